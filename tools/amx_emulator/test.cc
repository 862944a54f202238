// The AMX instructions against plain C++: under the emulator (LD_PRELOAD), or on a processor that has them,
// where it checks this file's idea of them. Prints "ok" or the first difference.
#include <dlfcn.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace {

struct Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
    void tile(int t, int r, int bytes) {
        rows[t] = static_cast<uint8_t>(r);
        row_bytes[t] = static_cast<uint16_t>(bytes);
    }
};
static_assert(sizeof(Config) == 64);

using Matrix = std::vector<uint8_t>;  // 16 rows of 64 bytes

bool emulated;

void check(bool ok, const std::string& what) {
    if (ok) return;
    std::fprintf(stderr, "failed: %s\n", what.c_str());
    std::exit(1);
}

void configure(const Config& config) { __asm__ volatile("ldtilecfg %0" ::"m"(config)); }
void release() { __asm__ volatile("tilerelease"); }

#define LOAD(tile, p) __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile::"r"((p).data()), "r"(int64_t{64}) : "memory")
#define STORE(tile, p) \
    __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"((p).data()), "r"(int64_t{64}) : "memory")

Matrix random_matrix(std::mt19937& r) {
    Matrix m(1024);
    for (uint8_t& byte : m) byte = static_cast<uint8_t>(r());
    return m;
}

// ---- memory operands: every register as base or index, every scale and displacement

// Loads and stores a tile with the operand given, after base and index have been put into its registers.
#define CHECK_OPERAND(operand, base_register, index_register, base, index)                                 \
    {                                                                                                      \
        __asm__ volatile("mov %0, %%" base_register "\n mov %1, %%" index_register "\n tileloadd " operand \
                         ", %%tmm3" ::"r"(static_cast<const void*>(base)),                                 \
                         "r"(static_cast<int64_t>(index))                                                  \
                         : base_register, index_register, "memory");                                       \
        Matrix out(1024, 0xee);                                                                            \
        STORE(3, out);                                                                                     \
        check(std::memcmp(out.data(), want.data(), 1024) == 0, std::string("tileloadd ") + operand);       \
        Matrix back(memory.size(), 0);                                                                     \
        const uint8_t* moved = back.data() + (reinterpret_cast<const uint8_t*>(base) - memory.data());     \
        __asm__ volatile("mov %0, %%" base_register "\n mov %1, %%" index_register                         \
                         "\n tilestored %%tmm3, " operand::"r"(static_cast<const void*>(moved)),           \
                         "r"(static_cast<int64_t>(index))                                                  \
                         : base_register, index_register, "memory");                                       \
        check(back == expected_back, std::string("tilestored ") + operand);                                \
    }

