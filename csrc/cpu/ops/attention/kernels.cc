// Flash-style attention: a tile of rows walks the key tiles at absolute positions and keeps a running
// maximum, sum and output per row. Scores of 64 keys, then probabilities, then values, each as a small
// matrix product in registers. With vdpbf16ps and a bf16 cache, queries and probabilities are rounded
// to bf16; otherwise the arithmetic is f32.
//
// Batch invariance: key tiles start at multiples of kKeyTile, and every operation on a row is done in an
// order that depends on nothing but the key positions. A tile that is masked for a row leaves it as it is.
#include "cpu/ops/attention/contract.h"
#include "cpu/row_tiles.h"
#include "cpu/simd_math.h"

namespace pelton::cpu::PELTON_ISA {
namespace {

using namespace attention;

constexpr float kMinusInfinity = -__builtin_inff();

struct F32Cache {
    static constexpr bool kPairs = false, kDot = false;
    static constexpr int kTokenBytes = 4;  // step between neighbouring tokens of a key row
};
struct Bf16Cache {
    static constexpr bool kPairs = true, kDot = kBf16Dot;
    static constexpr int kTokenBytes = 4;  // a pair of dims
};

struct Scratch {
    char* queries;        // [kRowTile][padded], f32, or bf16 when kDot
    float* scores;        // [kRowTile][kKeyTile]
    char* probabilities;  // the same as f32, or bf16 when kDot
    float* output;        // [kRowTile][padded]
    float *maxima, *sums, *corrections;
    int32_t *lows, *highs;  // the keys [low, high) of the current tile that a row sees
};

struct Problem {
    const Call* call;
    CacheLayout layout;
    int64_t head_dim, block_size, group, window;
    float scale, cap;
    const int32_t* block_table;       // row of this sequence
    int64_t seq_len, first_position;  // of query token 0
    const char* cache;                // of this KV head in block 0
};

// Where the 16-token groups of a key tile lie; groups beyond the last token repeat the last one.
struct TileAddress {
    const char* keys[kKeyTile / kTokenGroup];
    const char* values[kKeyTile / kTokenGroup];
};

TileAddress address_tile(const Problem& p, int64_t begin, int64_t end) {
    TileAddress at;
    const int64_t value_row = p.layout.padded * (p.call->ints[kFormat] == kCacheBf16 ? 2 : 4);  // per token
    for (int i = 0; i < kKeyTile / kTokenGroup; ++i) {
        int64_t token = begin + i * kTokenGroup;
        if (token >= end) token = (end - 1) / kTokenGroup * kTokenGroup;
        const int64_t inside = token % p.block_size;
        const char* block = p.cache + p.block_table[token / p.block_size] * p.layout.block_bytes;
        at.keys[i] = block + inside * 4;
        at.values[i] = block + p.layout.key_bytes + inside * value_row;
    }
    return at;
}

// ---- scores [rows][64] = queries x keys

template <class Cache, int kRows>
void score_tile(const char* q, int64_t q_stride, const TileAddress& at, int64_t head_dim, int64_t block_size,
                int64_t num_keys, float* scores) {
    for (int64_t key = 0; key < num_keys; key += kTileVecs * kW) {
        VF acc[kRows][kTileVecs] = {};
        const char* k[kTileVecs];
        PELTON_UNROLL
        for (int v = 0; v < kTileVecs; ++v) {
            const int64_t token = key + v * kW;
            k[v] = at.keys[token / kTokenGroup] + token % kTokenGroup * Cache::kTokenBytes;
        }
        const int64_t key_row = block_size * 4;
        const int step = Cache::kPairs ? 2 : 1;
        const char* qp = q;
        for (int64_t d = 0; d < head_dim; d += step) {
            VU lanes[kTileVecs];
            PELTON_UNROLL
            for (int v = 0; v < kTileVecs; ++v) {
                lanes[v] = load_u32(k[v]);
                k[v] += key_row;
            }
            PELTON_UNROLL
            for (int m = 0; m < kRows; ++m) {
                const float* x = reinterpret_cast<const float*>(qp + m * q_stride);
                if constexpr (Cache::kDot) {
#if defined(__AVX512BF16__)
                    VU pair = splat_u32(pair_at(x));
                    PELTON_UNROLL
                    for (int v = 0; v < kTileVecs; ++v) acc[m][v] = dot_pairs(acc[m][v], pair, lanes[v]);
#endif
                } else if constexpr (Cache::kPairs) {
                    VF x0 = splat(x[0]), x1 = splat(x[1]);
                    PELTON_UNROLL
                    for (int v = 0; v < kTileVecs; ++v) {
                        acc[m][v] = fma(x0, pair_low(lanes[v]), acc[m][v]);
                        acc[m][v] = fma(x1, pair_high(lanes[v]), acc[m][v]);
                    }
                } else {
                    VF x0 = splat(x[0]);
                    PELTON_UNROLL
                    for (int v = 0; v < kTileVecs; ++v) acc[m][v] = fma(x0, as_float(lanes[v]), acc[m][v]);
                }
            }
            qp += Cache::kDot ? 4 : 4 * step;
        }
        PELTON_UNROLL
        for (int m = 0; m < kRows; ++m) {
            PELTON_UNROLL
            for (int v = 0; v < kTileVecs; ++v) store(scores + m * kKeyTile + key + v * kW, acc[m][v]);
        }
    }
}

// ---- output [rows][padded] = output * correction + probabilities x values

// What the rows of a register tile see of a key tile: all of them [begin, end), some of them [first, last),
// row m [lows[m], highs[m]). The inner ends are even, as bf16 keys come in pairs.
struct Seen {
    const int32_t *lows, *highs;
    int32_t first, begin, end, last;
};

// acc += probabilities x values of a key or pair of keys. `mask` is what of each lane counts: the other key
// of a pair may be infinite or, if not written yet, anything, and not even its product with 0 may get in.
template <class Cache, int kVecs>
PELTON_INLINE void take_keys(VF (&acc)[kVecs], const char* p, const VU (&lanes)[kVecs], uint32_t mask) {
    if constexpr (Cache::kDot) {
#if defined(__AVX512BF16__)
        VU pair = splat_u32(pair_at(p));
        PELTON_UNROLL
        for (int v = 0; v < kVecs; ++v) acc[v] = dot_pairs(acc[v], pair, lanes[v] & mask);
#endif
    } else {
        const float* x = reinterpret_cast<const float*>(p);
        if (!Cache::kPairs || mask & 0xffffu) {
            VF x0 = splat(x[0]);
            PELTON_UNROLL
            for (int v = 0; v < kVecs; ++v) {
                acc[v] = fma(x0, Cache::kPairs ? pair_low(lanes[v]) : as_float(lanes[v]), acc[v]);
            }
        }
        if (Cache::kPairs && mask >> 16) {
            VF x1 = splat(x[1]);
            PELTON_UNROLL
            for (int v = 0; v < kVecs; ++v) acc[v] = fma(x1, pair_high(lanes[v]), acc[v]);
        }
    }
}

// kEdges: some keys are seen by some rows only. Most tiles have none, and are spared the code for it.
template <class Cache, bool kEdges, int kRows, int kVecs>
PELTON_INLINE void value_columns(const char* p, const float* corrections, const TileAddress& at, const Seen& seen,
                                 int64_t padded, int64_t col, float* out) {
    VF acc[kRows][kVecs];
    PELTON_UNROLL
    for (int m = 0; m < kRows; ++m) {
        PELTON_UNROLL
        for (int v = 0; v < kVecs; ++v) acc[m][v] = load(out + m * padded + col + v * kW) * corrections[m];
    }
    constexpr int kStep = Cache::kPairs ? 2 : 1, kPBytes = Cache::kDot ? 2 : 4, kPStride = kKeyTile * kPBytes;
    const int64_t row_bytes = padded * 4;
    const auto values_at = [&](int64_t j) {
        return at.values[j / kTokenGroup] + j % kTokenGroup / kStep * row_bytes + col * 4;
    };
    [[maybe_unused]] const auto edge = [&](int64_t from, int64_t to) {
        for (int64_t j = from; j < to; j += kStep) {
            const char* w = values_at(j);
            VU lanes[kVecs];
            PELTON_UNROLL
            for (int v = 0; v < kVecs; ++v) lanes[v] = load_u32(w + v * kW * 4);
            PELTON_UNROLL
            for (int m = 0; m < kRows; ++m) {
                const int64_t low = seen.lows[m], high = seen.highs[m];
                uint32_t mask = 0;
                if (low <= j && j < high) mask = Cache::kPairs ? 0xffffu : 0xffffffffu;
                if (Cache::kPairs && low <= j + 1 && j + 1 < high) mask |= 0xffff0000u;
                if (mask) take_keys<Cache>(acc[m], p + m * kPStride + j * kPBytes, lanes, mask);
            }
        }
    };
    if constexpr (kEdges) edge(seen.first, seen.begin);
    for (int64_t begin = seen.begin; begin < seen.end;) {
        const char *w = values_at(begin), *x = p + begin * kPBytes;
        const int64_t group_end = begin / kTokenGroup * kTokenGroup + kTokenGroup;
        const int64_t count = (group_end < seen.end ? group_end : seen.end) - begin;
        begin += count;
        for (int64_t j = 0; j < count; j += kStep) {
            VU lanes[kVecs];
            PELTON_UNROLL
            for (int v = 0; v < kVecs; ++v) lanes[v] = load_u32(w + v * kW * 4);
            w += row_bytes;
            PELTON_UNROLL
            for (int m = 0; m < kRows; ++m)
                take_keys<Cache>(acc[m], x + m * kPStride + j * kPBytes, lanes, 0xffffffffu);
        }
    }
    if constexpr (kEdges) edge(seen.end, seen.last);
    PELTON_UNROLL
    for (int m = 0; m < kRows; ++m) {
        PELTON_UNROLL
        for (int v = 0; v < kVecs; ++v) store(out + m * padded + col + v * kW, acc[m][v]);
    }
}

template <class Cache, bool kEdges, int kRows>
void value_rows(const Scratch& s, int64_t row, const TileAddress& at, const Seen& seen, int64_t padded) {
    const char* p = s.probabilities + row * kKeyTile * (Cache::kDot ? 2 : 4);
    const float* corrections = s.corrections + row;
    float* out = s.output + row * padded;
    int64_t col = 0;
    for (; col + kTileVecs * kW <= padded; col += kTileVecs * kW) {
        value_columns<Cache, kEdges, kRows, kTileVecs>(p, corrections, at, seen, padded, col, out);
    }
    for (; col < padded; col += kW) value_columns<Cache, kEdges, kRows, 1>(p, corrections, at, seen, padded, col, out);
}

template <class Cache, int kRows>
void value_tile(const Scratch& s, int64_t row, const TileAddress& at, int64_t padded) {
    Seen seen = {s.lows + row, s.highs + row, kKeyTile, 0, kKeyTile, 0};
    for (int m = 0; m < kRows; ++m) {
        const int32_t low = seen.lows[m], high = seen.highs[m];
        seen.first = low < seen.first ? low : seen.first;
        seen.begin = low > seen.begin ? low : seen.begin;
        seen.end = high < seen.end ? high : seen.end;
        seen.last = high > seen.last ? high : seen.last;
    }
    seen.first = seen.first / 2 * 2;
    seen.begin = (seen.begin + 1) / 2 * 2;
    seen.end = seen.end / 2 * 2;
    seen.end = seen.end > seen.begin ? seen.end : seen.begin;
    if (seen.first == seen.begin && seen.last == seen.end) {
        value_rows<Cache, false, kRows>(s, row, at, seen, padded);
    } else {
        value_rows<Cache, true, kRows>(s, row, at, seen, padded);
    }
}

// ---- softmax of one row over one key tile

// kMasked: some of the 64 keys are invisible. Visible lanes are computed alike either way.
template <class Cache, bool kMasked>
void softmax_row(const Problem& p, int64_t position, int64_t begin, int64_t low, int64_t high, float slope,
                 const Scratch& s, int64_t row) {
    const VF lanes = lane_numbers();
    const VF first = splat(static_cast<float>(low)), last = splat(static_cast<float>(high));

    float* scores = s.scores + row * kKeyTile;
    VF values[kKeyTile / kW];
    VF maximum = splat(kMinusInfinity);
    PELTON_UNROLL
    for (int v = 0; v < kKeyTile / kW; ++v) {
        VF index = lanes + static_cast<float>(v * kW);
        VF x = load(scores + v * kW) * p.scale;
        if (p.cap != 0.0f) x = tanh(x / p.cap) * p.cap;
        if (slope != 0.0f) x += (index + static_cast<float>(begin - position)) * slope;
        if (kMasked) {
            x = index < first ? splat(kMinusInfinity) : x;
            x = index < last ? x : splat(kMinusInfinity);
        }
        values[v] = x;
        maximum = max(maximum, x);
    }
    const float before = s.maxima[row], tile = max_lane(maximum);
    const float now = before > tile ? before : tile;
    s.maxima[row] = now;
    // While nothing is visible the maximum stays -inf; subtract 0 then, as -inf - -inf is NaN.
    const float shift = now == kMinusInfinity ? 0.0f : now;
    const float correction = before == now ? 1.0f : exp_nonpositive(splat(before - shift))[0];
    s.corrections[row] = correction;

    VF total = {};
    PELTON_UNROLL
    for (int v = 0; v < kKeyTile / kW; ++v) {
        VF e = exp_nonpositive(values[v] - shift);
        if constexpr (Cache::kDot) {
            VH rounded = to_bf16(e);
            store_u16(s.probabilities + (row * kKeyTile + v * kW) * 2, rounded);
            e = pair_low(widen(rounded));  // sum what is used, so that the weights add up to one
        } else {
            store(reinterpret_cast<float*>(s.probabilities) + row * kKeyTile + v * kW, e);
        }
        total += e;
    }
    s.sums[row] = s.sums[row] * correction + sum(total);
}

template <class Cache>
void softmax_tile(const Problem& p, const AttentionTile& tile, const float* slopes, int64_t begin, int64_t num_keys,
                  const Scratch& s) {
    for (int64_t i = 0; i < tile.row_end - tile.row_begin; ++i) {
        const int64_t row = tile.row_begin + i, position = p.first_position + row / p.group;
        const float slope = slopes ? slopes[tile.kv_head * p.group + row % p.group] : 0.0f;
        // Lanes [low, high) are visible to the query.
        int64_t low = 0, high = position + 1 - begin;
        if (p.window && position - p.window + 1 > begin) low = position - p.window + 1 - begin;
        if (high > num_keys) high = num_keys;
        s.lows[i] = static_cast<int32_t>(low < num_keys ? low : num_keys);
        s.highs[i] = static_cast<int32_t>(high > s.lows[i] ? high : s.lows[i]);
        if (low == 0 && high == kKeyTile) {
            softmax_row<Cache, false>(p, position, begin, low, high, slope, s, i);
        } else {
            softmax_row<Cache, true>(p, position, begin, low, high, slope, s, i);
        }
    }
}

template <class Cache>
void attend(const Problem& p, const AttentionTile& tile, const Scratch& s) {
    const Call& call = *p.call;
    const int64_t rows = tile.row_end - tile.row_begin, padded = p.layout.padded, head_dim = p.head_dim;
    const int64_t query_start = reinterpret_cast<const int32_t*>(call.operands[kQueryStart].data)[tile.sequence];
    const float* q = reinterpret_cast<const float*>(call.operands[kQ].data);
    float* out = reinterpret_cast<float*>(call.operands[kOut].data);
    const float* slopes = reinterpret_cast<const float*>(call.operands[kSlopes].data);
    const int64_t q_stride = head_dim * (Cache::kDot ? 2 : 4);

    for (int64_t i = 0; i < rows; ++i) {
        const int64_t row = tile.row_begin + i, head = tile.kv_head * p.group + row % p.group;
        const float* from = q + (query_start + row / p.group) * call.ints[kLdQ] + head * head_dim;
        if constexpr (Cache::kDot) {
            uint16_t* to = reinterpret_cast<uint16_t*>(s.queries + i * q_stride);
            int64_t d = 0;
            for (; d + kW <= head_dim; d += kW) store_u16(to + d, to_bf16(load(from + d)));
            if (d < head_dim) {
                uint16_t last[kW];
                store_u16(last, to_bf16(load_n(from + d, head_dim - d)));
                __builtin_memcpy(to + d, last, (head_dim - d) * 2);
            }
        } else {
            __builtin_memcpy(s.queries + i * q_stride, from, q_stride);
        }
        s.maxima[i] = kMinusInfinity;
        s.sums[i] = 0.0f;
    }
    for (int64_t i = 0; i < rows * padded; i += kW) store(s.output + i, VF{});

    const int64_t first = p.first_position + tile.row_begin / p.group;
    const int64_t last = p.first_position + (tile.row_end - 1) / p.group;
    int64_t begin = p.window && first - p.window + 1 > 0 ? first - p.window + 1 : 0;
    begin = begin / kKeyTile * kKeyTile;
    for (; begin <= last; begin += kKeyTile) {
        const int64_t end = last + 1 - begin < kKeyTile ? last + 1 : begin + kKeyTile;
        const int64_t num_keys = end - begin;
        const TileAddress at = address_tile(p, begin, end);
        for_row_tiles<kTileRows>(rows, [&]<int kRows>(int64_t m) {
            score_tile<Cache, kRows>(s.queries + m * q_stride, q_stride, at, head_dim, p.block_size, num_keys,
                                     s.scores + m * kKeyTile);
        });
        softmax_tile<Cache>(p, tile, slopes, begin, num_keys, s);
        for_row_tiles<kTileRows>(rows, [&]<int kRows>(int64_t m) { value_tile<Cache, kRows>(s, m, at, padded); });
    }

    for (int64_t i = 0; i < rows; ++i) {
        const int64_t row = tile.row_begin + i, head = tile.kv_head * p.group + row % p.group;
        float* to = out + (query_start + row / p.group) * call.ints[kLdOut] + head * head_dim;
        const float* from = s.output + i * padded;
        int64_t d = 0;
        for (; d + kW <= head_dim; d += kW) store(to + d, load(from + d) / s.sums[i]);
        for (; d < head_dim; ++d) to[d] = from[d] / s.sums[i];
    }
}

void attention_tiles(const Call& call, int64_t first, int64_t end, Worker& worker) {
    const int64_t* ints = call.ints;
    Problem p;
    p.call = &call;
    p.layout = cache_layout(ints[kKvHeads], ints[kHeadDim], ints[kBlockSize], ints[kFormat]);
    p.head_dim = ints[kHeadDim];
    p.block_size = ints[kBlockSize];
    p.group = ints[kHeads] / ints[kKvHeads];
    p.window = ints[kWindow];
    p.scale = call.floats[kScaleFactor];
    p.cap = call.floats[kCap];
    Scratch s;
    char* at = worker.scratch;
    s.queries = at;
    s.scores = reinterpret_cast<float*>(at += kRowTile * p.layout.padded * 4);
    s.probabilities = at += kRowTile * kKeyTile * 4;
    s.output = reinterpret_cast<float*>(at += kRowTile * kKeyTile * 4);
    s.maxima = reinterpret_cast<float*>(at += kRowTile * p.layout.padded * 4);
    s.sums = s.maxima + kRowTile;
    s.corrections = s.sums + kRowTile;
    s.lows = reinterpret_cast<int32_t*>(s.corrections + kRowTile);
    s.highs = s.lows + kRowTile;

    const AttentionTile* tiles = static_cast<const AttentionTile*>(call.plan);
    const int32_t* seq_lens = reinterpret_cast<const int32_t*>(call.operands[kSeqLens].data);
    const int32_t* query_start = reinterpret_cast<const int32_t*>(call.operands[kQueryStart].data);
    for (int64_t i = first; i < end; ++i) {
        const AttentionTile& tile = tiles[i];
        const int32_t seq = tile.sequence;
        p.block_table = reinterpret_cast<const int32_t*>(call.operands[kBlockTable].data) + seq * ints[kTableWidth];
        p.seq_len = seq_lens[seq];
        p.first_position = p.seq_len - (query_start[seq + 1] - query_start[seq]);
        p.cache = call.operands[kCache].data + tile.kv_head * p.layout.head_bytes;
        if (ints[kFormat] == kCacheBf16) {
            attend<Bf16Cache>(p, tile, s);
        } else {
            attend<F32Cache>(p, tile, s);
        }
    }
}

}  // namespace

extern const Kernel attention_kernels[];
const Kernel attention_kernels[] = {{"attention", {attention_tiles}, 0}, {nullptr, {}, 0}};

}  // namespace pelton::cpu::PELTON_ISA
