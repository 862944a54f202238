// FP8 E4M3 (OCP: bias 7, no infinities, at most 448) to and from floats.
#pragma once

#include "cpu/simd.h"

namespace pelton::cpu::PELTON_ISA {
namespace {

// E4M3 in the upper bits of an f32 has the exponent's bias wrong by 120; subnormals come out right as well.
PELTON_INLINE VF fp8_to_float(VU byte) { return as_float(((byte & 0x7fu) << 20) | ((byte & 0x80u) << 24)) * 0x1p120f; }

// bf16 pairs of bytes 0 and 2 (i = 0) or 1 and 3 of each lane. Exact.
PELTON_INLINE VU fp8_pair(VU quad, int i) {
#if defined(__AVX512BW__)
    // As above in 16-bit lanes, the code in the upper half. What multiplies bf16 may count subnormals as zero, so those
    // come from a table; a permutation looks at the lowest five bits of an index only.
    const __m512i q = reinterpret_cast<__m512i>(quad), w = i ? q : _mm512_slli_epi16(q, 8);
    const __m512i table = _mm512_castsi128_si512(
        _mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));  // 0 to 7 times 2^-9
    __m512i value = _mm512_and_si512(_mm512_srli_epi16(w, 4), _mm512_set1_epi16(0x7f0));
    value = _mm512_add_epi16(value, _mm512_set1_epi16(120 << 7));
    const __mmask32 small = _mm512_testn_epi16_mask(w, _mm512_set1_epi16(0x7800));
    value = _mm512_mask_permutexvar_epi16(value, small, i ? _mm512_srli_epi16(q, 8) : q, table);
    constexpr int kSelect = 0xca;  // by bits, of three operands: a ? b : c
    const __m512i sign = _mm512_set1_epi16(static_cast<int16_t>(0x8000));
    return reinterpret_cast<VU>(_mm512_ternarylogic_epi32(sign, w, value, kSelect));
#else
    // The upper half of an f32 is all there is to it.
    const auto wide = [](VU top) {  // the code in the upper byte
        const VU moved = reinterpret_cast<VU>(reinterpret_cast<VI>(top) >> 4) & 0x87f00000u;
        return as_u32(as_float(moved) * 0x1p120f);
    };
    return (i ? wide(quad << 16) : wide(quad << 24)) >> 16 | wide(i ? quad : quad << 8);
#endif
}

// In the lowest byte of each lane: to the nearest, ties to even, what is larger than 448 becomes that. Not for NaN.
PELTON_INLINE VU to_fp8(VF x) {
    const VF size = min(abs(x), splat(448.0f));
    const VU bits = as_u32(size);
    const VU normal = ((bits + 0x7ffffu + ((bits >> 20) & 1u)) >> 20) - (120u << 3);
    // Numbers below 2^-6 are multiples of 2^-9, the distance of floats from 2^14 on.
    const VU subnormal = as_u32(size + 0x1p14f) - as_u32(splat(0x1p14f));
    return (size < splat(0x1p-6f) ? subnormal : normal) | ((as_u32(x) >> 24) & 0x80u);
}

}  // namespace
}  // namespace pelton::cpu::PELTON_ISA
