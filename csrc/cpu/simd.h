// Vectors of kW floats for the ISA this translation unit is compiled for. One source serves every
// tier; intrinsics appear only where the compiler's vector extensions lack the operation.
// Include from kernels.cc files only: everything here has internal linkage.
#pragma once

#include <stdint.h>
#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if !defined(PELTON_ISA)
#error "compile kernels with -DPELTON_ISA=<tier>"
#endif

#define PELTON_INLINE __attribute__((always_inline, unused)) inline
#define PELTON_UNROLL _Pragma("GCC unroll 32")

namespace pelton::cpu::PELTON_ISA {
namespace {

// kTileRows x kTileVecs accumulators stay in registers next to the operands: 24 + 4 + 1 of 32
// registers (AVX-512), 12 + 2 + 1 of 16 (AVX2), 8 + 2 + 1 and temporaries of 16 (SSE2, NEON).
#if defined(__AVX512F__)
constexpr int kW = 16, kTileRows = 6, kTileVecs = 4;
#elif defined(__AVX2__)
constexpr int kW = 8, kTileRows = 6, kTileVecs = 2;
#else
constexpr int kW = 4, kTileRows = 4, kTileVecs = 2;
#endif

#if defined(__AVX512BF16__)
constexpr bool kBf16Dot = true;
#else
constexpr bool kBf16Dot = false;
#endif

typedef float VF __attribute__((vector_size(kW * 4)));
typedef int32_t VI __attribute__((vector_size(kW * 4)));
typedef uint32_t VU __attribute__((vector_size(kW * 4)));
typedef uint16_t VH __attribute__((vector_size(kW * 2)));
typedef uint8_t VB __attribute__((vector_size(kW)));
typedef float VFu __attribute__((vector_size(kW * 4), aligned(1), may_alias));
typedef uint32_t VUu __attribute__((vector_size(kW * 4), aligned(1), may_alias));
typedef uint16_t VHu __attribute__((vector_size(kW * 2), aligned(1), may_alias));
typedef uint8_t VBu __attribute__((vector_size(kW), aligned(1), may_alias));
typedef uint32_t U32u __attribute__((aligned(1), may_alias));

PELTON_INLINE VF load(const float* p) { return *reinterpret_cast<const VFu*>(p); }
PELTON_INLINE void store(float* p, VF v) { *reinterpret_cast<VFu*>(p) = v; }
PELTON_INLINE VU load_u32(const void* p) { return *reinterpret_cast<const VUu*>(p); }
PELTON_INLINE VH load_u16(const void* p) { return *reinterpret_cast<const VHu*>(p); }
PELTON_INLINE VB load_u8(const void* p) { return *reinterpret_cast<const VBu*>(p); }
PELTON_INLINE void store_u16(void* p, VH v) { *reinterpret_cast<VHu*>(p) = v; }
PELTON_INLINE void store_u32(void* p, VU v) { *reinterpret_cast<VUu*>(p) = v; }
PELTON_INLINE uint32_t pair_at(const void* p) { return *reinterpret_cast<const U32u*>(p); }

PELTON_INLINE VF splat(float x) { return x - VF{}; }  // x - 0 keeps the sign of zero, x + 0 would not
PELTON_INLINE VU splat_u32(uint32_t x) { return x + VU{}; }
PELTON_INLINE VF as_float(VU v) { return reinterpret_cast<VF>(v); }
PELTON_INLINE VU as_u32(VF v) { return reinterpret_cast<VU>(v); }
PELTON_INLINE VF to_float(VI v) { return __builtin_convertvector(v, VF); }
PELTON_INLINE VF to_float(VU v) { return to_float(reinterpret_cast<VI>(v)); }
PELTON_INLINE VU widen(VH v) { return __builtin_convertvector(v, VU); }

PELTON_INLINE VF fma(VF a, VF b, VF c) {
#if defined(__AVX512F__)
    return reinterpret_cast<VF>(
        _mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__AVX2__)
    return reinterpret_cast<VF>(
        _mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#elif defined(__aarch64__)
    return vfmaq_f32(c, a, b);
#else
    return a * b + c;
#endif
}

// If either lane is NaN the result is `b`: put the data second to let NaN through.
PELTON_INLINE VF max(VF a, VF b) {
#if defined(__AVX512F__)
    return reinterpret_cast<VF>(_mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__AVX2__)
    return reinterpret_cast<VF>(_mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
    return a > b ? a : b;
#endif
}

PELTON_INLINE VF min(VF a, VF b) {
#if defined(__AVX512F__)
    return reinterpret_cast<VF>(_mm512_min_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__AVX2__)
    return reinterpret_cast<VF>(_mm256_min_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
    return a < b ? a : b;
#endif
}

PELTON_INLINE VF abs(VF a) { return as_float(as_u32(a) & 0x7fffffffu); }

// The first n < kW elements, zeros after them.
PELTON_INLINE VF load_n(const float* p, int64_t n) {
#if defined(__AVX512F__)
    return reinterpret_cast<VF>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p));
#else
    float lanes[kW] = {};
    for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
    return load(lanes);
#endif
}

PELTON_INLINE void store_n(float* p, VF v, int64_t n) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), reinterpret_cast<__m512>(v));
#else
    float lanes[kW];
    store(lanes, v);
    for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
#endif
}

#if defined(__clang__) || __GNUC__ >= 12
#define PELTON_SHUFFLE(v, ...) __builtin_shufflevector(v, v, __VA_ARGS__)
#else
#define PELTON_SHUFFLE(v, ...) __builtin_shuffle(v, VI{__VA_ARGS__})
#endif

