#include "cpu/features.h"

#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>

#include <cstdio>
#endif

namespace pelton::cpu {
namespace {

#if defined(__x86_64__)
struct Leaf {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Leaf leaf(unsigned number, unsigned sub = 0) {
    Leaf r;
    if (!__get_cpuid_count(number, sub, &r.eax, &r.ebx, &r.ecx, &r.edx)) return Leaf();
    return r;
}

// Register states that the operating system saves (XCR0).
uint64_t saved_states() {
    if (!(leaf(1).ecx & (1u << 27))) return 0;
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (static_cast<uint64_t>(high) << 32) | low;
}

// Linux gives the 8 KB of tiles only to processes that ask for them, once for all of their threads.
bool request_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    return granted;
#else
    return false;
#endif
}

bool detect_tiles() {
    const bool saved = (saved_states() & 0x60000) == 0x60000;
    if (!saved || !(leaf(7).edx & (1u << 24))) return false;
    return leaf(0x1d).eax >= 1 && request_tiles();  // some virtual machines announce tiles but no palette
}
#elif defined(__aarch64__) && defined(__linux__)
// Bits of AT_HWCAP and AT_HWCAP2 by number: the headers that wheels are built against are older than most names.
bool hwcap(unsigned long type, int i) { return ((getauxval(type) >> i) & 1u) != 0; }

// Main ID register: implementer, part, revision. 0 where Linux does not let a program read it.
unsigned midr() {
    if (!hwcap(AT_HWCAP, 11)) return 0;
    uint64_t id;
    __asm__("mrs %0, midr_el1" : "=r"(id));
    return static_cast<unsigned>(id);
}

constexpr std::pair<unsigned, const char*> kImplementers[] = {{0x41, "Arm"},    {0x46, "Fujitsu"},  {0x48, "HiSilicon"},
                                                              {0x4e, "NVIDIA"}, {0x51, "Qualcomm"}, {0x61, "Apple"},
                                                              {0xc0, "Ampere"}};
#endif

// For emulators: PELTON_ASSUME_FEATURES=amx_tile,amx_bf16 claims features that the processor does not
// announce. A wrong claim ends in an illegal instruction.
void assume(std::vector<std::pair<std::string, bool>>& flags) {
    const char* text = std::getenv("PELTON_ASSUME_FEATURES");
    std::string names = text ? text : "";
    while (!names.empty()) {
        const size_t comma = names.find(',');
        const std::string name = names.substr(0, comma);
        names = comma == std::string::npos ? "" : names.substr(comma + 1);
        bool known = name.empty();
        for (auto& [flag, present] : flags) {
            if (flag == name) known = present = true;
        }
        if (!known) throw std::invalid_argument("PELTON_ASSUME_FEATURES: there is no feature '" + name + "'");
    }
}

std::vector<std::pair<std::string, bool>> detect_flags() {
    std::vector<std::pair<std::string, bool>> flags;
#if defined(__x86_64__)
    const uint64_t states = saved_states();
    const bool ymm = (states & 0x6) == 0x6, zmm = ymm && (states & 0xe0) == 0xe0;
    const bool tiles = detect_tiles();
    const Leaf l1 = leaf(1), l7 = leaf(7), l71 = leaf(7, 1);
    auto bit = [](unsigned word, int i) { return ((word >> i) & 1u) != 0; };
    flags = {{"avx2", ymm && bit(l7.ebx, 5)},
             {"fma", ymm && bit(l1.ecx, 12)},
             {"f16c", ymm && bit(l1.ecx, 29)},
             {"avx512f", zmm && bit(l7.ebx, 16)},
             {"avx512dq", zmm && bit(l7.ebx, 17)},
             {"avx512bw", zmm && bit(l7.ebx, 30)},
             {"avx512vl", zmm && bit(l7.ebx, 31)},
             {"avx512_vbmi", zmm && bit(l7.ecx, 1)},
             {"avx512_vnni", zmm && bit(l7.ecx, 11)},
             {"avx512_bf16", zmm && bit(l71.eax, 5)},
             {"avx512_fp16", zmm && bit(l7.edx, 23)},
             {"avx_vnni", ymm && bit(l71.eax, 4)},
             {"amx_tile", tiles},
             {"amx_bf16", tiles && bit(l7.edx, 22)},
             {"amx_int8", tiles && bit(l7.edx, 25)}};
#elif defined(__aarch64__)
    flags = {{"neon", true}};
#if defined(__linux__)
    flags.insert(flags.end(), {{"fp16", hwcap(AT_HWCAP, 10)},
                               {"dotprod", hwcap(AT_HWCAP, 20)},
                               {"sve", hwcap(AT_HWCAP, 22)},
                               {"i8mm", hwcap(AT_HWCAP2, 13)},
                               {"bf16", hwcap(AT_HWCAP2, 14)}});
#endif
#endif
    assume(flags);
    return flags;
}

#if defined(_SC_LEVEL1_DCACHE_SIZE)
int64_t cache_bytes(int name) {
    long value = sysconf(name);
    return value > 0 ? value : 0;
}
#endif

}  // namespace

bool has_feature(const char* name) {
    static const std::vector<std::pair<std::string, bool>> flags = detect_flags();
    for (const auto& [flag, present] : flags) {
        if (flag == name) return present;
    }
    return false;
}

Features detect_features() {
    Features f;
    f.flags = detect_flags();
#if defined(__x86_64__)
    Leaf v = leaf(0);
    char vendor[13] = {};
    std::memcpy(vendor, &v.ebx, 4);
    std::memcpy(vendor + 4, &v.edx, 4);
    std::memcpy(vendor + 8, &v.ecx, 4);
    f.vendor = vendor;
    char model[49] = {};
    for (unsigned i = 0; i < 3; ++i) {
        Leaf l = leaf(0x80000002u + i);
        std::memcpy(model + 16 * i, &l, 16);
    }
    f.model = model;
    while (!f.model.empty() && f.model.back() == ' ') f.model.pop_back();
#elif defined(__aarch64__) && defined(__linux__)
    const unsigned id = midr();
    if (id) {
        char text[40];
        std::snprintf(text, sizeof text, "implementer 0x%02x", id >> 24);
        f.vendor = text;
        for (const auto& [number, name] : kImplementers) {
            if (number == id >> 24) f.vendor = name;
        }
        std::snprintf(text, sizeof text, " part 0x%03x", (id >> 4) & 0xfff);
        f.model = f.vendor + text;
    }
#endif
#if defined(_SC_LEVEL1_DCACHE_SIZE)
    f.l1_bytes = cache_bytes(_SC_LEVEL1_DCACHE_SIZE);
    f.l2_bytes = cache_bytes(_SC_LEVEL2_CACHE_SIZE);
    f.l3_bytes = cache_bytes(_SC_LEVEL3_CACHE_SIZE);
#endif
    return f;
}

}  // namespace pelton::cpu
