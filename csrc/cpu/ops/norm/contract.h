// Normalisation of rows, alone or fused with the residual addition before it.
#pragma once

#include "cpu/kernel.h"

namespace pelton::cpu {

struct Contract;

// rms_norm: every chunk of `chunk` columns on its own, y = x * rsqrt(mean(x^2) + eps) * (w[j] + offset).
namespace rms_norm {
enum Operands { kOut, kX, kWeight };
enum Ints { kRowsDim, kCols, kChunk, kLdOut, kLdX };
enum Floats { kEps, kWeightOffset };
}  // namespace rms_norm

// layer_norm: y = (x - mean) * rsqrt(variance + eps) * w[j] + b[j]; the bias is optional.
namespace layer_norm {
enum Operands { kOut, kX, kWeight, kBias };
enum Ints { kRowsDim, kCols, kLdOut, kLdX };
enum Floats { kEps };
}  // namespace layer_norm

// add_rms_norm, add_layer_norm: sum = a + b, out = norm(sum).
namespace add_norm {
enum Operands { kSum, kOut, kA, kB, kWeight, kBias };
enum Ints { kRowsDim, kCols, kLdSum, kLdOut, kLdA, kLdB };
enum Floats { kEps, kWeightOffset };
}  // namespace add_norm

extern const Contract kRmsNorm, kLayerNorm, kAddRmsNorm, kAddLayerNorm;

}  // namespace pelton::cpu
