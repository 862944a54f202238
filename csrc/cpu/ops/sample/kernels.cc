#include "cpu/ops/sample/contract.h"
#include "cpu/simd.h"

namespace pelton::cpu::PELTON_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr int kBlockVecs = kSampleBlock / kW;

typedef float VFhalf __attribute__((vector_size(kW * 2)));
typedef double VD __attribute__((vector_size(kW * 4)));
typedef uint64_t VM __attribute__((vector_size(kW * 4)));  // masses

PELTON_INLINE uint64_t bits_of(double x) {
    uint64_t bits;
    __builtin_memcpy(&bits, &x, 8);
    return bits;
}

// The first n <= kW elements, `fill` after them.
PELTON_INLINE VF load_or(const float* p, int64_t n, float fill) {
    if (n >= kW) return load(p);
#if defined(__AVX512F__)
    return reinterpret_cast<VF>(
        _mm512_mask_loadu_ps(reinterpret_cast<__m512>(splat(fill)), static_cast<__mmask16>((1u << n) - 1), p));
#else
    VF v = splat(fill);
    for (int64_t i = 0; i < n; ++i) v[i] = p[i];
    return v;
#endif
}

PELTON_INLINE void store_up_to(float* p, VF v, int64_t n) {
    if (n >= kW) {
        store(p, v);
    } else {
        store_n(p, v, n);
    }
}

struct Doubles {
    VD low, high;
};

PELTON_INLINE Doubles to_double(VF v) {
#if defined(__AVX512F__)
    const __m512 x = reinterpret_cast<__m512>(v);
    return {reinterpret_cast<VD>(_mm512_cvtps_pd(_mm512_castps512_ps256(x))),
            reinterpret_cast<VD>(_mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)))};
#elif defined(__AVX2__)
    const __m256 x = reinterpret_cast<__m256>(v);
    return {reinterpret_cast<VD>(_mm256_cvtps_pd(_mm256_castps256_ps128(x))),
            reinterpret_cast<VD>(_mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)))};
#else
    VFhalf halves[2];
    __builtin_memcpy(halves, &v, sizeof(v));
    return {__builtin_convertvector(halves[0], VD), __builtin_convertvector(halves[1], VD)};
#endif
}

// Sums of masses. Each number brings the shifter's bits with it; they are taken off together.
class MassSum {
public:
    PELTON_INLINE void add(VF v) {
        const Doubles d = to_double(v);
        add(d.low);
        add(d.high);
    }
    PELTON_INLINE void add(VD d) {
        sum_ += reinterpret_cast<VM>(d + kMassShifter);
        ++vectors_;
    }
    PELTON_INLINE uint64_t total() const {
        uint64_t total = 0;
#if defined(__AVX512F__)
        // Not _mm512_reduce_add_epi64: it adds signed numbers, whose overflow is undefined.
        const __m512i lanes = reinterpret_cast<__m512i>(sum_);
        const __m256i four = _mm256_add_epi64(_mm512_castsi512_si256(lanes), _mm512_extracti64x4_epi64(lanes, 1));
        const __m128i two = _mm_add_epi64(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1));
        total = static_cast<uint64_t>(_mm_cvtsi128_si64(two)) + static_cast<uint64_t>(_mm_extract_epi64(two, 1));
#else
        for (int i = 0; i < kW / 2; ++i) total += sum_[i];
#endif
        return total - vectors_ * (kW / 2) * bits_of(kMassShifter);
    }

private:
    VM sum_ = {};
    uint64_t vectors_ = 0;
};

PELTON_INLINE uint64_t mass_of(float weight) {
    return bits_of(static_cast<double>(weight) + kMassShifter) - bits_of(kMassShifter);
}

PELTON_INLINE VF scaled(VF x, VF peak, VF scale) { return max(splat(-60.0f), (x - peak) * scale); }

