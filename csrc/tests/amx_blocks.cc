// The products of the tier amx, of linear and of attention, against plain C++: every remainder of rows and depth,
// buffers that end where they are promised to, and bits that do not depend on the rows beside. Prints "ok" or aborts.
// With --time [MB] it prints rates of one thread instead, for panels in a cache and panels from memory.
// Needs AMX or its emulator (tools/test_amx.sh), whose times mean nothing.
#include <dlfcn.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "cpu/ops/attention/amx.h"
#include "cpu/ops/linear/amx.h"

namespace pelton::cpu::PELTON_ISA {
namespace {

void check(bool ok, const char* what, int64_t rows, int64_t depth) {
    if (ok) return;
    std::fprintf(stderr, "failed: %s, %lld rows, depth %lld\n", what, static_cast<long long>(rows),
                 static_cast<long long>(depth));
    std::abort();
}

// Memory that ends at a page which must not be touched.
class Guarded {
public:
    explicit Guarded(int64_t bytes) {
        const int64_t page = sysconf(_SC_PAGESIZE);
        size_ = (bytes + page - 1) / page * page + page;
        base_ = static_cast<char*>(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        if (base_ == MAP_FAILED || mprotect(base_ + size_ - page, page, PROT_NONE)) std::abort();
        data_ = base_ + size_ - page - bytes;
    }
    ~Guarded() { munmap(base_, size_); }
    Guarded(const Guarded&) = delete;
    char* data() const { return data_; }

private:
    int64_t size_;
    char *base_, *data_;
};

float bf16(const char* p) { return from_bf16_scalar(*reinterpret_cast<const uint16_t*>(p)); }

// As the header defines it: partial sums of two chains per 32 of k.
float bf16_sum(const char* a, const char* w, int64_t depth, int64_t col, float start) {
    for (int64_t k0 = 0; k0 < depth; k0 += 32) {
        float chains[2] = {0.0f, 0.0f};
        for (int64_t k = k0; k < depth && k < k0 + 32; ++k) {
            chains[k % 2] = std::fma(bf16(a + 2 * k), bf16(w + (k / 2 * kPanel + col) * 4 + k % 2 * 2), chains[k % 2]);
        }
        start += chains[0] + chains[1];
    }
    return start;
}

void check_bf16(int64_t rows, int64_t depth, int64_t block) {
    std::mt19937 r(static_cast<unsigned>(rows * 1000 + depth));
    std::normal_distribution<float> normal;
    const int64_t stride = depth * 2 + 6, ld = kPanel + 3;
    Guarded a((rows - 1) * stride + depth * 2), w(depth * kPanel * 2), out(((rows - 1) * ld + kPanel) * 4);
    const auto fill = [&](char* p, int64_t count) {
        for (int64_t i = 0; i < count; ++i) {
            reinterpret_cast<uint16_t*>(p)[i] = to_bf16_scalar(normal(r));
        }
    };
    std::memset(a.data(), 0xff, (rows - 1) * stride + depth * 2);  // NaN between the rows
    for (int64_t m = 0; m < rows; ++m) fill(a.data() + m * stride, depth);
    fill(w.data(), depth * kPanel);
    float* y = reinterpret_cast<float*>(out.data());
    for (int64_t i = 0; i < (rows - 1) * ld + kPanel; ++i) y[i] = NAN;
    AmxTiles tiles;
    for (int64_t k = 0; k < depth; k += block) {
        amx_bf16_block(tiles, a.data() + k * 2, stride, rows, w.data() + k * kPanel * 2, std::min(block, depth - k), y,
                       ld, k == 0);
    }
    std::vector<float> alone(kPanel);
    for (int64_t m = 0; m < rows; ++m) {
        for (int64_t n = 0; n < kPanel; ++n) {
            const float want = bf16_sum(a.data() + m * stride, w.data(), depth, n, 0.0f);
            check(y[m * ld + n] == want, "bf16", rows, depth);
        }
        check(m + 1 == rows || std::isnan(y[m * ld + kPanel]), "bf16 writes beside its columns", rows, depth);
        amx_bf16_block(tiles, a.data() + m * stride, stride, 1, w.data(), depth, alone.data(), kPanel, true);
        check(!std::memcmp(alone.data(), y + m * ld, kPanel * 4), "a bf16 row alone has other bits", rows, depth);
    }
}

void check_int8(int64_t rows, int64_t depth) {
    std::mt19937 r(static_cast<unsigned>(rows * 1000 + depth));
    const int64_t stride = depth + 5, ld = kPanel + 2;
    Guarded a((rows - 1) * stride + depth), w(depth * kPanel), out(((rows - 1) * ld + kPanel) * 4);
    for (int64_t i = 0; i < (rows - 1) * stride + depth; ++i) a.data()[i] = static_cast<char>(r());
    for (int64_t i = 0; i < depth * kPanel; ++i) w.data()[i] = static_cast<char>(r());
    int32_t* y = reinterpret_cast<int32_t*>(out.data());
    for (int64_t i = 0; i < (rows - 1) * ld + kPanel; ++i) y[i] = 77;
    AmxTiles tiles;
    for (int pass = 1; pass <= 2; ++pass) {  // the second adds to the first
        amx_block<AmxInt8>(tiles, a.data(), stride, rows, w.data(), depth, reinterpret_cast<char*>(y), ld * 4,
                           pass == 1);
        for (int64_t m = 0; m < rows; ++m) {
            for (int64_t n = 0; n < kPanel; ++n) {
                int32_t want = 0;
                for (int64_t k = 0; k < depth; ++k) {
                    want += static_cast<int8_t>(a.data()[m * stride + k]) *
                            static_cast<uint8_t>(w.data()[(k / 4 * kPanel + n) * 4 + k % 4]);
                }
                check(y[m * ld + n] == pass * want, "int8", rows, depth);
            }
            check(m + 1 == rows || y[m * ld + kPanel] == 77, "int8 writes beside its columns", rows, depth);
        }
    }
}

// Every sum of a group arrives once, after those of the groups before, with the value of the definition.
template <int kActivation>
void check_groups(int64_t rows, int64_t size, int64_t count, bool stream) {
    std::mt19937 r(static_cast<unsigned>(rows * 1000 + size * 10 + count));
    std::normal_distribution<float> normal;
    const int64_t row_bytes = size * kActivation, codes = row_bytes * kPanel, w_stride = codes + 192;
    const int64_t stride = count * row_bytes + 6;
    const int64_t a_bytes = stride * (rows - 1) + count * row_bytes, w_bytes = w_stride * (count - 1) + codes;
    Guarded a(a_bytes), w(w_bytes);
    const auto fill = [&](char* p, int64_t bytes) {
        for (int64_t i = 0; i < bytes; i += kActivation) {
            const uint16_t value = kActivation == 1 ? static_cast<uint16_t>(r() & 0xff) : to_bf16_scalar(normal(r));
            std::memcpy(p + i, &value, kActivation);
        }
    };
    std::memset(a.data(), 0xff, a_bytes);  // NaN between the rows and the groups
    std::memset(w.data(), 0xff, w_bytes);
    for (int64_t m = 0; m < rows; ++m) fill(a.data() + m * stride, count * row_bytes);
    for (int64_t i = 0; i < count; ++i) fill(w.data() + i * w_stride, codes);
    std::vector<int64_t> seen(rows * kPanel);
    AmxTiles tiles;
    const auto add = [&](const AmxSums& sums) {
        check(sums.row + sums.rows <= rows && sums.col + kPanel / 2 <= kPanel, "rows of sums", rows, size);
        const char* codes_of_group = w.data() + sums.group * w_stride;
        for (int64_t i = 0; i < sums.rows * kPanel / 2; ++i) {
            const int64_t m = sums.row + i / (kPanel / 2), n = sums.col + i % (kPanel / 2);
            const char* x = a.data() + m * stride + sums.group * row_bytes;
            const char* got = sums.data + i / (kPanel / 2) * kAmxGroupSumsRow + i % (kPanel / 2) * 4;
            check(seen[m * kPanel + n]++ == sums.group, "order of groups", rows, size);
            if (kActivation == 2) {
                const float want = bf16_sum(x, codes_of_group, size, n, 0.0f);
                check(!std::memcmp(got, &want, 4), "bf16 group", rows, size);
                continue;
            }
            int32_t want = 0;
            for (int64_t k = 0; k < size; ++k) {
                want +=
                    static_cast<int8_t>(x[k]) * static_cast<uint8_t>(codes_of_group[(k / 4 * kPanel + n) * 4 + k % 4]);
            }
            check(!std::memcmp(got, &want, 4), "int8 group", rows, size);
        }
    };
    amx_groups<typename AmxProduct<kActivation>::Type>(tiles, a.data(), stride, rows, w.data(), w_stride, row_bytes,
                                                       count, stream, add);
    for (int64_t n : seen) check(n == count, "a sum is missing", rows, size);
}

// A key tile in groups of which each ends at a page that must not be touched, or in one piece that does.
template <class Cache>
class KeyTile {
public:
    KeyTile(int64_t head_dim, bool together, std::mt19937& r)
        : lane_rows((head_dim + Cache::kStep - 1) / Cache::kStep), row_bytes((head_dim + 15) / 16 * 64) {
        const int64_t pieces = together ? 1 : kTileGroups, groups = kTileGroups / pieces;
        const int64_t value_bytes = kTokenGroup / Cache::kStep * row_bytes;
        at.fetch = false;
        at.key_row = groups * kTokenGroup * 4;
        for (int64_t i = 0; i < kTileGroups; ++i) {
            if (i % groups == 0) {
                memory_.push_back(std::make_unique<Guarded>(lane_rows * at.key_row));
                memory_.push_back(std::make_unique<Guarded>(groups * value_bytes));
                fill(memory_[memory_.size() - 2]->data(), lane_rows * at.key_row, r);
                fill(memory_.back()->data(), groups * value_bytes, r);
            }
            at.keys[i] = memory_[memory_.size() - 2]->data() + i % groups * kTokenGroup * 4;
            at.values[i] = memory_.back()->data() + i % groups * value_bytes;
        }
    }

