// Rotary position embedding and the writing of keys and values into the paged cache, alone or fused.
#pragma once

#include "cpu/kernel.h"

namespace pelton::cpu {

struct Contract;

// rope: out = x with the first rot_dim dims of each head rotated; the table is f32
// [max_positions][rot_dim], cosines of the rot_dim / 2 pairs, then sines.
namespace rope {
enum Operands { kOut, kX, kTable, kPositions };
enum Ints { kRowsDim, kHeads, kHeadDim, kRotDim, kLdOut, kLdX, kInterleaved, kMaxPositions };
}  // namespace rope

// kv_write: token t goes to slot slot_mapping[t] = block * block_size + offset.
namespace kv_write {
enum Operands { kCache, kK, kV, kSlots };
enum Ints { kKvHeads, kHeadDim, kLdK, kLdV, kBlockSize, kNumBlocks, kFormat };
}  // namespace kv_write

namespace rope_kv_write {
enum Operands { kQOut, kCache, kQ, kK, kV, kTable, kPositions, kSlots };
enum Ints {
    kHeads,
    kKvHeads,
    kHeadDim,
    kRotDim,
    kLdQOut,
    kLdQ,
    kLdK,
    kLdV,
    kInterleaved,
    kMaxPositions,
    kBlockSize,
    kNumBlocks,
    kFormat
};
}  // namespace rope_kv_write

extern const Contract kRope, kKvWrite, kRopeKvWrite;

}  // namespace pelton::cpu
