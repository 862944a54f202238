// One source for every tier. Where vdpbf16ps exists (kBf16Dot), activations are rounded to bf16 and
// multiplied in pairs; elsewhere weights are expanded to f32 in registers.
//
// Batch invariance: an output element is one chain of additions over k (over groups of k when
// quantized) in ascending order. Register tiles, row blocks and depth blocks only decide when the chain
// is parked in memory, which is exact in f32.
#include "cpu/ops/linear/amx.h"
#include "cpu/ops/linear/contract.h"
#include "cpu/row_tiles.h"

namespace pelton::cpu::PELTON_ISA {
namespace {

using namespace linear;

constexpr int kActBytes = kBf16Dot ? 2 : 4;  // an activation next to bf16 or quantized weights
// Up to this many rows codes are expanded in registers, once per row tile; from 3 tiles of 4 rows on it
// is cheaper to expand them into the cache once.
constexpr int kDirectRows = 8, kDirectTile = kW == 16 ? 4 : 2;
// Depth of a weight block that the rows of an item pass over while it stays in the cache. Where a
// register tile is as wide as the panel it streams from L2 (128 KB of bf16); narrower tiles pass over a
// block strip by strip, which wants L1 (16 KB of f32).
constexpr int64_t kDepthBlock = kW == 16 ? 1024 : 64;
// With vdpbf16ps, codes of types without minima become code - offset, which is exact in bf16 as well.
constexpr bool kCentered = kBf16Dot;

// Vectors of columns in a register tile of that many rows: a single row takes 8 to stream whole lines,
// several keep to the accumulators that simd.h allows.
constexpr int tile_vecs(int rows) {
    if (kW == 16) return kTileVecs;
    return rows == 1 ? 8 : rows <= 3 && kW == 8 ? 4 : rows == 2 ? 4 : kTileVecs;
}

constexpr int kPrefetch = 2048;  // bytes ahead: beyond what the hardware prefetcher crosses pages for

struct Activations {
    const char* rows;
    int64_t stride;  // bytes
    const float* sums;
    int64_t sums_stride;  // floats
};

struct Output {
    float* data;
    int64_t ld;
    bool first;         // start from zero, else from what is there
    const float* bias;  // added at the end of the last depth block; null before that or if absent
};

// ---- codes in the two-element unit of the arithmetic

#if defined(__AVX512BF16__)
// What turns codes into bf16 pairs. vpermw looks at 5 bits, of which the upper one belongs to the next
// code, so the 16 values stand there twice.
struct Decoder {
    VU table;
    VI offset;
};

PELTON_INLINE Decoder make_decoder(int offset) {
    uint16_t values[32];
    for (int i = 0; i < 32; ++i) values[i] = to_bf16_scalar(static_cast<float>((i & 15) - offset));
    return {load_u32(values), VI{} + offset};
}

PELTON_INLINE VU nibble_pair(const Decoder& d, VU w, int j) {
    return reinterpret_cast<VU>(
        _mm512_permutexvar_epi16(reinterpret_cast<__m512i>(w >> (4 * j)), reinterpret_cast<__m512i>(d.table)));
}

// An integer of at most 8 significant bits as f32 is a bf16 followed by 16 zeros.
PELTON_INLINE VU byte_pair(const Decoder& d, VU w, int j) {
    VU even = j ? (w >> 8) & 0xffu : w & 0xffu;
    VU odd = j ? w >> 24 : (w >> 16) & 0xffu;
    even = reinterpret_cast<VU>(reinterpret_cast<VI>(even) - d.offset);
    odd = reinterpret_cast<VU>(reinterpret_cast<VI>(odd) - d.offset);
    return (as_u32(to_float(even)) >> 16) | as_u32(to_float(odd));
}
#else
struct Decoder {};
PELTON_INLINE Decoder make_decoder(int) { return {}; }
#endif

PELTON_INLINE VF nibble(VU w, int k) {  // code k of 8
    const int shift = k / 2 * 4 + k % 2 * 16;
#if defined(__AVX512F__)
    const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return reinterpret_cast<VF>(_mm512_permutexvar_ps(reinterpret_cast<__m512i>(w >> shift), table));
#else
    return to_float((w >> shift) & 15u);
#endif
}

PELTON_INLINE VF byte(VU w, int k) {  // code k of 4
    const int shift = k / 2 * 8 + k % 2 * 16;
    return to_float((w >> shift) & 0xffu);
}

// ---- weight formats: acc[m][v] += x[m] * w[v] for kStep values of k

PELTON_INLINE float value_at(const char* a, int i) { return reinterpret_cast<const float*>(a)[i]; }

template <int kRows, int kVecs>
PELTON_INLINE void multiply(VF (&acc)[kRows][kVecs], const VF (&b)[kVecs], const char* a, int64_t stride, int i) {
    PELTON_UNROLL
    for (int m = 0; m < kRows; ++m) {
        VF x = splat(value_at(a + m * stride, i));
        PELTON_UNROLL
        for (int v = 0; v < kVecs; ++v) acc[m][v] = fma(x, b[v], acc[m][v]);
    }
}

#if defined(__AVX512BF16__)
template <int kRows, int kVecs>
PELTON_INLINE void multiply_pairs(VF (&acc)[kRows][kVecs], const VU (&b)[kVecs], const char* a, int64_t stride, int i) {
    PELTON_UNROLL
    for (int m = 0; m < kRows; ++m) {
        VU x = splat_u32(pair_at(a + m * stride + 4 * i));
        PELTON_UNROLL
        for (int v = 0; v < kVecs; ++v) acc[m][v] = dot_pairs(acc[m][v], x, b[v]);
    }
}
#endif

struct F32Weight {
    static constexpr int kStep = 1, kActStep = 4;
    template <int kRows, int kVecs>
    static PELTON_INLINE void step(VF (&acc)[kRows][kVecs], const Decoder&, const char* w, const char* a,
                                   int64_t stride) {
        VF b[kVecs];
        PELTON_UNROLL
        for (int v = 0; v < kVecs; ++v) b[v] = load(reinterpret_cast<const float*>(w) + v * kW);
        multiply(acc, b, a, stride, 0);
    }
};

struct PairWeight {
    static constexpr int kStep = 2, kActStep = 2 * kActBytes;
    template <int kRows, int kVecs>
    static PELTON_INLINE void step(VF (&acc)[kRows][kVecs], const Decoder&, const char* w, const char* a,
                                   int64_t stride) {
        VU pairs[kVecs];
        PELTON_UNROLL
        for (int v = 0; v < kVecs; ++v) pairs[v] = load_u32(w + v * kW * 4);
#if defined(__AVX512BF16__)
        multiply_pairs(acc, pairs, a, stride, 0);
#else
        VF b[kVecs];
        PELTON_UNROLL
        for (int v = 0; v < kVecs; ++v) b[v] = pair_low(pairs[v]);
        multiply(acc, b, a, stride, 0);
        PELTON_UNROLL
        for (int v = 0; v < kVecs; ++v) b[v] = pair_high(pairs[v]);
        multiply(acc, b, a, stride, 1);
#endif
    }
};

// kCodes codes of 32 / kCodes bits in each lane.
template <int kCodes>
struct PackedWeight {
    static constexpr int kStep = kCodes, kActStep = kCodes * kActBytes;
    template <int kRows, int kVecs>
    static PELTON_INLINE void step(VF (&acc)[kRows][kVecs], const Decoder& d, const char* w, const char* a,
                                   int64_t stride) {
        (void)d;
        VU codes[kVecs];
        PELTON_UNROLL
        for (int v = 0; v < kVecs; ++v) codes[v] = load_u32(w + v * kW * 4);
#if defined(__AVX512BF16__)
        PELTON_UNROLL
        for (int j = 0; j < kCodes / 2; ++j) {
            VU b[kVecs];
            PELTON_UNROLL
            for (int v = 0; v < kVecs; ++v) {
                b[v] = kCodes == 8 ? nibble_pair(d, codes[v], j) : byte_pair(d, codes[v], j);
            }
            multiply_pairs(acc, b, a, stride, j);
        }
#else
        PELTON_UNROLL
        for (int k = 0; k < kCodes; ++k) {
            VF b[kVecs];
            PELTON_UNROLL
            for (int v = 0; v < kVecs; ++v) b[v] = kCodes == 8 ? nibble(codes[v], k) : byte(codes[v], k);
            multiply(acc, b, a, stride, k);
        }
#endif
    }
};

template <bool kPairs>
struct Expanded {
    using Weight = PairWeight;
};
template <>
struct Expanded<false> {
    using Weight = F32Weight;
};
using ExpandedWeight = Expanded<kBf16Dot>::Weight;

// ---- register tiles

template <int kRows, int kVecs>
PELTON_INLINE void load_tile(VF (&acc)[kRows][kVecs], const Output& c, int col, bool zero) {
    PELTON_UNROLL
    for (int m = 0; m < kRows; ++m) {
        PELTON_UNROLL
        for (int v = 0; v < kVecs; ++v) acc[m][v] = zero ? VF{} : load(c.data + m * c.ld + col + v * kW);
    }
}

template <int kRows, int kVecs>
PELTON_INLINE void store_tile(VF (&acc)[kRows][kVecs], const Output& c, int col, const float* bias) {
    PELTON_UNROLL
    for (int m = 0; m < kRows; ++m) {
        PELTON_UNROLL
        for (int v = 0; v < kVecs; ++v) {
            VF y = acc[m][v];
            if (bias) y += load(bias + col + v * kW);
            store(c.data + m * c.ld + col + v * kW, y);
        }
    }
}

template <int kVecs>
PELTON_INLINE void prefetch(const char* w) {
    PELTON_UNROLL
    for (int line = 0; line < kVecs * kW * 4; line += 64) __builtin_prefetch(w + kPrefetch + line);
}

// Weights without groups. `w` points at the panel, moved to the first k of the block.
template <class Weight, int kRows>
void plain_tile(const char* w, const char* a, int64_t stride, int64_t depth, const Output& c) {
    constexpr int kVecs = tile_vecs(kRows), kColumns = kVecs * kW;
    for (int col = 0; col < kPanel; col += kColumns) {
        VF acc[kRows][kVecs];
        load_tile(acc, c, col, c.first);
        const char *wp = w + col * 4, *ap = a;
        int64_t k = 0;
        for (; k + Weight::kStep <= depth; k += Weight::kStep) {
            if (kRows < kTileRows) prefetch<kVecs>(wp);  // full tiles are many and find the block in the cache
            Weight::step(acc, Decoder(), wp, ap, stride);
            wp += kPanel * 4;
            ap += Weight::kActStep;
        }
        if (k < depth) {  // odd k of bf16 weights; rounded activations are padded and do not come here
            VF b[kVecs];
            PELTON_UNROLL
            for (int v = 0; v < kVecs; ++v) b[v] = pair_low(load_u32(wp + v * kW * 4));
            multiply(acc, b, ap, stride, 0);
        }
        store_tile(acc, c, col, c.bias);
    }
}

struct Groups {
    const char* codes;  // of the first group, packed or expanded
    int64_t codes_stride;
    const char* scales;  // of the first group; minima follow
    int64_t scales_stride;
    int64_t count, size;
    bool has_min, scale_is_f32;
    int offset;
};

PELTON_INLINE VF scale_at(const char* scales, bool f32, int64_t i) {
    return f32 ? load(reinterpret_cast<const float*>(scales) + i)
               : from_f16(load_u16(reinterpret_cast<const uint16_t*>(scales) + i));
}

// Weights in groups: codes are multiplied as exact integers, then scaled; the constant part of a group
// is its minimum (or -offset * scale) times the sum of its activations.
template <class Weight, int kRows>
void grouped_tile(const Groups& g, const Decoder& shared_decoder, const char* a, int64_t stride, const float* sums,
                  int64_t sums_stride, const Output& c) {
    constexpr int kVecs = tile_vecs(kRows), kColumns = kVecs * kW;
    const int64_t scale_bytes = kPanel * (g.scale_is_f32 ? 4 : 2);
    const float minus_offset = static_cast<float>(-g.offset);
    const Decoder decoder = shared_decoder;  // in registers
    for (int col = 0; col < kPanel; col += kColumns) {
        const char* ap = a;
        for (int64_t i = 0; i < g.count; ++i) {
            const char* w = g.codes + i * g.codes_stride + col * 4;
            VF acc[kRows][kVecs] = {};
            for (int64_t k = 0; k < g.size; k += Weight::kStep) {
                if (kRows < kTileRows) prefetch<kVecs>(w);
                Weight::step(acc, decoder, w, ap, stride);
                w += kPanel * 4;
                ap += Weight::kActStep;
            }
            const char* scales = g.scales + i * g.scales_stride;
            const bool zero = c.first && i == 0;
            const float* bias = i + 1 == g.count ? c.bias : nullptr;
            PELTON_UNROLL
            for (int v = 0; v < kVecs; ++v) {
                const int at = col + v * kW;
                const VF scale = scale_at(scales, g.scale_is_f32, at);
                VF constant = {};
                if (g.has_min) {
                    constant = scale_at(scales + scale_bytes, g.scale_is_f32, at);
                } else if (!kCentered) {
                    constant = scale * minus_offset;
                }
                PELTON_UNROLL
                for (int m = 0; m < kRows; ++m) {
                    float* out = c.data + m * c.ld + at;
                    VF y = fma(scale, acc[m][v], zero ? VF{} : load(out));
                    if (g.has_min || !kCentered) y = fma(constant, splat(sums[m * sums_stride + i]), y);
                    store(out, bias ? y + load(bias + at) : y);
                }
            }
        }
    }
}

// ---- activations

void prepare_row(const Call& call, const LinearShape& shape, const float* x, char* rounded, float* sums) {
    const int64_t k = call.ints[kK];
    if (shape.rounded_bytes) {
        uint16_t* out = reinterpret_cast<uint16_t*>(rounded);
        int64_t i = 0;
        for (; i + kW <= k; i += kW) store_u16(out + i, to_bf16(load(x + i)));
        if (i < k) {
            uint16_t last[kW];
            store_u16(last, to_bf16(load_n(x + i, k - i)));
            for (int64_t j = i; j < shape.padded_k; ++j) out[j] = last[j - i];
        }
    }
    const int64_t group = call.ints[kGroupSize];
    for (int64_t g = 0; g < shape.groups; ++g) {
        VF total = {};
        for (int64_t i = g * group; i < (g + 1) * group; i += kW) {
            const int64_t left = (g + 1) * group - i;
            VF v = left >= kW ? load(x + i) : load_n(x + i, left);
            // The sum must be that of the factors really used, or the offset of large codes stays behind.
            if (shape.rounded_bytes) v = pair_low(widen(to_bf16(v)));
            total += v;
        }
        sums[g] = sum(total);
    }
}

int64_t sums_floats(const LinearShape& shape) { return (shape.groups * 4 + 63) / 64 * 16; }

Activations activations_at(const LinearShape& shape, char* base, int64_t rows) {
    return {base, shape.rounded_bytes, reinterpret_cast<const float*>(base + rows * shape.rounded_bytes),
            sums_floats(shape)};
}

void prepare_rows(const Call& call, const LinearShape& shape, const Activations& to, int64_t begin, int64_t end) {
    const float* x = reinterpret_cast<const float*>(call.operands[kX].data);
    for (int64_t r = begin; r < end; ++r) {
        prepare_row(call, shape, x + r * call.ints[kLdX], const_cast<char*>(to.rows) + r * to.stride,
                    const_cast<float*>(to.sums) + r * to.sums_stride);
    }
}

// ---- one item: a panel and a block of rows

#if defined(__AMX_TILE__)
void amx_item(AmxTiles& tiles, const char* panel, int64_t k, const Activations& x, int64_t rows, const Output& c) {
    amx_bf16_block(tiles, x.rows, x.stride, rows, panel, k, c.data, c.ld, true);
    if (!c.bias) return;
    for (int64_t m = 0; m < rows; ++m) {
        for (int col = 0; col < kPanel; col += kW) {
            float* y = c.data + m * c.ld + col;
            store(y, load(y) + load(c.bias + col));
        }
    }
}
#else
struct AmxTiles {};
#endif

template <int kCodes>
void expand(const LinearShape& shape, const char* groups, int64_t count, int64_t group, const Decoder& d, char* out) {
    (void)d;
    for (int64_t g = 0; g < count; ++g) {
        const char* codes = groups + g * shape.group_bytes;
        for (int64_t i = 0; i < group / kCodes; ++i) {
            PELTON_UNROLL
            for (int col = 0; col < kPanel; col += kW) {
                VU w = load_u32(codes + (i * kPanel + col) * 4);
                char* to = out + col * 4;
#if defined(__AVX512BF16__)
                PELTON_UNROLL
                for (int j = 0; j < kCodes / 2; ++j) {
                    store_u32(to + j * kPanel * 4, kCodes == 8 ? nibble_pair(d, w, j) : byte_pair(d, w, j));
                }
#else
                PELTON_UNROLL
                for (int k = 0; k < kCodes; ++k) {
                    store(reinterpret_cast<float*>(to) + k * kPanel, kCodes == 8 ? nibble(w, k) : byte(w, k));
                }
#endif
            }
            out += kCodes * kPanel * (kBf16Dot ? 2 : 4);
        }
    }
}

template <class Weight>
void plain_item(const char* panel, int64_t k, int64_t depth_bytes, int act_bytes, const Activations& x, int64_t rows,
                Output c) {
    const float* bias = c.bias;
    for (int64_t k0 = 0; k0 < k; k0 += kDepthBlock) {
        const int64_t depth = k - k0 < kDepthBlock ? k - k0 : kDepthBlock;
        c.first = k0 == 0;
        c.bias = k0 + depth == k ? bias : nullptr;
        for_row_tiles<kTileRows>(rows, [&]<int kRows>(int64_t m) {
            Output tile = {c.data + m * c.ld, c.ld, c.first, c.bias};
            plain_tile<Weight, kRows>(panel + k0 * depth_bytes, x.rows + m * x.stride + k0 * act_bytes, x.stride, depth,
                                      tile);
        });
    }
}

template <class Weight, int kMost>
void grouped_rows(const Groups& g, const Decoder& decoder, int64_t first_group, const Activations& x, int64_t rows,
                  const Output& c) {
    for_row_tiles<kMost>(rows, [&]<int kRows>(int64_t m) {
        Output tile = {c.data + m * c.ld, c.ld, c.first, c.bias};
        grouped_tile<Weight, kRows>(g, decoder, x.rows + m * x.stride + first_group * g.size * kActBytes, x.stride,
                                    x.sums + m * x.sums_stride + first_group, x.sums_stride, tile);
    });
}

template <int kCodes>
void grouped_item(const Call& call, const LinearShape& shape, const char* panel, const Activations& x, int64_t rows,
                  Output c, char* expanded) {
    const int64_t group = call.ints[kGroupSize];
    Groups g = {panel,
                shape.group_bytes,
                panel + group * kPanel * 4 / kCodes,
                shape.group_bytes,
                shape.groups,
                group,
                call.ints[kHasMin] != 0,
                call.ints[kScaleIsF32] != 0,
                static_cast<int>(call.ints[kOffset])};
    const bool direct = rows <= kDirectRows;
    const Decoder decoder = make_decoder(g.has_min ? 0 : g.offset);
    const float* bias = c.bias;
    const char *codes = panel, *scales = g.scales;
    if (!direct) {
        g.codes = expanded;
        g.codes_stride = group * kPanel * (kBf16Dot ? 2 : 4);
    }
    const int64_t block = shape.depth / group;
    for (int64_t i = 0; i < shape.groups; i += block) {
        g.count = shape.groups - i < block ? shape.groups - i : block;
        g.scales = scales + i * shape.group_bytes;
        c.first = i == 0;
        c.bias = i + g.count == shape.groups ? bias : nullptr;
        if (direct) {
            g.codes = codes + i * shape.group_bytes;
            grouped_rows<PackedWeight<kCodes>, kDirectTile>(g, decoder, i, x, rows, c);
        } else {
            expand<kCodes>(shape, codes + i * shape.group_bytes, g.count, group, decoder, expanded);
            grouped_rows<ExpandedWeight, kTileRows>(g, decoder, i, x, rows, c);
        }
    }
}

void linear_item(const Call& call, const LinearShape& shape, const Activations& all, int64_t item, char* scratch,
                 AmxTiles& tiles) {
    (void)tiles;
    const int64_t panel = item / shape.row_blocks, m0 = item % shape.row_blocks * shape.row_block;
    const int64_t rows = call.rows - m0 < shape.row_block ? call.rows - m0 : shape.row_block;
    const int64_t n0 = panel * kPanel, n = call.ints[kN];
    const int64_t columns = n - n0 < kPanel ? n - n0 : kPanel;
    const Activations x = {all.rows + m0 * all.stride, all.stride, all.sums + m0 * all.sums_stride, all.sums_stride};
    const char* weight = call.operands[kWeight].data + panel * shape.panel_bytes;
    const float* bias = reinterpret_cast<const float*>(call.operands[kBias].data);
    float* out = reinterpret_cast<float*>(call.operands[kOut].data) + m0 * call.ints[kLdOut] + n0;

    float* ragged = reinterpret_cast<float*>(scratch);  // [kRowBlock][kPanel]
    char* expanded = scratch + kRowBlock * kPanel * 4;
    float padded_bias[kPanel];
    Output c = {out, call.ints[kLdOut], true, bias ? bias + n0 : nullptr};
    if (columns < kPanel) {  // registers are as wide as the panel: go through a buffer
        c.data = ragged;
        c.ld = kPanel;
        if (bias) {
            for (int i = 0; i < kPanel; ++i) padded_bias[i] = i < columns ? c.bias[i] : 0.0f;
            c.bias = padded_bias;
        }
    }
    switch (call.ints[kFormat]) {
        case kF32:
            plain_item<F32Weight>(weight, call.ints[kK], kPanel * 4, 4, x, rows, c);
            break;
        case kBf16:
#if defined(__AMX_TILE__)
            amx_item(tiles, weight, shape.padded_k, x, rows, c);
#else
            plain_item<PairWeight>(weight, kBf16Dot ? shape.padded_k : call.ints[kK], kPanel * 2, kActBytes, x, rows,
                                   c);
#endif
            break;
        default:
            call.ints[kBits] == 4 ? grouped_item<8>(call, shape, weight, x, rows, c, expanded)
                                  : grouped_item<4>(call, shape, weight, x, rows, c, expanded);
    }
    if (columns < kPanel) {
        for (int64_t m = 0; m < rows; ++m) {
            __builtin_memcpy(out + m * call.ints[kLdOut], ragged + m * kPanel, columns * 4);
        }
    }
}

void prepare_stage(const Call& call, int64_t begin, int64_t end, Worker&) {
    const LinearShape shape = linear_shape(call);
    prepare_rows(call, shape, activations_at(shape, call.shared, call.rows), begin, end);
}

void multiply_stage(const Call& call, int64_t begin, int64_t end, Worker& worker) {
    const LinearShape shape = linear_shape(call);
    const float* x = reinterpret_cast<const float*>(call.operands[kX].data);
    Activations a = {reinterpret_cast<const char*>(x), call.ints[kLdX] * 4, nullptr, 0};
    char* scratch = worker.scratch;
    if (shape.rounded_bytes || shape.groups) {
        const bool local = call.rows <= kLocalRows;
        Activations prepared = activations_at(shape, local ? scratch : call.shared, call.rows);
        if (local && worker.tag != call.tag) {
            prepare_rows(call, shape, prepared, 0, call.rows);
            worker.tag = call.tag;
        }
        a.sums = prepared.sums;
        a.sums_stride = prepared.sums_stride;
        if (shape.rounded_bytes) {
            a.rows = prepared.rows;
            a.stride = prepared.stride;
        }
        scratch += kLocalRows * (shape.rounded_bytes + sums_floats(shape) * 4);
    }
    AmxTiles tiles;
    for (int64_t item = begin; item < end; ++item) linear_item(call, shape, a, item, scratch, tiles);
}

}  // namespace

extern const Kernel linear_kernels[];
const Kernel linear_kernels[] = {
    {"linear", {prepare_stage, multiply_stage}, kBf16Dot ? kActivationsBf16 : kActivationsF32}, {nullptr, {}, 0}};

}  // namespace pelton::cpu::PELTON_ISA
