// Products of a block of rows and a panel (contract.h) on AMX tiles. A panel's layout is that of AMX's
// second factors already: 16 pairs (bf16) or quadruples (codes) of k by 16 columns are 16 rows of 64 bytes,
// 256 bytes apart.
//
// Batch invariance: a bf16 result is the sum of one partial sum per 32 of k, in ascending order, each made of
// an even and an odd chain. Rows do not meet, so a tile with one row gives the bits of one with 16. bf16
// weights, and codes as bf16, therefore must go through here whatever the number of rows, since vdpbf16ps sums in
// another order. int8 is exact and mixes freely with VNNI.
#pragma once

#include "cpu/amx_tiles.h"
#include "cpu/ops/linear/contract.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)

namespace pelton::cpu::PELTON_ISA {
namespace {

constexpr int64_t kAmxPanelRow = kPanel * 4;                // bytes between rows of a second factor
constexpr int64_t kAmxPanelStep = kAmxRows * kAmxPanelRow;  // bytes of a panel that one step multiplies
constexpr int64_t kAmxPrefetch = 2 * kAmxPanelStep;         // bytes ahead, where the panel comes from memory
// Steps after which a block of 32 rows turns to the other half of the panel: the activations (32 KB) are still
// in an L1 cache of 48 KB then, while the panel (64 KB) comes from L2. Longer blocks park sums less often. Not
// measured.
constexpr int64_t kAmxBlockSteps = 16;

// Where the panel of a product and the first factors of its last, incomplete step are.
struct AmxDepth {
    int64_t steps;  // of 64 bytes of a row
    bool has_tail;
    const char* tail_a;  // [32][64] bytes, padded with zeros
    const char* tail_w;  // a step of a panel, likewise
};

template <int kLines>
PELTON_INLINE void amx_prefetch(const char* w) {
    for (int64_t row = 0; row < kAmxRows; ++row) {
        PELTON_UNROLL
        for (int line = 0; line < kLines; ++line) __builtin_prefetch(w + kAmxPrefetch + row * kAmxPanelRow + 64 * line);
    }
}

template <int kTile>
PELTON_INLINE void amx_start(const char* c, int64_t stride, bool first) {
    first ? tile_zero<kTile>() : tile_load<kTile>(c, stride);
}

template <class Product>
PELTON_INLINE void amx_step_pair(const char* upper, const char* lower, int64_t a_stride, const char* w) {
    tile_load<6>(w, kAmxPanelRow);
    tile_load<4>(upper, a_stride);
    tile_load<7>(w + kAmxRowBytes, kAmxPanelRow);
    tile_load<5>(lower, a_stride);
    Product::template dot<0, 4, 6>();
    Product::template dot<1, 4, 7>();
    Product::template dot<2, 5, 6>();
    Product::template dot<3, 5, 7>();
}

// Half a panel and `steps` of depth for 17 to 32 rows: two tiles of rows by two of columns, so that each load
// feeds two products.
template <class Product, bool kStream>
PELTON_INLINE void amx_half(const char* a, int64_t a_stride, const char* w, int64_t steps, const char* tail_a,
                            const char* tail_w, char* out, int64_t out_stride, bool first) {
    const char* lower = a + kAmxRows * a_stride;
    char* out_lower = out + kAmxRows * out_stride;
    amx_start<0>(out, out_stride, first);
    amx_start<1>(out + kAmxRowBytes, out_stride, first);
    amx_start<2>(out_lower, out_stride, first);
    amx_start<3>(out_lower + kAmxRowBytes, out_stride, first);
    for (int64_t s = 0; s < steps; ++s) {
        if (kStream) amx_prefetch<2>(w);
        amx_step_pair<Product>(a + s * kAmxRowBytes, lower + s * kAmxRowBytes, a_stride, w);
        w += kAmxPanelStep;
    }
    if (tail_a) amx_step_pair<Product>(tail_a, tail_a + kAmxRows * kAmxRowBytes, kAmxRowBytes, tail_w);
    tile_store<0>(out, out_stride);
    tile_store<1>(out + kAmxRowBytes, out_stride);
    tile_store<2>(out_lower, out_stride);
    tile_store<3>(out_lower + kAmxRowBytes, out_stride);
}

template <class Product, bool kStream>
PELTON_INLINE void amx_pair(const char* a, int64_t a_stride, const char* w, const AmxDepth& depth, char* out,
                            int64_t out_stride, bool first) {
    for (int64_t s = 0; s < depth.steps; s += kAmxBlockSteps) {
        const int64_t left = depth.steps - s, steps = left < kAmxBlockSteps ? left : kAmxBlockSteps;
        const char* tail_a = steps == left && depth.has_tail ? depth.tail_a : nullptr;
        for (int64_t at = 0; at < 4 * kAmxRowBytes; at += 2 * kAmxRowBytes) {
            amx_half<Product, kStream>(a + s * kAmxRowBytes, a_stride, w + s * kAmxPanelStep + at, steps, tail_a,
                                       depth.tail_w + at, out + at, out_stride, first && s == 0);
        }
    }
}

template <class Product>
PELTON_INLINE void amx_step_single(const char* a, int64_t a_stride, const char* w) {
    tile_load<4>(a, a_stride);
    tile_load<5>(w, kAmxPanelRow);
    tile_load<6>(w + kAmxRowBytes, kAmxPanelRow);
    tile_load<7>(w + 2 * kAmxRowBytes, kAmxPanelRow);
    Product::template dot<0, 4, 5>();
    tile_load<5>(w + 3 * kAmxRowBytes, kAmxPanelRow);
    Product::template dot<1, 4, 6>();
    Product::template dot<2, 4, 7>();
    Product::template dot<3, 4, 5>();
}

// Up to 16 rows: the whole width at once, so that the panel streams through in the order of its bytes.
template <class Product, bool kStream>
PELTON_INLINE void amx_single(const char* a, int64_t a_stride, const char* w, const AmxDepth& depth, char* out,
                              int64_t out_stride, bool first) {
    amx_start<0>(out, out_stride, first);
    amx_start<1>(out + kAmxRowBytes, out_stride, first);
    amx_start<2>(out + 2 * kAmxRowBytes, out_stride, first);
    amx_start<3>(out + 3 * kAmxRowBytes, out_stride, first);
    for (int64_t s = 0; s < depth.steps; ++s) {
        if (kStream) amx_prefetch<4>(w);
        amx_step_single<Product>(a + s * kAmxRowBytes, a_stride, w);
        w += kAmxPanelStep;
    }
    if (depth.has_tail) amx_step_single<Product>(depth.tail_a, kAmxRowBytes, depth.tail_w);
    tile_store<0>(out, out_stride);
    tile_store<1>(out + kAmxRowBytes, out_stride);
    tile_store<2>(out + 2 * kAmxRowBytes, out_stride);
    tile_store<3>(out + 3 * kAmxRowBytes, out_stride);
}

// row_bytes: of a row of `a` that count, a multiple of 4; nothing behind them is read, nor behind the panel.
template <class Product>
PELTON_INLINE void amx_block(AmxTiles& tiles, const char* a, int64_t a_stride, int64_t rows, const char* w,
                             int64_t row_bytes, char* out, int64_t out_stride, bool first) {
    const int64_t whole = row_bytes / kAmxRowBytes, rest = row_bytes % kAmxRowBytes;
    // A single step may be shorter, behind others it is padded: another shape would clear the sums.
    const bool padded = whole > 0 && rest > 0;
    const int bytes = whole > 0 ? kAmxRowBytes : static_cast<int>(rest);
    alignas(64) char tail_a[2 * kAmxRows * kAmxRowBytes], tail_w[kAmxPanelStep];
    const AmxDepth depth = {whole > 0 ? whole : 1, padded, tail_a, tail_w};
    if (padded) {
        const int64_t used = rest / 4 * kAmxPanelRow;
        __builtin_memcpy(tail_w, w + whole * kAmxPanelStep, used);
        __builtin_memset(tail_w + used, 0, kAmxPanelStep - used);
        __builtin_memset(tail_a, 0, sizeof(tail_a));
    }
    for (int64_t m = 0; m < rows;) {
        const int64_t left = rows - m, height = left < 2 * kAmxRows ? left : 2 * kAmxRows;
        const char* from = a + m * a_stride;
        char* to = out + m * out_stride;
        if (padded) {
            for (int64_t r = 0; r < height; ++r) {
                __builtin_memcpy(tail_a + r * kAmxRowBytes, from + r * a_stride + whole * kAmxRowBytes, rest);
            }
        }
        // From memory the first time, from a cache for the rows after. Less than a step is too short to look ahead
        // from: who multiplies a panel in such pieces prefetches it himself.
        const bool stream = m == 0 && whole > 0;
        if (height > kAmxRows) {
            tiles.shape_pair(kAmxRows, static_cast<int>(height) - kAmxRows, bytes);
            stream ? amx_pair<Product, true>(from, a_stride, w, depth, to, out_stride, first)
                   : amx_pair<Product, false>(from, a_stride, w, depth, to, out_stride, first);
        } else {
            tiles.shape_single(static_cast<int>(height), bytes);
            stream ? amx_single<Product, true>(from, a_stride, w, depth, to, out_stride, first)
                   : amx_single<Product, false>(from, a_stride, w, depth, to, out_stride, first);
        }
        m += height;
    }
}

// out[rows][64] (+)= a[rows][depth] x w[depth / 2][64][2] in bf16. `a_stride` is in bytes, `ld` in floats;
// `first` starts from zero. depth is even and best given whole: it is cut for the caches here. Where the caller
// cuts it, the parts must begin at multiples of 32, or their sums would be others.
__attribute__((unused)) void amx_bf16_block(AmxTiles& tiles, const char* a, int64_t a_stride, int64_t rows,
                                            const char* w, int64_t depth, float* out, int64_t ld, bool first) {
    amx_block<AmxBf16>(tiles, a, a_stride, rows, w, depth * 2, reinterpret_cast<char*>(out), ld * 4, first);
}

// The product for activations of so many bytes.
template <int kBytes>
struct AmxProduct {
    typedef AmxBf16 Type;
};
template <>
struct AmxProduct<1> {
    typedef AmxInt8 Type;
};

// ---- groups of k, whose sums are scaled one by one before they are added up

// Whether tiles multiply groups of so many bytes of a row: whole steps or a single shorter one. Groups of 8 codes are
// nearly all scaling, which tiles do not do.
constexpr bool amx_takes_groups(int64_t codes, int64_t row_bytes) {
    return codes >= 16 && (row_bytes <= kAmxRowBytes || row_bytes % kAmxRowBytes == 0);
}

// Sums of one group: f32 or int32 [rows][32] for rows from `row` and half of the panel from `col`.
struct AmxSums {
    int64_t group, row, rows, col;
    const char* data;
};
constexpr int kAmxGroupSumsRow = 2 * kAmxRowBytes;

template <class Product>
PELTON_INLINE void amx_group(const char* upper, const char* lower, int64_t a_stride, const char* w, int64_t row_bytes) {
    tile_zero_results();
    for (int64_t k = 0; k < row_bytes; k += kAmxRowBytes, w += kAmxPanelStep) {
        if (lower) {
            amx_step_pair<Product>(upper + k, lower + k, a_stride, w);
        } else {
            tile_load<6>(w, kAmxPanelRow);
            tile_load<4>(upper + k, a_stride);
            tile_load<7>(w + kAmxRowBytes, kAmxPanelRow);
            Product::template dot<0, 4, 6>();
            Product::template dot<1, 4, 7>();
        }
    }
}

// `add` gets the sums of a[rows][count * row_bytes] x w, group after group for each element; amx_takes_groups holds.
// A group of `w` is row_bytes / 4 rows as in a panel, `w_stride` bytes behind the one before. `stream`: w is in memory.
//
// Two tiles of rows and two of columns at a time keep sums, results and the block's codes in the L1 cache. The sums of
// a group are scaled between the next group's products and their way into the buffer, so that vectors work while the
// tile unit does. To be expected, and never timed: a tile's product takes 16 cycles for any group of up to 64 codes,
// its store about 16, the scaling of its 16 vectors 32 to 48. So scaling is the limit for groups of 32, products and
// scaling are even for int8 groups of about 128.
template <class Product, class Add>
PELTON_INLINE void amx_groups(AmxTiles& tiles, const char* a, int64_t a_stride, int64_t rows, const char* w,
                              int64_t w_stride, int64_t row_bytes, int64_t count, bool stream, Add add) {
    // The last 16 rows are multiplied together, some of them twice: that is cheaper than a tile of another shape,
    // which would be configured anew for every block of groups.
    const int64_t height = rows < kAmxRows ? rows : kAmxRows, last = rows - height;
    tiles.shape_pair(static_cast<int>(height), static_cast<int>(height),
                     static_cast<int>(row_bytes < kAmxRowBytes ? row_bytes : kAmxRowBytes));
    alignas(64) char buffer[2 * kAmxRows * kAmxGroupSumsRow];
    AmxSums sums = {};
    for (int64_t m = 0; m < rows; m += 2 * kAmxRows) {
        const int64_t left = rows - m, upper = m < last ? m : last, lower = m + kAmxRows < last ? m + kAmxRows : last;
        const bool pair = left > kAmxRows;
        const char *upper_a = a + upper * a_stride, *lower_a = pair ? a + lower * a_stride : nullptr;
        // Where the two meet, the same sums are stored twice.
        char* lower_sums = buffer + (lower - upper) * kAmxGroupSumsRow;
        for (int64_t col = 0; col < kPanel; col += kPanel / 2) {
            const char* codes = w + col * 4;
            for (int64_t i = 0; i < count; ++i, codes += w_stride) {
                if (stream && m == 0 && col == 0) {
                    for (int64_t at = 0; at < w_stride; at += 64) __builtin_prefetch(codes + kAmxPrefetch + at);
                }
                const int64_t k = i * row_bytes;
                amx_group<Product>(upper_a + k, pair ? lower_a + k : nullptr, a_stride, codes, row_bytes);
                if (sums.rows) add(sums);
                tile_store<0>(buffer, kAmxGroupSumsRow);
                tile_store<1>(buffer + kAmxRowBytes, kAmxGroupSumsRow);
                if (pair) {
                    tile_store<2>(lower_sums, kAmxGroupSumsRow);
                    tile_store<3>(lower_sums + kAmxRowBytes, kAmxGroupSumsRow);
                }
                sums = {i, m, pair && left > 2 * kAmxRows ? 2 * kAmxRows : left, col,
                        buffer + (m - upper) * kAmxGroupSumsRow};
            }
        }
    }
    add(sums);
}

}  // namespace
}  // namespace pelton::cpu::PELTON_ISA

#endif
