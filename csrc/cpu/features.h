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

Features detect_features();
bool has_feature(const char* name);  // usable: processor and operating system

}  // namespace pelton::cpu
