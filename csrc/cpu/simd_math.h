// exp, tanh and the activations on vectors, with relative errors of a few 1e-7. The polynomials were
// fitted for this project (least squares reweighted towards minimax).
#pragma once

#include "cpu/simd.h"

namespace pelton::cpu::PELTON_ISA {
namespace {

// exp(x) = p * 2^n with n a whole number and p in about [0.7, 1.42].
struct ExpParts {
    VF p, n;
};

PELTON_INLINE ExpParts exp_parts(VF x) {
    const VF shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    VF n = fma(x, splat(1.44269504f), shifter) - shifter;
    // ln 2 in two parts; the first has 12 trailing zeros, so n times it is exact.
    VF r = fma(n, splat(-0.693359375f), x);
    r = fma(n, splat(2.12194440e-4f), r);
    VF q = fma(splat(1.390130574e-03f), r, splat(8.363200052e-03f));
    q = fma(q, r, splat(4.166685414e-02f));
    q = fma(q, r, splat(1.666657696e-01f));
    q = fma(q, r, splat(4.999999955e-01f));
    VF p = fma(q * r, r, r) + 1.0f;
    return {p, n};
}

PELTON_INLINE VF exp(VF x) {
    // Below -87.34 the result is subnormal and counts as 0. From 88.38 on n is 128, whose exponent is that
    // of infinity: 0.35 before the end of f32, at no cost.
    const VF lowest = splat(-87.336540f), highest = splat(89.0f);
    VF clamped = min(highest, max(lowest, x));
    const ExpParts e = exp_parts(clamped);
    VI exponent = (__builtin_convertvector(e.n, VI) + 127) << 23;
    VF result = e.p * reinterpret_cast<VF>(exponent);
    return x < lowest ? VF{} : result;
}

// 2^x for x <= 0 as softmax needs it, 0 for -inf and wherever f32 ends; a NaN stays one.
PELTON_INLINE VF exp2_nonpositive(VF x) {
#if defined(__AVX512F__)
    // What is left of x after rounding it to an integer; 0 for -inf.
    VF r = reinterpret_cast<VF>(_mm512_reduce_ps(reinterpret_cast<__m512>(x), 0));
    VF n = x - r;
#else
    VF clamped = max(splat(-126.0f), x);
    const VF shifter = splat(12582912.0f);  // as in exp_parts
    VF n = (clamped + shifter) - shifter;
    VF r = clamped - n;
#endif
    VF p = fma(splat(1.326472731e-03f), r, splat(9.671512991e-03f));
    p = fma(p, r, splat(5.550733581e-02f));
    p = fma(p, r, splat(2.402224243e-01f));
    p = fma(p, r, splat(6.931470037e-01f));
    p = fma(p, r, splat(1.0f));
#if defined(__AVX512F__)
    return reinterpret_cast<VF>(_mm512_scalef_ps(reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(n)));
#else
    VI exponent = (__builtin_convertvector(n, VI) + 127) << 23;
    VF result = p * reinterpret_cast<VF>(exponent);
    return x < -126.0f ? VF{} : result;
#endif
}

PELTON_INLINE VF tanh(VF x) {
    // Near zero 1 - 2/(e^2x + 1) cancels, so a polynomial takes over below 0.625.
    VF z = x * x;
    VF q = fma(splat(-5.923977655e-03f), z, splat(2.087367419e-02f));
    q = fma(q, z, splat(-5.382381570e-02f));
    q = fma(q, z, splat(1.333258419e-01f));
    q = fma(q, z, splat(-3.333332703e-01f));
    VF small = fma(q * z, x, x);
    VF e = exp(x + x);
    VF large = 1.0f - 2.0f / (e + 1.0f);
    return abs(x) < 0.625f ? small : large;
}

PELTON_INLINE VF silu(VF x) { return x / (exp(-x) + 1.0f); }

// x/2 (1 + tanh u) = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3): no cancellation on either side.
PELTON_INLINE VF gelu_tanh(VF x) {
    VF u2 = x * fma(x * x, splat(2.0f * 0.7978845608f * 0.044715f), splat(2.0f * 0.7978845608f));
    return x / (exp(-u2) + 1.0f);
}

// x/2 erfc(-x/sqrt 2), with erfc(t) = exp(-t^2) P(1/(1 + 0.4 t)) for t >= 0, P fitted on [0, 10].
PELTON_INLINE VF gelu_erf(VF x) {
    VF t = abs(x) * 0.70710678f;
    VF u = 1.0f / fma(t, splat(0.4f), splat(1.0f));
    VF p = fma(splat(-3.867234764e-02f), u, splat(2.502780564e-01f));
    p = fma(p, u, splat(-6.306082617e-01f));
    p = fma(p, u, splat(7.387819797e-01f));
    p = fma(p, u, splat(-4.611626865e-01f));
    p = fma(p, u, splat(3.805006994e-01f));
    p = fma(p, u, splat(8.504181100e-02f));
    p = fma(p, u, splat(2.270810502e-01f));
    p = fma(p, u, splat(2.228551181e-01f));
    p = fma(p, u, splat(2.259134025e-01f));
    p = fma(p, u, splat(-8.819918989e-06f));
    VF tail = exp(x * x * -0.5f) * p;
    VF erfc = x < 0.0f ? tail : 2.0f - tail;
    return x * 0.5f * erfc;
}

PELTON_INLINE VF relu(VF x) { return max(VF{}, x); }

}  // namespace
}  // namespace pelton::cpu::PELTON_ISA
