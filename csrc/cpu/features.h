// What the processor offers.
#pragma once

#include <stdint.h>

#include <string>
#include <utility>
#include <vector>

namespace pelton::cpu {

struct Features {
    std::string vendor, model;
    std::vector<std::pair<std::string, bool>> flags;
    int64_t l1_bytes = 0, l2_bytes = 0, l3_bytes = 0;  // 0 if unknown
};

// Usable ones: the processor has it and the operating system lets this process use it, or
// PELTON_ASSUME_FEATURES (a comma-separated list, for emulators) says so. Both throw std::invalid_argument if
// that names something unknown.
Features detect_features();
bool has_feature(const char* name);

}  // namespace pelton::cpu
