// Two stages: sums = A x in the shared scratch, then y += B sums. Adapters are f32, or bf16, which tiers with vdpbf16ps
// multiply in pairs with x and sums rounded to bf16; elsewhere x and sums stay f32.
//
// Batch invariance: an element of A x is, per split of x, kChains chains over columns that depend on the width of x
// alone; then splits are added from the first to the last. An element of B sums is one chain over ranks.
#include "cpu/ops/lora/contract.h"
#include "cpu/row_tiles.h"

namespace pelton::cpu::PELTON_ISA {
namespace {

using namespace lora;

constexpr int kRankVecs = kRankPanel / kW;
// Independent sums hide the latency of an addition when there is one row; with more rows, they fill the registers.
constexpr int kChains = kW == 16 ? 4 : kW == 8 ? 2 : 1;
constexpr int kSumRows = kW == 16 ? 6 : kW == 8 ? 3 : 2;
constexpr int64_t kMostSplit = kDepthSplit + 32;

// A lane of weights times a lane of x. Rows of x lie as f32, or as pairs of bf16 where the tier has such products.
struct F32Lanes {
    static constexpr bool kPairs = false, kRounded = false;
    PELTON_INLINE static VF multiply(VF acc, const char* x, VU w) {
        return fma(splat(*reinterpret_cast<const float*>(x)), as_float(w), acc);
    }
};
struct PairLanes {
    static constexpr bool kPairs = true, kRounded = kBf16Dot;
    PELTON_INLINE static VF multiply(VF acc, const char* x, VU w) {
#if defined(__AVX512BF16__)
        return dot_pairs(acc, splat_u32(pair_at(x)), w);
#else
        const float* pair = reinterpret_cast<const float*>(x);
        return fma(splat(pair[1]), pair_high(w), fma(splat(pair[0]), pair_low(w), acc));
#endif
    }
};
template <class Lanes>
constexpr int64_t kLaneBytes = Lanes::kPairs && !Lanes::kRounded ? 8 : 4;  // of x

// n floats as lanes; the second half of an odd pair is zero, whatever lies behind the row.
template <class Lanes>
PELTON_INLINE const char* as_lanes(const float* x, int64_t n, char* buffer) {
    if (!Lanes::kPairs || (!Lanes::kRounded && n % 2 == 0)) return reinterpret_cast<const char*>(x);
    if (Lanes::kRounded) {
        uint16_t* to = reinterpret_cast<uint16_t*>(buffer);
        int64_t i = 0;
        for (; i + kW <= n; i += kW) store_u16(to + i, to_bf16(load(x + i)));
        for (; i < n; ++i) to[i] = to_bf16_scalar(x[i]);
        if (n % 2) to[n] = 0;
    } else {
        float* to = reinterpret_cast<float*>(buffer);
        for (int64_t i = 0; i < n; ++i) to[i] = x[i];
        to[n] = 0.0f;
    }
    return buffer;
}

// sums [16] of kRows rows over `lanes` lanes of a panel of A.
template <class Lanes, int kRows>
PELTON_INLINE void sum_tile(const char* const* x, const char* panel, int64_t lanes, float* const* sums) {
    VF acc[kRows][kChains][kRankVecs] = {};
    int64_t lane = 0;
    for (; lane + kChains <= lanes; lane += kChains) {
        PELTON_UNROLL
        for (int c = 0; c < kChains; ++c) {
            PELTON_UNROLL
            for (int v = 0; v < kRankVecs; ++v) {
                const VU w = load_u32(panel + ((lane + c) * kRankPanel + v * kW) * 4);
                PELTON_UNROLL
                for (int m = 0; m < kRows; ++m) {
                    acc[m][c][v] = Lanes::multiply(acc[m][c][v], x[m] + (lane + c) * kLaneBytes<Lanes>, w);
                }
            }
        }
    }
    for (; lane < lanes; ++lane) {
        PELTON_UNROLL
        for (int v = 0; v < kRankVecs; ++v) {
            const VU w = load_u32(panel + (lane * kRankPanel + v * kW) * 4);
            PELTON_UNROLL
            for (int m = 0; m < kRows; ++m) {
                acc[m][0][v] = Lanes::multiply(acc[m][0][v], x[m] + lane * kLaneBytes<Lanes>, w);
            }
        }
    }
    PELTON_UNROLL
    for (int m = 0; m < kRows; ++m) {
        PELTON_UNROLL
        for (int v = 0; v < kRankVecs; ++v) {
            VF sum = acc[m][0][v];
            PELTON_UNROLL
            for (int c = 1; c < kChains; ++c) sum += acc[m][c][v];
            store(sums[m] + v * kW, sum);
        }
    }
}

// y [cols] += B sums for kRows rows and a panel of 64 columns.
template <class Lanes, int kRows>
PELTON_INLINE void add_tile(const char* const* sums, const char* panel, int64_t lanes, float* const* y, int64_t cols) {
    for (int64_t c = 0; c < cols; c += kTileVecs * kW) {
        VF acc[kRows][kTileVecs] = {};
        for (int64_t lane = 0; lane < lanes; ++lane) {
            PELTON_UNROLL
            for (int v = 0; v < kTileVecs; ++v) {
                const VU w = load_u32(panel + (lane * kColumnPanel + c + v * kW) * 4);
                PELTON_UNROLL
                for (int m = 0; m < kRows; ++m) {
                    acc[m][v] = Lanes::multiply(acc[m][v], sums[m] + lane * kLaneBytes<Lanes>, w);
                }
            }
        }
        PELTON_UNROLL
        for (int m = 0; m < kRows; ++m) {
            PELTON_UNROLL
            for (int v = 0; v < kTileVecs; ++v) {
                const int64_t at = c + v * kW, left = cols - at;
                if (left >= kW) {
                    store(y[m] + at, load(y[m] + at) + acc[m][v]);
                } else if (left > 0) {
                    store_n(y[m] + at, load_n(y[m] + at, left) + acc[m][v], left);
                }
            }
        }
    }
}

PELTON_INLINE const char* slot_of(const Call& call, const LoraShape& shape, int64_t slot) {
    return call.operands[kTable].data + (slot - 1) * shape.slot_bytes;
}

// Sums of a row over a split, in the order of the blocks' rows.
PELTON_INLINE float* sums_of(const Call& call, const LoraShape& shape, int64_t row, int64_t split) {
    return reinterpret_cast<float*>(call.shared) + (row * shape.splits + split) * shape.ranks;
}

template <class Lanes>
void sum_stage(const Call& call, int64_t begin, int64_t end) {
    const LoraShape shape = lora_shape(call);
    const LoraWork& work = *static_cast<const LoraWork*>(call.plan);
    for (int64_t item = begin; item < end; ++item) {
        const LoraBlock& block = work.blocks[item / shape.splits];
        const int64_t split = item % shape.splits, first = split * shape.split;
        const int64_t left = call.ints[kIn] - first, depth = left < shape.split ? left : shape.split;
        const int64_t lanes = Lanes::kPairs ? (depth + 1) / 2 : depth;
        const char* slot = slot_of(call, shape, block.slot);
        const int32_t* header = reinterpret_cast<const int32_t*>(slot);
        int64_t ranks = 0;
        for (int64_t p = 0; p < call.ints[kParts]; ++p) {
            if (header[2 * p + 1] && header[2 * p] + header[2 * p + 1] > ranks)
                ranks = header[2 * p] + header[2 * p + 1];
        }
        const char* a = slot + kMostParts * 8 + first / (Lanes::kPairs ? 2 : 1) * kRankPanel * 4;
        for_row_tiles<kSumRows>(block.count, [&]<int kRows>(int64_t m) {
            alignas(64) char buffer[kRows][kMostSplit * (Lanes::kRounded ? 2 : 4)];
            const char* x[kRows];
            float* sums[kRows];
            for (int i = 0; i < kRows; ++i) {
                const int64_t row = work.rows[block.begin + m + i];
                const float* from = reinterpret_cast<float*>(call.operands[kX].data) + row * call.ints[kLdX] + first;
                x[i] = as_lanes<Lanes>(from, depth, buffer[i]);
            }
            for (int64_t r = 0; r < ranks; r += kRankPanel) {
                for (int i = 0; i < kRows; ++i) sums[i] = sums_of(call, shape, block.begin + m + i, split) + r;
                sum_tile<Lanes, kRows>(x, a + r / kRankPanel * shape.a_panel, lanes, sums);
            }
        });
    }
}

// The sums of a part's ranks as lanes.
template <class Lanes>
PELTON_INLINE const char* sums_as_lanes(const float* sums, const LoraShape& shape, int64_t rank, float* total,
                                        char* buffer) {
    if (shape.splits > 1) {
        int64_t r = 0;
        for (; r + kW <= rank; r += kW) {
            VF v = load(sums + r);
            for (int64_t s = 1; s < shape.splits; ++s) v += load(sums + s * shape.ranks + r);
            store(total + r, v);
        }
        for (; r < rank; ++r) {
            float v = sums[r];
            for (int64_t s = 1; s < shape.splits; ++s) v += sums[s * shape.ranks + r];
            total[r] = v;
        }
        sums = total;
    }
    return as_lanes<Lanes>(sums, rank, buffer);
}

// Panels [begin, end) of a part whose first panel is `first_panel` and first column `column`, for rows of a block.
template <class Lanes>
PELTON_INLINE void add_part(const Call& call, const LoraShape& shape, const LoraBlock& block, int64_t part,
                            int64_t begin, int64_t end, int64_t first_panel, int64_t column) {
    const LoraWork& work = *static_cast<const LoraWork*>(call.plan);
    const char* slot = slot_of(call, shape, block.slot);
    const int32_t* header = reinterpret_cast<const int32_t*>(slot) + 2 * part;
    const int64_t first = header[0], rank = header[1], width = call.ints[kWidths + part];
    if (rank == 0) return;
    for_row_tiles<kTileRows>(block.count, [&]<int kRows>(int64_t m) {
        alignas(64) float total[kRows][kMostRank];
        alignas(64) char buffer[kRows][kMostRank * 4];
        const char* sums[kRows];
        float *rows[kRows], *y[kRows];
        for (int i = 0; i < kRows; ++i) {
            const int64_t at = block.begin + m + i;
            sums[i] = sums_as_lanes<Lanes>(sums_of(call, shape, at, 0) + first, shape, rank, total[i], buffer[i]);
            rows[i] = reinterpret_cast<float*>(call.operands[kY].data) + work.rows[at] * call.ints[kLdY] + column;
        }
        for (int64_t p = begin; p < end; ++p) {  // along the rows, which is how memory is fastest
            const int64_t offset = (p - first_panel) * kColumnPanel, left = width - offset;
            for (int i = 0; i < kRows; ++i) y[i] = rows[i] + offset;
            add_tile<Lanes, kRows>(sums, slot + shape.b_offset + p * shape.b_panel,
                                   Lanes::kPairs ? (rank + 1) / 2 : rank, y, left < kColumnPanel ? left : kColumnPanel);
        }
    });
}

template <class Lanes>
void add_stage(const Call& call, int64_t begin, int64_t end) {
    const LoraShape shape = lora_shape(call);
    const LoraWork& work = *static_cast<const LoraWork*>(call.plan);
    while (begin < end) {
        const int64_t index = begin / shape.panels, start = index * shape.panels;
        const int64_t from = begin - start, to = (end - start < shape.panels ? end - start : shape.panels);
        int64_t first_panel = 0, column = 0;
        for (int64_t part = 0; first_panel < to; ++part) {
            const int64_t next = first_panel + (call.ints[kWidths + part] + kColumnPanel - 1) / kColumnPanel;
            const int64_t low = from > first_panel ? from : first_panel, high = to < next ? to : next;
            if (low < high) add_part<Lanes>(call, shape, work.blocks[index], part, low, high, first_panel, column);
            first_panel = next;
            column += call.ints[kWidths + part];
        }
        begin = start + to;
    }
}

void lora_sums(const Call& call, int64_t begin, int64_t end, Worker&) {
    call.ints[kFormat] == kBf16 ? sum_stage<PairLanes>(call, begin, end) : sum_stage<F32Lanes>(call, begin, end);
}

void lora_add(const Call& call, int64_t begin, int64_t end, Worker&) {
    call.ints[kFormat] == kBf16 ? add_stage<PairLanes>(call, begin, end) : add_stage<F32Lanes>(call, begin, end);
}

}  // namespace

extern const Kernel lora_kernels[];
const Kernel lora_kernels[] = {{"lora", {lora_sums, lora_add}, 0}, {nullptr, {}, 0}};

}  // namespace pelton::cpu::PELTON_ISA
