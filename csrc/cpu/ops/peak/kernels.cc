#include "cpu/ops/peak/contract.h"
#include "cpu/simd.h"

namespace pelton::cpu::PELTON_ISA {
namespace {

// More chains than latency times throughput (up to 6 cycles x 2 on current cores), few enough for registers.
constexpr int kChains = kW == 16 ? 24 : 12;

// Keeps the compiler from folding a chain without touching memory.
#if defined(__SSE2__)
#define PELTON_OPAQUE(v) __asm__("" : "+v"(v))
#else
#define PELTON_OPAQUE(v) __asm__("" : "+w"(v))
#endif

PELTON_INLINE float finish(VF (&acc)[kChains]) {
    VF total = {};
    PELTON_UNROLL
    for (int i = 0; i < kChains; ++i) total += acc[i];
    return sum(total);
}

template <bool kPrefetch>
float read_bytes(const char* data, int64_t bytes) {
    VF acc[8] = {};
    constexpr int64_t kStep = 8 * kW * 4;
    for (int64_t i = 0; i + kStep <= bytes; i += kStep) {
        if constexpr (kPrefetch) {
            for (int line = 0; line < kStep; line += 64) __builtin_prefetch(data + i + 1024 + line);
        }
        PELTON_UNROLL
        for (int v = 0; v < 8; ++v) acc[v] += load(reinterpret_cast<const float*>(data + i + v * kW * 4));
    }
    VF total = {};
    PELTON_UNROLL
    for (int v = 0; v < 8; ++v) total += acc[v];
    return sum(total);
}

float f32_rounds(int64_t iterations) {
    VF acc[kChains] = {}, a = splat(0.5f), b = splat(0.25f);
    PELTON_OPAQUE(a);
    for (int64_t i = 0; i < iterations; ++i) {
        PELTON_UNROLL
        for (int c = 0; c < kChains; ++c) {
            acc[c] = fma(a, acc[c], b);
            PELTON_OPAQUE(acc[c]);
        }
    }
    return finish(acc);
}

#if defined(__AVX512BF16__)
float bf16_rounds(int64_t iterations) {
    VF acc[kChains] = {};
    VU a = splat_u32(0x3f803f80u), b = splat_u32(0x3e803e80u);
    PELTON_OPAQUE(a);
    for (int64_t i = 0; i < iterations; ++i) {
        PELTON_UNROLL
        for (int c = 0; c < kChains; ++c) {
            acc[c] = dot_pairs(acc[c], a, b);
            PELTON_OPAQUE(acc[c]);
        }
    }
    return finish(acc);
}

float int8_rounds(int64_t iterations) {
    VF acc[kChains] = {};
    VU a = splat_u32(0x01010101u), b = splat_u32(0x01ff01ffu);
    PELTON_OPAQUE(a);
    for (int64_t i = 0; i < iterations; ++i) {
        PELTON_UNROLL
        for (int c = 0; c < kChains; ++c) {
            acc[c] = reinterpret_cast<VF>(_mm512_dpbusd_epi32(
                reinterpret_cast<__m512i>(acc[c]), reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
            PELTON_OPAQUE(acc[c]);
        }
    }
    return finish(acc);
}
#endif

}  // namespace

extern const PeakKernels peak_kernels;
#if defined(__AVX512BF16__)
const PeakKernels peak_kernels = {read_bytes<true>, read_bytes<false>,  f32_rounds,         bf16_rounds,
                                  int8_rounds,      kChains * kW * 2.0, kChains * kW * 4.0, kChains * kW * 8.0};
#else
const PeakKernels peak_kernels = {read_bytes<true>, read_bytes<false>,  f32_rounds, nullptr,
                                  nullptr,          kChains * kW * 2.0, 0.0,        0.0};
#endif

}  // namespace pelton::cpu::PELTON_ISA
