#include "cpu/ops/norm/contract.h"
#include "cpu/simd.h"

namespace pelton::cpu::PELTON_ISA {
namespace {

PELTON_INLINE float* row_of(const Call& call, int operand, int64_t row, int64_t ld) {
    return reinterpret_cast<float*>(call.operands[operand].data) + row * ld;
}

// Two accumulators hide the latency of the additions.
PELTON_INLINE float sum_of_squares(const float* x, int64_t n, VF shift) {
    VF a = {}, b = {};
    int64_t i = 0;
    for (; i + 2 * kW <= n; i += 2 * kW) {
        VF u = load(x + i) - shift, v = load(x + i + kW) - shift;
        a = fma(u, u, a);
        b = fma(v, v, b);
    }
    for (; i + kW <= n; i += kW) {
        VF u = load(x + i) - shift;
        a = fma(u, u, a);
    }
    float total = sum(a + b);
    for (; i < n; ++i) {
        float u = x[i] - shift[0];
        total += u * u;
    }
    return total;
}

PELTON_INLINE float sum_of(const float* x, int64_t n) {
    VF a = {};
    int64_t i = 0;
    for (; i + kW <= n; i += kW) a += load(x + i);
    float total = sum(a);
    for (; i < n; ++i) total += x[i];
    return total;
}

void rms_row(const float* x, const float* weight, int64_t n, float eps, float offset, float* out) {
    const float factor = 1.0f / sqrt_scalar(sum_of_squares(x, n, VF{}) / static_cast<float>(n) + eps);
    int64_t i = 0;
    for (; i + kW <= n; i += kW) store(out + i, load(x + i) * factor * (load(weight + i) + offset));
    for (; i < n; ++i) out[i] = x[i] * factor * (weight[i] + offset);
}

void layer_row(const float* x, const float* weight, const float* bias, int64_t n, float eps, float* out) {
    const float mean = sum_of(x, n) / static_cast<float>(n);
    const float variance = sum_of_squares(x, n, splat(mean)) / static_cast<float>(n);
    const float factor = 1.0f / sqrt_scalar(variance + eps);
    int64_t i = 0;
    for (; i + kW <= n; i += kW) {
        VF y = (load(x + i) - mean) * factor * load(weight + i);
        store(out + i, bias ? y + load(bias + i) : y);
    }
    for (; i < n; ++i) {
        float y = (x[i] - mean) * factor * weight[i];
        out[i] = bias ? y + bias[i] : y;
    }
}

void add_row(const float* a, const float* b, int64_t n, float* out) {
    int64_t i = 0;
    for (; i + kW <= n; i += kW) store(out + i, load(a + i) + load(b + i));
    for (; i < n; ++i) out[i] = a[i] + b[i];
}

void rms_norm_rows(const Call& call, int64_t begin, int64_t end, Worker&) {
    using namespace rms_norm;
    const int64_t cols = call.ints[kCols], chunk = call.ints[kChunk];
    const float* weight = row_of(call, kWeight, 0, 0);
    for (int64_t r = begin; r < end; ++r) {
        const float* x = row_of(call, kX, r, call.ints[kLdX]);
        float* out = row_of(call, kOut, r, call.ints[kLdOut]);
        for (int64_t c = 0; c < cols; c += chunk) {
            rms_row(x + c, weight, chunk, call.floats[kEps], call.floats[kWeightOffset], out + c);
        }
    }
}

void layer_norm_rows(const Call& call, int64_t begin, int64_t end, Worker&) {
    using namespace layer_norm;
    for (int64_t r = begin; r < end; ++r) {
        layer_row(row_of(call, kX, r, call.ints[kLdX]), row_of(call, kWeight, 0, 0), row_of(call, kBias, 0, 0),
                  call.ints[kCols], call.floats[kEps], row_of(call, kOut, r, call.ints[kLdOut]));
    }
}

template <bool kRms>
void add_norm_rows(const Call& call, int64_t begin, int64_t end, Worker&) {
    using namespace add_norm;
    const int64_t cols = call.ints[kCols];
    const float* weight = row_of(call, kWeight, 0, 0);
    for (int64_t r = begin; r < end; ++r) {
        float* total = row_of(call, kSum, r, call.ints[kLdSum]);
        float* out = row_of(call, kOut, r, call.ints[kLdOut]);
        add_row(row_of(call, kA, r, call.ints[kLdA]), row_of(call, kB, r, call.ints[kLdB]), cols, total);
        if (kRms) {
            rms_row(total, weight, cols, call.floats[kEps], call.floats[kWeightOffset], out);
        } else {
            layer_row(total, weight, row_of(call, kBias, 0, 0), cols, call.floats[kEps], out);
        }
    }
}

}  // namespace

extern const Kernel norm_kernels[];
const Kernel norm_kernels[] = {{"rms_norm", {rms_norm_rows}, 0},
                               {"layer_norm", {layer_norm_rows}, 0},
                               {"add_rms_norm", {add_norm_rows<true>}, 0},
                               {"add_layer_norm", {add_norm_rows<false>}, 0},
                               {nullptr, {}, 0}};

}  // namespace pelton::cpu::PELTON_ISA