// 2^x for -60 <= x <= 0 with every product and sum rounded: fused ones would differ between tiers. The polynomial
// is that of simd_math.h, the steps are those of the NumPy sampler.
PELTON_INLINE VF weight_of(VF x) {
    const VF shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, which the lower bits hold
    VF n = x + shifter;
    VF r = x - (n - shifter);
    VF p = splat(1.326472731e-03f) * r + splat(9.671512991e-03f);
    p = p * r + splat(5.550733581e-02f);
    p = p * r + splat(2.402224243e-01f);
    p = p * r + splat(6.931470037e-01f);
    p = p * r + splat(1.0f);
    return as_float(as_u32(p) + (as_u32(n) << 23));
}

bool maxima(const float* x, int64_t n, float* out) {
#if defined(__AVX512F__)
    __mmask16 unordered = 0;
#else
    VI unordered = {};
#endif
    const auto look = [&](VF a, VF b) __attribute__((always_inline)) {
#if defined(__AVX512F__)
        unordered |= _mm512_cmp_ps_mask(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), _CMP_UNORD_Q);
#else
        unordered |= (a != a) | (b != b);
#endif
        return max(a, b);
    };
    int64_t i = 0;
    for (; i + kSampleBlock <= n; i += kSampleBlock) {
        VF best = look(load(x + i), load(x + i + kW));
        PELTON_UNROLL
        for (int v = 2; v < kBlockVecs; v += 2) {
            best = max(best, look(load(x + i + v * kW), load(x + i + (v + 1) * kW)));
        }
        *out++ = max_lane(best);
    }
    if (i < n) {
        VF best = splat(-kInfinity);
        for (; i < n; i += kW) {
            const VF v = load_or(x + i, n - i, -kInfinity);
            best = max(best, look(v, v));
        }
        *out = max_lane(best);
    }
#if defined(__AVX512F__)
    return unordered != 0;
#else
    int32_t any = 0;
    for (int lane = 0; lane < kW; ++lane) any |= unordered[lane];
    return any != 0;
#endif
}

void masked(float* out, const float* x, int64_t n, const uint32_t* bits) {
    for (int64_t i = 0; i < n; i += kW) {
        const VF v = load_or(x + i, n - i, -kInfinity);
        const uint32_t lanes = bits[i / 32] >> (i % 32);
#if defined(__AVX512F__)
        const VF kept = reinterpret_cast<VF>(_mm512_mask_mov_ps(
            reinterpret_cast<__m512>(splat(-kInfinity)), static_cast<__mmask16>(lanes), reinterpret_cast<__m512>(v)));
#else
        const VI numbers = __builtin_convertvector(lane_numbers(), VI);
        const VI bit = reinterpret_cast<VI>(splat_u32(1)) << numbers;
        const VF kept = (reinterpret_cast<VI>(splat_u32(lanes)) & bit) != 0 ? v : splat(-kInfinity);
#endif
        store_up_to(out + i, kept, n - i);
    }
}

void block_masses(const float* x, int64_t n, float peak, float scale, uint64_t* masses) {
    const VF peaks = splat(peak), scales = splat(scale);
    int64_t i = 0;
    for (; i + kSampleBlock <= n; i += kSampleBlock) {
        MassSum sum;
        PELTON_UNROLL
        for (int v = 0; v < kBlockVecs; ++v) sum.add(weight_of(scaled(load(x + i + v * kW), peaks, scales)));
        *masses++ = sum.total();
    }
    if (i < n) {
        MassSum sum;
        for (; i < n; i += kW) sum.add(weight_of(scaled(load_or(x + i, n - i, -kInfinity), peaks, scales)));
        *masses = sum.total();
    }
}

uint64_t weigh(float* weights, const float* x, int64_t n, float peak, float scale) {
    const VF peaks = splat(peak), scales = splat(scale);
    MassSum sum;
    for (int64_t i = 0; i < n; i += kW) {
        const VF w = weight_of(scaled(load_or(x + i, n - i, -kInfinity), peaks, scales));
        sum.add(w);
        store_up_to(weights + i, w, n - i);
    }
    return sum.total();
}