void check_operands() {
    std::mt19937 r(1);
    Matrix memory(1 << 16);
    for (uint8_t& byte : memory) byte = static_cast<uint8_t>(r());
    Config config;
    config.tile(3, 16, 64);
    configure(config);
    constexpr int64_t kAt = 4096, kStride = 160;
    const uint8_t* at = memory.data() + kAt;
    Matrix want(1024), expected_back(memory.size(), 0);
    for (int row = 0; row < 16; ++row) {
        std::memcpy(&want[row * 64], at + row * kStride, 64);
        std::memcpy(&expected_back[kAt + row * kStride], at + row * kStride, 64);
    }
    CHECK_OPERAND("(%%rax,%%rbx,1)", "rax", "rbx", at, kStride)
    CHECK_OPERAND("(%%rcx,%%rdx,2)", "rcx", "rdx", at, kStride / 2)
    CHECK_OPERAND("(%%rsi,%%rdi,4)", "rsi", "rdi", at, kStride / 4)
    CHECK_OPERAND("(%%r8,%%r9,8)", "r8", "r9", at, kStride / 8)
    CHECK_OPERAND("(%%r10,%%rax,1)", "r10", "rax", at, kStride)
    CHECK_OPERAND("(%%rax,%%r11,2)", "rax", "r11", at, kStride / 2)
    CHECK_OPERAND("(%%r12,%%r13,1)", "r12", "r13", at, kStride)      // the low bits of rsp: r12 needs no special base
    CHECK_OPERAND("(%%r13,%%r12,4)", "r13", "r12", at, kStride / 4)  // r13 as base has a displacement; r12 an index
    CHECK_OPERAND("(%%r14,%%r15,1)", "r14", "r15", at, kStride)
    CHECK_OPERAND("0x40(%%r15,%%r14,1)", "r15", "r14", at - 0x40, kStride)
    CHECK_OPERAND("-0x80(%%rdx,%%rsi,1)", "rdx", "rsi", at + 0x80, kStride)
    CHECK_OPERAND("0x1234(%%r13,%%r8,2)", "r13", "r8", at - 0x1234, kStride / 2)
    CHECK_OPERAND("-0x4321(%%rbx,%%rcx,8)", "rbx", "rcx", at + 0x4321, kStride / 8)
    CHECK_OPERAND("0x40(%%r12,%%rbx,1)", "r12", "rbx", at - 0x40, kStride)
    // rbp and rsp, which a compiler keeps for itself.
    Matrix out(1024);
    __asm__ volatile("push %%rbp\n mov %0, %%rbp\n tileloadd (%%rbp,%1,1), %%tmm3\n pop %%rbp" ::"r"(at), "r"(kStride)
                     : "memory");
    STORE(3, out);
    check(out == want, "tileloadd with rbp as base");
    __asm__ volatile("push %%rbp\n mov %1, %%rbp\n tileloadd (%0,%%rbp,1), %%tmm3\n pop %%rbp" ::"r"(at), "r"(kStride)
                     : "memory");
    STORE(3, out);
    check(out == want, "tileloadd with rbp as index");
    const uint8_t* from = at;
    int64_t count = 16 * kStride;
    __asm__ volatile(
        "mov %%rsp, %%rax\n sub $8192, %%rsp\n and $-64, %%rsp\n lea 64(%%rsp), %%rdi\n rep movsb\n"
        "tileloadd 64(%%rsp,%2,1), %%tmm3\n mov %%rax, %%rsp"
        : "+S"(from), "+c"(count)
        : "r"(kStride)
        : "rax", "rdi", "memory");
    STORE(3, out);
    check(out == want, "tileloadd with rsp as base");
    // No index: every row is the same.
    __asm__ volatile("tileloadd 64(%0), %%tmm3" ::"r"(at) : "memory");
    STORE(3, out);
    for (int row = 0; row < 16; ++row) {
        check(std::memcmp(&out[row * 64], at + 64, 64) == 0, "tileloadd without an index");
    }
    __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm3" ::"r"(at + 15 * kStride), "r"(-kStride) : "memory");
    STORE(3, out);
    for (int row = 0; row < 16; ++row) {
        check(std::memcmp(&out[row * 64], &want[(15 - row) * 64], 64) == 0, "tileloaddt1 with a negative stride");
    }
    release();
}

// ---- configuration

Config global_config;

void check_configuration() {
    Config config;
    for (int t = 0; t < 8; ++t) config.tile(t, t + 1, 8 * t + 4);
    configure(config);
    Config back;
    back.tile(9, 9, 9);  // to be overwritten
    __asm__ volatile("sttilecfg %0" : "=m"(back));
    check(std::memcmp(&back, &config, 64) == 0, "sttilecfg gives back the configuration");
    // Rows and bytes outside of a tile are not touched, and read as zeros afterwards.
    std::mt19937 r(2);
    const Matrix in = random_matrix(r);
    Matrix out(1024, 0xee), want(1024, 0xee);
    LOAD(5, in);
    STORE(5, out);
    for (int row = 0; row < 6; ++row) std::memcpy(&want[row * 64], &in[row * 64], 44);
    check(out == want, "a small tile stays in its bounds");
    __asm__ volatile("tilezero %%tmm5" ::);
    STORE(5, out);
    for (int row = 0; row < 6; ++row) std::memset(&want[row * 64], 0, 44);
    check(out == want, "tilezero");
    LOAD(7, in);
    configure(config);
    STORE(7, out);
    for (int row = 0; row < 8; ++row) std::memset(&want[row * 64], 0, 60);
    check(out == want, "ldtilecfg clears the tiles");
    release();
}

void check_configuration_operands() {
    Config config[3];
    config[1].tile(2, 3, 12);
    Config back[3];
    __asm__ volatile("mov %0, %%r11\n ldtilecfg 64(%%r11)" ::"r"(config) : "r11", "memory");
    __asm__ volatile("mov %0, %%r13\n mov $1, %%r12\n sttilecfg 0x20(%%r13,%%r12,8)" ::"r"(
                         reinterpret_cast<uintptr_t>(back) + 64 - 0x28)
                     : "r12", "r13", "memory");
    check(std::memcmp(&back[1], &config[1], 64) == 0, "ldtilecfg disp8, sttilecfg base + index * 8 + disp8");
    global_config = Config();
    global_config.tile(1, 5, 20);
    __asm__ volatile("ldtilecfg %0" ::"m"(global_config));  // relative to rip
    __asm__ volatile("mov %0, %%rbx\n sttilecfg 0x1000(%%rbx)" ::"r"(reinterpret_cast<uintptr_t>(back) - 0x1000)
                     : "rbx", "memory");
    check(std::memcmp(&back[0], &global_config, 64) == 0, "ldtilecfg rip-relative, sttilecfg disp32");
    release();
    __asm__ volatile("sttilecfg %0" : "=m"(back[2]));
    const Config none = [] {
        Config c;
        c.palette = 0;
        return c;
    }();
    check(std::memcmp(&back[2], &none, 64) == 0, "sttilecfg after tilerelease gives zeros");
}

