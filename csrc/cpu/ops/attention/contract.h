// Causal attention over the paged KV cache, and the layout of that cache.
#pragma once

#include "cpu/kernel.h"

namespace pelton::cpu {

struct Contract;

// Keys are read in tiles of this many tokens that start at multiples of it, whatever the query: a
// row's result depends on its own position only. 64 keys are 4 AVX-512 registers of pairs.
constexpr int kKeyTile = 64;
// Rows (query tokens times query heads per KV head) that share the reading of a key tile: 8 register
// tiles of 6 rows; scores and probabilities of 48 rows fit the L1 cache.
constexpr int kRowTile = 48;
// Tokens of a cache block are kept in groups of this size; block_size is a multiple of it.
constexpr int kTokenGroup = 16;

enum CacheFormat { kCacheF32, kCacheBf16 };

// Per block and KV head: keys, then values.
//   f32:  keys [head_dim][block_size],         values [block_size][padded]
//   bf16: keys [head_dim / 2][block_size][2],  values [block_size / 2][padded][2]
// with padded = head_dim rounded up to 16. Keys lie transposed so that scores of neighbouring tokens
// are neighbouring lanes and need no horizontal sums; bf16 values lie in pairs, the unit of vdpbf16ps.
struct CacheLayout {
    int64_t padded;
    int64_t key_bytes;    // keys of one block and head
    int64_t head_bytes;   // keys and values of one block and head
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

// A piece of work: rows [row_begin, row_end) of one sequence and KV head, where row t * group + g is
// query token t under query head g of the group.
struct AttentionTile {
    int32_t sequence, kv_head, row_begin, row_end;
    int64_t cost;
};

extern const Contract kAttention;

}  // namespace pelton::cpu
