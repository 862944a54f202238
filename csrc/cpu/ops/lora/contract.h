// y += B (A x) for rows that use a low-rank adapter; rows of slot 0 keep their bits. Source: Hu et al. 2021.
#pragma once

#include "cpu/kernel.h"

namespace pelton::cpu {

struct Contract;

// Products that share x are one call: their columns lie side by side in y, as parts of it.
constexpr int kMostParts = 8;
constexpr int64_t kMostRank = 512;  // of one part: what the sums of a register tile's rows fit on the stack with
// Ranks of all parts lie side by side in panels of this many, columns of y in panels of 64, as those of linear do.
constexpr int kRankPanel = 16;
constexpr int kColumnPanel = 64;
// A sum over x is made of sums over this many columns at most, so that a wide row is work for several threads.
constexpr int64_t kDepthSplit = 512;
// Rows of one adapter that an item of work takes: a multiple of each tier's register tile.
constexpr int64_t kAdaptedRows = 48;

// The table of a call: slot after slot, of slot_bytes each, the first one being slot 1. A slot:
//   header  int32 [kMostParts][2]: first rank of the part, and how many; 0 if the adapter leaves the part alone
//   A       panels of 16 ranks, those of all parts one after another: [lanes of in][16]
//   B       per part panels of 64 columns: [lanes of max_rank][64]
// where a lane is an f32, or a pair of bf16. Every part begins at an even rank, columns without a rank are zero.
struct LoraShape {
    int64_t depth_lanes, rank_lanes;  // lanes that in and max_rank take
    int64_t split, splits;            // columns of x in a sum, and how many sums
    int64_t ranks;                    // of all parts at most, in whole panels
    int64_t a_panel, b_panel;         // bytes
    int64_t b_offset;                 // bytes from the start of a slot
    int64_t panels;                   // of columns, all parts
    int64_t columns;                  // of y
    int64_t slot_bytes;
};

namespace lora {
enum Operands { kY, kX, kTable, kSlots };
enum Ints { kRowsDim, kIn, kLdY, kLdX, kNumSlots, kMaxRank, kFormat, kParts, kWidths };
enum Format { kF32, kBf16 };
}  // namespace lora

LoraShape lora_shape(const Call& call);

// Rows [begin, begin + count) of LoraWork::rows use the adapter of a slot.
struct LoraBlock {
    int32_t slot, begin, count;
};

// What Call::plan points to. An item of the first stage is a block and a split, the split fastest; of the second a
// block and a panel of columns.
struct LoraWork {
    const int32_t* rows;
    const LoraBlock* blocks;
};

extern const Contract kLora;

}  // namespace pelton::cpu
