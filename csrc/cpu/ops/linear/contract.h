// out = x W^T + bias for a weight packed in panels of 64 output columns (pelton/backends/cpu/packing.py).
#pragma once

#include "cpu/kernel.h"

namespace pelton::cpu {

struct Contract;

// 64 columns are 4 AVX-512, 8 AVX2 or 16 SSE registers: one layout serves every ISA.
constexpr int kPanel = 64;
// Up to this many rows every thread rounds the activations for itself, which is cheaper than a barrier.
constexpr int kLocalRows = 4;
// Rows of one work item: a multiple of 6 (register tile) and large enough to reuse a panel from L2.
constexpr int kRowBlock = 192;
// Depth of codes that are expanded at a time: 16 KB of bf16 pairs or f32, which stay in the L1 cache.
constexpr int kExpandBlockBf16 = 128, kExpandBlockF32 = 64;

// Panel layouts, columns padded to 64 with zeros:
//   f32        [k][64] f32
//   bf16       [ceil(k / 2)][64][2] bf16
//   quantized  per group of k: codes, scales [64], minima [64] if any (f16 or f32)
//     4 bits: [group / 8][64] u32; nibble j of the low half is code 2j, of the high half code 2j + 1,
//             so that one shift by 4j brings a pair of codes into the positions of a bf16 pair
//     8 bits: [group / 4][64] u32; bytes 0 and 2 are codes 0 and 1, bytes 1 and 3 codes 2 and 3
namespace linear {
enum Operands { kOut, kX, kWeight, kBias };
enum Ints {
    kRowsDim,
    kN,
    kK,
    kLdOut,
    kLdX,
    kFormat,
    kBits,
    kGroupSize,
    kHasMin,
    kScaleIsF32,
    kOffset,
    kBlockRows
};  // the last is set by the plan
enum Format { kF32, kBf16, kQuantized };
// Traits of a kernel: the type it multiplies activations in (except with f32 weights).
enum Traits { kActivationsF32, kActivationsBf16 };
}  // namespace linear

// Sizes that the contract and the kernels must agree on.
struct LinearShape {
    int64_t panels;
    int64_t row_blocks, row_block;  // an item is a panel and a row block, row blocks fastest
    int64_t padded_k;               // elements of a row of rounded activations
    int64_t groups;                 // per row, 0 unless quantized
    int64_t group_bytes;            // codes, scales and minima of one panel and group
    int64_t panel_bytes;
    int64_t rounded_bytes;  // of one row of rounded activations, 0 if x is used as it is
    int64_t depth;          // k that is expanded at a time when quantized
};
LinearShape linear_shape(const Call& call);

extern const Contract kLinear;

}  // namespace pelton::cpu
