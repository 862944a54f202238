#include "cpu/ops/elementwise/contract.h"
#include "cpu/simd_math.h"

namespace pelton::cpu::PELTON_ISA {
namespace {

PELTON_INLINE float* row_of(const Call& call, int operand, int64_t row, int64_t ld) {
    return reinterpret_cast<float*>(call.operands[operand].data) + row * ld;
}

// The last columns go through the same vector code, so an element's value does not depend on where
// in the row it stands.
template <class F>
PELTON_INLINE void map1(const float* x, float* out, int64_t n, F f) {
    int64_t i = 0;
    for (; i + kW <= n; i += kW) store(out + i, f(load(x + i)));
    if (i < n) store_n(out + i, f(load_n(x + i, n - i)), n - i);
}

template <class F>
PELTON_INLINE void map2(const float* a, const float* b, float* out, int64_t n, F f) {
    int64_t i = 0;
    for (; i + kW <= n; i += kW) store(out + i, f(load(a + i), load(b + i)));
    if (i < n) store_n(out + i, f(load_n(a + i, n - i), load_n(b + i, n - i)), n - i);
}

template <class F>
PELTON_INLINE void unary_rows(const Call& call, int64_t begin, int64_t end, F f) {
    using namespace unary;
    for (int64_t r = begin; r < end; ++r) {
        map1(row_of(call, kX, r, call.ints[kLdX]), row_of(call, kOut, r, call.ints[kLdOut]), call.ints[kCols], f);
    }
}

template <class F>
PELTON_INLINE void binary_rows(const Call& call, int64_t begin, int64_t end, F f) {
    using namespace binary;
    for (int64_t r = begin; r < end; ++r) {
        map2(row_of(call, kA, r, call.ints[kLdA]), row_of(call, kB, r, call.ints[kLdB]),
             row_of(call, kOut, r, call.ints[kLdOut]), call.ints[kCols], f);
    }
}

void add_rows(const Call& call, int64_t begin, int64_t end, Worker&) {
    binary_rows(call, begin, end, [](VF a, VF b) { return a + b; });
}

void mul_rows(const Call& call, int64_t begin, int64_t end, Worker&) {
    binary_rows(call, begin, end, [](VF a, VF b) { return a * b; });
}

void scale_rows(const Call& call, int64_t begin, int64_t end, Worker&) {
    const float factor = call.floats[unary::kFactor];
    unary_rows(call, begin, end, [factor](VF x) { return x * factor; });
}

void softcap_rows(const Call& call, int64_t begin, int64_t end, Worker&) {
    const float cap = call.floats[unary::kFactor];
    unary_rows(call, begin, end, [cap](VF x) { return tanh(x / cap) * cap; });
}

void activation_rows(const Call& call, int64_t begin, int64_t end, Worker&) {
    switch (call.ints[unary::kKind]) {
        case kSilu:
            return unary_rows(call, begin, end, [](VF x) { return silu(x); });
        case kGeluTanh:
            return unary_rows(call, begin, end, [](VF x) { return gelu_tanh(x); });
        case kGeluErf:
            return unary_rows(call, begin, end, [](VF x) { return gelu_erf(x); });
        default:
            return unary_rows(call, begin, end, [](VF x) { return relu(x); });
    }
}

void gated_activation_rows(const Call& call, int64_t begin, int64_t end, Worker&) {
    switch (call.ints[gated::kKind]) {
        case kSilu:
            return binary_rows(call, begin, end, [](VF g, VF u) { return silu(g) * u; });
        case kGeluTanh:
            return binary_rows(call, begin, end, [](VF g, VF u) { return gelu_tanh(g) * u; });
        case kGeluErf:
            return binary_rows(call, begin, end, [](VF g, VF u) { return gelu_erf(g) * u; });
        default:
            return binary_rows(call, begin, end, [](VF g, VF u) { return relu(g) * u; });
    }
}

}  // namespace

extern const Kernel elementwise_kernels[];
const Kernel elementwise_kernels[] = {{"add", {add_rows}, 0},
                                      {"mul", {mul_rows}, 0},
                                      {"scale", {scale_rows}, 0},
                                      {"softcap", {softcap_rows}, 0},
                                      {"activation", {activation_rows}, 0},
                                      {"gated_activation", {gated_activation_rows}, 0},
                                      {nullptr, {}, 0}};

}  // namespace pelton::cpu::PELTON_ISA
