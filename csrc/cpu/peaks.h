// Measured limits of this machine: memory bandwidth and arithmetic per precision.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace pelton::cpu {

// Bytes and operations per second. `seconds` is the time spent on each number; `names` are those wanted, all if empty.
std::vector<std::pair<std::string, double>> measure_peaks(const std::string& isa, int threads, double seconds,
                                                          const std::vector<std::string>& names);

}  // namespace pelton::cpu
