// Rows of activations in the type that the weights are multiplied with.
#pragma once

#include "cpu/ops/linear/contract.h"
#include "cpu/simd_int8.h"

namespace pelton::cpu::PELTON_ISA {
namespace {

struct Activations {
    const char* rows;
    int64_t stride;  // bytes
    // Per row and group, for quantized weights: the scale of int8 activations, what minima are multiplied with,
    // where integer accumulators start.
    const float *scales, *sums;
    const int32_t* starts;
    int64_t info_stride;  // elements
};

PELTON_INLINE Activations shifted(const Activations& x, int64_t rows) {
    return {x.rows + rows * x.stride,        x.stride,
            x.scales + rows * x.info_stride, x.sums + rows * x.info_stride,
            x.starts + rows * x.info_stride, x.info_stride};
}

PELTON_INLINE Activations prepared_at(const LinearShape& shape, char* base, int64_t rows) {
    const float* scales = reinterpret_cast<const float*>(base + rows * shape.row_bytes);
    const float* sums = scales + shape.groups;
    return {base,
            shape.row_bytes,
            scales,
            sums,
            reinterpret_cast<const int32_t*>(sums + shape.groups),
            shape.info_bytes / 4};
}

// A row of k floats, read as zeros from k on.
PELTON_INLINE VF load_to(const float* x, int64_t i, int64_t k) {
    return i + kW <= k ? load(x + i) : i < k ? load_n(x + i, k - i) : VF{};
}

// Next to codes, quads lie in the order 0 2 1 3, in which codes are widened to pairs.
PELTON_INLINE VF swap_middle(VF v) {
#if defined(__AVX512F__)
    return PELTON_SHUFFLE(v, 0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
#elif defined(__AVX2__)
    return PELTON_SHUFFLE(v, 0, 2, 1, 3, 4, 6, 5, 7);
#else
    return PELTON_SHUFFLE(v, 0, 2, 1, 3);
#endif
}

void prepare_bf16(const float* x, int64_t k, int64_t padded, bool quads, uint16_t* out) {
    for (int64_t i = 0; i < padded; i += kW) {
        VF v = load_to(x, i, k);
        if (quads) v = swap_middle(v);
        const VH rounded = to_bf16(v);
        if (i + kW <= padded) {
            store_u16(out + i, rounded);
        } else {
            uint16_t last[kW];
            store_u16(last, rounded);
            for (int64_t j = i; j < padded; ++j) out[j] = last[j - i];
        }
    }
}

// int8 with one scale per group, to the nearest; the largest becomes 127. Infinities and NaN make the scale NaN.
void prepare_int8(const Call& call, const LinearShape& shape, const float* x, int8_t* out, float* scales, float* sums,
                  int32_t* starts) {
    using namespace linear;
    const int64_t k = call.ints[kK];
    const int64_t format = call.ints[kCodes];
    const uint32_t offset = static_cast<uint32_t>(call.ints[kOffset]) - (format == kByte ? kWideCodeShift : 0);
    for (int64_t g = 0; g < shape.groups; ++g) {
        const int64_t begin = g * shape.group, end = begin + shape.group;
        VF largest = {}, poison = {};
        for (int64_t i = begin; i < end; i += kW) {
            VF v = load_to(x, i, k < end ? k : end);
            largest = max(largest, abs(v));
            poison = fma(v, VF{}, poison);
        }
        const float most = max_lane(largest), nan = sum(poison);  // 0, or NaN if there is one
        const float scale = most * (1.0f / 127.0f) + nan;
        // Below the smallest normal number 127 / most would be infinite: such a group counts as zeros.
        const float inverse = most >= 0x1p-120f ? 127.0f / most : 0.0f;
        VI total = {};
        for (int64_t i = begin; i < end; i += kW) {
            VI q = round_to_int(load_to(x, i, k < end ? k : end) * inverse);
            total += q;
            if (i + kW <= end) {
                store_bytes(out + i, reinterpret_cast<VU>(q));
            } else {  // a group of 8 in registers of 16
                int8_t last[kW];
                store_bytes(last, reinterpret_cast<VU>(q));
                for (int64_t j = i; j < end; ++j) out[j] = last[j - i];
            }
        }
        const int32_t units = sum_int(total);
        scales[g] = scale;
        sums[g] = scale * static_cast<float>(units);
        // Integers of what is not finite mean nothing, so the product may wrap around; the scale is NaN.
        starts[g] = static_cast<int32_t>(0u - offset * static_cast<uint32_t>(units));
    }
}

void prepare_row(const Call& call, const LinearShape& shape, const float* x, char* row, float* info) {
    const int64_t k = call.ints[linear::kK];
    float *scales = info, *sums = info + shape.groups;
    if (shape.prepared == kRowsInt8) {
        return prepare_int8(call, shape, x, reinterpret_cast<int8_t*>(row), scales, sums,
                            reinterpret_cast<int32_t*>(sums + shape.groups));
    }
    if (shape.prepared == kRowsBf16) {
        prepare_bf16(x, k, shape.padded_k, shape.groups != 0, reinterpret_cast<uint16_t*>(row));
    } else if (shape.prepared == kRowsF32) {
        for (int64_t i = 0; i < shape.padded_k; i += kW) store(reinterpret_cast<float*>(row) + i, load_to(x, i, k));
    }
    for (int64_t g = 0; g < shape.groups; ++g) {
        const int64_t end = (g + 1) * shape.group;
        VF total = {};
        for (int64_t i = g * shape.group; i < end; i += kW) {
            VF v = load_to(x, i, k < end ? k : end);
            // The sum must be that of the factors really used, or the offset of large codes stays behind.
            if (shape.prepared == kRowsBf16) v = pair_low(widen(to_bf16(v)));
            total += v;
        }
        sums[g] = sum(total);
    }
}

void prepare_rows(const Call& call, const LinearShape& shape, const Activations& to, int64_t begin, int64_t end) {
    const float* x = reinterpret_cast<const float*>(call.operands[linear::kX].data);
    for (int64_t r = begin; r < end; ++r) {
        prepare_row(call, shape, x + r * call.ints[linear::kLdX], const_cast<char*>(to.rows) + r * to.stride,
                    const_cast<float*>(to.scales) + r * to.info_stride);
    }
}

}  // namespace
}  // namespace pelton::cpu::PELTON_ISA