// ---- products

float flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

float bf16_at(const Matrix& m, int row, int i) {
    uint32_t bits = static_cast<uint32_t>(m[row * 64 + 2 * i] | m[row * 64 + 2 * i + 1] << 8) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return flush(x);
}

template <class T>
T at(const Matrix& m, int row, int i) {
    T x;
    std::memcpy(&x, &m[row * 64 + i * sizeof(T)], sizeof(T));
    return x;
}

template <class T>
void put(Matrix& m, int row, int i, T x) {
    std::memcpy(&m[row * 64 + i * sizeof(T)], &x, sizeof(T));
}

Matrix product_bf16(Matrix c, const Matrix& a, const Matrix& b, int m, int n, int k) {  // k in pairs
    for (int i = 0; i < m; ++i) {
        for (int j = 0; j < n; ++j) {
            float chains[2] = {0.0f, 0.0f};
            for (int p = 0; p < k; ++p) {
                for (int half = 0; half < 2; ++half) {
                    const float x = bf16_at(a, i, 2 * p + half), y = bf16_at(b, p, 2 * j + half);
                    chains[half] = flush(std::fma(x, y, chains[half]));
                }
            }
            put(c, i, j, flush(flush(at<float>(c, i, j)) + flush(chains[0] + chains[1])));
        }
    }
    return c;
}

template <class A, class B>
Matrix product_int8(Matrix c, const Matrix& a, const Matrix& b, int m, int n, int k) {  // k in quadruples
    for (int i = 0; i < m; ++i) {
        for (int j = 0; j < n; ++j) {
            uint32_t total = at<uint32_t>(c, i, j);
            for (int p = 0; p < 4 * k; ++p) {
                total += static_cast<uint32_t>(int{at<A>(a, i, p)} * int{at<B>(b, p / 4, 4 * j + p % 4)});
            }
            put(c, i, j, total);
        }
    }
    return c;
}

// Like tiles: what is outside of a tile's rows and bytes is not there.
Matrix crop(const Matrix& whole, int rows, int bytes) {
    Matrix part(1024);
    for (int row = 0; row < rows; ++row) std::memcpy(&part[row * 64], &whole[row * 64], bytes);
    return part;
}

// Random bits are mostly far apart in size; these give sums in which every rounding counts, and subnormals.
Matrix bf16_matrix(std::mt19937& r, int kind) {
    std::normal_distribution<float> normal;
    Matrix m(1024);
    for (int i = 0; i < 512; ++i) {
        float x = normal(r);
        if (kind == 1) x *= 0x1p-63f;                       // products around the smallest normal number
        if (kind == 2) x *= r() % 2 ? 0x1p-126f : 0x1p40f;  // subnormal factors
        if (kind == 3 && r() % 16 == 0) x = -0.0f;
        if (kind == 3 && r() % 64 == 0) x = INFINITY;
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        put<uint16_t>(m, i / 32, i % 32, static_cast<uint16_t>(bits >> 16));
    }
    return m;
}

bool same(const Matrix& x, const Matrix& y, bool floats) {
    for (int i = 0; i < 256; ++i) {
        if (floats && std::isnan(at<float>(x, 0, i)) && std::isnan(at<float>(y, 0, i))) continue;
        if (at<uint32_t>(x, 0, i) != at<uint32_t>(y, 0, i)) return false;
    }
    return true;
}

