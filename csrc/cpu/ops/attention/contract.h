// Causal attention over the paged KV cache, and the layout of that cache.
#pragma once

#include "cpu/kernel.h"

namespace pelton::cpu {

struct Contract;

// Keys are read in tiles of this many tokens that start at multiples of it, whatever the query: a
// row's result depends on its own position only. 64 keys are 4 AVX-512 registers of pairs.
constexpr int kKeyTile = 64;
// Keys [i * kSplit, (i + 1) * kSplit) are attended to on their own, then the results are merged from the
// first to the last, so that other threads can take some without a bit changing. A split of 512 keys is
// work for some microseconds, several times what a barrier costs.
constexpr int kSplit = 512;
// Rows (query tokens times query heads) of a piece of work: 8 register tiles of 6 rows, whose queries and
// outputs stay in the L2 cache next to the key tiles.
constexpr int kRowTile = 48;
constexpr int kMostTileRows = 6;  // rows of a register tile on any tier
constexpr int kAmxTileRows = 16;  // rows of an AMX tile
// Tokens of a cache block are kept in groups of this size; block_size is a multiple of it.
constexpr int kTokenGroup = 16;

enum CacheFormat { kCacheF32, kCacheBf16, kCacheInt8, kCacheFp8, kCacheF16 };

// Per block and KV head: keys, then values, for int8 and fp8 then the scales of the keys and of the values.
//   f32:  keys [head_dim][block_size],         values [block_size][padded]
//   f16:  the same in 16-bit lanes, as each number is widened to f32 on its way
//   bf16: keys [head_dim / 2][block_size][2],  values [block_size / 2][padded][2]
//   int8: keys [quads][block_size][4],         values [block_size / 4][padded][4],
//         scales f32 [2][block_size]; a number is its code times the scale of its token and head
//   fp8:  the same, but the codes of a lane lie in the order 0 2 1 3, in which they are widened to pairs
// with padded = head_dim rounded up to 16 and quads = head_dim / 4 rounded up. Keys lie transposed so that
// scores of neighbouring tokens are neighbouring lanes and need no horizontal sums; what shares a 32-bit lane
// is what vdpbf16ps, vpdpbusd and AMX tiles multiply at once.
struct CacheLayout {
    int64_t padded;
    int64_t lane_bytes;   // of a lane: 2 for f16, else 4
    int64_t lane_rows;    // lanes that a key takes
    int64_t key_bytes;    // keys of one block and head
    int64_t value_bytes;  // values of one block and head
    int64_t head_bytes;   // keys, values and scales of one block and head
    int64_t block_bytes;  // all heads
};
CacheLayout cache_layout(int64_t kv_heads, int64_t head_dim, int64_t block_size, int64_t format);
// Bytes of all blocks, or INT64_MAX if that is too small a type for them.
int64_t cache_size(int64_t kv_heads, int64_t head_dim, int64_t block_size, int64_t num_blocks, int64_t format);
// What is wrong with such a cache, or null.
const char* check_cache(int64_t kv_heads, int64_t head_dim, int64_t block_size, int64_t num_blocks, int64_t format);

namespace attention {
enum Operands { kOut, kQ, kCache, kBlockTable, kSeqLens, kQueryStart, kSlopes };
enum Ints { kHeads, kKvHeads, kHeadDim, kLdOut, kLdQ, kBlockSize, kNumBlocks, kFormat, kWindow, kTableWidth };
enum Floats { kScaleFactor, kCap };
}  // namespace attention

// A piece of work: rows [row_begin, row_end) of one sequence under each of `kv_heads` KV heads, over the key
// splits [split_begin, split_end), where row t * group + g is query token t under query head g of the group.
// Few rows take several heads, as those of a block lie side by side and memory is fastest in long runs. With
// slot < 0 the splits are all there are; else results go to slots of the shared scratch, a split after the
// other, a slot per head and row.
struct AttentionTile {
    int32_t sequence, kv_head, kv_heads, row_begin, row_end, split_begin, split_end;
    int32_t slot_stride;  // from one split to the next
    int64_t slot, cost;
};

// A row whose `splits` results lie in shared slots, `stride` apart.
struct AttentionMerge {
    int32_t sequence, kv_head, row, splits;
    int64_t slot, stride;
};

// What Call::plan points to.
struct AttentionWork {
    const AttentionTile* tiles;
    const AttentionMerge* merges;
};

// Floats of a slot: the output, then maximum and sum, in whole cache lines.
int64_t slot_floats(int64_t head_dim);

extern const Contract kAttention;

}  // namespace pelton::cpu
