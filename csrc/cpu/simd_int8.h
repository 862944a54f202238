// Products of unsigned codes and signed int8 activations, four to a 32-bit lane.
#pragma once

#include "cpu/simd.h"

namespace pelton::cpu::PELTON_ISA {
namespace {

#if defined(__AVX2__)
constexpr bool kInt8Products = true;
#else
constexpr bool kInt8Products = false;
#endif

// Where there is no instruction for u8 x s8 with 32-bit sums, codes above 127 would overflow the 16 bits between.
// Such codes are taken as signed there, which makes them smaller by this much; the caller's sums make up for it.
#if defined(__AVX512VNNI__)
constexpr int kWideCodeShift = 0;
#else
constexpr int kWideCodeShift = 128;
#endif

#if defined(__AVX512VNNI__)
// acc + the products of the four unsigned bytes of `a` with the signed ones of `b`, per lane.
PELTON_INLINE VI dot_bytes(VI acc, VU a, VU b) {
    return reinterpret_cast<VI>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(acc), reinterpret_cast<__m512i>(a),
                                                    reinterpret_cast<__m512i>(b)));
}
#endif

// The same where there is no such instruction; codes - kWideCodeShift if kWide, else codes up to 127.
template <bool kWide>
PELTON_INLINE VI dot_codes(VI acc, VU codes, VU x) {
#if defined(__AVX512VNNI__)
    return dot_bytes(acc, codes, x);
#elif defined(__AVX512BW__)
    __m512i w = reinterpret_cast<__m512i>(codes), s = reinterpret_cast<__m512i>(x);
    if constexpr (kWide) {
        w = _mm512_xor_si512(w, _mm512_set1_epi32(static_cast<int>(0x80808080u)));
        s = _mm512_mask_sub_epi8(s, _mm512_movepi8_mask(w), _mm512_setzero_si512(), s);
        w = _mm512_abs_epi8(w);
    }
    const __m512i sums = _mm512_madd_epi16(_mm512_maddubs_epi16(w, s), _mm512_set1_epi16(1));
    return acc + reinterpret_cast<VI>(sums);
#elif defined(__AVX2__)
    __m256i w = reinterpret_cast<__m256i>(codes), s = reinterpret_cast<__m256i>(x);
    if constexpr (kWide) {
        w = _mm256_xor_si256(w, _mm256_set1_epi32(static_cast<int>(0x80808080u)));
        s = _mm256_sign_epi8(s, w);
        w = _mm256_abs_epi8(w);
    }
    const __m256i sums = _mm256_madd_epi16(_mm256_maddubs_epi16(w, s), _mm256_set1_epi16(1));
    return acc + reinterpret_cast<VI>(sums);
#else
    (void)codes, (void)x;
    return acc;
#endif
}

// Rounds to nearest even; |x| must be below 2^22.
PELTON_INLINE VI round_to_int(VF x) {
    const VF shifted = x + 12582912.0f;  // 1.5 * 2^23
    return reinterpret_cast<VI>(shifted) - 0x4b400000;
}

// The lowest byte of each lane.
PELTON_INLINE void store_bytes(void* p, VU v) {
#if defined(__AVX512F__)
    _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(v)));
#else
    *reinterpret_cast<VBu*>(p) = __builtin_convertvector(v, VB);
#endif
}

// Wraps around, as vectors do.
PELTON_INLINE int32_t sum_int(VI v) {
    uint32_t total = 0;
    for (int i = 0; i < kW; ++i) total += static_cast<uint32_t>(v[i]);
    return static_cast<int32_t>(total);
}

}  // namespace
}  // namespace pelton::cpu::PELTON_ISA
