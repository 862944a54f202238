// Loops that reach the limits of a core: what utilisation is measured against.
#pragma once

#include <stdint.h>

namespace pelton::cpu {

struct PeakKernels {
    // Sums the bytes as vectors of f32 and returns something that depends on all of them.
    float (*read)(const char* data, int64_t bytes);
    // The same without prefetches, which take a third of an L1 cache's bandwidth; from DRAM it depends.
    float (*read_plain)(const char* data, int64_t bytes);
    // `iterations` rounds of independent multiply-adds; null where the tier has no such instruction.
    float (*f32)(int64_t iterations);
    float (*bf16)(int64_t iterations);
    float (*int8)(int64_t iterations);
    // Operations (a multiply and an add are two) of one round.
    double f32_ops, bf16_ops, int8_ops;
};

}  // namespace pelton::cpu