// Folds the lanes in a tree of fixed shape: lane i with lane i ^ kW/2, and so on. The orders are written
// out because the compiler builds them at run time from a loop.
template <class F>
PELTON_INLINE float fold(VF v, F f) {
#if defined(__AVX512F__)
    v = f(v, PELTON_SHUFFLE(v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    v = f(v, PELTON_SHUFFLE(v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
    v = f(v, PELTON_SHUFFLE(v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    v = f(v, PELTON_SHUFFLE(v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
#elif defined(__AVX2__)
    v = f(v, PELTON_SHUFFLE(v, 4, 5, 6, 7, 0, 1, 2, 3));
    v = f(v, PELTON_SHUFFLE(v, 2, 3, 0, 1, 6, 7, 4, 5));
    v = f(v, PELTON_SHUFFLE(v, 1, 0, 3, 2, 5, 4, 7, 6));
#else
    v = f(v, PELTON_SHUFFLE(v, 2, 3, 0, 1));
    v = f(v, PELTON_SHUFFLE(v, 1, 0, 3, 2));
#endif
    return v[0];
}

PELTON_INLINE float sum(VF v) {
    return fold(v, [](VF a, VF b) { return a + b; });
}

PELTON_INLINE float max_lane(VF v) {
    return fold(v, [](VF a, VF b) { return max(a, b); });
}

PELTON_INLINE VF lane_numbers() {
#if defined(__AVX512F__)
    return VF{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif defined(__AVX2__)
    return VF{0, 1, 2, 3, 4, 5, 6, 7};
#else
    return VF{0, 1, 2, 3};
#endif
}

PELTON_INLINE float sqrt_scalar(float x) { return __builtin_sqrtf(x); }

// The halves of a lane that holds a pair of bf16: a bf16 is the upper half of an f32.
PELTON_INLINE VF pair_low(VU w) { return as_float(w << 16); }
PELTON_INLINE VF pair_high(VU w) { return as_float(w & 0xffff0000u); }

// Round to nearest even; a NaN keeps its upper bits and is made quiet.
PELTON_INLINE uint16_t to_bf16_scalar(float x) {
    uint32_t u;
    __builtin_memcpy(&u, &x, 4);
    if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40u);
    return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

PELTON_INLINE VH to_bf16(VF x) {
#if defined(__AVX512BF16__)
    return reinterpret_cast<VH>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(x)));
#else
    VU u = as_u32(x);
    VU rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    VU quiet = (u >> 16) | 0x40u;
    VU value = (u & 0x7fffffffu) > 0x7f800000u ? quiet : rounded;
    return __builtin_convertvector(value, VH);
#endif
}

PELTON_INLINE VF from_f16(VH h) {
#if defined(__AVX512F__)
    return reinterpret_cast<VF>(_mm512_cvtph_ps(reinterpret_cast<__m256i>(h)));
#elif defined(__AVX2__)
    return reinterpret_cast<VF>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(h)));
#else
    VU u = widen(h);
    VU sign = (u & 0x8000u) << 16;
    VU magnitude = (u & 0x7fffu) << 13, exponent = u & 0x7c00u;
    // 112 moves the exponent's bias from 15 to 127. Subnormals go through integers and a multiplication
    // that is exact, as an f32 subnormal on the way would depend on the mode of the processor.
    VU bits = exponent == 0x7c00u ? magnitude | 0x7f800000u : magnitude + (112u << 23);
    bits = exponent == 0u ? as_u32(to_float(u & 0x3ffu) * 0x1p-24f) : bits;
    return as_float(bits | sign);
#endif
}

// Round to nearest even; what rounds to more than 65504 is infinite, a NaN keeps its upper bits and is made quiet.
PELTON_INLINE VH to_f16(VF x) {
#if defined(__AVX512F__)
    return reinterpret_cast<VH>(_mm512_cvtps_ph(reinterpret_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
    return reinterpret_cast<VH>(_mm256_cvtps_ph(reinterpret_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT));
#else
    const VU sign = (as_u32(x) >> 16) & 0x8000u, u = as_u32(abs(x));
    VU value = ((u + 0xfffu + ((u >> 13) & 1u)) >> 13) - (112u << 10);  // with the other bias, as above
    // Subnormals are multiples of 2^-24, the distance of floats from 1/2 on.
    value = u < 0x38800000u ? as_u32(abs(x) + 0.5f) - 0x3f000000u : value;
    value = u < 0x47800000u ? value : u > 0x7f800000u ? ((u >> 13) & 0x1ffu) | 0x7e00u : VU{} + 0x7c00u;
    return __builtin_convertvector(value | sign, VH);
#endif
}

PELTON_INLINE float from_f16_scalar(uint16_t h) {
    const uint32_t magnitude = (h & 0x7fffu) << 13, exponent = h & 0x7c00u;
    uint32_t bits = exponent == 0x7c00u ? magnitude | 0x7f800000u : magnitude + (112u << 23);
    float value;
    if (exponent == 0) {
        value = static_cast<float>(h & 0x3ffu) * 0x1p-24f;
        __builtin_memcpy(&bits, &value, 4);
    }
    bits |= (h & 0x8000u) << 16;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

PELTON_INLINE float from_bf16_scalar(uint16_t h) {
    uint32_t bits = static_cast<uint32_t>(h) << 16;
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

#if defined(__AVX512BF16__)
// acc + low(a)*low(b) + high(a)*high(b) per lane.
PELTON_INLINE VF dot_pairs(VF acc, VU a, VU b) {
    return reinterpret_cast<VF>(
        _mm512_dpbf16_ps(reinterpret_cast<__m512>(acc), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
}
#endif

}  // namespace
}  // namespace pelton::cpu::PELTON_ISA
