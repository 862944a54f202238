// What a kernel is: plain data shared by the executor, the contracts and the per-ISA translation
// units. No inline code here: an inline function compiled with AVX-512 flags could be picked by the
// linker for the baseline build.
#pragma once

#include <stdint.h>

namespace pelton::cpu {

constexpr int kMaxOperands = 8;  // rope_kv_write has the most
constexpr int kMaxInts = 16;     // lora has as many
constexpr int kMaxFloats = 2;    // attention and the norms
constexpr int kMaxStages = 2;    // linear: round the activations, then multiply

// An operand as the kernel sees it: `bytes` is what may be touched from `data` on; null if absent.
struct Operand {
    char* data;
    int64_t bytes;
};

// One thread of the pool. `tag` says for which call the scratch was last prepared.
struct Worker {
    int id;
    char* scratch;
    uint64_t tag;
};

// How a stage is cut: threads take `grain` items at a time until `items` are gone.
struct Cut {
    int64_t items;
    int64_t grain;
};

struct Kernel;

// A call resolved for one step. Contracts fill it, kernels read it.
struct Call {
    Operand operands[kMaxOperands];
    int64_t ints[kMaxInts];
    float floats[kMaxFloats];
    const Kernel* kernel;
    int64_t rows;
    Cut cuts[kMaxStages];
    int64_t shared_bytes;  // scratch that all threads of the call share, wanted this step
    char* shared;
    const void* plan;  // work list of the call, where its contract makes one
    uint64_t tag;      // unique per call and step
};

using Stage = void (*)(const Call& call, int64_t begin, int64_t end, Worker& worker);

struct Kernel {
    const char* name;  // null ends a table
    Stage stages[kMaxStages];
    int traits;  // contract specific, e.g. how linear wants its activations
};

}  // namespace pelton::cpu