#define CHECK_PRODUCT(name, c_tile, a_tile, b_tile, floats, want)                                               \
    {                                                                                                           \
        Config config;                                                                                          \
        config.tile(c_tile, m, 4 * n);                                                                          \
        config.tile(a_tile, m, 4 * k);                                                                          \
        config.tile(b_tile, k, 4 * n);                                                                          \
        configure(config);                                                                                      \
        LOAD(c_tile, c);                                                                                        \
        LOAD(a_tile, a);                                                                                        \
        LOAD(b_tile, b);                                                                                        \
        __asm__ volatile(name " %%tmm" #b_tile ", %%tmm" #a_tile ", %%tmm" #c_tile::);                          \
        Matrix got(1024), factor(1024);                                                                         \
        STORE(c_tile, got);                                                                                     \
        check(same(got, crop(want, m, 4 * n), floats),                                                          \
              std::string(name) + " " + std::to_string(m) + "x" + std::to_string(n) + "x" + std::to_string(k)); \
        STORE(a_tile, factor);                                                                                  \
        check(factor == crop(a, m, 4 * k), "a product leaves its factors alone");                               \
        release();                                                                                              \
    }

void check_products() {
    std::mt19937 r(3);
    for (int round = 0; round < 120; ++round) {
        const int m = round == 0 ? 16 : 1 + r() % 16, n = round == 0 ? 16 : 1 + r() % 16;
        const int k = round == 0 ? 16 : 1 + r() % 16;
        Matrix a = random_matrix(r), b = random_matrix(r), c = random_matrix(r);
        CHECK_PRODUCT("tdpbssd", 0, 1, 2, false, (product_int8<int8_t, int8_t>(c, a, b, m, n, k)))
        CHECK_PRODUCT("tdpbsud", 3, 4, 5, false, (product_int8<int8_t, uint8_t>(c, a, b, m, n, k)))
        CHECK_PRODUCT("tdpbusd", 6, 7, 0, false, (product_int8<uint8_t, int8_t>(c, a, b, m, n, k)))
        CHECK_PRODUCT("tdpbuud", 7, 2, 6, false, (product_int8<uint8_t, uint8_t>(c, a, b, m, n, k)))
        a = bf16_matrix(r, round % 4);
        b = bf16_matrix(r, round % 4);
        std::normal_distribution<float> normal;
        for (int i = 0; i < 256; ++i) put(c, 0, i, normal(r) * (round % 4 == 1 ? 0x1p-126f : 1.0f));
        CHECK_PRODUCT("tdpbf16ps", 1, 7, 4, true, product_bf16(c, a, b, m, n, k))
        CHECK_PRODUCT("tdpbf16ps", 5, 0, 3, true, product_bf16(c, a, b, m, n, k))
    }
    // Two chains, joined at the end: 1 + 2^-24 in each step would be lost in a single chain's f32 sum.
    Matrix a(1024), b(1024), c(1024);
    const int m = 1, n = 1, k = 2;
    const uint16_t one = 0x3f80, tiny = 0x3380 /* 2^-24 */;
    put(a, 0, 0, one), put(a, 0, 1, tiny), put(a, 0, 2, uint16_t{0}), put(a, 0, 3, tiny);
    for (int p = 0; p < 2; ++p) put(b, p, 0, one), put(b, p, 1, one);
    CHECK_PRODUCT("tdpbf16ps", 0, 1, 2, true, product_bf16(c, a, b, m, n, k))
    check(at<float>(product_bf16(c, a, b, m, n, k), 0, 0) == 1.0f + 0x1p-23f, "the chains are apart");
}

// ---- threads, other illegal instructions, faults

void check_threads() {
    Config config;
    config.tile(0, 2, 8);
    configure(config);
    Matrix in(1024, 7), out(1024, 0);
    LOAD(0, in);
    std::thread([] {
        Config seen;
        __asm__ volatile("sttilecfg %0" : "=m"(seen));
        check(seen.palette == 0, "a new thread has no tiles");
        Config other;
        other.tile(0, 16, 64);
        configure(other);
        release();
    }).join();
    STORE(0, out);
    check(out[0] == 7 && out[64 + 7] == 7 && out[8] == 0, "a thread's tiles are its own");
    release();
}

sigjmp_buf jump;

void check_passing_on() {
    struct sigaction action = {}, before = {};
    action.sa_handler = [](int) { siglongjmp(jump, 1); };
    sigaction(SIGILL, &action, &before);
    volatile bool jumped = false;
    if (sigsetjmp(jump, 1) == 0) {
        __asm__ volatile("ud2");
    } else {
        jumped = true;
    }
    check(jumped, "the program's handler sees other illegal instructions");
    Config config;
    config.tile(0, 1, 4);
    configure(config);
    release();
    sigaction(SIGILL, &before, nullptr);
}

// Runs `body` in a child, which must end in a fault whose text is `want`.
void must_fault(const char* want, void (*body)()) {
    int pipe_ends[2];
    check(pipe(pipe_ends) == 0, "pipe");
    const pid_t child = fork();
    if (child == 0) {
        dup2(pipe_ends[1], 2);
        body();
        _exit(0);
    }
    close(pipe_ends[1]);
    std::string text;
    char buffer[512];
    for (ssize_t size; (size = read(pipe_ends[0], buffer, sizeof(buffer))) > 0;) text.append(buffer, size);
    close(pipe_ends[0]);
    int status = 0;
    waitpid(child, &status, 0);
    check(WIFSIGNALED(status), std::string("no fault: ") + want);
    if (emulated && *want) {
        check(WTERMSIG(status) == SIGABRT && text.find(want) != std::string::npos,
              std::string("wanted '") + want + "', got '" + text + "'");
    }
}

template <class F>
void with_config(F change) {
    Config config;
    for (int t = 0; t < 8; ++t) config.tile(t, 16, 64);
    change(config);
    configure(config);
}

#define PRODUCT(b, a, c) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c::)

void check_faults() {
    static Matrix memory(1024);
    must_fault("tiles are not configured", [] { __asm__ volatile("tilezero %%tmm0" ::); });
    must_fault("tiles are not configured", [] {
        with_config([](Config&) {});
        release();
        PRODUCT(2, 1, 0);
    });
    must_fault("palette must be", [] { with_config([](Config& c) { c.palette = 2; }); });
    must_fault("reserved bytes", [] { with_config([](Config& c) { c.reserved[3] = 1; }); });
    must_fault("reserved bytes", [] { with_config([](Config& c) { c.tile(8, 1, 4); }); });
    must_fault("more than 16 rows", [] { with_config([](Config& c) { c.tile(4, 17, 64); }); });
    must_fault("more than 64 bytes", [] { with_config([](Config& c) { c.tile(4, 16, 68); }); });
    must_fault("rows without bytes", [] { with_config([](Config& c) { c.tile(4, 0, 64); }); });
    must_fault("rows without bytes", [] { with_config([](Config& c) { c.tile(4, 16, 0); }); });
    must_fault("no rows in the configuration", [] {
        with_config([](Config& c) { c.tile(4, 0, 0); });
        LOAD(4, memory);
    });
    must_fault("unlike numbers of rows", [] {
        with_config([](Config& c) { c.tile(1, 15, 64); });
        PRODUCT(2, 1, 0);
    });
    must_fault("unlike bytes per row", [] {
        with_config([](Config& c) { c.tile(2, 16, 60); });
        PRODUCT(2, 1, 0);
    });
    must_fault("not the second factor's rows", [] {
        with_config([](Config& c) { c.tile(2, 15, 64); });
        PRODUCT(2, 1, 0);
    });
    must_fault("multiple of 4", [] {
        with_config([](Config& c) { c.tile(1, 16, 62); });
        PRODUCT(2, 1, 0);
    });
    must_fault("must differ", [] {
        with_config([](Config&) {});
        __asm__ volatile(".byte 0xc4, 0xe2, 0x73, 0x5e, 0xc1");  // tdpbssd tmm0, tmm1, tmm1
    });
    must_fault("needs a SIB byte", [] {
        with_config([](Config&) {});
        __asm__ volatile(".byte 0xc4, 0xe2, 0x7b, 0x4b, 0x00" ::"a"(memory.data()));  // tileloadd (%rax), no SIB
    });
    must_fault("VEX.W", [] { __asm__ volatile(".byte 0xc4, 0xe2, 0xf8, 0x49, 0xc0"); });
    must_fault("VEX.L", [] { __asm__ volatile(".byte 0xc4, 0xe2, 0x7c, 0x49, 0xc0"); });
    must_fault("no tile above 7", [] { __asm__ volatile(".byte 0xc4, 0x62, 0x7b, 0x49, 0xc0"); });
    must_fault("VEX.vvvv", [] { __asm__ volatile(".byte 0xc4, 0xe2, 0x70, 0x49, 0xc0"); });
    must_fault("", [] { __asm__ volatile("ud2"); });  // by default it ends the program
}

}  // namespace

int main() {
    emulated = dlsym(RTLD_DEFAULT, "amx_emulator_executed") != nullptr;
    if (!emulated) {
        constexpr int kRequestPermission = 0x1023, kTileData = 18;
        check(syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0,
              "no AMX here (or the kernel does not grant it): run under the emulator with LD_PRELOAD");
    }
    check_configuration();
    check_configuration_operands();
    check_operands();
    check_products();
    check_threads();
    check_passing_on();
    check_faults();
    std::puts("ok");
    return 0;
}
