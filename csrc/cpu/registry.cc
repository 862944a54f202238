#include "cpu/registry.h"

#include <stdexcept>

#include "cpu/contract.h"
#include "cpu/features.h"

// The translation units of a tier that define kernels of their own.
#define PELTON_DECLARE_COMMON(isa)             \
    namespace pelton::cpu::isa {               \
    extern const Kernel embedding_kernels[];   \
    extern const Kernel norm_kernels[];        \
    extern const Kernel elementwise_kernels[]; \
    extern const Kernel rope_kernels[];        \
    extern const SampleKernels sample_kernels; \
    }
#define PELTON_DECLARE_SPECIAL(isa)          \
    namespace pelton::cpu::isa {             \
    extern const Kernel linear_kernels[];    \
    extern const Kernel attention_kernels[]; \
    extern const Kernel lora_kernels[];      \
    extern const PeakKernels peak_kernels;   \
    }

PELTON_DECLARE_COMMON(generic)
PELTON_DECLARE_SPECIAL(generic)
#if defined(__x86_64__)
PELTON_DECLARE_COMMON(avx2)
PELTON_DECLARE_SPECIAL(avx2)
PELTON_DECLARE_COMMON(avx512)
PELTON_DECLARE_SPECIAL(avx512)
PELTON_DECLARE_SPECIAL(avx512_bf16)
#if defined(PELTON_HAS_AMX)
PELTON_DECLARE_SPECIAL(amx)
#endif
#endif

namespace pelton::cpu {
namespace {

struct Tier {
    const char* name;
    std::vector<const char*> features;
    std::vector<const Kernel*> tables;
    const PeakKernels* peaks;
    const SampleKernels* sample = nullptr;  // those of the tier before
};

#define PELTON_SPECIAL(isa) isa::linear_kernels, isa::attention_kernels, isa::lora_kernels
#define PELTON_ALL(isa) \
    isa::embedding_kernels, isa::norm_kernels, isa::elementwise_kernels, isa::rope_kernels, PELTON_SPECIAL(isa)

// Each tier includes the ones before it.
const std::vector<Tier>& tiers() {
    static const std::vector<Tier> all = {
        {"generic", {}, {PELTON_ALL(generic)}, &generic::peak_kernels, &generic::sample_kernels},
#if defined(__x86_64__)
        {"avx2", {"avx2", "fma", "f16c"}, {PELTON_ALL(avx2)}, &avx2::peak_kernels, &avx2::sample_kernels},
        {"avx512",
         {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
         {PELTON_ALL(avx512)},
         &avx512::peak_kernels,
         &avx512::sample_kernels},
        {"avx512_bf16", {"avx512_bf16", "avx512_vnni"}, {PELTON_SPECIAL(avx512_bf16)}, &avx512_bf16::peak_kernels},
#if defined(PELTON_HAS_AMX)
        {"amx", {"amx_tile", "amx_bf16", "amx_int8"}, {PELTON_SPECIAL(amx)}, &amx::peak_kernels},
#endif
#endif
    };
    return all;
}

size_t num_supported() {
    size_t n = 0;
    for (const Tier& tier : tiers()) {
        for (const char* feature : tier.features) {
            if (!has_feature(feature)) return n;
        }
        ++n;
    }
    return n;
}

size_t index_of(const std::string& isa) {
    const size_t supported = num_supported();
    for (size_t i = 0; i < supported; ++i) {
        if (isa == tiers()[i].name) return i;
    }
    std::string names;
    for (const std::string& name : supported_isas()) names += " " + name;
    throw std::invalid_argument("this machine cannot run the ISA tier '" + isa + "'; it has:" + names);
}

}  // namespace

std::vector<std::string> supported_isas() {
    std::vector<std::string> names;
    for (size_t i = 0; i < num_supported(); ++i) names.push_back(tiers()[i].name);
    return names;
}

void require_isa(const std::string& isa) { index_of(isa); }

const Kernel* find_kernel(const std::string& isa, const std::string& name, std::string* tier) {
    for (size_t i = index_of(isa) + 1; i-- > 0;) {
        for (const Kernel* table : tiers()[i].tables) {
            for (const Kernel* kernel = table; kernel->name; ++kernel) {
                if (name != kernel->name) continue;
                if (tier) *tier = tiers()[i].name;
                return kernel;
            }
        }
    }
    return nullptr;
}

std::vector<std::string> kernel_names() {
    std::vector<std::string> names;
    for (const Contract* const* c = all_contracts(); *c; ++c) names.push_back((*c)->name);
    return names;
}

const PeakKernels& peak_kernels(const std::string& isa) { return *tiers()[index_of(isa)].peaks; }

const SampleKernels& sample_kernels(const std::string& isa) {
    size_t i = index_of(isa);
    while (!tiers()[i].sample) --i;
    return *tiers()[i].sample;
}

}  // namespace pelton::cpu
