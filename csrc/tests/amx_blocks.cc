// The block products of the tier amx against plain C++, with every remainder of rows and depth, buffers that
// end where they are promised to, and bits that do not depend on the rows beside. Prints "ok" or aborts.
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
#include <random>
#include <vector>

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
        amx_int8_block(tiles, a.data(), stride, rows, w.data(), depth, y, ld, pass == 1);
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
            const char* got = sums.data + i / (kPanel / 2) * kAmxSumsRow + i % (kPanel / 2) * 4;
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
                        int8 ? amx_int8_block(tiles, a.data(), kStride, rows, panels.data() + at, kDepth,
                                              reinterpret_cast<int32_t*>(out.data()), kPanel, true)
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
    std::puts("ok");
    return 0;
}
