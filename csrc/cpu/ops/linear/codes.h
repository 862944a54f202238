// Codes of quantized weights in the units of contract.h, and their scales.
#pragma once

#include "cpu/ops/linear/contract.h"
#include "cpu/simd_fp8.h"
#include "cpu/simd_int8.h"

namespace pelton::cpu::PELTON_ISA {
namespace {

// A format of codes: a unit has kWords words [64], each holding kQuads quads, and one word [64] more if kPlane.
// quad(word, plane, j, h) is quad number j of the unit, number h of its word: u8 codes in the bytes of each lane.
struct ByteCodes {
    static constexpr int kWords = 1, kQuads = 1;
    static constexpr bool kPlane = false, kWide = true;
    static PELTON_INLINE VU quad(VU word, VU, int, int) { return word; }
};

struct NarrowByteCodes : ByteCodes {  // up to 127, as expanded from the formats below
    static constexpr bool kWide = false;
};

struct NibbleCodes {
    static constexpr int kWords = 1, kQuads = 2;
    static constexpr bool kPlane = false, kWide = false;
    static PELTON_INLINE VU quad(VU word, VU, int, int h) { return (h ? word >> 4 : word) & 0x0f0f0f0fu; }
};

struct Nibble1Codes {
    static constexpr int kWords = 4, kQuads = 2;
    static constexpr bool kPlane = true, kWide = false;
    static PELTON_INLINE VU quad(VU word, VU plane, int j, int h) {
        const VU upper = j < 4 ? plane << (4 - j) : plane >> (j - 4);
        return ((h ? word >> 4 : word) & 0x0f0f0f0fu) | (upper & 0x10101010u);
    }
};

struct Nibble2Codes {
    static constexpr int kWords = 2, kQuads = 2;
    static constexpr bool kPlane = true, kWide = false;
    static PELTON_INLINE VU quad(VU word, VU plane, int j, int h) {
        const VU upper = j < 2 ? plane << (4 - 2 * j) : plane >> (2 * j - 4);
        return ((h ? word >> 4 : word) & 0x0f0f0f0fu) | (upper & 0x30303030u);
    }
};

struct TwoCodes {
    static constexpr int kWords = 1, kQuads = 4;
    static constexpr bool kPlane = false, kWide = false;
    static PELTON_INLINE VU quad(VU word, VU, int, int h) { return (word >> (2 * h)) & 0x03030303u; }
};

// FP4 E2M1: twice the value is one of 0 1 2 3 4 6 8 12 with a sign, so codes are 12 + that; scales are halved.
constexpr int kFp4Offset = 12;

struct Fp4Codes {
    static constexpr int kWords = 1, kQuads = 2;
    static constexpr bool kPlane = false, kWide = false;
    static PELTON_INLINE VU quad(VU word, VU, int, int h) {
        const VU index = (h ? word >> 4 : word) & 0x0f0f0f0fu;
#if defined(__AVX512BW__)
        const __m512i table =
            _mm512_broadcast_i32x4(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
        return reinterpret_cast<VU>(_mm512_shuffle_epi8(table, reinterpret_cast<__m512i>(index)));
#elif defined(__AVX2__)
        const __m256i table =
            _mm256_broadcastsi128_si256(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
        return reinterpret_cast<VU>(_mm256_shuffle_epi8(table, reinterpret_cast<__m256i>(index)));
#else
        typedef int8_t Bytes __attribute__((vector_size(kW * 4)));
        const Bytes code = reinterpret_cast<Bytes>(index), m = code & 7;
        const Bytes size = m < 4 ? m : m < 6 ? 2 * m - 4 : 4 * m - 16;
        return reinterpret_cast<VU>(code < 8 ? 12 + size : 12 - size);
#endif
    }
};

// FP8 E4M3: bytes, but no integers.
struct Fp8Codes : ByteCodes {};

template <class Codes>
constexpr int kUnitCodes = Codes::kWords * Codes::kQuads * 4;
template <class Codes>
constexpr int kUnitBytes = (Codes::kWords + Codes::kPlane) * kPanel * 4;

// Calls f(quads[kVecs], number of the quad) for each quad of a unit; `unit` points at the first column.
template <class Codes, int kVecs, class F>
PELTON_INLINE void for_quads(const char* unit, F f) {
    VU plane[kVecs] = {};
    if constexpr (Codes::kPlane) {
        PELTON_UNROLL
        for (int v = 0; v < kVecs; ++v) plane[v] = load_u32(unit + Codes::kWords * kPanel * 4 + v * kW * 4);
    }
    PELTON_UNROLL
    for (int i = 0; i < Codes::kWords; ++i) {
        VU words[kVecs];
        PELTON_UNROLL
        for (int v = 0; v < kVecs; ++v) words[v] = load_u32(unit + i * kPanel * 4 + v * kW * 4);
        PELTON_UNROLL
        for (int h = 0; h < Codes::kQuads; ++h) {
            VU quads[kVecs];
            PELTON_UNROLL
            for (int v = 0; v < kVecs; ++v) quads[v] = Codes::quad(words[v], plane[v], i * Codes::kQuads + h, h);
            f(quads, i * Codes::kQuads + h);
        }
    }
}

// ---- quads as floats

template <class Codes>
PELTON_INLINE VF code_as_float(VU quad, int i) {  // code i of 4
    const VU byte = i == 3 ? quad >> 24 : (quad >> (8 * i)) & 0xffu;
    if constexpr (__is_same(Codes, Fp8Codes)) {
        return fp8_to_float(byte);
    } else {
        return to_float(byte);
    }
}

// bf16 pairs of codes 0 and 2 (i = 0) or 1 and 3: activations are kept in that order, see activations.h.
template <class Codes>
PELTON_INLINE VU code_pair(VU quad, int i) {
#if defined(__AVX512BF16__)
    if constexpr (__is_same(Codes, Fp8Codes)) {
        return fp8_pair(quad, i);
    } else {
        // An integer of at most 8 significant bits as f32 is a bf16 followed by 16 zeros.
        const VU low = i ? (quad >> 8) & 0xffu : quad & 0xffu, high = i ? quad >> 24 : (quad >> 16) & 0xffu;
        return (as_u32(to_float(low)) >> 16) | as_u32(to_float(high));
    }
#else
    (void)quad, (void)i;
    return VU{};
#endif
}

// ---- scales

// Compilers make this of single bytes where it is left to them.
PELTON_INLINE VU widen_u8(const void* p) {
#if defined(__AVX512F__)
    return reinterpret_cast<VU>(_mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
    return reinterpret_cast<VU>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))));
#else
    return __builtin_convertvector(load_u8(p), VU);
#endif
}

// Element i of an array in a scale format.
template <int64_t kFormat>
PELTON_INLINE VF scale_at(const char* p, int64_t i) {
    using namespace linear;
    switch (kFormat) {
        case kScaleF32:
            return load(reinterpret_cast<const float*>(p) + i);
        case kScaleF16:
            return from_f16(load_u16(p + 2 * i));
        case kScaleBf16:
            return pair_low(widen(load_u16(p + 2 * i)));
        case kScaleU8:
            return to_float(widen_u8(p + i));
        case kScaleI8:
            return to_float(reinterpret_cast<VI>(widen_u8(p + i) << 24) >> 24);
        case kScaleE4m3:
            return fp8_to_float(widen_u8(p + i));
        default: {  // E8M0: 2^(code - 127); 0 is subnormal as f32, 255 is NaN
            const VU code = widen_u8(p + i);
            const VU bits = code == 0u ? splat_u32(0x00400000u) : code == 255u ? splat_u32(0x7fc00000u) : code << 23;
            return as_float(bits);
        }
    }
}

PELTON_INLINE const char* group_at(const LinearShape& shape, const char* panel, int64_t group) {
    if (!shape.outer_groups) return panel + shape.outer_bytes + group * shape.group_bytes;
    return panel + (group / shape.outer_groups + 1) * shape.outer_bytes + group * shape.group_bytes;
}

template <int64_t kFormat, int64_t kOuterFormat>
void expand_scales_of(const Call& call, const LinearShape& shape, const char* panel, int64_t first, int64_t count,
                      bool centred, float* scales, float* zeros) {
    using namespace linear;
    const int64_t* ints = call.ints;
    const bool has_outer = ints[kOuter], minima = ints[kZeros] == kMinima, points = ints[kZeros] == kZeroPoints;
    const float unit = ints[kCodes] == kFp4 ? 0.5f : 1.0f;
    const float minus_offset = centred ? 0.0f : -static_cast<float>(ints[kOffset]);
    const char* at = group_at(shape, panel, first) + shape.code_bytes;
    // The groups of one call share their outer factors.
    const char* outer =
        shape.outer_groups ? group_at(shape, panel, first / shape.outer_groups * shape.outer_groups) - shape.outer_bytes
                           : panel;
    for (int64_t col = 0; col < kPanel; col += kW) {
        const VF outer_scale = has_outer ? scale_at<kOuterFormat>(outer, col) * unit : splat(unit);
        const VF outer_minimum = has_outer && minima
                                     ? scale_at<kOuterFormat>(outer + kPanel * (kOuterFormat == kScaleF16 ? 2 : 4), col)
                                     : splat(1.0f);
        const char* group = at;
        for (int64_t i = col; i < col + count * kPanel; i += kPanel, group += shape.group_bytes) {
            const VF scale = scale_at<kFormat>(group, col) * outer_scale;
            VF zero = scale * minus_offset;
            if (minima) zero = scale_at<kFormat>(group + shape.scale_bytes, col) * outer_minimum;
            if (points) zero = -scale * to_float(widen_u8(group + shape.scale_bytes + col));
            store(scales + i, scale);
            store(zeros + i, zero);
        }
    }
}

// Scales and what a group adds for each unit of its activations' sum, as f32 [count][64]. For codes with an
// offset the latter is -offset * scale, unless `centred`: then the accumulators start with it.
PELTON_INLINE void expand_scales(const Call& call, const LinearShape& shape, const char* panel, int64_t first,
                                 int64_t count, bool centred, float* scales, float* zeros) {
    using namespace linear;
    const auto expand = [&]<int64_t kFormat>() {
        if (call.ints[kOuter] > 1) {
            return expand_scales_of<kFormat, kScaleF16>(call, shape, panel, first, count, centred, scales, zeros);
        }
        return expand_scales_of<kFormat, kScaleF32>(call, shape, panel, first, count, centred, scales, zeros);
    };
    switch (call.ints[kScaleFormat]) {
        case kScaleF32:
            return expand.template operator()<kScaleF32>();
        case kScaleF16:
            return expand.template operator()<kScaleF16>();
        case kScaleBf16:
            return expand.template operator()<kScaleBf16>();
        case kScaleU8:
            return expand.template operator()<kScaleU8>();
        case kScaleI8:
            return expand.template operator()<kScaleI8>();
        case kScaleE4m3:
            return expand.template operator()<kScaleE4m3>();
        default:
            return expand.template operator()<kScaleE8m0>();
    }
}

}  // namespace
}  // namespace pelton::cpu::PELTON_ISA
