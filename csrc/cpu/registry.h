// The ISA tiers and which kernel serves a name in each.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernel.h"
#include "cpu/ops/peak/contract.h"
#include "cpu/ops/sample/contract.h"

namespace pelton::cpu {

// Tiers this machine can run, best last.
std::vector<std::string> supported_isas();
// Throws std::invalid_argument if the tier is unknown or cannot run here.
void require_isa(const std::string& isa);
// The kernel of the tier, or of the next lower one that has it; null if the name is unknown.
// `tier` receives the name of the tier it comes from.
const Kernel* find_kernel(const std::string& isa, const std::string& name, std::string* tier = nullptr);
std::vector<std::string> kernel_names();
const PeakKernels& peak_kernels(const std::string& isa);
const SampleKernels& sample_kernels(const std::string& isa);  // of the tier or a lower one

}  // namespace pelton::cpu
