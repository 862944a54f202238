#include "cpu/ops/attention/contract.h"

#include <algorithm>

#include "cpu/contract.h"

namespace pelton::cpu {

CacheLayout cache_layout(int64_t kv_heads, int64_t head_dim, int64_t block_size, int64_t format) {
    const int64_t size = format == kCacheF32 ? 4 : format == kCacheBf16 || format == kCacheF16 ? 2 : 1;
    CacheLayout layout;
    layout.padded = (head_dim + 15) / 16 * 16;
    layout.lane_bytes = format == kCacheF16 ? 2 : 4;
    layout.lane_rows = (head_dim * size + layout.lane_bytes - 1) / layout.lane_bytes;
    layout.key_bytes = mul_sizes(layout.lane_rows * layout.lane_bytes, block_size);
    layout.value_bytes = mul_sizes(layout.padded * size, block_size);
    layout.head_bytes = add_sizes(layout.key_bytes, layout.value_bytes);
    const bool scaled = format == kCacheInt8 || format == kCacheFp8;
    if (scaled) layout.head_bytes = add_sizes(layout.head_bytes, mul_sizes(8, block_size));
    layout.block_bytes = mul_sizes(layout.head_bytes, kv_heads);
    return layout;
}

int64_t slot_floats(int64_t head_dim) { return (head_dim + 15) / 16 * 16 + 16; }

int64_t cache_size(int64_t kv_heads, int64_t head_dim, int64_t block_size, int64_t num_blocks, int64_t format) {
    return mul_sizes(cache_layout(kv_heads, head_dim, block_size, format).block_bytes, num_blocks);
}

const char* check_cache(int64_t kv_heads, int64_t head_dim, int64_t block_size, int64_t num_blocks, int64_t format) {
    if (kv_heads < 1) return "kv_heads must be positive";
    if (head_dim < 2 || head_dim > 512 || head_dim % 2) return "head_dim must be even, 2 to 512";
    if (block_size < 1 || block_size % kTokenGroup) return "block_size must be a multiple of 16";
    if (num_blocks < 1) return "num_blocks must be positive";
    if (format < kCacheF32 || format > kCacheF16)
        return "cache_format must be 0 (f32), 1 (bf16), 2 (int8), 3 (fp8) or 4 (f16)";
    return nullptr;
}

static std::string validate(const Call& call) {
    using namespace attention;
    const int64_t* ints = call.ints;
    const char* error = check_cache(ints[kKvHeads], ints[kHeadDim], ints[kBlockSize], ints[kNumBlocks], ints[kFormat]);
    if (error) return error;
    if (ints[kHeads] < 1 || ints[kHeads] % ints[kKvHeads]) return "kv_heads must divide heads";
    if (ints[kWindow] < 0) return "window must not be negative";
    int64_t bytes = cache_size(ints[kKvHeads], ints[kHeadDim], ints[kBlockSize], ints[kNumBlocks], ints[kFormat]);
    if (bytes > call.operands[kCache].bytes) return "the cache is too small";
    if (call.operands[kSlopes].data && call.operands[kSlopes].bytes < ints[kHeads] * 4) return "too few alibi slopes";
    return "";
}

// Checks the ragged batch itself. The minima and maxima of the inputs bound most values already.
static std::string check_batch(const Call& call, const Step& step, int64_t width) {
    using namespace attention;
    const int64_t tokens = step.dims[0], sequences = step.dims[1];
    const Input& table = step.inputs[call.operands[kBlockTable].bytes];
    const int32_t* lens = step.inputs[call.operands[kSeqLens].bytes].data;
    const int32_t* start = step.inputs[call.operands[kQueryStart].bytes].data;
    const int64_t block_size = call.ints[kBlockSize], num_blocks = call.ints[kNumBlocks];
    if (start[0] != 0 || start[sequences] > tokens) return "query_start_loc must run from 0 to at most T";
    for (int64_t s = 0; s < sequences; ++s) {
        int64_t queries = start[s + 1] - start[s];
        if (queries < 0) return "query_start_loc must not decrease";
        if (lens[s] < queries) return "seq_lens must include the tokens of this step";
        int64_t blocks = (lens[s] + block_size - 1) / block_size;
        if (blocks > width) return "the block table is too narrow for seq_lens";
        if (table.min >= 0 && table.max < num_blocks) continue;
        for (int64_t b = 0; b < blocks; ++b) {  // padding beyond the blocks in use may be anything
            int32_t id = table.data[s * width + b];
            if (id < 0 || id >= num_blocks) return "block id " + std::to_string(id) + " is out of range";
        }
    }
    return "";
}

// Bounds the shared scratch, to 10 MiB with heads of 64. Decode stays far below; prefill has tiles enough.
constexpr int64_t kMostSlots = 1 << 15;

// Cuts a tile that is more than its share of the work: by splits first, as heads lie side by side in memory.
static void cut_tiles(int threads, AttentionPlan& plan) {
    if (threads == 1) return;
    int64_t total = 0;
    for (const AttentionTile& tile : plan.tiles) total += tile.cost;
    // Four pieces a thread leave at most an eighth of the time to wait for the last one, on average.
    const int64_t share = total / (4 * threads) + 1;
    const size_t whole = plan.tiles.size();
    for (size_t i = 0; i < whole; ++i) {
        const AttentionTile tile = plan.tiles[i];
        if (tile.cost <= share) continue;
        const int64_t splits = tile.split_end - tile.split_begin;
        const int64_t head_rows = tile.row_end - tile.row_begin, rows = head_rows * tile.kv_heads;
        int64_t pieces = std::min(splits, (tile.cost + share - 1) / share);
        if (plan.slots + splits * rows > kMostSlots) pieces = 1;
        const int64_t parts = std::min<int64_t>(tile.kv_heads, (tile.cost / pieces + share - 1) / share);
        for (int64_t n = 0; n < pieces * parts; ++n) {
            AttentionTile piece = tile;
            const int64_t part = n % parts, head = tile.kv_heads * part / parts;
            piece.kv_head = static_cast<int32_t>(tile.kv_head + head);
            piece.kv_heads = static_cast<int32_t>(tile.kv_heads * (part + 1) / parts - head);
            piece.split_begin = static_cast<int32_t>(tile.split_begin + splits * (n / parts) / pieces);
            piece.split_end = static_cast<int32_t>(tile.split_begin + splits * (n / parts + 1) / pieces);
            if (pieces > 1) piece.slot = plan.slots + (piece.split_begin - tile.split_begin) * rows + head * head_rows;
            piece.slot_stride = static_cast<int32_t>(rows);
            piece.cost = tile.cost * (piece.split_end - piece.split_begin) / splits * piece.kv_heads / tile.kv_heads;
            if (n == 0) {
                plan.tiles[i] = piece;
            } else {
                plan.tiles.push_back(piece);
            }
        }
        if (pieces == 1) continue;
        for (int64_t r = 0; r < rows; ++r) {
            plan.merges.push_back({tile.sequence, static_cast<int32_t>(tile.kv_head + r / head_rows),
                                   static_cast<int32_t>(tile.row_begin + r % head_rows), static_cast<int32_t>(splits),
                                   plan.slots + r, rows});
        }
        plan.slots += splits * rows;
    }
}

static void make_tiles(const Call& call, const Step& step, AttentionPlan& plan) {
    using namespace attention;
    const int32_t* lens = step.inputs[call.operands[kSeqLens].bytes].data;
    const int32_t* start = step.inputs[call.operands[kQueryStart].bytes].data;
    const int64_t kv_heads = call.ints[kKvHeads], group = call.ints[kHeads] / kv_heads, window = call.ints[kWindow];
    plan.tiles.clear();
    plan.merges.clear();
    plan.slots = 0;
    for (int64_t s = 0; s < step.dims[1]; ++s) {
        int64_t rows = (start[s + 1] - start[s]) * group, first = lens[s] - (start[s + 1] - start[s]);
        for (int64_t r = 0; r < rows; r += kRowTile) {
            int64_t end = std::min<int64_t>(r + kRowTile, rows);
            int64_t last_key = first + (end - 1) / group;
            int64_t first_key = window ? std::max<int64_t>(0, first + r / group - window + 1) : 0;
            AttentionTile tile = {};
            tile.sequence = static_cast<int32_t>(s);
            tile.row_begin = static_cast<int32_t>(r);
            tile.row_end = static_cast<int32_t>(end);
            tile.split_begin = static_cast<int32_t>(first_key / kSplit);
            tile.split_end = static_cast<int32_t>(last_key / kSplit + 1);
            tile.slot = -1;
            const int64_t most_heads = kRowTile / (end - r), parts = (kv_heads + most_heads - 1) / most_heads;
            for (int64_t part = 0; part < parts; ++part) {
                tile.kv_head = static_cast<int32_t>(kv_heads * part / parts);
                tile.kv_heads = static_cast<int32_t>(kv_heads * (part + 1) / parts - tile.kv_head);
                tile.cost = (last_key + 1 - first_key) * (end - r + 8) * tile.kv_heads;  // 8: reading a key and value
                plan.tiles.push_back(tile);
            }
        }
    }
    cut_tiles(step.threads, plan);
    // Heavy tiles first, so that the last ones to be taken are short.
    std::sort(plan.tiles.begin(), plan.tiles.end(), [](const AttentionTile& a, const AttentionTile& b) {
        if (a.cost != b.cost) return a.cost > b.cost;
        if (a.sequence != b.sequence) return a.sequence < b.sequence;
        if (a.kv_head != b.kv_head) return a.kv_head < b.kv_head;
        if (a.row_begin != b.row_begin) return a.row_begin < b.row_begin;
        return a.split_begin < b.split_begin;
    });
    plan.work = {plan.tiles.data(), plan.merges.data()};
}

static std::string plan(Call& call, Step& step) {
    using namespace attention;
    const int64_t tokens = step.dims[0], sequences = step.dims[1], int_max = INT32_MAX;
    call.rows = tokens;
    call.cuts[0] = call.cuts[1] = {0, 1};
    std::string error = check_rows(call, kOut, tokens, call.ints[kHeads] * call.ints[kHeadDim], call.ints[kLdOut]);
    if (error.empty()) error = check_rows(call, kQ, tokens, call.ints[kHeads] * call.ints[kHeadDim], call.ints[kLdQ]);
    if (sequences == 0 || !error.empty()) return error;
    if (mul_sizes(tokens, call.ints[kHeads]) > int_max) return "T times heads must be below 2^31";  // rows of a tile
    error = check_input(call, step, kSeqLens, sequences, int_max);
    if (error.empty()) error = check_input(call, step, kQueryStart, sequences + 1, int_max);
    if (!error.empty()) return error;
    int64_t table_size = step.inputs[call.operands[kBlockTable].bytes].size;
    if (table_size % sequences) return "the block table must have the same number of entries for each sequence";
    call.ints[kTableWidth] = table_size / sequences;

    // Layers repeat the same attention: check and cut it once per step.
    const int64_t key[] = {call.operands[kBlockTable].bytes,
                           call.operands[kSeqLens].bytes,
                           call.operands[kQueryStart].bytes,
                           call.ints[kHeads],
                           call.ints[kKvHeads],
                           call.ints[kBlockSize],
                           call.ints[kNumBlocks],
                           call.ints[kWindow]};
    AttentionPlan* found = nullptr;
    for (size_t i = 0; i < step.num_attention_plans && !found; ++i) {
        AttentionPlan& candidate = step.attention_plans[i];
        if (std::equal(candidate.key.begin(), candidate.key.end(), key)) found = &candidate;
    }
    if (!found) {
        error = check_batch(call, step, call.ints[kTableWidth]);
        if (!error.empty()) return error;
        found = &step.attention_plans[step.num_attention_plans++];  // one per call is reserved
        found->key.assign(std::begin(key), std::end(key));
        make_tiles(call, step, *found);
    }
    call.plan = &found->work;
    call.cuts[0] = {static_cast<int64_t>(found->tiles.size()), 1};
    call.cuts[1] = {static_cast<int64_t>(found->merges.size()), 4};
    call.shared_bytes = mul_sizes(found->slots, slot_floats(call.ints[kHeadDim]) * 4);
    return "";
}

static int64_t scratch_bytes(const Call& call) {
    // Packed queries, the output of a split and of those before it, sums by lane, some numbers; then scores
    // and probabilities of a register tile.
    const int64_t padded = (call.ints[attention::kHeadDim] + 15) / 16 * 16;
    // With AMX scores and probabilities of more rows, as many sums, keys of one step in depth, values.
    const int64_t amx = (3 * kAmxTileRows * 4 + 64 + padded * 2) * kKeyTile;
    const int64_t expanded = call.ints[attention::kFormat] == kCacheFp8 ? 2 * kKeyTile * padded * 2 : 0;
    return kRowTile * (3 * padded * 4 + 64 + 64) + 2 * kMostTileRows * kKeyTile * 4 + amx + expanded;
}

const Contract kAttention = {
    "attention",
    "operands [out(arena), q(arena), cache(cache), block_table(input), seq_lens(input), query_start_loc(input), "
    "alibi_slopes(const or none)]; ints [heads, kv_heads, head_dim, ld_out, ld_q, block_size, num_blocks, "
    "cache_format, window]; floats [scale, softcap]",
    "aakiiiC",
    9,
    2,
    validate,
    plan,
    scratch_bytes};

}  // namespace pelton::cpu
