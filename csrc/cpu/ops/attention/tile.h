// A register tile of attention: scores of up to kTileRows rows with a tile of keys, and the product of
// their probabilities with the values, per cache format. Private to kernels.cc.
#pragma once

#include "cpu/ops/attention/contract.h"
#include "cpu/simd_fp8.h"
#include "cpu/simd_int8.h"

namespace pelton::cpu::PELTON_ISA {
namespace {

// Inner loops stay functions of their own: inlined into each other they run out of registers.
#define PELTON_APART __attribute__((noinline))

#if defined(__AVX512VNNI__)
constexpr bool kByteDot = true;
#else
constexpr bool kByteDot = false;
#endif

// kLaneBytes: of a lane in the cache. kStep: how many dims of a key, or tokens of a value, share one. kDot: products
// are taken of whole lanes, so queries and probabilities are packed like the cache: rounded to bf16, or as 16-bit
// integers in two bytes, each byte in a row of its own. Otherwise they are f32, as is the arithmetic. kScaled: keys and
// values have scales. kExpanded: tiles are widened to bf16, and what this says is of those.
struct F32Cache {
    static constexpr int kLaneBytes = 4, kStep = 1;
    static constexpr bool kDot = false, kBytes = false, kScaled = false, kExpanded = false;
};
struct F16Cache : F32Cache {
    static constexpr int kLaneBytes = 2;
};
struct Bf16Cache {
    static constexpr int kLaneBytes = 4, kStep = 2;
    static constexpr bool kDot = kBf16Dot, kBytes = false, kScaled = false, kExpanded = false;
};
struct Int8Cache {
    static constexpr int kLaneBytes = 4, kStep = 4;
    static constexpr bool kDot = kByteDot, kBytes = true, kScaled = true, kExpanded = false;
};
struct Fp8Cache : Bf16Cache {
    static constexpr bool kScaled = true, kExpanded = true;
};

// Bytes of a row of probabilities.
template <class Cache>
constexpr int kWeightBytes = Cache::kDot ? kKeyTile * 2 : kKeyTile * 4;

// Where the 16-token groups of a key tile lie; groups beyond the last token repeat the last one.
struct TileAddress {
    bool fetch;  // into the cache, while the tile before it is worked on
    const char* keys[kKeyTile / kTokenGroup];
    const char* values[kKeyTile / kTokenGroup];
    const char* scales[kKeyTile / kTokenGroup];  // of the keys, if there are any
    int64_t value_scales;                        // bytes from there to those of the values
    int64_t key_row;                             // bytes from a lane of a key to the next
};

template <class Cache>
PELTON_INLINE VU load_lanes(const char* from) {
    if constexpr (Cache::kLaneBytes == 2) return as_u32(from_f16(load_u16(from)));
    return load_u32(from);
}

// Element i of each lane.
template <class Cache>
PELTON_INLINE VF element(VU lanes, int i) {
    if constexpr (Cache::kStep == 1) return as_float(lanes);
    if constexpr (Cache::kStep == 2) return i == 0 ? pair_low(lanes) : pair_high(lanes);
    return __builtin_convertvector(reinterpret_cast<VI>(lanes << (24 - 8 * i)) >> 24, VF);
}

// acc += a row's elements, packed as Cache::kDot says, times those of each lane.
template <class Cache>
PELTON_INLINE VF dot_lanes(VF acc, VU row, VU lanes) {
#if defined(__AVX512BF16__)
    if constexpr (Cache::kStep == 2) return dot_pairs(acc, row, lanes);
#endif
    return acc;
}

// ---- FP8

// A key tile as bf16, in `to`: once for all rows that attend to it. Fetches the lines of the tile after it.
PELTON_APART TileAddress expand_tile(const TileAddress& at, const TileAddress& next, int64_t lane_rows, int64_t padded,
                                     char* to) {
    constexpr int64_t kTileRow = kKeyTile * 4, kGroupBytes = kTokenGroup * 4;
    const auto widen_line = [](const char* from, char* first, char* second) {
        PELTON_UNROLL
        for (int v = 0; v < 16 / kW; ++v) {
            const VU quad = load_u32(from + v * kW * 4);
            store_u32(first + v * kW * 4, fp8_pair(quad, 0));
            store_u32(second + v * kW * 4, fp8_pair(quad, 1));
        }
    };
    TileAddress expanded = at;
    expanded.key_row = kTileRow;
    char* values = to + 2 * lane_rows * kTileRow;
    const int64_t value_row = padded * 4, value_bytes = kTokenGroup / 4 * value_row;
    for (int group = 0; group < kKeyTile / kTokenGroup; ++group) {
        char* keys = to + group * kGroupBytes;
        expanded.keys[group] = keys;
        for (int64_t offset = 0; offset < lane_rows * at.key_row; offset += at.key_row, keys += 2 * kTileRow) {
            __builtin_prefetch(next.keys[group] + offset);
            widen_line(at.keys[group] + offset, keys, keys + kTileRow);
        }
        expanded.values[group] = values;
        for (int64_t row = 0; row < value_bytes; row += value_row, values += 2 * value_row) {
            for (int64_t col = 0; col < value_row; col += 64) {
                __builtin_prefetch(next.values[group] + row + col);
                widen_line(at.values[group] + row + col, values + col, values + value_row + col);
            }
        }
    }
    return expanded;
}

// ---- scores [rows][64] = queries x keys x factors

// Queries lie in 32-bit elements [element][kRows], so that one pointer walks those of a register tile.

// Fetches keys of the tile after this one: processors follow a stream by themselves within a page only, and the
// next block may lie anywhere. A group of 16-bit lanes is half a cache line, which it shares with the next lane of the
// group or with the next group: either way every second one reaches all lines.
template <class Cache>
PELTON_INLINE void fetch_keys(const TileAddress& next, int64_t lane, int64_t offset) {
    constexpr int kStep = 4 / Cache::kLaneBytes;
    PELTON_UNROLL
    for (int i = 0; i < kKeyTile / kTokenGroup; i += kStep) __builtin_prefetch(next.keys[i + lane % kStep] + offset);
}

PELTON_INLINE void fetch_scales(const TileAddress& next) {
    for (const char* scales : next.scales) {
        __builtin_prefetch(scales);
        __builtin_prefetch(scales + next.value_scales);
    }
}

template <class Cache, int kRows>
PELTON_APART void score_tile(const char* q, const float* factors, [[maybe_unused]] const int32_t* biases,
                             const TileAddress& at, const TileAddress& next, int64_t lane_rows, int64_t num_keys,
                             float* scores) {
    const int64_t key_row = at.key_row;
    for (int64_t key = 0; key < num_keys; key += kTileVecs * kW) {
        const char* k[kTileVecs];
        PELTON_UNROLL
        for (int v = 0; v < kTileVecs; ++v) {
            const int64_t token = key + v * kW;
            k[v] = at.keys[token / kTokenGroup] + token % kTokenGroup * Cache::kLaneBytes;
        }
        if constexpr (Cache::kBytes && Cache::kDot) {
#if defined(__AVX512VNNI__)
            // Signed times unsigned: 128 is added to the keys, and its share subtracted in the end.
            VI acc[kRows][kTileVecs] = {};
            for (int part = 0; part < 2; ++part) {
                int64_t offset = 0;
                for (int64_t d = 0; d < lane_rows; ++d, offset += key_row) {
                    VU lanes[kTileVecs];
                    PELTON_UNROLL
                    for (int v = 0; v < kTileVecs; ++v) lanes[v] = load_u32(k[v] + offset) ^ 0x80808080u;
                    if (part == 0 && next.fetch) fetch_keys<Cache>(next, d, offset);
                    PELTON_UNROLL
                    for (int m = 0; m < kRows; ++m) {
                        VU quad = splat_u32(pair_at(q + (d * kRows + m) * 4));
                        PELTON_UNROLL
                        for (int v = 0; v < kTileVecs; ++v) acc[m][v] = dot_bytes(acc[m][v], lanes[v], quad);
                    }
                }
                if (part == 1) break;
                q += lane_rows * kRows * 4;
                PELTON_UNROLL
                for (int m = 0; m < kRows; ++m) {
                    PELTON_UNROLL
                    for (int v = 0; v < kTileVecs; ++v) acc[m][v] <<= 7;
                }
            }
            PELTON_UNROLL
            for (int m = 0; m < kRows; ++m) {
                PELTON_UNROLL
                for (int v = 0; v < kTileVecs; ++v) {
                    store(scores + m * kKeyTile + key + v * kW, to_float(acc[m][v] - biases[m]) * factors[m]);
                }
            }
#endif
        } else {
            VF acc[kRows][kTileVecs] = {};
            const char* x = q;
            int64_t offset = 0;
            for (int64_t d = 0; d < lane_rows; ++d, offset += key_row) {
                VU lanes[kTileVecs];
                PELTON_UNROLL
                for (int v = 0; v < kTileVecs; ++v) lanes[v] = load_lanes<Cache>(k[v] + offset);
                if (key == 0 && next.fetch) fetch_keys<Cache>(next, d, offset);
                if constexpr (Cache::kDot) {
                    PELTON_UNROLL
                    for (int m = 0; m < kRows; ++m) {
                        VU packed = splat_u32(pair_at(x + m * 4));
                        PELTON_UNROLL
                        for (int v = 0; v < kTileVecs; ++v) acc[m][v] = dot_lanes<Cache>(acc[m][v], packed, lanes[v]);
                    }
                    x += kRows * 4;
                } else {
                    PELTON_UNROLL
                    for (int i = 0; i < Cache::kStep; ++i) {
                        VF elements[kTileVecs];
                        PELTON_UNROLL
                        for (int v = 0; v < kTileVecs; ++v) elements[v] = element<Cache>(lanes[v], i);
                        PELTON_UNROLL
                        for (int m = 0; m < kRows; ++m) {
                            VF dim = splat(*reinterpret_cast<const float*>(x + m * 4));
                            PELTON_UNROLL
                            for (int v = 0; v < kTileVecs; ++v) acc[m][v] = fma(dim, elements[v], acc[m][v]);
                        }
                        x += kRows * 4;
                    }
                }
            }
            PELTON_UNROLL
            for (int m = 0; m < kRows; ++m) {
                PELTON_UNROLL
                for (int v = 0; v < kTileVecs; ++v) store(scores + m * kKeyTile + key + v * kW, acc[m][v] * factors[m]);
            }
        }
    }
}

// ---- output [rows][padded] = output * correction + probabilities x values

// What the rows of a register tile see of a key tile: all of them [begin, end), some of them [first, last),
// row m [lows[m], highs[m]). All but the rows' own are multiples of Cache::kStep.
struct Seen {
    const int32_t *lows, *highs;
    int64_t first, begin, end, last;
};

template <class Cache, int kRows>
PELTON_INLINE Seen seen_by(const int32_t* lows, const int32_t* highs) {
    Seen seen = {lows, highs, kKeyTile, 0, kKeyTile, 0};
    PELTON_UNROLL
    for (int m = 0; m < kRows; ++m) {
        const int64_t low = lows[m], high = highs[m];
        seen.first = low < seen.first ? low : seen.first;
        seen.begin = low > seen.begin ? low : seen.begin;
        seen.end = high < seen.end ? high : seen.end;
        seen.last = high > seen.last ? high : seen.last;
    }
    constexpr int64_t kMask = -Cache::kStep;
    seen.first &= kMask;
    seen.begin = (seen.begin + Cache::kStep - 1) & kMask;
    seen.end &= kMask;
    seen.last = (seen.last + Cache::kStep - 1) & kMask;
    seen.end = seen.end > seen.begin ? seen.end : seen.begin;
    return seen;
}

// acc += probabilities x values of the keys in a lane. `mask` is what of each lane counts: a key that a row
// does not see may be infinite or, if not written yet, anything, and not even its product with 0 may get in.
template <class Cache, int kVecs>
PELTON_INLINE void take_keys(VF (&acc)[kVecs], const char* p, const VU (&lanes)[kVecs], uint32_t mask) {
    if constexpr (Cache::kDot) {
        VU packed = splat_u32(pair_at(p));
        PELTON_UNROLL
        for (int v = 0; v < kVecs; ++v) acc[v] = dot_lanes<Cache>(acc[v], packed, lanes[v] & mask);
    } else {
        const float* x = reinterpret_cast<const float*>(p);
        PELTON_UNROLL
        for (int i = 0; i < Cache::kStep; ++i) {
            if (!(mask >> (32 / Cache::kStep * i) & 1u)) continue;
            VF weight = splat(x[i]);
            PELTON_UNROLL
            for (int v = 0; v < kVecs; ++v) acc[v] = fma(weight, element<Cache>(lanes[v], i), acc[v]);
        }
    }
}

// Keys [begin, end) of which all rows see all.
template <class Cache, int kRows, int kVecs>
PELTON_APART void value_columns(const char* p, const float* corrections, const TileAddress& at, const TileAddress& next,
                                int64_t begin, int64_t end, int64_t padded, int64_t col, float* out) {
    VF acc[kRows][kVecs];
    PELTON_UNROLL
    for (int m = 0; m < kRows; ++m) {
        PELTON_UNROLL
        for (int v = 0; v < kVecs; ++v) acc[m][v] = load(out + m * padded + col + v * kW) * corrections[m];
    }
    constexpr int kStep = Cache::kStep, kBytes = Cache::kDot ? 4 / kStep : 4, kStride = kWeightBytes<Cache>;
    constexpr int kLaneBytes = Cache::kLaneBytes;
    const int64_t row_bytes = padded * kLaneBytes;
    while (begin < end) {
        const int64_t group = begin / kTokenGroup, inside = begin % kTokenGroup / kStep * row_bytes + col * kLaneBytes;
        const char *w = at.values[group] + inside, *x = p + begin * kBytes;
        const int64_t fetch = next.values[group] - at.values[group];
        const int64_t group_end = group * kTokenGroup + kTokenGroup;
        const int64_t count = (group_end < end ? group_end : end) - begin;
        begin += count;
        for (int64_t j = 0; j < count; j += kStep) {
            VU lanes[kVecs];
            PELTON_UNROLL
            for (int v = 0; v < kVecs; ++v) {
                lanes[v] = load_lanes<Cache>(w + v * kW * kLaneBytes);
                if (v * kW * kLaneBytes % 64 == 0 && next.fetch) __builtin_prefetch(w + fetch + v * kW * kLaneBytes);
            }
            w += row_bytes;
            PELTON_UNROLL
            for (int m = 0; m < kRows; ++m) take_keys<Cache>(acc[m], x + m * kStride, lanes, 0xffffffffu);
            x += kStep * kBytes;
        }
    }
    PELTON_UNROLL
    for (int m = 0; m < kRows; ++m) {
        PELTON_UNROLL
        for (int v = 0; v < kVecs; ++v) store(out + m * padded + col + v * kW, acc[m][v]);
    }
}

// Keys [begin, end) for one row, which sees [low, high).
template <class Cache>
PELTON_APART void value_edge(const char* p, const TileAddress& at, int64_t low, int64_t high, int64_t begin,
                             int64_t end, int64_t padded, float* out) {
    constexpr int kStep = Cache::kStep, kBytes = Cache::kDot ? 4 / kStep : 4;
    for (int64_t j = begin; j < end; j += kStep) {
        uint32_t mask = 0;
        PELTON_UNROLL
        for (int i = 0; i < kStep; ++i) {
            const bool sees = low <= j + i && j + i < high;
            mask |= sees ? 0xffffffffu >> (32 - 32 / kStep) << (32 / kStep * i) : 0u;
        }
        if (!mask) continue;
        const char* w = at.values[j / kTokenGroup] + j % kTokenGroup / kStep * padded * Cache::kLaneBytes;
        for (int64_t col = 0; col < padded; col += kW) {
            VF acc[1] = {load(out + col)};
            const VU lanes[1] = {load_lanes<Cache>(w + col * Cache::kLaneBytes)};
            take_keys<Cache>(acc, p + j * kBytes, lanes, mask);
            store(out + col, acc[0]);
        }
    }
}

#if defined(__AVX512VNNI__)
// The same for 16-bit probabilities and values of 8 bits: exact sums of integers, so that a probability of 0
// is as good as a mask. `units` is what 1 of a row's probabilities stands for.
template <int kRows, int kVecs>
PELTON_APART void byte_value_columns(const char* p, const float* corrections, const float* units, const TileAddress& at,
                                     const TileAddress& next, int64_t first, int64_t last, int64_t padded, int64_t col,
                                     float* out) {
    VI acc[kRows][kVecs] = {};
    const int64_t row_bytes = padded * 4;
    for (int part = 0; part < 2; ++part) {
        for (int64_t begin = first; begin < last;) {
            const int64_t group = begin / kTokenGroup, inside = begin % kTokenGroup / 4 * row_bytes + col * 4;
            const char *w = at.values[group] + inside, *x = p + begin;
            const int64_t fetch = next.values[group] - at.values[group];
            const int64_t group_end = group * kTokenGroup + kTokenGroup;
            const int64_t end = group_end < last ? group_end : last;
            for (; begin < end; begin += 4) {
                VU lanes[kVecs];
                PELTON_UNROLL
                for (int v = 0; v < kVecs; ++v) {
                    lanes[v] = load_u32(w + v * kW * 4);
                    if (part == 0 && next.fetch) __builtin_prefetch(w + fetch + v * kW * 4);
                }
                w += row_bytes;
                PELTON_UNROLL
                for (int m = 0; m < kRows; ++m) {
                    VU quad = splat_u32(pair_at(x + m * kWeightBytes<Int8Cache>));
                    PELTON_UNROLL
                    for (int v = 0; v < kVecs; ++v) acc[m][v] = dot_bytes(acc[m][v], quad, lanes[v]);
                }
                x += 4;
            }
        }
        if (part == 1) break;
        p += kKeyTile;
        PELTON_UNROLL
        for (int m = 0; m < kRows; ++m) {
            PELTON_UNROLL
            for (int v = 0; v < kVecs; ++v) acc[m][v] <<= 8;
        }
    }
    PELTON_UNROLL
    for (int m = 0; m < kRows; ++m) {
        PELTON_UNROLL
        for (int v = 0; v < kVecs; ++v) {
            float* to = out + m * padded + col + v * kW;
            store(to, fma(to_float(acc[m][v]), splat(units[m]), load(to) * corrections[m]));
        }
    }
}
#endif

static_assert(kTileRows <= kMostTileRows && kMostTileRows == 6);

// Calls f<vecs>(first column) for the columns of an output.
template <class F>
PELTON_INLINE void for_columns(int64_t padded, F f) {
    int64_t col = 0;
    for (; col + kTileVecs * kW <= padded; col += kTileVecs * kW) f.template operator()<kTileVecs>(col);
    for (; col < padded; col += kW) f.template operator()<1>(col);
}

template <class Cache, int kRows>
void value_tile(const char* p, const float* corrections, [[maybe_unused]] const float* units, const TileAddress& at,
                const TileAddress& next, const Seen& seen, int64_t padded, float* out) {
    if constexpr (Cache::kBytes && Cache::kDot) {
#if defined(__AVX512VNNI__)
        for_columns(padded, [&]<int kVecs>(int64_t col) {
            byte_value_columns<kRows, kVecs>(p, corrections, units, at, next, seen.first, seen.last, padded, col, out);
        });
#endif
    } else {
        const bool edges = seen.first < seen.begin || seen.end < seen.last;
        const auto edge = [&](int64_t begin, int64_t end) {
            for (int64_t m = 0; m < kRows; ++m) {
                value_edge<Cache>(p + m * kWeightBytes<Cache>, at, seen.lows[m], seen.highs[m], begin, end, padded,
                                  out + m * padded);
            }
        };
        const float ones[] = {1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f};
        if (edges) {
            for (int64_t m = 0; m < kRows; ++m) {
                float* row = out + m * padded;
                for (int64_t col = 0; col < padded; col += kW) store(row + col, load(row + col) * corrections[m]);
            }
            edge(seen.first, seen.begin);
            corrections = ones;
        }
        for_columns(padded, [&]<int kVecs>(int64_t col) {
            value_columns<Cache, kRows, kVecs>(p, corrections, at, next, seen.begin, seen.end, padded, col, out);
        });
        if (edges) edge(seen.end, seen.last);
    }
}

}  // namespace
}  // namespace pelton::cpu::PELTON_ISA
