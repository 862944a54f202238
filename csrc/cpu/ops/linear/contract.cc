#include "cpu/ops/linear/contract.h"

#include <algorithm>

#include "cpu/contract.h"

namespace pelton::cpu {

LinearShape linear_shape(const Call& call) {
    using namespace linear;
    const int64_t* ints = call.ints;
    const int64_t n = ints[kN], k = ints[kK];
    LinearShape shape = {};
    shape.panels = (n + kPanel - 1) / kPanel;
    shape.padded_k = (k + 1) / 2 * 2;
    if (ints[kFormat] == kF32) {
        shape.panel_bytes = k * kPanel * 4;
    } else if (ints[kFormat] == kBf16) {
        shape.panel_bytes = shape.padded_k * kPanel * 2;
    } else {
        const int64_t group = ints[kGroupSize];
        shape.groups = k / group;
        shape.group_bytes =
            group * kPanel * ints[kBits] / 8 + kPanel * (ints[kScaleIsF32] ? 4 : 2) * (ints[kHasMin] ? 2 : 1);
        shape.panel_bytes = shape.groups * shape.group_bytes;
        const int64_t block = call.kernel->traits == kActivationsBf16 ? kExpandBlockBf16 : kExpandBlockF32;
        shape.depth = std::max(group, block / group * group);
    }
    if (call.kernel->traits == kActivationsBf16 && ints[kFormat] != kF32) {
        shape.rounded_bytes = (shape.padded_k * 2 + 63) / 64 * 64;
    }
    shape.row_block = ints[kBlockRows] ? ints[kBlockRows] : kRowBlock;  // 0 before the first plan
    shape.row_blocks = (call.rows + shape.row_block - 1) / shape.row_block;
    return shape;
}

static std::string validate(const Call& call) {
    using namespace linear;
    const int64_t* ints = call.ints;
    if (ints[kN] < 1 || ints[kK] < 1) return "n and k must be positive";
    if (ints[kFormat] < kF32 || ints[kFormat] > kQuantized) return "format must be 0, 1 or 2";
    if (ints[kFormat] == kQuantized) {
        if (ints[kBits] != 4 && ints[kBits] != 8) return "bits_stored must be 4 or 8";
        if (ints[kGroupSize] < 8 || ints[kGroupSize] % 8) return "group_size must be a multiple of 8";
        if (ints[kK] % ints[kGroupSize]) return "k must be a multiple of group_size";
        if (ints[kOffset] < 0 || ints[kOffset] > 255) return "offset must be a code";
    }
    LinearShape shape = linear_shape(call);
    if (mul_sizes(shape.panels, shape.panel_bytes) > call.operands[kWeight].bytes) {
        return "the packed weight is too small";
    }
    if (call.operands[kBias].data && call.operands[kBias].bytes < ints[kN] * 4) return "the bias is too short";
    return "";
}

static std::string plan(Call& call, Step& step) {
    using namespace linear;
    const int64_t* ints = call.ints;
    if (!rows_of_step(call, step, &call.rows)) return "rows_dim must be 0, 1 or 2";
    std::string error = check_rows(call, kOut, call.rows, ints[kN], ints[kLdOut]);
    if (error.empty()) error = check_rows(call, kX, call.rows, ints[kK], ints[kLdX]);
    if (!error.empty()) return error;

    // Halve the row blocks until there are a few items per thread, as cores run at unequal speed.
    const int64_t panels = (ints[kN] + kPanel - 1) / kPanel;
    int64_t block = kRowBlock;
    while (block > 24 && panels * ((call.rows + block - 1) / block) < 4 * step.threads) block /= 2;
    call.ints[kBlockRows] = block;
    LinearShape shape = linear_shape(call);
    const bool prepares = shape.rounded_bytes || shape.groups;
    call.shared_bytes = 0;
    call.cuts[0] = {0, 1};
    if (prepares && call.rows > kLocalRows) {
        call.shared_bytes = mul_sizes(call.rows, shape.rounded_bytes + (shape.groups * 4 + 63) / 64 * 64);
        call.cuts[0] = cut_rows(call.rows, ints[kK]);
    }
    // All row blocks of a panel go to one thread while there are panels enough: the panel is read once.
    const int64_t together = panels >= 8 * step.threads ? shape.row_blocks : 1;
    call.cuts[1] = {panels * shape.row_blocks, together};
    return "";
}

static int64_t scratch_bytes(const Call& call) {
    // Activations of a few rows and their group sums, a block of ragged output, an expanded weight block.
    LinearShape shape = linear_shape(call);
    int64_t expanded = call.kernel->traits == linear::kActivationsBf16 ? 2 : 4;
    return kLocalRows * (shape.rounded_bytes + (shape.groups * 4 + 63) / 64 * 64) + kRowBlock * kPanel * 4 +
           shape.depth * kPanel * expanded;
}

const Contract kLinear = {
    "linear",
    "operands [out(arena), x(arena), weight(const), bias(const or none)]; ints [rows_dim, n, k, ld_out, ld_x, format, "
    "bits_stored, group_size, has_min, scale_is_f32, offset]",
    "aacC",
    11,
    0,
    validate,
    plan,
    scratch_bytes};

}  // namespace pelton::cpu
