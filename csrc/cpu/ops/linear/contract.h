// out = x W^T + bias for a weight packed in panels of 64 output columns (pelton/backends/cpu/packing.py).
#pragma once

#include "cpu/kernel.h"

namespace pelton::cpu {

struct Contract;

// 64 columns are 4 AVX-512, 8 AVX2 or 16 SSE registers, or 4 AMX tiles: one layout serves every ISA.
constexpr int kPanel = 64;
// Up to this many rows every thread prepares the activations for itself, which is cheaper than a barrier.
constexpr int kLocalRows = 4;
// Rows of one work item: a multiple of 6 (register tile) and large enough to reuse a panel from L2.
constexpr int kRowBlock = 192;
// Bytes of codes that are expanded at a time: they stay in the L1 cache.
constexpr int kExpandBytes = 16 * 1024;
// A row that is one group is padded to a multiple of this, the largest unit of codes.
constexpr int kUnit = 32;

// Panel layouts, columns padded to 64 with zeros:
//   f32    [k][64] f32
//   bf16   [ceil(k / 2)][64][2] bf16
//   codes  [outer factors of the row] blocks of ([outer factors] groups of (codes, scales [64], zeros [64]))
// with outer factors as f32 [64] where the row shares them, f16 [64] before each block otherwise; the same again
// for minima. Zeros are minima in the type of the scales, or zero points as u8.
// Codes lie in units of u32 words [64], a quad of codes k .. k + 3 in the bytes of a word, lowest first:
//   byte     4 codes    1 word
//   nibble   8 codes    1 word: low halves of the bytes are codes 0-3, high halves 4-7
//   nibble1  32 codes   4 words of nibbles and one of fifth bits: bit j of byte b belongs to code 4j + b
//   nibble2  16 codes   2 words of nibbles and one of upper bits: bits 2j, 2j + 1 of byte b belong to code 4j + b
//   two      16 codes   1 word: bits 2j, 2j + 1 of byte b are code 4j + b
//   fp4      as nibble, FP4 E2M1
//   fp8      as byte, FP8 E4M3
namespace linear {
enum Operands { kOut, kX, kWeight, kBias };
enum Ints {
    kRowsDim,
    kN,
    kK,
    kLdOut,
    kLdX,
    kFormat,
    kCodes,
    kGroupSize,    // 0: the row
    kScaleFormat,  // of scales and minima
    kZeros,
    kOuter,  // 0: no outer factor, 1: of the row, else the elements that share one
    kOffset,
    kActivations,
    kEpilogue,
    kBlockRows
};  // the last is set by the plan
enum Format { kF32, kBf16, kQuantized };
enum CodeFormat { kByte, kNibble, kNibble1, kNibble2, kTwo, kFp4, kFp8 };
enum ScaleFormat { kScaleF32, kScaleF16, kScaleBf16, kScaleU8, kScaleI8, kScaleE4m3, kScaleE8m0 };
enum Zeros { kNoZeros, kMinima, kZeroPoints };
// What quantized weights are multiplied with: floats (the tier's best type), or int8 with a scale per group.
enum Activations { kFloats, kInt8 };
// kGated + an activation kind: columns come in blocks of 32 gates and their 32 ups, out is activation(gate) * up.
enum Epilogue { kPlain, kGated };
// Traits of a kernel, as bits.
enum Traits { kActivationsBf16 = 1, kInt8Dot = 2 };
}  // namespace linear

// How a row of activations is prepared.
enum PreparedRows { kRowsAsTheyAre, kRowsF32, kRowsBf16, kRowsInt8 };

// Sizes that the contract and the kernels must agree on.
struct LinearShape {
    int64_t panels;
    int64_t row_blocks, row_block;  // an item is a panel and a row block, row blocks fastest
    PreparedRows prepared;
    int64_t padded_k;   // elements of a prepared row
    int64_t row_bytes;  // of a prepared row, 0 if x is used as it is
    // The rest is 0 unless the weight is quantized.
    int64_t group, groups;  // elements, count per row
    int64_t info_bytes;     // per row: scale, sum, and start of the accumulators for each group
    int64_t code_bytes;     // of one panel and group
    int64_t scale_bytes;    // of one panel and group: scales, and as much again for minima
    int64_t group_bytes;    // codes, scales and zeros of one panel and group
    int64_t outer_groups;   // that share an outer factor, 0 if there is none or the row shares it
    int64_t outer_bytes;    // outer factors before each block, or before the row
    int64_t panel_bytes;
    int64_t block;  // groups that are taken at a time, their scales as f32; 1 if the row is one group
    int64_t depth;  // codes that are expanded at a time
};
LinearShape linear_shape(const Call& call);

extern const Contract kLinear;

}  // namespace pelton::cpu