    static void fill(char* p, int64_t bytes, std::mt19937& r) {
        std::normal_distribution<float> normal;
        for (int64_t i = 0; i < bytes; i += 2) {
            const uint16_t x = Cache::kBytes ? static_cast<uint16_t>(r()) : to_bf16_scalar(normal(r));
            std::memcpy(p + i, &x, 2);
        }
    }
    const char* key(int64_t token, int64_t dim) const {
        return at.keys[token / kTokenGroup] + dim / Cache::kStep * at.key_row + token % kTokenGroup * 4 +
               dim % Cache::kStep * (4 / Cache::kStep);
    }
    char* value(int64_t token, int64_t col) const {
        return const_cast<char*>(at.values[token / kTokenGroup]) + token % kTokenGroup / Cache::kStep * row_bytes +
               col * 4 + token % Cache::kStep * (4 / Cache::kStep);
    }

    const int64_t lane_rows, row_bytes;
    TileAddress at;

private:
    std::vector<std::unique_ptr<Guarded>> memory_;
};

// Sums over `count` of x(k) times y(k): in order if whole numbers, else two chains per 32.
template <class Cache, class X, class Y>
float attention_sum(int64_t count, X x, Y y) {
    if constexpr (Cache::kBytes) {
        int64_t total = 0;
        for (int64_t k = 0; k < count; ++k) total += static_cast<int64_t>(x(k)) * y(k);
        return static_cast<float>(static_cast<int32_t>(total));
    } else {
        float total = 0.0f;
        for (int64_t k0 = 0; k0 < count; k0 += 32) {
            float chains[2] = {0.0f, 0.0f};
            for (int64_t k = k0; k < count && k < k0 + 32; ++k) chains[k % 2] = std::fma(x(k), y(k), chains[k % 2]);
            total += chains[0] + chains[1];
        }
        return total;
    }
}

// Row m sees keys [4 m, 40 + m) of the tile or, if `whole`, all of them; the others' values are NaN for a bf16 cache
// and, if `shared`, so are some that a part of the rows sees.
template <class Cache>
void check_attention(int64_t rows, int64_t head_dim, bool together, bool whole, bool shared) {
    std::mt19937 r(static_cast<unsigned>(rows * 1000 + head_dim));
    KeyTile<Cache> tile(head_dim, together, r);
    const int64_t padded = tile.row_bytes / 4, part = amx_query_part(tile.lane_rows);
    const int64_t q_stride = (Cache::kBytes ? 2 : 1) * part;
    const auto number = [](const char* p) {
        if constexpr (Cache::kBytes)
            return static_cast<int64_t>(static_cast<int8_t>(*p));
        else
            return bf16(p);
    };
    std::vector<uint32_t> packed(2 * tile.lane_rows);
    std::vector<char> keys(4096), values(kKeyTile * padded * 2), sums(4096), scores(4096), weights(16 * 128);
    Guarded queries(rows * q_stride);
    std::vector<float> factors(rows), out(rows * padded), before;
    std::vector<int32_t> lows(rows), highs(rows);
    const AmxScratch scratch = {keys.data(), values.data(), sums.data()};
    for (int64_t m = 0; m < rows; ++m) {
        KeyTile<Cache>::fill(reinterpret_cast<char*>(packed.data()), static_cast<int64_t>(packed.size()) * 4, r);
        amx_store_query<Cache>(queries.data() + m * q_stride, packed.data(), tile.lane_rows, q_stride);
        factors[m] = 1.0f / static_cast<float>(m + 1);
        lows[m] = static_cast<int32_t>(whole ? 0 : 4 * m);
        highs[m] = static_cast<int32_t>(whole ? kKeyTile : std::max<int64_t>(40 + m, lows[m]));
    }
    AmxTiles tiles;
    amx_shape<Cache>(tiles, rows);
    amx_copy_last_keys(tile.at, tile.lane_rows, keys.data());
    float* got = reinterpret_cast<float*>(scores.data());
    amx_scores<Cache>(queries.data(), q_stride, factors.data(), tile.at, tile.at, tile.lane_rows, rows, scratch, got);
    const int64_t dims = tile.lane_rows * Cache::kStep;
    for (int64_t m = 0; m < rows; ++m) {
        for (int64_t key = 0; key < kKeyTile; ++key) {
            const char* q = queries.data() + m * q_stride;
            const float want = attention_sum<Cache>(
                dims,
                [&](int64_t k) {
                    if constexpr (Cache::kBytes)
                        return number(q + k) * 128 + number(q + part + k);
                    else
                        return number(q + 2 * k);
                },
                [&](int64_t k) { return number(tile.key(key, k)); });
            check(got[m * kKeyTile + key] == want * factors[m], "scores", rows, head_dim);
        }
    }

    KeyTile<Cache>::fill(weights.data(), static_cast<int64_t>(weights.size()), r);
    const auto sees = [&](int64_t m, int64_t key) { return lows[m] <= key && key < highs[m]; };
    for (int64_t key = 0; key < kKeyTile; ++key) {
        int64_t viewers = 0;
        for (int64_t m = 0; m < rows; ++m) {
            viewers += sees(m, key);
            for (int byte = 0; byte < 2 && !sees(m, key); ++byte) {
                weights[m * 128 + (Cache::kBytes ? key + byte * kKeyTile : 2 * key + byte)] = 0;
            }
        }
        const bool spoilt = viewers == 0 || (shared && viewers < rows && key % 5 == 0);
        for (int64_t col = 0; col < padded && spoilt && !Cache::kBytes; ++col) {
            std::memset(tile.value(key, col), 0xff, 2);
        }
    }
    for (int64_t i = 0; i < rows * padded; ++i) out[i] = static_cast<float>(i % 7) - 3.0f;
    before = out;
    AmxValues taken = {{}, -1, -1, false, false};
    for (int pass = 0; pass < 2; ++pass) {  // the second with what the first has taken
        out = before;
        amx_values<Cache>(weights.data(), factors.data(), factors.data(), tile.at, tile.at,
                          whole ? nullptr : lows.data(), highs.data(), rows, padded, scratch, scores.data(), taken,
                          out.data());
        for (int64_t m = 0; m < rows; ++m) {
            for (int64_t col = 0; col < padded; ++col) {
                const float sum = attention_sum<Cache>(
                    kKeyTile,
                    [&](int64_t k) {
                        const char* w = weights.data() + m * 128;
                        if constexpr (Cache::kBytes) {
                            return static_cast<uint8_t>(w[k]) * 256 + static_cast<uint8_t>(w[kKeyTile + k]);
                        } else {
                            return bf16(w + 2 * k);
                        }
                    },
                    [&](int64_t k) { return sees(m, k) ? number(tile.value(k, col)) : decltype(number(nullptr))(0); });
                float want = before[m * padded + col];
                if (lows[m] < highs[m]) {
                    want =
                        Cache::kBytes ? std::fma(sum, factors[m], want * factors[m]) : std::fma(want, factors[m], sum);
                }
                const float y = out[m * padded + col];
                check(y == want || (std::isnan(y) && std::isnan(want)), "values", rows, head_dim);
            }
        }
    }
}

// Values that were taken unchecked are checked once it matters, although the rows before found theirs finite.
void check_taken_values(bool together) {
    std::mt19937 r(1);
    KeyTile<Bf16Cache> tile(16, together, r);
    std::memset(tile.value(5, 0), 0xff, 2);
    std::vector<char> values(kKeyTile * 32), sums(4096), spare(4096), weights(2 * 128);
    const AmxScratch scratch = {nullptr, values.data(), sums.data()};
    const float corrections[] = {1.0f, 1.0f};
    AmxValues taken = {{}, -1, -1, false, false};
    AmxTiles tiles;
    amx_shape<Bf16Cache>(tiles, 2);
    const int32_t later[] = {6, 6}, none[] = {0, 0}, all[] = {64, 64}, one[] = {0, 6};
    for (const int32_t* lows : {later, static_cast<const int32_t*>(nullptr), one, none}) {
        float out[2 * 16] = {};
        amx_values<Bf16Cache>(weights.data(), corrections, nullptr, tile.at, tile.at, lows, all, 2, 16, scratch,
                              spare.data(), taken, out);
        check(std::isnan(out[0]) == (lows != later), "a value that row 0 sees", 2, 16);
        check(std::isnan(out[16]) == (lows == nullptr || lows == none), "a value that row 1 sees", 2, 16);
    }
}

// 4096 deep, as bf16 and as int8. Best of several passes over all panels.
void print_rates(int64_t megabytes) {
    constexpr int64_t kDepth = 4096, kStride = kDepth * 2 + 64;  // rows not a multiple of 4 KB apart
    std::vector<char> panels(std::max<int64_t>(megabytes << 20, kDepth * kPanel * 2), 0x3c);
    std::vector<char> a(256 * kStride, 0x3c);
    std::vector<float> out(256 * kPanel);
    AmxTiles tiles;
    for (const bool int8 : {false, true}) {
        const int64_t panel = kDepth * kPanel * (int8 ? 1 : 2);
        for (const int64_t bytes : {panel, static_cast<int64_t>(panels.size()) / panel * panel}) {
            for (const int64_t rows : {1, 4, 16, 32, 64, 192}) {
                double best = 1e9;
                for (int repeat = 0; repeat < 5; ++repeat) {
                    const auto start = std::chrono::steady_clock::now();
                    for (int64_t at = 0; at < bytes; at += panel) {
                        int8 ? amx_block<AmxInt8>(tiles, a.data(), kStride, rows, panels.data() + at, kDepth,
                                                  reinterpret_cast<char*>(out.data()), kPanel * 4, true)
                             : amx_bf16_block(tiles, a.data(), kStride, rows, panels.data() + at, kDepth, out.data(),
                                              kPanel, true);
                    }
                    const auto end = std::chrono::steady_clock::now();
                    best = std::min(best, std::chrono::duration<double>(end - start).count());
                }
                std::printf("%s %4lld rows, %6.1f MB of panels: %8.1f GFLOP/s %7.2f GB/s of panels\n",
                            int8 ? "int8" : "bf16", static_cast<long long>(rows),
                            static_cast<double>(bytes) / (1 << 20),
                            static_cast<double>(bytes / panel * rows * kDepth * kPanel) * 2e-9 / best,
                            static_cast<double>(bytes) * 1e-9 / best);
            }
        }
    }
}

}  // namespace
}  // namespace pelton::cpu::PELTON_ISA

int main(int count, char** arguments) {
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    if (!dlsym(RTLD_DEFAULT, "amx_emulator_executed") && syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) {
        std::fputs("no AMX here (or the kernel does not grant it): run under the emulator with LD_PRELOAD\n", stderr);
        return 1;
    }
    using namespace pelton::cpu::amx;
    if (count > 1 && !std::strcmp(arguments[1], "--time")) {
        print_rates(count > 2 ? std::atoll(arguments[2]) : 256);
        return 0;
    }
    for (int64_t rows : {1, 2, 15, 16, 17, 31, 32, 33, 49, 67}) {
        for (int64_t depth : {2, 30, 32, 34, 62, 64, 130, 192}) check_bf16(rows, depth, 1 << 20);
        for (int64_t depth : {512, 514, 1090}) check_bf16(rows, depth, 1 << 20);  // several blocks of depth
        check_bf16(rows, 130, 64);
        check_bf16(rows, 96, 32);
        for (int64_t depth : {4, 16, 32, 60, 64, 68, 128, 196, 1100}) check_int8(rows, depth);
        for (int64_t size : {16, 32, 64, 128}) {
            for (int64_t count : {1, 2, 5}) {
                check_groups<1>(rows, size, count, count == 2);
                check_groups<2>(rows, size, count, count == 2);
            }
        }
    }
    for (const bool together : {false, true}) check_taken_values(together);
    for (int64_t rows : {1, 2, 5, 11, 16}) {
        for (int64_t head_dim : {2, 16, 30, 32, 34, 64, 80, 96, 128, 514}) {
            for (const int kind : {0, 1, 2, 3, 4, 5}) {
                const bool together = kind % 2, whole = kind < 2, shared = kind > 3;
                check_attention<Bf16Cache>(rows, head_dim, together, whole, shared);
                check_attention<Int8Cache>(rows, head_dim, together, whole, shared);
            }
        }
    }
    std::puts("ok");
    return 0;
}