int64_t collect(const float* x, int64_t n, const float* maxima, float least, float* keys, int32_t* ids) {
    int64_t count = 0;
    for (int64_t begin = 0; begin < n; begin += kSampleBlock) {
        if (maxima[begin / kSampleBlock] < least) continue;
        const int64_t end = begin + kSampleBlock < n ? begin + kSampleBlock : n;
#if defined(__AVX512F__)
        const __m512i numbers = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        for (int64_t i = begin; i < end; i += 16) {
            const __mmask16 inside = static_cast<__mmask16>(end - i >= 16 ? 0xffff : (1u << (end - i)) - 1);
            const __m512 v = _mm512_maskz_loadu_ps(inside, x + i);
            const __mmask16 hit = _mm512_mask_cmp_ps_mask(inside, v, _mm512_set1_ps(least), _CMP_GE_OQ);
            const __m512i id = _mm512_add_epi32(numbers, _mm512_set1_epi32(static_cast<int32_t>(i)));
            _mm512_storeu_ps(keys + count, _mm512_maskz_compress_ps(hit, v));
            _mm512_storeu_si512(ids + count, _mm512_maskz_compress_epi32(hit, id));
            count += __builtin_popcount(hit);
        }
#else
        for (int64_t i = begin; i < end; ++i) {
            keys[count] = x[i];
            ids[count] = static_cast<int32_t>(i);
            count += x[i] >= least;
        }
#endif
    }
    return count;
}

SampleSplit split(const float* keys, const float* weights, int64_t n, float pivot) {
    MassSum mass;
    VF least = splat(kInfinity), largest = splat(-kInfinity);
    const VF pivots = splat(pivot);
    for (int64_t i = 0; i < n; i += kW) {
        const VF key = load_or(keys + i, n - i, -kInfinity);
        VF weight = splat(1.0f);
        if (weights) {
            weight = load_or(weights + i, n - i, 0.0f);
        } else if (n - i < kW) {
            weight = lane_numbers() < splat(static_cast<float>(n - i)) ? weight : VF{};
        }
        const VI upper = key >= pivots;
        mass.add(upper ? weight : VF{});
        least = min(least, upper ? key : splat(kInfinity));
        largest = max(largest, upper ? splat(-kInfinity) : key);
    }
    const float least_upper = fold(least, [](VF a, VF b) { return min(a, b); });
    return {mass.total(), least_upper, max_lane(largest)};
}

#if defined(__AVX512F__)
// Where whole vectors are written, what lies behind them has been read already, or is padding.
PELTON_INLINE void compress(float* to, __mmask16 hit, __m512 v) {
    _mm512_storeu_ps(to, _mm512_maskz_compress_ps(hit, v));
}

PELTON_INLINE void compress(int32_t* to, __mmask16 hit, __m512i v) {
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(hit, v));
}

template <bool kIds>
PELTON_INLINE int64_t keep_lanes(const SampleList& from, const float* test, float key, int32_t id, bool inside,
                                 const SampleList& to) {
    const float *keys = from.keys, *weights = from.weights;
    float *to_keys = to.keys, *to_weights = to.weights;
    const int32_t* ids = from.ids;
    int32_t* to_ids = to.ids;
    const __m512 pivot = _mm512_set1_ps(key);
    const __m512i last = _mm512_set1_epi32(id);
    const __mmask16 flip = inside ? 0 : 0xffff;
    int64_t count = 0;
    const auto step = [&](int64_t i, __mmask16 lanes) __attribute__((always_inline)) {
        const __m512 tested = _mm512_maskz_loadu_ps(lanes, test + i);
        __mmask16 hit;
        if constexpr (kIds) {
            const __m512i number = _mm512_maskz_loadu_epi32(lanes, ids + i);
            hit = _mm512_cmp_ps_mask(tested, pivot, _CMP_GT_OQ) |
                  (_mm512_cmp_ps_mask(tested, pivot, _CMP_EQ_OQ) & _mm512_cmple_epi32_mask(number, last));
            hit = (hit ^ flip) & lanes;
            const __m512 vector = _mm512_maskz_loadu_ps(lanes, keys + i);
            const __m512 weight = _mm512_maskz_loadu_ps(lanes, weights + i);
            compress(to_keys + count, hit, vector);
            compress(to_weights + count, hit, weight);
            compress(to_ids + count, hit, number);
        } else {
            hit = (_mm512_cmp_ps_mask(tested, pivot, _CMP_GE_OQ) ^ flip) & lanes;
            const __m512 vector = _mm512_maskz_loadu_ps(lanes, keys + i);
            if (to_weights) {
                const __m512 weight = _mm512_maskz_loadu_ps(lanes, weights + i);
                compress(to_weights + count, hit, weight);
            }
            compress(to_keys + count, hit, vector);
        }
        count += __builtin_popcount(hit);
    };
    int64_t i = 0;
    for (; i + 16 <= from.size; i += 16) step(i, 0xffff);
    if (i < from.size) step(i, static_cast<__mmask16>((1u << (from.size - i)) - 1));
    return count;
}
#endif

