// One source for every tier. Weights are f32, bf16 pairs, or codes in groups; codes meet int8 activations as exact
// integers where the tier has such products (kInt8Products), else floats. Where vdpbf16ps exists (kBf16Dot), floats
// next to bf16 weights and codes are rounded to bf16 and multiplied in pairs.
//
// Batch invariance: an output element is one chain of additions over k (over groups of k when quantized) in
// ascending order. Register tiles, row blocks and depth blocks only decide when the chain is parked in memory,
// which is exact in f32 and in int32.
#include "cpu/ops/elementwise/contract.h"
#include "cpu/ops/linear/activations.h"
#include "cpu/ops/linear/amx.h"
#include "cpu/ops/linear/codes.h"
#include "cpu/row_tiles.h"
#include "cpu/simd_math.h"

namespace pelton::cpu::PELTON_ISA {
namespace {

using namespace linear;

constexpr int kActBytes = kBf16Dot ? 2 : 4;  // a float activation next to bf16 weights and codes
// Few rows expand codes in registers, once per row tile, more of them into the cache once. Nibbles are so quickly
// expanded that for integers the register wins up to many rows, and always if their scales are read as they lie.
constexpr int kDirectRows = 8, kDirectTile = kW == 16 ? 4 : 2;
template <class Codes, class Math>
constexpr bool kQuick = kW == 16 && __is_same(Codes, NibbleCodes) && Math::kCentred;
constexpr int kQuickRows = 48;
// Up to this many rows weights take longer to stream than to multiply: tiles fetch them as they go.
constexpr int kStreamRows = kW == 16 ? 16 : 8;
// Full tiles of groups of integers are so narrow that results fit into the registers beside the sums: scaling the sums
// of each group of 32 into results in memory takes a third of the time.
template <class Math>
constexpr bool kInRegisters = kW == 16 && Math::kCentred;
// Depth of a weight block that the rows of an item pass over while it stays in the cache. Where a
// register tile is as wide as the panel it streams from L2 (128 KB of bf16); narrower tiles pass over a
// block strip by strip, which wants L1 (16 KB of f32).
constexpr int64_t kDepthBlock = kW == 16 ? 1024 : 64;

// Vectors of columns in a register tile of that many rows: a single row takes 8 to stream whole lines,
// several keep to the accumulators that simd.h allows.
constexpr int tile_vecs(int rows) {
    if (kW == 16) return kTileVecs;
    return rows == 1 ? 8 : rows <= 3 && kW == 8 ? 4 : rows == 2 ? 4 : kTileVecs;
}

// Weights that stream are fetched so many bytes ahead, which covers the latency of memory at full bandwidth. What is
// read before its turn, the scales of a block of groups, must be nearer than that.
constexpr int kPrefetch = 8192, kStreamBytes = 6144;

PELTON_INLINE void prefetch(const char* w, int64_t bytes) {
    PELTON_UNROLL
    for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(w + kPrefetch + line);
}

// Many rows compute on a block of weights for a while: meanwhile their full tiles fetch the next one, a line at a step,
// each tile a part of it.
struct Ahead {
    const char* at;
    int64_t step;  // 0 when all is fetched
};

PELTON_INLINE Ahead ahead_of(const char* next, int64_t bytes, int64_t tile, int64_t steps) {
    const int64_t offset = tile * steps * 64;
    return {next + (offset < bytes ? offset : 0), offset < bytes ? 64 : 0};
}

template <int kVecs, bool kStream>
PELTON_INLINE void fetch(const char* w, Ahead& ahead) {
    if (kStream) {
        prefetch(w, kVecs * kW * 4);
    } else {
        __builtin_prefetch(ahead.at);
        ahead.at += ahead.step;
    }
}

struct Output {
    float* data;
    int64_t ld;
    bool first;         // start from zero, else from what is there
    const float* bias;  // added at the end of the last depth block; null before that or if absent
};

// ---- products: acc[m][v] += x[m] * w[v]

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

// How quads of codes are multiplied: as int8 with int32 sums, or as floats.
struct IntMath {
    typedef VI Acc;
    static constexpr int kActivation = 1;  // bytes
    static constexpr bool kCentred = true;
    template <class Codes, int kRows, int kVecs>
    static PELTON_INLINE void quad(VI (&acc)[kRows][kVecs], const VU (&q)[kVecs], const char* a, int64_t stride) {
        PELTON_UNROLL
        for (int m = 0; m < kRows; ++m) {
            VU x = splat_u32(pair_at(a + m * stride));
            PELTON_UNROLL
            for (int v = 0; v < kVecs; ++v) acc[m][v] = dot_codes<Codes::kWide>(acc[m][v], q[v], x);
        }
    }
    static PELTON_INLINE VI start(const int32_t* starts) { return VI{} + *starts; }
    static PELTON_INLINE VF scaled(VI acc, VF scale, const float* scales, VF y) {
        return fma(to_float(acc), scale * *scales, y);
    }
};

struct FloatMath {
    typedef VF Acc;
    static constexpr int kActivation = kActBytes;
    static constexpr bool kCentred = false;
    template <class Codes, int kRows, int kVecs>
    static PELTON_INLINE void quad(VF (&acc)[kRows][kVecs], const VU (&q)[kVecs], const char* a, int64_t stride) {
#if defined(__AVX512BF16__)
        PELTON_UNROLL
        for (int i = 0; i < 2; ++i) {
            VU b[kVecs];
            PELTON_UNROLL
            for (int v = 0; v < kVecs; ++v) b[v] = code_pair<Codes>(q[v], i);
            multiply_pairs(acc, b, a, stride, i);
        }
#else
        PELTON_UNROLL
        for (int i = 0; i < 4; ++i) {
            VF b[kVecs];
            PELTON_UNROLL
            for (int v = 0; v < kVecs; ++v) b[v] = code_as_float<Codes>(q[v], i);
            multiply(acc, b, a, stride, i);
        }
#endif
    }
    static PELTON_INLINE VF start(const int32_t*) { return VF{}; }
    static PELTON_INLINE VF scaled(VF acc, VF scale, const float*, VF y) { return fma(scale, acc, y); }
};

// A step of a weight's layout: kStep values of k in kBytes, for activations of kActStep bytes.
struct F32Step {
    typedef FloatMath Math;
    static constexpr bool kPacked = false;  // not codes as they lie in a panel
    static constexpr int kStep = 1, kBytes = kPanel * 4, kActStep = 4;
    template <int kRows, int kVecs>
    static PELTON_INLINE void step(VF (&acc)[kRows][kVecs], const char* w, const char* a, int64_t stride) {
        VF b[kVecs];
        PELTON_UNROLL
        for (int v = 0; v < kVecs; ++v) b[v] = load(reinterpret_cast<const float*>(w) + v * kW);
        multiply(acc, b, a, stride, 0);
    }
};

struct PairStep {
    typedef FloatMath Math;
    static constexpr bool kPacked = false;
    static constexpr int kStep = 2, kBytes = kPanel * 4, kActStep = 2 * kActBytes;
    template <int kRows, int kVecs>
    static PELTON_INLINE void step(VF (&acc)[kRows][kVecs], const char* w, const char* a, int64_t stride) {
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

template <class Codes, class MathType>
struct CodeStep {
    typedef MathType Math;
    static constexpr bool kPacked = !__is_same(Codes, NarrowByteCodes);
    static constexpr int kStep = kUnitCodes<Codes>, kBytes = kUnitBytes<Codes>, kActStep = kStep * Math::kActivation;
    template <int kRows, int kVecs>
    static PELTON_INLINE void step(typename Math::Acc (&acc)[kRows][kVecs], const char* w, const char* a,
                                   int64_t stride) {
        for_quads<Codes, kVecs>(w, [&](const VU(&q)[kVecs], int j) {
            Math::template quad<Codes>(acc, q, a + j * 4 * Math::kActivation, stride);
        });
    }
};

// What codes are expanded to.
template <class Math>
struct Expanded {
    typedef CodeStep<NarrowByteCodes, IntMath> Step;
};
template <>
struct Expanded<FloatMath> {
#if defined(__AVX512BF16__)
    typedef PairStep Step;
#else
    typedef F32Step Step;
#endif
};

// ---- register tiles

// Weights without groups. `w` points at the panel, moved to the first k of the block.
template <class Step, int kRows, bool kStream>
void plain_tile(const char* w, const char* a, int64_t stride, int64_t depth, Ahead ahead, const Output& c) {
    constexpr int kVecs = tile_vecs(kRows), kColumns = kVecs * kW;
    for (int col = 0; col < kPanel; col += kColumns) {
        VF acc[kRows][kVecs];
        PELTON_UNROLL
        for (int m = 0; m < kRows; ++m) {
            PELTON_UNROLL
            for (int v = 0; v < kVecs; ++v) acc[m][v] = c.first ? VF{} : load(c.data + m * c.ld + col + v * kW);
        }
        const char *wp = w + col * 4, *ap = a;
        int64_t k = 0;
        for (; k + Step::kStep <= depth; k += Step::kStep) {
            fetch<kVecs, kStream>(wp, ahead);
            Step::step(acc, wp, ap, stride);
            wp += Step::kBytes;
            ap += Step::kActStep;
        }
        if (k < depth) {  // odd k of bf16 weights; rounded activations are padded and do not come here
            VF b[kVecs];
            PELTON_UNROLL
            for (int v = 0; v < kVecs; ++v) b[v] = pair_low(load_u32(wp + v * kW * 4));
            multiply(acc, b, ap, stride, 0);
        }
        PELTON_UNROLL
        for (int m = 0; m < kRows; ++m) {
            PELTON_UNROLL
            for (int v = 0; v < kVecs; ++v) {
                VF y = acc[m][v];
                if (c.bias) y += load(c.bias + col + v * kW);
                store(c.data + m * c.ld + col + v * kW, y);
            }
        }
    }
}

// Consecutive groups of a panel, or a slice of a row that is one group.
struct Groups {
    const char* codes;    // of the first group, packed or expanded
    int64_t stride;       // bytes between groups
    const float* scales;  // [count][64]; null for f16 behind each group's codes, which lie as packed
    const float* zeros;   // the same, null if nothing is to be added
    bool minima;          // behind f16 scales
    int64_t first, count;
    int64_t size;             // elements of k
    bool sliced, ends_group;  // part of a row that is one group, its end
};

// A loop over the eight steps of a usual group ends before the processor is up to speed: kUnroll writes them out.
template <class Step, bool kStream, bool kUnroll, int kRows, int kVecs>
PELTON_INLINE void multiply_group(typename Step::Math::Acc (&acc)[kRows][kVecs], const char* w, int64_t size,
                                  const char* a, int64_t stride, Ahead& ahead) {
    const auto step = [&] {
        if (Step::kPacked) {
            PELTON_UNROLL
            for (int line = 0; line < Step::kBytes; line += kPanel * 4) fetch<kVecs, kStream>(w + line, ahead);
        }
        Step::step(acc, w, a, stride);
        w += Step::kBytes;
        a += Step::kActStep;
    };
    constexpr int kChunk = kUnroll && Step::kStep < 32 ? 32 : Step::kStep;
    for (; size >= kChunk; size -= kChunk) {
        PELTON_UNROLL
        for (int k = 0; k < kChunk; k += Step::kStep) step();
    }
    if (kChunk == Step::kStep) return;
#pragma GCC unroll 1
    for (; size > 0; size -= Step::kStep) step();
}

// Where a tile finds scales, and zeros if there are any: as f32 of their own, or as f16 behind the codes.
template <bool kHalfType, bool kZerosType>
struct ScalesAt {
    static constexpr bool kHalf = kHalfType, kZeros = kZerosType;
};

// Codes are multiplied first, then scaled: each group adds scale * sum(code * x), and zero * sum(x) if there are zeros.
// Everything that the loops need is copied to locals, or the compiler reads it again after each store.
template <class Step, int kRows, bool kStream, class Scales>
void grouped_tile(const Groups& g, const Activations& x, const char* a, Ahead ahead, const Output& c) {
    typedef typename Step::Math Math;
    // Results that stay in registers beside the sums. Others have a place of their own: rows of the output may lie a
    // multiple of 4 KB apart, where a load waits for the store of another row.
    constexpr int kVecs = kStream || !kInRegisters<Math> ? tile_vecs(kRows) : 2, kColumns = kVecs * kW;
    constexpr bool kKeep = kRows * kVecs <= (kInRegisters<Math> ? 12 : 8);
    const int64_t ld = c.ld, info = x.info_stride, size = g.size, stride = x.stride, count = g.count;
    for (int col = 0; col < kPanel; col += kColumns) {
        float* const out = c.data + col;
        alignas(64) float parked[kKeep ? 1 : kRows * kColumns];
        VF y[kRows][kVecs];
        PELTON_UNROLL
        for (int m = 0; m < kRows; ++m) {
            PELTON_UNROLL
            for (int v = 0; v < kVecs; ++v) {
                const VF before = c.first ? VF{} : load(out + m * ld + v * kW);
                if (kKeep) y[m][v] = before;
                if (!kKeep) store(parked + m * kColumns + v * kW, before);
            }
        }
        const char *ap = a, *codes = g.codes + col * 4;
        const int64_t code_bytes = size / Step::kStep * Step::kBytes, tail = g.stride - code_bytes;
        const float *scales = g.scales, *zeros = g.zeros;
        if (!Scales::kHalf) scales += col, zeros += col;
        const float *x_scales = x.scales + g.first, *x_sums = x.sums + g.first;
        const int32_t* x_starts = x.starts + g.first;
        for (int64_t i = 0; i < count; ++i) {
            typename Math::Acc acc[kRows][kVecs];
            PELTON_UNROLL
            for (int m = 0; m < kRows; ++m) {
                PELTON_UNROLL
                for (int v = 0; v < kVecs; ++v) acc[m][v] = Math::start(x_starts + m * info);
            }
            multiply_group<Step, kStream, kInRegisters<Math> && !kStream>(acc, codes, size, ap, stride, ahead);
            if (Step::kPacked && kStream) prefetch(codes + code_bytes, tail);
            const char* halves = codes + code_bytes - 2 * col;  // codes are four bytes a column
            PELTON_UNROLL
            for (int v = 0; v < kVecs; ++v) {
                VF scale, zero = {};
                if constexpr (Scales::kHalf) {
                    scale = from_f16(load_u16(halves + 2 * v * kW));
                    if (Scales::kZeros) zero = from_f16(load_u16(halves + 2 * kPanel + 2 * v * kW));
                } else {
                    scale = load(scales + v * kW);
                    if (Scales::kZeros) zero = load(zeros + v * kW);
                }
                PELTON_UNROLL
                for (int m = 0; m < kRows; ++m) {
                    float* at = parked + m * kColumns + v * kW;
                    VF now = Math::scaled(acc[m][v], scale, x_scales + m * info, kKeep ? y[m][v] : load(at));
                    if (Scales::kZeros) now = fma(zero, splat(x_sums[m * info]), now);
                    if (kKeep) y[m][v] = now;
                    if (!kKeep) store(at, now);
                }
            }
            ap += size * Math::kActivation;
            codes += g.stride;
            if (!Scales::kHalf) scales += kPanel, zeros += kPanel;
            ++x_scales, ++x_sums, ++x_starts;
        }
        PELTON_UNROLL
        for (int m = 0; m < kRows; ++m) {
            PELTON_UNROLL
            for (int v = 0; v < kVecs; ++v) {
                const VF now = kKeep ? y[m][v] : load(parked + m * kColumns + v * kW);
                store(out + m * ld + v * kW, c.bias ? now + load(c.bias + col + v * kW) : now);
            }
        }
    }
}

// What a row that is one group comes to, from its accumulators.
template <class Math>
PELTON_INLINE VF finished(typename Math::Acc acc, const Groups& g, const Activations& x, int64_t row, int col,
                          const float* bias) {
    const int64_t at = row * x.info_stride;
    VF y = Math::scaled(acc, load(g.scales + col), x.scales + at, VF{});
    if (g.zeros) y = fma(load(g.zeros + col), splat(x.sums[at]), y);
    return bias ? y + load(bias + col) : y;
}

// A slice of a row that is one group. Until the last one the accumulators are parked in the output.
template <class Step, int kRows, bool kStream>
void sliced_tile(const Groups& g, const Activations& x, const char* a, Ahead ahead, const Output& c) {
    typedef typename Step::Math Math;
    typedef typename Math::Acc Acc;
    constexpr int kVecs = tile_vecs(kRows), kColumns = kVecs * kW;
    for (int col = 0; col < kPanel; col += kColumns) {
        float* const out = c.data + col;
        Acc acc[kRows][kVecs];
        PELTON_UNROLL
        for (int m = 0; m < kRows; ++m) {
            PELTON_UNROLL
            for (int v = 0; v < kVecs; ++v) {
                acc[m][v] = c.first ? Math::start(x.starts + m * x.info_stride)
                                    : reinterpret_cast<Acc>(load(out + m * c.ld + v * kW));
            }
        }
        multiply_group<Step, kStream, false>(acc, g.codes + col * 4, g.size, a, x.stride, ahead);
        PELTON_UNROLL
        for (int m = 0; m < kRows; ++m) {
            PELTON_UNROLL
            for (int v = 0; v < kVecs; ++v) {
                store(out + m * c.ld + v * kW, g.ends_group ? finished<Math>(acc[m][v], g, x, m, col + v * kW, c.bias)
                                                            : reinterpret_cast<VF>(acc[m][v]));
            }
        }
    }
}

// ---- one item: a panel and a block of rows

#if defined(__AMX_TILE__)
void add_bias(int64_t rows, const Output& c) {
    if (!c.bias) return;
    for (int64_t m = 0; m < rows; ++m) {
        for (int col = 0; col < kPanel; col += kW) {
            float* y = c.data + m * c.ld + col;
            store(y, load(y) + load(c.bias + col));
        }
    }
}

// All rows, whatever their number: the sums of tiles are not those of vectors.
void tiles_item(AmxTiles& tiles, const char* panel, int64_t k, const Activations& x, int64_t rows, const Output& c) {
    amx_bf16_block(tiles, x.rows, x.stride, rows, panel, k, c.data, c.ld, true);
    add_bias(rows, c);
}

// Sums of a tile as if they had started like those of vectors.
template <class Math>
PELTON_INLINE typename Math::Acc started(const void* sums, int32_t start) {
    typename Math::Acc acc = reinterpret_cast<typename Math::Acc>(load_u32(sums));
    if constexpr (__is_same(Math, IntMath)) acc += start;
    return acc;
}

// A slice as sliced_tile does it.
template <class Math>
void sliced_tiles(AmxTiles& tiles, const Groups& g, const Activations& x, const char* a, int64_t rows,
                  const Output& c) {
    amx_block<typename AmxProduct<Math::kActivation>::Type>(tiles, a, x.stride, rows, g.codes,
                                                            g.size * Math::kActivation, reinterpret_cast<char*>(c.data),
                                                            c.ld * 4, c.first);
    if (!g.ends_group) return;
    for (int64_t m = 0; m < rows; ++m) {
        for (int col = 0; col < kPanel; col += kW) {
            float* y = c.data + m * c.ld + col;
            store(y, finished<Math>(started<Math>(y, x.starts[m * x.info_stride]), g, x, m, col, c.bias));
        }
    }
}

// Groups as grouped_tile does it: int8 to the same bits.
template <class Math, bool kZeros>
void grouped_tiles(AmxTiles& tiles, const Groups& g, const Activations& x, const char* a, int64_t rows, const Output& c,
                   bool stream) {
    constexpr int kVecs = kPanel / 2 / kW;
    for (int64_t m = 0; c.first && m < rows; ++m) __builtin_memset(c.data + m * c.ld, 0, kPanel * 4);
    const int64_t ld = c.ld, info = x.info_stride;
    const auto add = [&](const AmxSums& sums) {
        VF scale[kVecs], zero[kVecs];
        PELTON_UNROLL
        for (int v = 0; v < kVecs; ++v) {
            const int64_t at = sums.group * kPanel + sums.col + v * kW;
            scale[v] = load(g.scales + at);
            zero[v] = kZeros ? load(g.zeros + at) : VF{};
        }
        const int64_t first = sums.row * info + g.first + sums.group;
        const float *x_scales = x.scales + first, *x_sums = x.sums + first;
        const int32_t* x_starts = x.starts + first;
        const char* from = sums.data;
        float* y = c.data + sums.row * ld + sums.col;
        for (int64_t m = 0; m < sums.rows; ++m) {
            const float x_scale = x_scales[m * info], x_sum = x_sums[m * info];
            const int32_t start = x_starts[m * info];
            PELTON_UNROLL
            for (int v = 0; v < kVecs; ++v) {
                VF now =
                    Math::scaled(started<Math>(from + v * kAmxRowBytes, start), scale[v], &x_scale, load(y + v * kW));
                if (kZeros) now = fma(zero[v], splat(x_sum), now);
                store(y + v * kW, now);
            }
            from += kAmxGroupSumsRow;
            y += ld;
        }
    };
    amx_groups<typename AmxProduct<Math::kActivation>::Type>(tiles, a, x.stride, rows, g.codes, g.stride,
                                                             g.size * Math::kActivation, g.count, stream, add);
    add_bias(rows, c);
}

template <class Math>
void code_tiles(AmxTiles& tiles, const Groups& g, const Activations& x, const char* a, int64_t rows, const Output& c,
                bool stream) {
    if (g.sliced) return sliced_tiles<Math>(tiles, g, x, a, rows, c);
    if (g.zeros) return grouped_tiles<Math, true>(tiles, g, x, a, rows, c, stream);
    grouped_tiles<Math, false>(tiles, g, x, a, rows, c, stream);
}

constexpr bool kTiles = true;
#else
struct AmxTiles {};
constexpr bool amx_takes_groups(int64_t, int64_t) { return false; }
void tiles_item(AmxTiles&, const char*, int64_t, const Activations&, int64_t, const Output&) {}
template <class Math>
void code_tiles(AmxTiles&, const Groups&, const Activations&, const char*, int64_t, const Output&, bool) {}
constexpr bool kTiles = false;
#endif
// From here on tiles take fewer cycles than vectors for int8, which is exact either way: codes that are used in place,
// and those that are expanded first.
constexpr int kLeastTileRows = 5, kLeastExpandedTileRows = kDirectRows + 1;

// Calls f<rows, whether to stream>(first row, tile) for register tiles of up to kMost rows. Where the weights are to
// stream, tiles have fewer rows; among others, only those that are not full stream.
template <int kMost, class F>
PELTON_INLINE void for_weight_tiles(int64_t rows, F f) {
    if (rows <= kStreamRows) {
        constexpr int kFew = kMost < kDirectTile ? kMost : kDirectTile;
        return for_row_tiles<kFew>(rows, [&]<int kRows>(int64_t m) { f.template operator()<kRows, true>(m, 0); });
    }
    for_row_tiles<kMost>(rows,
                         [&]<int kRows>(int64_t m) { f.template operator()<kRows, (kRows < kMost)>(m, m / kMost); });
}

template <class Step>
void plain_item(const char* panel, int64_t k, int act_bytes, const Activations& x, int64_t rows, Output c) {
    const float* bias = c.bias;
    for (int64_t k0 = 0; k0 < k; k0 += kDepthBlock) {
        const int64_t depth = k - k0 < kDepthBlock ? k - k0 : kDepthBlock;
        c.first = k0 == 0;
        c.bias = k0 + depth == k ? bias : nullptr;
        for_weight_tiles<kTileRows>(rows, [&]<int kRows, bool kStream>(int64_t m, int64_t index) {
            Output tile = {c.data + m * c.ld, c.ld, c.first, c.bias};
            const char *w = panel + k0 / Step::kStep * Step::kBytes, *next = w + depth / Step::kStep * Step::kBytes;
            const Ahead ahead = ahead_of(next, next - w, index, depth / Step::kStep);
            plain_tile<Step, kRows, kStream>(w, x.rows + m * x.stride + k0 * act_bytes, x.stride, depth, ahead, tile);
        });
    }
}

// Codes of `depth` elements as quads of bytes, bf16 pairs or f32.
template <class Codes, class Math>
void expand(const char* codes, int64_t depth, char* out) {
    for (int64_t k = 0; k < depth; k += kUnitCodes<Codes>) {
        prefetch(codes, kUnitBytes<Codes>);
        for (int col = 0; col < kPanel; col += kW) {
            for_quads<Codes, 1>(codes + col * 4, [&](const VU(&q)[1], int j) {
                if constexpr (__is_same(Math, IntMath)) {
                    store_u32(out + j * kPanel * 4 + col * 4, q[0]);
                } else if constexpr (kBf16Dot) {
                    store_u32(out + 2 * j * kPanel * 4 + col * 4, code_pair<Codes>(q[0], 0));
                    store_u32(out + (2 * j + 1) * kPanel * 4 + col * 4, code_pair<Codes>(q[0], 1));
                } else {
                    PELTON_UNROLL
                    for (int i = 0; i < 4; ++i) {
                        store(reinterpret_cast<float*>(out) + (4 * j + i) * kPanel + col,
                              code_as_float<Codes>(q[0], i));
                    }
                }
            });
        }
        codes += kUnitBytes<Codes>;
        out += kUnitCodes<Codes> * kPanel * Math::kActivation;
    }
}

template <class Step, int kMost>
void sliced_rows(const Groups& g, const Activations& x, const char* a, int64_t rows, const Output& c) {
    const int64_t steps = g.size / Step::kStep, bytes = steps * Step::kBytes;
    for_weight_tiles<kMost>(rows, [&]<int kRows, bool kStream>(int64_t m, int64_t index) {
        const Output tile = {c.data + m * c.ld, c.ld, c.first, c.bias};
        const Ahead ahead = ahead_of(g.codes + bytes, bytes, index, steps);
        sliced_tile<Step, kRows, kStream>(g, shifted(x, m), a + m * x.stride, ahead, tile);
    });
}

template <class Step, int kMost>
void grouped_rows(const Groups& g, const Activations& x, const char* a, int64_t rows, const Output& c) {
    const int64_t steps = g.count * (g.size / Step::kStep), bytes = g.count * g.stride;
    for_weight_tiles<kMost>(rows, [&]<int kRows, bool kStream>(int64_t m, int64_t index) {
        const auto run = [&]<class Scales>(Scales) {
            const Output tile = {c.data + m * c.ld, c.ld, c.first, c.bias};
            const Ahead ahead = ahead_of(g.codes + bytes, bytes, index, steps);
            grouped_tile<Step, kRows, kStream, Scales>(g, shifted(x, m), a + m * x.stride, ahead, tile);
        };
        if (g.scales) {
            g.zeros ? run(ScalesAt<false, true>()) : run(ScalesAt<false, false>());
        } else if constexpr (Step::kPacked) {
            g.minima ? run(ScalesAt<true, true>()) : run(ScalesAt<true, false>());
        }
    });
}

template <class Codes, class Math>
void codes_item(const Call& call, const LinearShape& shape, const char* panel, const Activations& x, int64_t rows,
                Output c, char* scratch, AmxTiles& tiles) {
    // Bytes that meet int8 activations are used where they are.
    constexpr bool kInPlace = __is_same(Codes, ByteCodes) && __is_same(Math, IntMath);
    typedef CodeStep<Codes, Math> Direct;
    typedef typename Expanded<Math>::Step Wide;
    float* scales = reinterpret_cast<float*>(scratch);
    float* zeros = scales + shape.block * kPanel;
    char* expanded = reinterpret_cast<char*>(zeros + shape.block * kPanel);
    const bool one_group = shape.groups == 1;
    // Sums of floats must come from tiles for any number of rows if they do for one.
    const bool tiled = kTiles && (one_group || amx_takes_groups(shape.group, shape.group * Math::kActivation)) &&
                       (!Math::kCentred || rows >= (kInPlace ? kLeastTileRows : kLeastExpandedTileRows));
    // A single group may be cut: a few rows take it whole, many in slices that stay in the cache.
    const bool whole = !one_group || (rows <= kDirectRows && (kInPlace || !tiled));
    const int64_t slice = whole ? shape.group : kInPlace ? kDepthBlock : shape.depth;
    const float* bias = c.bias;
    Groups g = {};
    g.sliced = one_group;
    g.scales = scales;
    g.zeros = call.ints[kZeros] || (!Math::kCentred && call.ints[kOffset]) ? zeros : nullptr;
    // Scales that a tile can read as they lie behind the codes.
    const bool plain = call.ints[kScaleFormat] == kScaleF16 && !call.ints[kOuter] && call.ints[kCodes] != kFp4 &&
                       (!g.zeros || call.ints[kZeros] == kMinima) && !one_group;
    const bool quick = kQuick<Codes, Math> && !one_group && (plain || rows <= kQuickRows);
    const bool direct = kInPlace || (!tiled && (quick || rows <= kDirectRows));
    int64_t block = shape.block;
    if (plain && direct && !tiled && (!kInPlace || rows <= kStreamRows)) {
        g.scales = nullptr;
        g.minima = g.zeros;
        block = shape.groups;
    } else if (rows <= kStreamRows && !one_group) {
        while (block % 2 == 0 && block * shape.group_bytes > kStreamBytes) block /= 2;
    }
    for (int64_t i = 0; i < shape.groups; i += block) {
        g.first = i;
        g.count = shape.groups - i < block ? shape.groups - i : block;
        if (g.scales) expand_scales(call, shape, panel, i, g.count, Math::kCentred, scales, zeros);
        for (int64_t k0 = 0; k0 < shape.group; k0 += slice) {
            g.size = shape.group - k0 < slice ? shape.group - k0 : slice;
            g.ends_group = k0 + g.size == shape.group;
            c.first = i == 0 && k0 == 0;
            c.bias = i + g.count == shape.groups && g.ends_group ? bias : nullptr;
            g.codes = group_at(shape, panel, i) + k0 / kUnitCodes<Codes> * kUnitBytes<Codes>;
            const int64_t at = i * shape.group + k0;
            g.stride = shape.group_bytes;  // a block of groups has no outer factors inside
            if (!direct) {
                const int64_t size = g.size * kPanel * Math::kActivation;
                for (int64_t j = 0; j < g.count; ++j) {
                    expand<Codes, Math>(g.codes + j * g.stride, g.size, expanded + j * size);
                }
                g.codes = expanded;
                g.stride = size;
            }
            const char* a = x.rows + at * Math::kActivation;
            if (tiled) {
                code_tiles<Math>(tiles, g, x, a, rows, c, direct);
            } else if (direct && g.sliced) {
                sliced_rows<Direct, kInPlace ? kTileRows : kDirectTile>(g, x, a, rows, c);
            } else if (direct) {
                grouped_rows<Direct, kInPlace || kQuick<Codes, Math> ? kTileRows : kDirectTile>(g, x, a, rows, c);
            } else if (g.sliced) {
                sliced_rows<Wide, kTileRows>(g, x, a, rows, c);
            } else {
                grouped_rows<Wide, kTileRows>(g, x, a, rows, c);
            }
        }
    }
}

template <class Math>
void quantized_item(const Call& call, const LinearShape& shape, const char* panel, const Activations& x, int64_t rows,
                    const Output& c, char* scratch, AmxTiles& tiles) {
    switch (call.ints[kCodes]) {
        case kByte:
            return codes_item<ByteCodes, Math>(call, shape, panel, x, rows, c, scratch, tiles);
        case kNibble:
            return codes_item<NibbleCodes, Math>(call, shape, panel, x, rows, c, scratch, tiles);
        case kNibble1:
            return codes_item<Nibble1Codes, Math>(call, shape, panel, x, rows, c, scratch, tiles);
        case kNibble2:
            return codes_item<Nibble2Codes, Math>(call, shape, panel, x, rows, c, scratch, tiles);
        case kTwo:
            return codes_item<TwoCodes, Math>(call, shape, panel, x, rows, c, scratch, tiles);
        case kFp4:
            return codes_item<Fp4Codes, Math>(call, shape, panel, x, rows, c, scratch, tiles);
        default:
            return codes_item<Fp8Codes, FloatMath>(call, shape, panel, x, rows, c, scratch, tiles);
    }
}

// ---- epilogues, on a block of rows in [64] columns

template <class F>
PELTON_INLINE void gate_rows(const float* block, int64_t rows, float* out, int64_t ld, F activation) {
    for (int64_t m = 0; m < rows; ++m, block += kPanel, out += ld) {
        PELTON_UNROLL
        for (int col = 0; col < kPanel / 2; col += kW) {
            store(out + col, activation(load(block + col)) * load(block + kPanel / 2 + col));
        }
    }
}

void gate(int64_t kind, const float* block, int64_t rows, float* out, int64_t ld) {
    switch (kind) {
        case kSilu:
            return gate_rows(block, rows, out, ld, [](VF x) { return silu(x); });
        case kGeluTanh:
            return gate_rows(block, rows, out, ld, [](VF x) { return gelu_tanh(x); });
        case kGeluErf:
            return gate_rows(block, rows, out, ld, [](VF x) { return gelu_erf(x); });
        default:
            return gate_rows(block, rows, out, ld, [](VF x) { return relu(x); });
    }
}

void linear_item(const Call& call, const LinearShape& shape, const Activations& all, int64_t item, char* scratch,
                 AmxTiles& tiles) {
    const int64_t panel = item / shape.row_blocks, m0 = item % shape.row_blocks * shape.row_block;
    const int64_t rows = call.rows - m0 < shape.row_block ? call.rows - m0 : shape.row_block;
    const int64_t n0 = panel * kPanel, n = call.ints[kN], ld = call.ints[kLdOut];
    const int64_t columns = n - n0 < kPanel ? n - n0 : kPanel;
    const bool gated = call.ints[kEpilogue] >= kGated;
    const Activations x = shifted(all, m0);
    const char* weight = call.operands[kWeight].data + panel * shape.panel_bytes;
    const float* bias = reinterpret_cast<const float*>(call.operands[kBias].data);
    float* out = reinterpret_cast<float*>(call.operands[kOut].data) + m0 * ld + (gated ? n0 / 2 : n0);

    float* block = reinterpret_cast<float*>(scratch);  // [kRowBlock][kPanel]
    scratch += kRowBlock * kPanel * 4;
    float padded_bias[kPanel];
    Output c = {out, ld, true, bias ? bias + n0 : nullptr};
    // Registers are as wide as the panel, and results that are parked block after block must not lie a multiple of
    // 4 KB apart, or they drive each other out of the caches: go through a buffer.
    const bool buffered = gated || columns < kPanel || (call.ints[kFormat] == kQuantized && rows > kDirectRows);
    if (buffered) {
        c.data = block;
        c.ld = kPanel;
        if (bias && columns < kPanel) {
            for (int i = 0; i < kPanel; ++i) padded_bias[i] = i < columns ? c.bias[i] : 0.0f;
            c.bias = padded_bias;
        }
    }
    if (call.ints[kFormat] == kF32) {
        plain_item<F32Step>(weight, call.ints[kK], 4, x, rows, c);
    } else if (call.ints[kFormat] == kBf16 && kTiles) {
        tiles_item(tiles, weight, shape.padded_k, x, rows, c);
    } else if (call.ints[kFormat] == kBf16) {
        plain_item<PairStep>(weight, kBf16Dot ? shape.padded_k : call.ints[kK], kActBytes, x, rows, c);
    } else if (kInt8Products && shape.prepared == kRowsInt8) {
        quantized_item<IntMath>(call, shape, weight, x, rows, c, scratch, tiles);
    } else {
        quantized_item<FloatMath>(call, shape, weight, x, rows, c, scratch, tiles);
    }
    if (gated) {
        gate(call.ints[kEpilogue] - kGated, block, rows, out, ld);
    } else if (buffered) {
        for (int64_t m = 0; m < rows; ++m) __builtin_memcpy(out + m * ld, block + m * kPanel, columns * 4);
    }
}

void prepare_stage(const Call& call, int64_t begin, int64_t end, Worker&) {
    const LinearShape shape = linear_shape(call);
    prepare_rows(call, shape, prepared_at(shape, call.shared, call.rows), begin, end);
}

void multiply_stage(const Call& call, int64_t begin, int64_t end, Worker& worker) {
    const LinearShape shape = linear_shape(call);
    const char* x = call.operands[kX].data;
    Activations a = {x, call.ints[kLdX] * 4, nullptr, nullptr, nullptr, 0};
    char* scratch = worker.scratch;
    AmxTiles tiles;
    if (shape.row_bytes || shape.groups) {
        const bool local = call.rows <= kLocalRows;
        a = prepared_at(shape, local ? scratch : call.shared, call.rows);
        if (local && worker.tag != call.tag) {
            prepare_rows(call, shape, a, 0, call.rows);
            worker.tag = call.tag;
        }
        if (!shape.row_bytes) {
            a.rows = x;
            a.stride = call.ints[kLdX] * 4;
        }
        scratch += kLocalRows * (shape.row_bytes + shape.info_bytes);
    }
    for (int64_t item = begin; item < end; ++item) linear_item(call, shape, a, item, scratch, tiles);
}

}  // namespace

extern const Kernel linear_kernels[];
const Kernel linear_kernels[] = {
    {"linear", {prepare_stage, multiply_stage}, (kBf16Dot ? kActivationsBf16 : 0) | (kInt8Products ? kInt8Dot : 0)},
    {nullptr, {}, 0}};

}  // namespace pelton::cpu::PELTON_ISA
