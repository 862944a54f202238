// Flash-style attention: a tile of rows walks the key tiles at absolute positions and keeps a running
// maximum, sum and output per row. Scores of 64 keys, then probabilities, then values, each as a small
// matrix product in registers. With vdpbf16ps and a bf16 cache, queries and probabilities are rounded to
// bf16; with vpdpbusd and an int8 cache, to 15 and 16 bits, which is finer, and products are exact. An fp8 cache is
// widened to bf16 a key tile at a time, and treated as such.
// Otherwise the arithmetic is f32, to which numbers of an f16 cache are widened as they are loaded. With AMX the
// products of both caches are made of tiles (amx.h), of an int8 cache where there are rows enough.
//
// Batch invariance: key tiles start at multiples of kKeyTile, splits at multiples of kSplit, and every
// operation on a row is done in an order that depends on nothing but the key positions. A tile or split that
// is masked for a row leaves it as it is.
#include "cpu/ops/attention/amx.h"
#include "cpu/ops/attention/tile.h"
#include "cpu/row_tiles.h"
#include "cpu/simd_math.h"

namespace pelton::cpu::PELTON_ISA {
namespace {

using namespace attention;

constexpr float kMinusInfinity = -__builtin_inff();
constexpr int kMaxHeadDim = 512;
constexpr float kLog2e = 1.44269504f;
// A query of an int8 cache is high * 128 + low times its unit, both signed bytes.
constexpr float kQueryUnits = 127.0f * 128.0f;
// The largest 16-bit probability, less a margin for the rounding of its unit.
constexpr float kWeightUnits = 65000.0f;

// A running softmax of the rows of a tile.
struct State {
    float *output, *maxima, *sums;  // [kRowTile][padded], [kRowTile] twice
};

struct Scratch {
    char* queries;                         // of a register tile after the other, `q_stride` bytes a row
    float* scores;                         // [register tile][kKeyTile]
    char* probabilities;                   // [register tile][kWeightBytes]
    float* lane_sums;                      // [kRowTile][kW]
    State split, total;                    // of the current split, and of those before it
    float *corrections, *units, *factors;  // units: of probabilities; factors: of scores
    int32_t *lows, *highs;                 // the keys [low, high) of the current tile that a row sees
    int32_t *biases, *positions;           // biases: of scores
    char* expanded;                        // a key tile of an fp8 cache as bf16
    AmxScratch amx;
};

struct Problem {
    const Call* call;
    CacheLayout layout;
    int64_t head_dim, block_size, group, window, value_row, q_stride;
    int64_t lane_rows;                             // lanes that a key takes in products
    float scale, cap;                              // in powers of 2 where there is no cap
    const float* slopes;                           // of the query heads, or null
    const int32_t* block_table;                    // row of this sequence
    int64_t query_start, seq_len, first_position;  // of query token 0
    const char* cache;
};

PELTON_INLINE int64_t position_of(const Problem& p, int64_t row) { return p.first_position + row / p.group; }

TileAddress address_tile(const Problem& p, int64_t kv_head, int64_t begin, int64_t end) {
    TileAddress at;
    at.fetch = true;
    at.value_scales = p.block_size * 4;
    at.key_row = p.block_size * p.layout.lane_bytes;
    for (int i = 0; i < kKeyTile / kTokenGroup; ++i) {
        int64_t token = begin + i * kTokenGroup;
        if (token >= end) token = (end - 1) / kTokenGroup * kTokenGroup;
        const int64_t inside = token % p.block_size;
        const char* block =
            p.cache + kv_head * p.layout.head_bytes + p.block_table[token / p.block_size] * p.layout.block_bytes;
        at.keys[i] = block + inside * p.layout.lane_bytes;
        at.values[i] = block + p.layout.key_bytes + inside * p.value_row;
        at.scales[i] = block + p.layout.key_bytes + p.layout.value_bytes + inside * 4;
    }
    return at;
}

// ---- queries

// Packs a query as Cache::kDot says; returns how many 32-bit elements that are.
template <class Cache>
int64_t load_query(const Problem& p, const float* from, const Scratch& s, int64_t i, char* to) {
    const int64_t head_dim = p.head_dim;
    s.factors[i] = p.scale;
    if constexpr (!Cache::kDot) {
        __builtin_memcpy(to, from, head_dim * 4);
        for (int64_t d = head_dim; d % Cache::kStep; ++d) reinterpret_cast<float*>(to)[d] = 0.0f;
    } else if constexpr (!Cache::kBytes) {
        int64_t d = 0;
        for (; d + kW <= head_dim; d += kW) store_u16(to + d * 2, to_bf16(load(from + d)));
        if (d < head_dim) {
            uint16_t last[kW];
            store_u16(last, to_bf16(load_n(from + d, head_dim - d)));
            __builtin_memcpy(to + d * 2, last, (head_dim - d) * 2);
        }
    } else {
#if defined(__AVX512VNNI__)
        const auto part = [&](int64_t d) {
            return head_dim - d < kW ? load_n(from + d, head_dim - d) : load(from + d);
        };
        VF largest = {}, poison = {};
        for (int64_t d = 0; d < head_dim; d += kW) {
            largest = max(largest, abs(part(d)));
            poison += part(d) * 0.0f;  // a maximum may lose a NaN
        }
        const float size = max_lane(largest) + sum(poison);
        const float unit = size / kQueryUnits, inverse = size > 1e-30f ? kQueryUnits / size : 0.0f;
        const int64_t bytes = p.lane_rows * 4;
        VU total = {};  // unsigned, as what is not finite overflows
        for (int64_t d = 0; d < head_dim; d += kW) {
            VI value = reinterpret_cast<VI>(_mm512_cvtps_epi32(reinterpret_cast<__m512>(part(d) * inverse)));
            total += reinterpret_cast<VU>(value);
            VI high = (value + 64) >> 7, low = value - (high << 7);
            char parts[2][kW];
            store_bytes(parts[0], reinterpret_cast<VU>(high));
            store_bytes(parts[1], reinterpret_cast<VU>(low));
            const int64_t count = bytes - d < kW ? bytes - d : kW;
            __builtin_memcpy(to + d, parts[0], count);
            __builtin_memcpy(to + bytes + d, parts[1], count);
        }
        uint32_t bias = 0;
        for (int lane = 0; lane < kW; ++lane) bias += total[lane];
        s.biases[i] = static_cast<int32_t>(bias * 128);
        s.factors[i] = p.scale * unit;
#endif
    }
    return p.lane_rows * (!Cache::kDot ? Cache::kStep : Cache::kBytes ? 2 : 1);
}

template <class Cache>
void load_queries(const Problem& p, const AttentionTile& tile, const Scratch& s) {
    const Call& call = *p.call;
    const float* q = reinterpret_cast<const float*>(call.operands[kQ].data);
    alignas(64) uint32_t packed[kMaxHeadDim];
    // Query heads of a KV head lie side by side, but tokens far apart.
    const int64_t width = tile.kv_heads * p.group * p.head_dim;
    for (int64_t token = tile.row_begin / p.group; token <= (tile.row_end - 1) / p.group; ++token) {
        const float* from = q + (p.query_start + token) * call.ints[kLdQ] + tile.kv_head * p.group * p.head_dim;
        for (int64_t d = 0; d < width; d += 16) __builtin_prefetch(from + d);
    }
    for (int64_t h = 0; h < tile.kv_heads; ++h) {
        const int64_t head = (tile.kv_head + h) * p.group, head_rows = tile.row_end - tile.row_begin;
        for_row_tiles<kTileRows>(head_rows, [&]<int kRows>(int64_t m) {
            uint32_t* to = reinterpret_cast<uint32_t*>(s.queries + (h * head_rows + m) * p.q_stride);
            for (int64_t i = 0; i < kRows; ++i) {
                const int64_t row = tile.row_begin + m + i, token = row / p.group, state = h * head_rows + m + i;
                s.positions[state] = static_cast<int32_t>(p.first_position + token);
                const float* from =
                    q + (p.query_start + token) * call.ints[kLdQ] + (head + row - token * p.group) * p.head_dim;
                const int64_t elements = load_query<Cache>(p, from, s, state, reinterpret_cast<char*>(packed));
                if (takes_tiles<Cache>(head_rows, p.head_dim)) {
                    amx_store_query<Cache>(s.queries + state * p.q_stride, packed, p.lane_rows, p.q_stride);
                    continue;
                }
                for (int64_t e = 0; e < elements; ++e) to[e * kRows + i] = packed[e];
            }
        });
    }
}

// ---- softmax of a register tile

// The keys [low, high) of a tile that a query sees.
PELTON_INLINE void see(const Problem& p, int64_t position, int64_t begin, int64_t num_keys, int32_t* low_at,
                       int32_t* high_at) {
    int64_t low = 0, high = position + 1 - begin;
    if (p.window && position - p.window + 1 > begin) low = position - p.window + 1 - begin;
    high = high > num_keys ? num_keys : high < 0 ? 0 : high;
    *low_at = static_cast<int32_t>(low < high ? low : high);
    *high_at = static_cast<int32_t>(high);
}

// Rounds the probabilities of a row and adds up what comes of it, so that the weights add up to one.
PELTON_INLINE VF store_rounded([[maybe_unused]] char* to, [[maybe_unused]] const VF (&e)[kKeyTile / kW]) {
    VF total = {};
#if defined(__AVX512BF16__)
    PELTON_UNROLL
    for (int v = 0; v < kKeyTile / kW; v += 2) {
        VU pairs = reinterpret_cast<VU>(
            _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(e[v + 1]), reinterpret_cast<__m512>(e[v])));
        store_u32(to + v * kW * 2, pairs);
        total = dot_pairs(total, pairs, splat_u32(0x3f803f80u));
    }
#endif
    return total;
}

// Scores -> probabilities of up to kTileRows rows. kMasked: some of the 64 keys are invisible; visible lanes are
// computed alike either way. kPlain: no cap, no slopes.
template <class Cache, bool kMasked, bool kPlain>
PELTON_APART void softmax_rows(const Problem& p, const TileAddress& at, int64_t begin, int64_t num_keys,
                               int64_t kv_head, int64_t row, int64_t rows, const Scratch& s, int64_t state) {
    constexpr int kVecs = kKeyTile / kW;
    constexpr bool kInteger = Cache::kBytes && Cache::kDot;
    const VF lanes = lane_numbers();
    const auto masked = [&](int64_t i, int v, VF x, float otherwise) {
        VF index = lanes + static_cast<float>(v * kW);
        x = index < splat(static_cast<float>(s.lows[state + i])) ? splat(otherwise) : x;
        return index < splat(static_cast<float>(s.highs[state + i])) ? x : splat(otherwise);
    };
    const auto scale_at = [&](int v) { return at.scales[v * kW / kTokenGroup] + v * kW % kTokenGroup * 4; };
    // Of row i in lane i: what goes through memory in another width than it came waits there for the store.
    VF tile = splat(kMinusInfinity);
    [[maybe_unused]] VF tile_scales = {};
    const auto put = [&](VF all, int64_t i, float x) { return lanes == static_cast<float>(i) ? splat(x) : all; };

    for (int64_t i = 0; i < rows; ++i) {
        float* scores = s.scores + i * kKeyTile;
        const int64_t position = s.positions[state + i];
        if (kMasked) see(p, position, begin, num_keys, s.lows + state + i, s.highs + state + i);
        VF maximum = splat(kMinusInfinity), largest_scale = {};
        PELTON_UNROLL
        for (int v = 0; v < kVecs; ++v) {
            VF x = load(scores + v * kW);
            if constexpr (Cache::kScaled) x *= as_float(load_u32(scale_at(v)));
            if (!kPlain && p.cap != 0.0f) x = tanh(x) * p.cap;
            if (!kPlain && p.slopes) {
                const float slope = p.slopes[kv_head * p.group + (row + i) % p.group] * kLog2e;
                x += (lanes + static_cast<float>(begin + v * kW - position)) * slope;
            }
            if (kMasked) x = masked(i, v, x, kMinusInfinity);
            if (Cache::kScaled || kMasked || !kPlain) store(scores + v * kW, x);
            maximum = max(maximum, x);
            if constexpr (kInteger) {
                VF scale = as_float(load_u32(scale_at(v) + at.value_scales));
                largest_scale = max(largest_scale, kMasked ? masked(i, v, scale, 0.0f) : scale);
            }
        }
        tile = put(tile, i, max_lane(maximum));
        if constexpr (kInteger) tile_scales = put(tile_scales, i, max_lane(largest_scale));
    }

    // All rows at once. A NaN becomes the maximum, or the correction in the tile after it.
    const VF before = load_n(s.split.maxima + state, rows);
    VF now = tile <= before ? before : tile;
    store_n(s.split.maxima + state, now, rows);
    // While nothing is visible the maximum stays -inf; subtract 0 then, as -inf - -inf is NaN.
    const VF shift = now == kMinusInfinity ? VF{} : now;
    const VF corrections = exp2_nonpositive(before - shift);
    store_n(s.corrections + state, corrections, rows);
    [[maybe_unused]] VF inverses;
    if constexpr (kInteger) {
        // What no probability times the scale of its value exceeds is 65000 units.
        const VF bound = exp2_nonpositive(tile - shift) * tile_scales;
        store_n(s.units + state, bound * (1.0f / kWeightUnits), rows);
        inverses = bound > 1e-30f ? kWeightUnits / bound : VF{};
    }

    for (int64_t i = 0; i < rows; ++i) {
        const float* scores = s.scores + i * kKeyTile;
        char* probabilities = s.probabilities + i * kWeightBytes<Cache>;
        VF e[kVecs], total = {};
        PELTON_UNROLL
        for (int v = 0; v < kVecs; ++v) e[v] = exp2_nonpositive(load(scores + v * kW) - shift[i]);
        if constexpr (Cache::kScaled) {
            PELTON_UNROLL
            for (int v = 0; v < kVecs; ++v) {
                total += e[v];
                e[v] *= as_float(load_u32(scale_at(v) + at.value_scales));
                if (kMasked) e[v] = masked(i, v, e[v], 0.0f);
            }
        }
        if constexpr (Cache::kDot && !Cache::kBytes) {
            const VF rounded = store_rounded(probabilities, e);
            if (!Cache::kScaled) total = rounded;
        } else {
            PELTON_UNROLL
            for (int v = 0; v < kVecs; ++v) {
                if (!Cache::kScaled) total += e[v];
                if constexpr (kInteger) {
#if defined(__AVX512VNNI__)
                    VU whole =
                        reinterpret_cast<VU>(__builtin_convertvector(fma(e[v], splat(inverses[i]), splat(0.5f)), VI));
                    store_bytes(probabilities + v * kW, whole >> 8);
                    store_bytes(probabilities + kKeyTile + v * kW, whole);
#endif
                } else {
                    store(reinterpret_cast<float*>(probabilities) + v * kW, e[v]);
                }
            }
        }
        float* sums = s.lane_sums + (state + i) * kW;
        store(sums, fma(load(sums), splat(corrections[i]), total));
    }
}

// ---- splits

// Merges rows of a later split into those before it.
PELTON_INLINE void merge_row(float* output, float* maximum, float* sum, const float* next_output, float next_maximum,
                             float next_sum, int64_t padded) {
    const float before = *maximum, now = before > next_maximum ? before : next_maximum;
    const float shift = now == kMinusInfinity ? 0.0f : now;
    const float a = exp2_nonpositive(splat(before - shift))[0], b = exp2_nonpositive(splat(next_maximum - shift))[0];
    *maximum = now;
    *sum = *sum * a + next_sum * b;
    for (int64_t d = 0; d < padded; d += kW) store(output + d, load(output + d) * a + load(next_output + d) * b);
}

void write_row(const Problem& p, int64_t kv_head, int64_t row, const float* from, float sum) {
    const Call& call = *p.call;
    const int64_t head = kv_head * p.group + row % p.group;
    float* to = reinterpret_cast<float*>(call.operands[kOut].data) +
                (p.query_start + row / p.group) * call.ints[kLdOut] + head * p.head_dim;
    int64_t d = 0;
    for (; d + kW <= p.head_dim; d += kW) store(to + d, load(from + d) / sum);
    if (d < p.head_dim) store_n(to + d, load(from + d) / sum, p.head_dim - d);
}

// Rows from query position `first` to `last` see nothing of keys [begin, end).
PELTON_INLINE bool blind(const Problem& p, int64_t first, int64_t last, int64_t begin, int64_t end) {
    return last < begin || (p.window && first - p.window + 1 >= end);
}

// They all see all of a whole key tile.
PELTON_INLINE bool sees_whole(const Problem& p, int64_t first, int64_t last, int64_t begin, int64_t end) {
    return first + 1 - begin >= kKeyTile && end - begin == kKeyTile && !(p.window && last - p.window + 1 > begin);
}

template <class Cache>
PELTON_INLINE auto softmax_of(const Problem& p, bool whole) {
    const bool plain = p.cap == 0.0f && !p.slopes;
    return whole   ? plain ? softmax_rows<Cache, false, true> : softmax_rows<Cache, false, false>
           : plain ? softmax_rows<Cache, true, true>
                   : softmax_rows<Cache, true, false>;
}

// The rows of one KV head, whose state begins at row `base` of the scratch, and keys [begin, end) of a tile.
template <class Cache>
void attend_tile(const Problem& p, const AttentionTile& tile, int64_t kv_head, int64_t base, const Scratch& s,
                 const TileAddress& at, TileAddress next, int64_t begin, int64_t end) {
    const int64_t num_keys = end - begin, padded = p.layout.padded;
    for_row_tiles<kTileRows>(tile.row_end - tile.row_begin, [&]<int kRows>(int64_t m) {
        const int64_t row = tile.row_begin + m, state = base + m;
        const int64_t first = s.positions[state], last = s.positions[state + kRows - 1];
        if (blind(p, first, last, begin, end)) return;
        next.fetch = !Cache::kExpanded && m < 2 * kTileRows;  // later rows find what these have fetched
        if (Cache::kScaled && m == 0) fetch_scales(next);
        score_tile<Cache, kRows>(s.queries + state * p.q_stride, s.factors + state, s.biases + state, at, next,
                                 p.lane_rows, num_keys, s.scores);
        const bool whole = sees_whole(p, first, last, begin, end);
        Seen seen = {nullptr, nullptr, 0, 0, kKeyTile, kKeyTile};
        softmax_of<Cache>(p, whole)(p, at, begin, num_keys, kv_head, row, kRows, s, state);
        if (!whole) seen = seen_by<Cache, kRows>(s.lows + state, s.highs + state);
        value_tile<Cache, kRows>(s.probabilities, s.corrections + state, s.units + state, at, next, seen, padded,
                                 s.split.output + state * padded);
    });
}

#if defined(__AMX_TILE__)
// The same on AMX tiles.
template <class Cache>
void attend_by_tiles(const Problem& p, const AttentionTile& tile, int64_t kv_head, int64_t base, const Scratch& s,
                     const TileAddress& at, TileAddress next, int64_t begin, int64_t end, AmxTiles& tiles) {
    const int64_t head_rows = tile.row_end - tile.row_begin, height = amx_height(head_rows);
    amx_shape<Cache>(tiles, head_rows);
    amx_copy_last_keys(at, p.lane_rows, s.amx.keys);
    AmxValues values = {{}, -1, -1, false, false};
    next.fetch = !Cache::kExpanded;
    for (int64_t m = 0; m < head_rows; m += height) {
        const int64_t row = tile.row_begin + m, state = base + m;
        const int64_t rows = head_rows - m < height ? head_rows - m : height;
        const int64_t first = s.positions[state], last = s.positions[state + rows - 1];
        if (blind(p, first, last, begin, end)) continue;
        if (Cache::kScaled && m == 0) fetch_scales(next);
        amx_scores<Cache>(s.queries + state * p.q_stride, p.q_stride, s.factors + state, at, next, p.lane_rows, rows,
                          s.amx, s.scores);
        const bool whole = sees_whole(p, first, last, begin, end);
        softmax_of<Cache>(p, whole)(p, at, begin, end - begin, kv_head, row, rows, s, state);
        amx_values<Cache>(s.probabilities, s.corrections + state, s.units + state, at, next,
                          whole ? nullptr : s.lows + state, s.highs + state, rows, p.layout.padded, s.amx,
                          reinterpret_cast<char*>(s.scores), values, s.split.output + state * p.layout.padded);
        next.fetch = false;  // later rows find what these have fetched
    }
}
#endif

template <class Cache>
PELTON_INLINE void attend_keys(const Problem& p, const AttentionTile& tile, int64_t kv_head, int64_t base,
                               const Scratch& s, TileAddress at, const TileAddress& next, int64_t begin, int64_t end,
                               [[maybe_unused]] AmxTiles& tiles) {
    if (Cache::kExpanded) at = expand_tile(at, next, p.layout.lane_rows, p.layout.padded, s.expanded);
#if defined(__AMX_TILE__)
    if (takes_tiles<Cache>(tile.row_end - tile.row_begin, p.head_dim)) {
        attend_by_tiles<Cache>(p, tile, kv_head, base, s, at, next, begin, end, tiles);
        return;
    }
#endif
    constexpr bool kOnlyTiles = kTiles && Cache::kDot && !Cache::kBytes;
    if constexpr (!kOnlyTiles) attend_tile<Cache>(p, tile, kv_head, base, s, at, next, begin, end);
}

template <class Cache>
void attend(const Problem& p, const AttentionTile& tile, Scratch s, AmxTiles& tiles) {
    const Call& call = *p.call;
    const int64_t head_rows = tile.row_end - tile.row_begin, rows = head_rows * tile.kv_heads;
    const int64_t padded = p.layout.padded;
    load_queries<Cache>(p, tile, s);
    const int64_t first = position_of(p, tile.row_begin), last = position_of(p, tile.row_end - 1);
    const int64_t seen = p.window && first >= p.window ? (first - p.window + 1) / kKeyTile * kKeyTile : 0;
    const int64_t until = last + 1 < tile.split_end * kSplit ? last + 1 : tile.split_end * kSplit;
    int64_t begin = seen > tile.split_begin * kSplit ? seen : tile.split_begin * kSplit;
    const auto end_of = [&](int64_t from) { return until - from < kKeyTile ? until : from + kKeyTile; };
    TileAddress at = address_tile(p, tile.kv_head, begin, end_of(begin));
    for (int64_t split = tile.split_begin; split < tile.split_end; ++split) {
        for (int64_t i = 0; i < rows; ++i) s.split.maxima[i] = kMinusInfinity;
        for (int64_t i = 0; i < rows * kW; i += kW) store(s.lane_sums + i, VF{});
        for (int64_t i = 0; i < rows * padded; i += kW) store(s.split.output + i, VF{});
        const int64_t split_end = (split + 1) * kSplit < until ? (split + 1) * kSplit : until;
        while (begin < split_end) {
            const int64_t end = end_of(begin);
            for (int64_t h = 0; h < tile.kv_heads; ++h) {
                TileAddress next = at;
                if (h + 1 < tile.kv_heads) {
                    next = address_tile(p, tile.kv_head + h + 1, begin, end);
                } else if (end < until) {
                    next = address_tile(p, tile.kv_head, end, end_of(end));
                }
                attend_keys<Cache>(p, tile, tile.kv_head + h, h * head_rows, s, at, next, begin, end, tiles);
                at = next;
            }
            begin = end;
        }
        for (int64_t i = 0; i < rows; ++i) s.split.sums[i] = sum(load(s.lane_sums + i * kW));
        if (tile.slot >= 0) {
            const int64_t floats = slot_floats(p.head_dim);
            const int64_t slot = tile.slot + (split - tile.split_begin) * tile.slot_stride;
            for (int64_t i = 0; i < rows; ++i) {
                float* to = reinterpret_cast<float*>(call.shared) + (slot + i) * floats;
                __builtin_memcpy(to, s.split.output + i * padded, padded * 4);
                to[padded] = s.split.maxima[i];
                to[padded + 1] = s.split.sums[i];
            }
        } else if (split == tile.split_begin) {
            const State swapped = s.total;
            s.total = s.split;
            s.split = swapped;
        } else {
            for (int64_t i = 0; i < rows; ++i) {
                merge_row(s.total.output + i * padded, s.total.maxima + i, s.total.sums + i,
                          s.split.output + i * padded, s.split.maxima[i], s.split.sums[i], padded);
            }
        }
    }
    if (tile.slot >= 0) return;
    for (int64_t i = 0; i < rows; ++i) {
        write_row(p, tile.kv_head + i / head_rows, tile.row_begin + i % head_rows, s.total.output + i * padded,
                  s.total.sums[i]);
    }
}

// ---- stages

Problem problem_of(const Call& call) {
    const int64_t* ints = call.ints;
    Problem p = {};
    p.call = &call;
    p.layout = cache_layout(ints[kKvHeads], ints[kHeadDim], ints[kBlockSize], ints[kFormat]);
    p.head_dim = ints[kHeadDim];
    p.block_size = ints[kBlockSize];
    p.group = ints[kHeads] / ints[kKvHeads];
    p.window = ints[kWindow];
    p.value_row = p.layout.value_bytes / p.block_size;
    p.q_stride = (p.head_dim * 4 + 63) / 64 * 64;
    const float scale = call.floats[kScaleFactor], cap = call.floats[kCap];
    p.slopes = reinterpret_cast<const float*>(call.operands[kSlopes].data);
    p.cache = call.operands[kCache].data;
    p.lane_rows = ints[kFormat] == kCacheFp8 ? p.head_dim / 2 : p.layout.lane_rows;
    p.cap = cap * kLog2e;
    p.scale = cap != 0.0f ? scale / cap : scale * kLog2e;
    return p;
}

void locate(Problem& p, int64_t sequence) {
    const Call& call = *p.call;
    const int32_t* query_start = reinterpret_cast<const int32_t*>(call.operands[kQueryStart].data);
    p.block_table =
        reinterpret_cast<const int32_t*>(call.operands[kBlockTable].data) + sequence * call.ints[kTableWidth];
    p.query_start = query_start[sequence];
    p.seq_len = reinterpret_cast<const int32_t*>(call.operands[kSeqLens].data)[sequence];
    p.first_position = p.seq_len - (query_start[sequence + 1] - query_start[sequence]);
}

void attention_tiles(const Call& call, int64_t first, int64_t end, Worker& worker) {
    Problem p = problem_of(call);
    char* at = worker.scratch;
    const auto take = [&](int64_t bytes) {
        char* taken = at;
        at += bytes;
        return taken;
    };
    const auto floats = [&](int64_t count) { return reinterpret_cast<float*>(take(count * 4)); };
    Scratch s;
    s.queries = take(kRowTile * p.q_stride);
    s.split.output = floats(kRowTile * p.layout.padded);
    s.total.output = floats(kRowTile * p.layout.padded);
    s.lane_sums = floats(kRowTile * 16);
    constexpr int kScoreRows = kTiles ? kAmxTileRows : kMostTileRows;
    s.scores = floats(kScoreRows * kKeyTile);
    s.probabilities = take(kScoreRows * kKeyTile * 4);
    float** const numbers[] = {&s.split.maxima, &s.split.sums, &s.total.maxima, &s.total.sums,
                               &s.corrections,  &s.units,      &s.factors};
    for (float** per_row : numbers) *per_row = floats(kRowTile);
    s.lows = reinterpret_cast<int32_t*>(floats(kRowTile));
    s.highs = reinterpret_cast<int32_t*>(floats(kRowTile));
    s.biases = reinterpret_cast<int32_t*>(floats(kRowTile));
    s.positions = reinterpret_cast<int32_t*>(floats(kRowTile));
    s.expanded = call.ints[kFormat] == kCacheFp8 ? take(2 * kKeyTile * p.layout.padded * 2) : nullptr;
    s.amx = amx_scratch(at, p.layout.padded);

    AmxTiles amx;
    const AttentionTile* tiles = static_cast<const AttentionWork*>(call.plan)->tiles;
    for (int64_t i = first; i < end; ++i) {
        locate(p, tiles[i].sequence);
        switch (call.ints[kFormat]) {
            case kCacheBf16:
                attend<Bf16Cache>(p, tiles[i], s, amx);
                break;
            case kCacheInt8:
                attend<Int8Cache>(p, tiles[i], s, amx);
                break;
            case kCacheFp8:
                attend<Fp8Cache>(p, tiles[i], s, amx);
                break;
            case kCacheF16:
                attend<F16Cache>(p, tiles[i], s, amx);
                break;
            default:
                attend<F32Cache>(p, tiles[i], s, amx);
        }
    }
}

void merge_splits(const Call& call, int64_t first, int64_t end, Worker& worker) {
    Problem p = problem_of(call);
    const AttentionMerge* merges = static_cast<const AttentionWork*>(call.plan)->merges;
    const int64_t padded = p.layout.padded, floats = slot_floats(p.head_dim);
    float* output = reinterpret_cast<float*>(worker.scratch);
    for (int64_t i = first; i < end; ++i) {
        const AttentionMerge& merge = merges[i];
        locate(p, merge.sequence);
        const float* slot = reinterpret_cast<const float*>(call.shared) + merge.slot * floats;
        __builtin_memcpy(output, slot, padded * 4);
        float maximum = slot[padded], sum = slot[padded + 1];
        for (int64_t n = 1; n < merge.splits; ++n) {
            slot += merge.stride * floats;
            merge_row(output, &maximum, &sum, slot, slot[padded], slot[padded + 1], padded);
        }
        write_row(p, merge.kv_head, merge.row, output, sum);
    }
}

}  // namespace

extern const Kernel attention_kernels[];
const Kernel attention_kernels[] = {{"attention", {attention_tiles, merge_splits}, 0}, {nullptr, {}, 0}};

}  // namespace pelton::cpu::PELTON_ISA
