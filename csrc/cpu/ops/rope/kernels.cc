#include "cpu/ops/attention/contract.h"
#include "cpu/ops/rope/contract.h"
#include "cpu/simd_fp8.h"

namespace pelton::cpu::PELTON_ISA {
namespace {

constexpr int kMaxHeadDim = 512;

PELTON_INLINE float* floats_of(const Call& call, int operand) {
    return reinterpret_cast<float*>(call.operands[operand].data);
}

PELTON_INLINE const int32_t* ints_of(const Call& call, int operand) {
    return reinterpret_cast<const int32_t*>(call.operands[operand].data);
}

// out may be x: both halves of a pair are read before either is written.
void rotate_head(const float* x, const float* table, int64_t head_dim, int64_t rot_dim, bool interleaved, float* out) {
    const int64_t half = rot_dim / 2;
    const float *cosines = table, *sines = table + half;
    if (interleaved) {
        for (int64_t i = 0; i < half; ++i) {
            float a = x[2 * i], b = x[2 * i + 1];
            out[2 * i] = a * cosines[i] - b * sines[i];
            out[2 * i + 1] = b * cosines[i] + a * sines[i];
        }
    } else {
        int64_t i = 0;
        for (; i + kW <= half; i += kW) {
            VF a = load(x + i), b = load(x + half + i), c = load(cosines + i), s = load(sines + i);
            store(out + i, a * c - b * s);
            store(out + half + i, b * c + a * s);
        }
        for (; i < half; ++i) {
            float a = x[i], b = x[half + i];
            out[i] = a * cosines[i] - b * sines[i];
            out[half + i] = b * cosines[i] + a * sines[i];
        }
    }
    if (out != x && rot_dim < head_dim) __builtin_memcpy(out + rot_dim, x + rot_dim, (head_dim - rot_dim) * 4);
}

struct CacheTarget {
    char* cache;
    CacheLayout layout;
    int64_t head_dim, block_size;
    int64_t format;
};

// kW numbers from d on, or as many as there are and zeros.
PELTON_INLINE VF part(const float* x, int64_t d, int64_t count) {
    return count - d < kW ? load_n(x + d, count - d) : load(x + d);
}

// Puts the codes of numbers in units of the scale, which is returned: the largest magnitude over `most`. If a number
// is not finite all codes are 0 and the scale infinite: nothing finite comes of it.
template <class R, class F>
PELTON_INLINE float round_scaled(const float* x, int64_t count, float most, R rounded, F put) {
    VF largest = {}, poison = {};
    int64_t d = 0;
    for (; d < count; d += kW) {
        largest = max(largest, abs(part(x, d, count)));
        poison += part(x, d, count) * 0.0f;  // a maximum may lose a NaN
    }
    const float size = max_lane(largest) + sum(poison);
    const bool finite = size < __builtin_inff();
    const float scale = finite ? size / most : __builtin_inff(), unit = scale > 0.0f ? scale : 1.0f;
    for (d = 0; d < count; d += kW) {
        int32_t lanes[kW];
        store_u32(lanes, rounded(finite ? part(x, d, count) / unit : VF{}));
        for (int64_t i = d; i < count && i < d + kW; ++i) put(i, static_cast<int8_t>(lanes[i - d]));
    }
    return scale;
}

// To the nearest (even) from -127 to 127.
template <class F>
PELTON_INLINE float round_to_bytes(const float* x, int64_t count, F put) {
    // Adding 1.5 * 2^23 rounds, and leaves the code in the lowest bits.
    const auto rounded = [](VF v) { return as_u32(min(splat(127.0f), max(splat(-127.0f), v)) + 12582912.0f); };
    return round_scaled(x, count, 127.0f, rounded, put);
}

template <class F>
PELTON_INLINE float round_to_fp8(const float* x, int64_t count, F put) {
    return round_scaled(x, count, 448.0f, [](VF v) { return to_fp8(v); }, put);
}

void write_slot(const CacheTarget& t, int64_t slot, int64_t head, const float* k, const float* v) {
    const int64_t block = slot / t.block_size, token = slot % t.block_size;
    const int64_t padded = t.layout.padded, lane = t.layout.lane_bytes;
    const int64_t row = t.block_size * lane;  // from a lane of a key to the next
    char* keys = t.cache + block * t.layout.block_bytes + head * t.layout.head_bytes;
    char* values = keys + t.layout.key_bytes;
    keys += token * lane;
    uint16_t rounded[kMaxHeadDim + kW];
    if (t.format == kCacheBf16) {
        values += token / 2 * padded * 4 + token % 2 * 2;
        const auto round_all = [&](const float* x) {
            for (int64_t d = 0; d < t.head_dim; d += kW) store_u16(rounded + d, to_bf16(part(x, d, t.head_dim)));
        };
        round_all(k);
        for (int64_t d = 0; d < t.head_dim; d += 2) __builtin_memcpy(keys + d / 2 * row, rounded + d, 4);
#if defined(__AVX512BW__)
        // Only the token's halves of the lanes are written: the others may be another thread's.
        const int shift = token % 2 * 16;
        for (int64_t d = 0; d < t.head_dim; d += kW) {
            VU lanes = widen(to_bf16(part(v, d, t.head_dim))) << shift;
            _mm512_mask_storeu_epi16(values + d * 4 - token % 2 * 2, 0x55555555u << token % 2,
                                     reinterpret_cast<__m512i>(lanes));
        }
#else
        round_all(v);
        for (int64_t d = 0; d < t.head_dim; ++d) __builtin_memcpy(values + d * 4, rounded + d, 2);
#endif
    } else if (t.format == kCacheInt8) {
        float* scales = reinterpret_cast<float*>(values + t.layout.value_bytes) + token;
        values += token / 4 * padded * 4 + token % 4;
        scales[0] = round_to_bytes(k, t.head_dim, [&](int64_t d, int8_t code) { keys[d / 4 * row + d % 4] = code; });
        scales[t.block_size] = round_to_bytes(v, t.head_dim, [&](int64_t d, int8_t code) { values[d * 4] = code; });
    } else if (t.format == kCacheFp8) {
        const auto swapped = [](int64_t i) { return i % 2 * 2 + i / 2 % 2; };  // the place of number i in its lane
        float* scales = reinterpret_cast<float*>(values + t.layout.value_bytes) + token;
        values += token / 4 * padded * 4 + swapped(token % 4);
        const auto put_key = [&](int64_t d, int8_t code) { keys[d / 4 * row + swapped(d % 4)] = code; };
        scales[0] = round_to_fp8(k, t.head_dim, put_key);
        scales[t.block_size] = round_to_fp8(v, t.head_dim, [&](int64_t d, int8_t code) { values[d * 4] = code; });
    } else if (t.format == kCacheF16) {
        values += token * padded * 2;
        for (int64_t d = 0; d < t.head_dim; d += kW) store_u16(rounded + d, to_f16(part(k, d, t.head_dim)));
        for (int64_t d = 0; d < t.head_dim; ++d) __builtin_memcpy(keys + d * row, rounded + d, 2);
        for (int64_t d = 0; d < t.head_dim; d += kW) store_u16(rounded + d, to_f16(part(v, d, t.head_dim)));
        __builtin_memcpy(values, rounded, t.head_dim * 2);
    } else {
        for (int64_t d = 0; d < t.head_dim; ++d) *reinterpret_cast<float*>(keys + d * row) = k[d];
        __builtin_memcpy(values + token * padded * 4, v, t.head_dim * 4);
    }
}

void rope_rows(const Call& call, int64_t begin, int64_t end, Worker&) {
    using namespace rope;
    const int64_t heads = call.ints[kHeads], head_dim = call.ints[kHeadDim], rot_dim = call.ints[kRotDim];
    for (int64_t r = begin; r < end; ++r) {
        const float* table = floats_of(call, kTable) + ints_of(call, kPositions)[r] * rot_dim;
        for (int64_t h = 0; h < heads; ++h) {
            rotate_head(floats_of(call, kX) + r * call.ints[kLdX] + h * head_dim, table, head_dim, rot_dim,
                        call.ints[kInterleaved], floats_of(call, kOut) + r * call.ints[kLdOut] + h * head_dim);
        }
    }
}

void kv_write_rows(const Call& call, int64_t begin, int64_t end, Worker&) {
    using namespace kv_write;
    const int64_t heads = call.ints[kKvHeads], head_dim = call.ints[kHeadDim], block_size = call.ints[kBlockSize];
    const int64_t format = call.ints[kFormat];
    const CacheTarget target = {call.operands[kCache].data, cache_layout(heads, head_dim, block_size, format), head_dim,
                                block_size, format};
    for (int64_t r = begin; r < end; ++r) {
        for (int64_t h = 0; h < heads; ++h) {
            write_slot(target, ints_of(call, kSlots)[r], h, floats_of(call, kK) + r * call.ints[kLdK] + h * head_dim,
                       floats_of(call, kV) + r * call.ints[kLdV] + h * head_dim);
        }
    }
}

void rope_kv_write_rows(const Call& call, int64_t begin, int64_t end, Worker&) {
    using namespace rope_kv_write;
    const int64_t heads = call.ints[kHeads], kv_heads = call.ints[kKvHeads], head_dim = call.ints[kHeadDim];
    const int64_t rot_dim = call.ints[kRotDim], block_size = call.ints[kBlockSize], format = call.ints[kFormat];
    const bool interleaved = call.ints[kInterleaved];
    const CacheTarget target = {call.operands[kCache].data, cache_layout(kv_heads, head_dim, block_size, format),
                                head_dim, block_size, format};
    float rotated[kMaxHeadDim];
    for (int64_t r = begin; r < end; ++r) {
        const float* table = floats_of(call, kTable) + ints_of(call, kPositions)[r] * rot_dim;
        for (int64_t h = 0; h < heads; ++h) {
            rotate_head(floats_of(call, kQ) + r * call.ints[kLdQ] + h * head_dim, table, head_dim, rot_dim, interleaved,
                        floats_of(call, kQOut) + r * call.ints[kLdQOut] + h * head_dim);
        }
        for (int64_t h = 0; h < kv_heads; ++h) {
            rotate_head(floats_of(call, kK) + r * call.ints[kLdK] + h * head_dim, table, head_dim, rot_dim, interleaved,
                        rotated);
            write_slot(target, ints_of(call, kSlots)[r], h, rotated,
                       floats_of(call, kV) + r * call.ints[kLdV] + h * head_dim);
        }
    }
}

}  // namespace

extern const Kernel rope_kernels[];
const Kernel rope_kernels[] = {{"rope", {rope_rows}, 0},
                               {"kv_write", {kv_write_rows}, 0},
                               {"rope_kv_write", {rope_kv_write_rows}, 0},
                               {nullptr, {}, 0}};

}  // namespace pelton::cpu::PELTON_ISA