int64_t keep(const SampleList& from, const float* test, float key, int32_t id, const SampleList& to) {
#if defined(__AVX512F__)
    return keep_lanes<true>(from, test, key, id, true, to);
#else
    int64_t count = 0;
    for (int64_t i = 0; i < from.size; ++i) {
        const float tested = test[i];
        const int32_t number = from.ids[i];
        to.keys[count] = from.keys[i];
        to.weights[count] = from.weights[i];
        to.ids[count] = number;
        count += tested > key || (tested == key && number <= id);
    }
    return count;
#endif
}

int64_t part(const SampleList& from, float pivot, bool upper, const SampleList& to) {
#if defined(__AVX512F__)
    return keep_lanes<false>(from, from.keys, pivot, 0, upper, to);
#else
    int64_t count = 0;
    for (int64_t i = 0; i < from.size; ++i) {
        const float key = from.keys[i];
        to.keys[count] = key;
        if (to.weights) to.weights[count] = from.weights[i];
        count += (key >= pivot) == upper;
    }
    return count;
#endif
}

int64_t draw(const float* weights, int64_t n, uint64_t target) {
    int64_t i = 0;
    for (; i + kSampleBlock <= n; i += kSampleBlock) {
        MassSum sum;
        PELTON_UNROLL
        for (int v = 0; v < kBlockVecs; ++v) sum.add(load(weights + i + v * kW));
        const uint64_t mass = sum.total();
        if (target < mass) break;
        target -= mass;
    }
    for (; i < n; ++i) {
        const uint64_t mass = mass_of(weights[i]);
        if (target < mass) break;
        target -= mass;
    }
    return i;
}

int64_t scaled_mass(const SampleList& list, float peak, float scale) {
    const VF peaks = splat(peak), scales = splat(scale);
    MassSum sum;
    for (int64_t i = 0; i < list.size; i += kW) {
        const int64_t left = list.size - i;
        const Doubles x = to_double(scaled(load_or(list.keys + i, left, -kInfinity), peaks, scales));
        const Doubles w = to_double(load_or(list.weights + i, left, 0.0f));
        // The weight as it counts elsewhere.
        sum.add(x.low * ((w.low + kMassShifter) - kMassShifter));
        sum.add(x.high * ((w.high + kMassShifter) - kMassShifter));
    }
    return static_cast<int64_t>(sum.total());
}

void nearness(float* out, const float* keys, int64_t n, float peak, float scale, float mean) {
    const VF peaks = splat(peak), scales = splat(scale), means = splat(mean);
    for (int64_t i = 0; i < n; i += kW) {
        const VF x = scaled(load_or(keys + i, n - i, -kInfinity), peaks, scales);
        store_up_to(out + i, -abs(x - means), n - i);
    }
}

int64_t count_above(const float* x, int64_t n, float value) {
    int64_t count = 0, i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= n; i += 16) {
        count += __builtin_popcount(_mm512_cmp_ps_mask(_mm512_loadu_ps(x + i), _mm512_set1_ps(value), _CMP_GT_OQ));
    }
#else
    VI counts = {};  // of at most MAX_VOCAB each
    for (; i + kW <= n; i += kW) counts -= load(x + i) > splat(value);
    for (int lane = 0; lane < kW; ++lane) count += counts[lane];
#endif
    for (; i < n; ++i) count += x[i] > value;
    return count;
}

}  // namespace

extern const SampleKernels sample_kernels;
const SampleKernels sample_kernels = {maxima, masked, block_masses, weigh,       collect,  split,
                                      part,   keep,   draw,         scaled_mass, nearness, count_above};

}  // namespace pelton::cpu::PELTON_ISA
