// What tile.h does, on AMX tiles and for up to 16 rows: the cache lies as second factors do. 16 lanes of 16 keys
// are one, their rows as far apart as a block has tokens. So are 32 (bf16) or 64 (int8) tokens of 16 columns, once
// their 16-token groups follow one another: those that do not are copied. First factors are queries and
// probabilities as rows of whole steps of 64 bytes. Private to kernels.cc.
//
// Batch invariance: a bf16 score is the sum of one partial sum per 32 dims, in ascending order, and what a key tile
// adds to an output the sum of one per 32 tokens, each made of an even and an odd chain. Rows do not meet. A key
// that a row does not see has a probability of 0, and its product with whatever is finite changes no bit: chains
// and sums start from +0, which a zero of either sign leaves as it is. Hence the sum of a key tile, not the output,
// starts in the tile, and rows that see nothing are left out. Values that are not finite are another matter: see
// amx_values. Since vdpbf16ps sums in another order, bf16 goes through here whatever the number of rows. int8 is
// exact.
#pragma once

#include "cpu/amx_tiles.h"
#include "cpu/ops/attention/tile.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)

namespace pelton::cpu::PELTON_ISA {
namespace {

constexpr bool kTiles = true;
// From here on tiles take int8 products, below they would mostly be empty. Not measured, nor is whether copying
// values beats steps of 16 tokens, which would find them in place and leave half of a tile empty.
constexpr int64_t kAmxLeastByteRows = 4;

constexpr int kTileGroups = kKeyTile / kTokenGroup;
static_assert(kTileGroups == 4 && kAmxRows == kAmxTileRows && kKeyTile * 4 == 4 * kAmxRowBytes,
              "four results of 16 keys or columns a row");
constexpr int64_t kAmxSumsRow = kKeyTile * 4;  // bytes of a row of sums: 64 keys, or 64 columns

struct AmxScratch {
    char* keys;    // [group][16][64]: the last, incomplete step in depth, padded with zeros
    char* values;  // of a key tile, as in the cache but one group behind the other
    char* sums;    // [16][kAmxSumsRow]
};

PELTON_INLINE AmxScratch amx_scratch(char* at, int64_t padded) {
    const int64_t keys = kTileGroups * kAmxRows * kAmxRowBytes, values = kKeyTile * padded * 2;
    return {at, at + keys, at + keys + values};
}

// Whether rows of one KV head are multiplied by tiles. Queries of int8 caches with few dims would not fit in their
// scratch once both parts are padded to a step.
template <class Cache>
PELTON_INLINE bool takes_tiles(int64_t head_rows, int64_t head_dim) {
    if constexpr (!Cache::kDot) return false;
    return !Cache::kBytes || (head_rows >= kAmxLeastByteRows && head_dim > kAmxRows);
}

// Rows of a tile: as equal as can be, for one configuration to serve a whole piece of work. The last tile may
// multiply up to two rows more than there are, of whatever lies behind; nobody looks at their results.
PELTON_INLINE int64_t amx_height(int64_t rows) {
    const int64_t tiles = (rows + kAmxRows - 1) / kAmxRows;
    return (rows + tiles - 1) / tiles;
}

// bf16: one first factor for four second ones. int8: two, the high and the low bytes, for two second ones.
template <class Cache>
PELTON_INLINE void amx_shape(AmxTiles& tiles, int64_t head_rows) {
    const int height = static_cast<int>(amx_height(head_rows));
    Cache::kBytes ? tiles.shape_pair(height, height, kAmxRowBytes) : tiles.shape_single(height, kAmxRowBytes);
}

// Bytes from the high to the low bytes of a query.
PELTON_INLINE int64_t amx_query_part(int64_t lane_rows) {
    return (lane_rows * 4 + kAmxRowBytes - 1) / kAmxRowBytes * kAmxRowBytes;
}

template <class Cache>
PELTON_INLINE void amx_store_query(char* to, const uint32_t* packed, int64_t lane_rows, int64_t q_stride) {
    __builtin_memset(to, 0, q_stride);
    __builtin_memcpy(to, packed, lane_rows * 4);
    if (Cache::kBytes) __builtin_memcpy(to + amx_query_part(lane_rows), packed + lane_rows, lane_rows * 4);
}

template <class Product>
PELTON_INLINE void amx_one_by_four(const char* a, int64_t a_stride, const char* const (&w)[4], int64_t w_stride) {
    tile_load<4>(a, a_stride);
    tile_load<5>(w[0], w_stride);
    tile_load<6>(w[1], w_stride);
    tile_load<7>(w[2], w_stride);
    Product::template dot<0, 4, 5>();
    tile_load<5>(w[3], w_stride);
    Product::template dot<1, 4, 6>();
    Product::template dot<2, 4, 7>();
    Product::template dot<3, 4, 5>();
}

// high: results 0 and 1; low: 2 and 3.
template <class Product, int kVecs>
PELTON_INLINE void amx_two_by_two(const char* high, const char* low, int64_t a_stride, const char* w0, const char* w1,
                                  int64_t w_stride) {
    tile_load<6>(w0, w_stride);
    tile_load<4>(high, a_stride);
    if (kVecs > 1) tile_load<7>(w1, w_stride);
    tile_load<5>(low, a_stride);
    Product::template dot<0, 4, 6>();
    if (kVecs > 1) Product::template dot<1, 4, 7>();
    Product::template dot<2, 5, 6>();
    if (kVecs > 1) Product::template dot<3, 5, 7>();
}

// ---- scores [rows][64] = queries x keys x factors

// The last step in depth, if it is incomplete: what lies behind the keys may be a NaN, whose product with the zeros
// behind the queries would get in.
PELTON_APART void amx_copy_last_keys(const TileAddress& at, int64_t lane_rows, char* to) {
    const int64_t first = lane_rows / kAmxRows * kAmxRows;
    if (first == lane_rows) return;
    for (const char* group : at.keys) {
        for (int64_t lane = first; lane < first + kAmxRows; ++lane, to += kAmxRowBytes) {
            store_u32(to, lane < lane_rows ? load_u32(group + lane * at.key_row) : VU{});
        }
    }
}

// Keys that nobody sees are multiplied as well; their scores are masked.
template <class Cache>
PELTON_APART void amx_scores(const char* q, int64_t q_stride, const float* factors, const TileAddress& at,
                             const TileAddress& next, int64_t lane_rows, int64_t rows, const AmxScratch& scratch,
                             float* scores) {
    const auto keys_of = [&](int group, int64_t lane) {
        return lane_rows - lane < kAmxRows ? scratch.keys + group * kAmxRows * kAmxRowBytes
                                           : at.keys[group] + lane * at.key_row;
    };
    const auto stride_of = [&](int64_t lane) { return lane_rows - lane < kAmxRows ? kAmxRowBytes : at.key_row; };
    const auto fetch = [&](int64_t lane) {
        const int64_t end = lane_rows - lane < kAmxRows ? lane_rows : lane + kAmxRows;
        for (; lane < end; ++lane) fetch_keys<Cache>(next, lane, lane * at.key_row);
    };
    char *high = reinterpret_cast<char*>(scores), *low = scratch.sums;
    if constexpr (Cache::kBytes) {
        const char* q_low = q + amx_query_part(lane_rows);
        for (int group = 0; group < kTileGroups; group += 2) {
            tile_zero_results();
            for (int64_t lane = 0; lane < lane_rows; lane += kAmxRows) {
                if (next.fetch && group == 0) fetch(lane);
                amx_two_by_two<AmxSigned, 2>(q + lane * 4, q_low + lane * 4, q_stride, keys_of(group, lane),
                                             keys_of(group + 1, lane), stride_of(lane));
            }
            tile_store<0>(high + group * kAmxRowBytes, kAmxSumsRow);
            tile_store<1>(high + (group + 1) * kAmxRowBytes, kAmxSumsRow);
            tile_store<2>(low + group * kAmxRowBytes, kAmxSumsRow);
            tile_store<3>(low + (group + 1) * kAmxRowBytes, kAmxSumsRow);
        }
    } else {
        tile_zero_results();
        for (int64_t lane = 0; lane < lane_rows; lane += kAmxRows) {
            if (next.fetch) fetch(lane);
            const char* const keys[] = {keys_of(0, lane), keys_of(1, lane), keys_of(2, lane), keys_of(3, lane)};
            amx_one_by_four<AmxBf16>(q + lane * 4, q_stride, keys, stride_of(lane));
        }
        tile_store<0>(high, kAmxSumsRow);
        tile_store<1>(high + kAmxRowBytes, kAmxSumsRow);
        tile_store<2>(high + 2 * kAmxRowBytes, kAmxSumsRow);
        tile_store<3>(high + 3 * kAmxRowBytes, kAmxSumsRow);
    }
    for (int64_t m = 0; m < rows; ++m) {
        PELTON_UNROLL
        for (int v = 0; v < kKeyTile / kW; ++v) {
            float* to = scores + m * kKeyTile + v * kW;
            VF sum = load(to);
            if constexpr (Cache::kBytes) {
                const VU parts = (as_u32(sum) << 7) + load_u32(low + m * kAmxSumsRow + v * kAmxRowBytes);
                sum = to_float(parts);
            }
            store(to, sum * factors[m]);
        }
    }
}

// ---- output [rows][padded] = output * correction + probabilities x values

// The values of a key tile as second factors: 16 rows per step, as far apart as in the cache.
struct AmxValues {
    const char* steps[2];  // of 32 tokens, or one of 64
    int64_t low, high;     // the keys that are there, zeros for others; none before the first use
    bool checked, finite;  // finite: if checked
};

// Copies the values of keys [low, high), and zeros for the others; returns whether all are finite.
template <class Cache>
PELTON_APART bool amx_copy_values(const TileAddress& at, int64_t low, int64_t high, int64_t row_bytes, char* to) {
    if constexpr (Cache::kBytes) {
        for (const char* group : at.values) {
            __builtin_memcpy(to, group, kTokenGroup / 4 * row_bytes);
            to += kTokenGroup / 4 * row_bytes;
        }
        return true;
    } else {
        __m512i largest = _mm512_setzero_si512();
        for (int64_t key = 0; key < kKeyTile; key += 2, to += row_bytes) {
            const char* from = at.values[key / kTokenGroup] + key % kTokenGroup / 2 * row_bytes;
            const uint32_t mask =
                (low <= key && key < high ? 0xffffu : 0u) | (low <= key + 1 && key + 1 < high ? 0xffff0000u : 0u);
            for (int64_t byte = 0; byte < row_bytes; byte += kAmxRowBytes) {
                const VU lanes = load_u32(from + byte) & mask;
                store_u32(to + byte, lanes);
                largest = _mm512_max_epu16(largest, reinterpret_cast<__m512i>(lanes & 0x7fff7fffu));
            }
        }
        return _mm512_cmpge_epu16_mask(largest, _mm512_set1_epi16(0x7f80)) == 0;
    }
}

// Keys [low, high), in place if all 64 are asked for, unchecked, and the groups of a step follow one another.
template <class Cache>
PELTON_INLINE void amx_take_values(AmxValues& values, const TileAddress& at, int64_t low, int64_t high, bool check,
                                   int64_t row_bytes, char* copy) {
    if (values.low == low && values.high == high && (values.checked || !check)) return;
    values.low = low;
    values.high = high;
    values.checked = check;
    const int64_t group_bytes = kTokenGroup / Cache::kStep * row_bytes;
    bool in_place = !check;
    for (int i = 1; i < kTileGroups; ++i) {
        const bool follows = at.values[i] - at.values[i - 1] == group_bytes;
        in_place = in_place && (follows || (!Cache::kBytes && i == 2));
    }
    values.steps[0] = in_place ? at.values[0] : copy;
    values.steps[1] = in_place ? at.values[2] : copy + 2 * group_bytes;
    if (!in_place) values.finite = amx_copy_values<Cache>(at, low, high, row_bytes, copy);
}

// `kVecs` times 16 columns from column `col` on of what a key tile adds, to sums of kAmxSumsRow a row.
template <class Cache, int kVecs>
PELTON_INLINE void amx_value_columns(const char* p, const AmxValues& values, const TileAddress& next, int64_t row_bytes,
                                     int64_t col, char* high, char* low) {
    static_assert(kVecs == 1 || kVecs == 4);
    constexpr int64_t kStride = kWeightBytes<Cache>;
    const auto fetch = [&](int step) {
        constexpr int kGroupRows = kTokenGroup / Cache::kStep;
        for (int row = step * kAmxRows; row < (step + 1) * kAmxRows; ++row) {
            const char* line = next.values[row / kGroupRows] + row % kGroupRows * row_bytes + col * 4;
            PELTON_UNROLL
            for (int v = 0; v < kVecs; ++v) __builtin_prefetch(line + v * kAmxRowBytes);
        }
    };
    if constexpr (Cache::kBytes) {
        if (next.fetch) fetch(0);
        const char* w = values.steps[0] + col * 4;
        constexpr int kPair = kVecs > 1 ? 2 : 1;
        PELTON_UNROLL
        for (int v = 0; v < kVecs; v += 2) {
            tile_zero<0>();
            if (kPair > 1) tile_zero<1>();
            tile_zero<2>();
            if (kPair > 1) tile_zero<3>();
            amx_two_by_two<AmxUnsigned, kPair>(p, p + kKeyTile, kStride, w + v * kAmxRowBytes,
                                               w + (v + 1) * kAmxRowBytes, row_bytes);
            tile_store<0>(high + v * kAmxRowBytes, kAmxSumsRow);
            if (kPair > 1) tile_store<1>(high + (v + 1) * kAmxRowBytes, kAmxSumsRow);
            tile_store<2>(low + v * kAmxRowBytes, kAmxSumsRow);
            if (kPair > 1) tile_store<3>(low + (v + 1) * kAmxRowBytes, kAmxSumsRow);
        }
    } else {
        tile_zero<0>();
        if (kVecs > 1) {
            tile_zero<1>();
            tile_zero<2>();
            tile_zero<3>();
        }
        for (int step = 0; step < 2; ++step) {
            if (next.fetch) fetch(step);
            const char *w = values.steps[step] + col * 4, *a = p + step * kAmxRowBytes;
            if constexpr (kVecs > 1) {
                const char* const columns[] = {w, w + kAmxRowBytes, w + 2 * kAmxRowBytes, w + 3 * kAmxRowBytes};
                amx_one_by_four<AmxBf16>(a, kStride, columns, row_bytes);
            } else {
                tile_load<4>(a, kStride);
                tile_load<5>(w, row_bytes);
                AmxBf16::dot<0, 4, 5>();
            }
        }
        tile_store<0>(high, kAmxSumsRow);
        if (kVecs > 1) {
            tile_store<1>(high + kAmxRowBytes, kAmxSumsRow);
            tile_store<2>(high + 2 * kAmxRowBytes, kAmxSumsRow);
            tile_store<3>(high + 3 * kAmxRowBytes, kAmxSumsRow);
        }
    }
}

// Row m sees keys [lows[m], highs[m]), all of them if `lows` is null. Values are taken with zeros where no row sees
// them. If one of those left is not finite and may belong to a key that another row does not see, rows that see the
// same take their values once more, with zeros where they do not. `spare`: as many bytes as the sums.
template <class Cache>
PELTON_APART void amx_values(const char* p, const float* corrections, [[maybe_unused]] const float* units,
                             const TileAddress& at, const TileAddress& next, const int32_t* lows, const int32_t* highs,
                             int64_t rows, int64_t padded, const AmxScratch& scratch, char* spare, AmxValues& values,
                             float* out) {
    const int64_t row_bytes = padded * 4;
    int64_t low = 0, high = kKeyTile;
    const bool check = lows && !Cache::kBytes;  // integers are finite
    if (check) {
        low = kKeyTile;
        high = 0;
        for (int64_t m = 0; m < rows; ++m) {
            if (lows[m] == highs[m]) continue;
            low = lows[m] < low ? lows[m] : low;
            high = highs[m] > high ? highs[m] : high;
        }
    }
    amx_take_values<Cache>(values, at, low, high, check, row_bytes, scratch.values);
    const bool apart = check && !values.finite;
    for (int64_t row = 0, end = rows; row < rows; row = end, end = rows) {
        if (apart) {
            end = row + 1;
            while (end < rows && lows[end] == lows[row] && highs[end] == highs[row]) ++end;
            amx_take_values<Cache>(values, at, lows[row], highs[row], true, row_bytes, scratch.values);
        }
        for_columns(padded, [&]<int kVecs>(int64_t col) {
            amx_value_columns<Cache, kVecs>(p, values, next, row_bytes, col, scratch.sums, spare);
            for (int64_t m = row; m < end; ++m) {
                if (lows && lows[m] == highs[m]) continue;
                PELTON_UNROLL
                for (int v = 0; v < kVecs; ++v) {
                    const int64_t from = m * kAmxSumsRow + v * kAmxRowBytes;
                    const VU sum = load_u32(scratch.sums + from);
                    float* to = out + m * padded + col + v * kW;
                    if constexpr (Cache::kBytes) {
                        const VU parts = (sum << 8) + load_u32(spare + from);
                        store(to, fma(to_float(parts), splat(units[m]), load(to) * corrections[m]));
                    } else {
                        store(to, fma(load(to), splat(corrections[m]), as_float(sum)));
                    }
                }
            }
        });
    }
}

}  // namespace
}  // namespace pelton::cpu::PELTON_ISA

#else

namespace pelton::cpu::PELTON_ISA {
namespace {

constexpr bool kTiles = false;
struct AmxTiles {};
struct AmxScratch {};
PELTON_INLINE AmxScratch amx_scratch(char*, int64_t) { return {}; }
template <class Cache>
PELTON_INLINE bool takes_tiles(int64_t, int64_t) {
    return false;
}
template <class Cache>
PELTON_INLINE void amx_store_query(char*, const uint32_t*, int64_t, int64_t) {}

}  // namespace
}  // namespace pelton::cpu::PELTON_ISA

#endif
