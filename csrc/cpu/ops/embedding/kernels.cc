#include "cpu/ops/embedding/contract.h"
#include "cpu/simd.h"

namespace pelton::cpu::PELTON_ISA {
namespace {

void quantized_row(const char* row, const int64_t* ints, float* out) {
    const int64_t cols = ints[embedding::kCols], group = ints[embedding::kGroupSize];
    const bool nibbles = ints[embedding::kBits] == 4, f32 = ints[embedding::kScaleIsF32];
    const bool has_min = ints[embedding::kHasMin];
    const uint8_t* codes = reinterpret_cast<const uint8_t*>(row);
    const char* scales = row + ((nibbles ? (cols + 1) / 2 : cols) + 3) / 4 * 4;
    const char* minima = scales + cols / group * (f32 ? 4 : 2);
    const float offset = has_min ? 0.0f : static_cast<float>(ints[embedding::kOffset]);
    for (int64_t g = 0; g < cols / group; ++g) {
        float scale, minimum = 0.0f;
        if (f32) {
            __builtin_memcpy(&scale, scales + g * 4, 4);
            if (has_min) __builtin_memcpy(&minimum, minima + g * 4, 4);
        } else {
            uint16_t half;
            __builtin_memcpy(&half, scales + g * 2, 2);
            scale = from_f16_scalar(half);
            if (has_min) {
                __builtin_memcpy(&half, minima + g * 2, 2);
                minimum = from_f16_scalar(half);
            }
        }
        for (int64_t j = g * group; j < (g + 1) * group; ++j) {
            int code = nibbles ? (codes[j / 2] >> (j % 2 * 4)) & 15 : codes[j];
            out[j] = (static_cast<float>(code) - offset) * scale + minimum;
        }
    }
}

void embedding_rows(const Call& call, int64_t begin, int64_t end, Worker&) {
    using namespace embedding;
    const int64_t cols = call.ints[kCols];
    const int64_t row_bytes = embedding_row_bytes(call.ints);
    const int32_t* ids = reinterpret_cast<const int32_t*>(call.operands[kIds].data);
    for (int64_t r = begin; r < end; ++r) {
        float* out = reinterpret_cast<float*>(call.operands[kOut].data) + r * call.ints[kLdOut];
        const char* row = call.operands[kTable].data + ids[r] * row_bytes;
        switch (call.ints[kFormat]) {
            case kF32:
                __builtin_memcpy(out, row, cols * 4);
                break;
            case kQuantized:
                quantized_row(row, call.ints, out);
                break;
            default: {
                const uint16_t* halves = reinterpret_cast<const uint16_t*>(row);
                const bool bf16 = call.ints[kFormat] == kBf16;
                int64_t j = 0;
                for (; j + kW <= cols; j += kW) {
                    VH h = load_u16(halves + j);
                    store(out + j, bf16 ? pair_low(widen(h)) : from_f16(h));
                }
                for (; j < cols; ++j) out[j] = bf16 ? from_bf16_scalar(halves[j]) : from_f16_scalar(halves[j]);
            }
        }
    }
}

void take_rows_rows(const Call& call, int64_t begin, int64_t end, Worker&) {
    using namespace take_rows;
    const int32_t* indices = reinterpret_cast<const int32_t*>(call.operands[kIndices].data);
    const float* x = reinterpret_cast<const float*>(call.operands[kX].data);
    float* out = reinterpret_cast<float*>(call.operands[kOut].data);
    for (int64_t r = begin; r < end; ++r) {
        __builtin_memcpy(out + r * call.ints[kLdOut], x + indices[r] * call.ints[kLdX], call.ints[kCols] * 4);
    }
}

}  // namespace

extern const Kernel embedding_kernels[];
const Kernel embedding_kernels[] = {
    {"embedding", {embedding_rows}, 0}, {"take_rows", {take_rows_rows}, 0}, {nullptr, {}, 0}};

}  // namespace pelton::cpu::PELTON_ISA
