#include "cpu/amx_tiles.h"
#include "cpu/ops/peak/contract.h"
#include "cpu/simd_int8.h"

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
            for (int line = 0; line < kStep; line += 64) __builtin_prefetch(data + i + 8192 + line);
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

#if defined(__AMX_TILE__)
// Four products a round, each into a tile of its own: a product keeps the unit busy for 16 cycles and its
// result takes some 50. With an eighth of the rounds a measurement is as long as with vectors.
constexpr int kTileShare = 8;

template <class Product>
float tile_rounds(int64_t iterations, uint32_t a, uint32_t b) {
    alignas(64) uint32_t values[2][kAmxRows * 16];
    for (int i = 0; i < kAmxRows * 16; ++i) {
        values[0][i] = a;
        values[1][i] = b;
    }
    const char *first = reinterpret_cast<const char*>(values[0]), *second = reinterpret_cast<const char*>(values[1]);
    AmxTiles tiles;
    tiles.shape_pair(kAmxRows, kAmxRows, kAmxRowBytes);
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
    tile_load<4>(first, kAmxRowBytes);
    tile_load<5>(first, kAmxRowBytes);
    tile_load<6>(second, kAmxRowBytes);
    tile_load<7>(second, kAmxRowBytes);
    for (int64_t i = 0; i < iterations / kTileShare; ++i) {
        Product::template dot<0, 4, 6>();
        Product::template dot<1, 4, 7>();
        Product::template dot<2, 5, 6>();
        Product::template dot<3, 5, 7>();
    }
    tile_store<0>(reinterpret_cast<char*>(values[0]), kAmxRowBytes);
    return as_float(load_u32(values[0]))[0];
}

float bf16_rounds(int64_t iterations) { return tile_rounds<AmxBf16>(iterations, 0x3f803f80u, 0x3e803e80u); }
float int8_rounds(int64_t iterations) { return tile_rounds<AmxInt8>(iterations, 0x01ff01ffu, 0x01010101u); }
constexpr double kBf16Ops = 4 * 16 * 16 * 32 * 2.0 / kTileShare, kInt8Ops = 4 * 16 * 16 * 64 * 2.0 / kTileShare;
#elif defined(__AVX512BF16__)
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

constexpr double kBf16Ops = kChains * kW * 4.0;
#endif

#if defined(__AVX2__) && !defined(__AMX_TILE__)
float int8_rounds(int64_t iterations) {
    VI acc[kChains] = {};
    VU a = splat_u32(0x01010101u), b = splat_u32(0x01ff01ffu);
    PELTON_OPAQUE(a);
    for (int64_t i = 0; i < iterations; ++i) {
        PELTON_UNROLL
        for (int c = 0; c < kChains; ++c) {
            acc[c] = dot_codes<false>(acc[c], a, b);
            PELTON_OPAQUE(acc[c]);
        }
    }
    VI total = {};
    PELTON_UNROLL
    for (int c = 0; c < kChains; ++c) total += acc[c];
    return static_cast<float>(sum_int(total));
}
constexpr double kInt8Ops = kChains * kW * 8.0;
#endif

}  // namespace

extern const PeakKernels peak_kernels;
#if defined(__AVX512BF16__)
const PeakKernels peak_kernels = {read_bytes<true>, read_bytes<false>,  f32_rounds, bf16_rounds,
                                  int8_rounds,      kChains * kW * 2.0, kBf16Ops,   kInt8Ops};
#elif defined(__AVX2__)
const PeakKernels peak_kernels = {read_bytes<true>, read_bytes<false>,  f32_rounds, nullptr,
                                  int8_rounds,      kChains * kW * 2.0, 0.0,        kInt8Ops};
#else
const PeakKernels peak_kernels = {read_bytes<true>, read_bytes<false>,  f32_rounds, nullptr,
                                  nullptr,          kChains * kW * 2.0, 0.0,        0.0};
#endif

}  // namespace pelton::cpu::PELTON_ISA
