// Element by element over rows: arithmetic, activations and the soft cap.
#pragma once

#include "cpu/kernel.h"

namespace pelton::cpu {

struct Contract;

// add, mul: out = a op b
namespace binary {
enum Operands { kOut, kA, kB };
enum Ints { kRowsDim, kCols, kLdOut, kLdA, kLdB };
}  // namespace binary

// scale: out = factor * x; softcap: out = cap * tanh(x / cap); activation: out = f(x)
namespace unary {
enum Operands { kOut, kX };
enum Ints { kRowsDim, kCols, kLdOut, kLdX, kKind };
enum Floats { kFactor };
}  // namespace unary

// gated_activation: out = f(gate) * up
namespace gated {
enum Operands { kOut, kGate, kUp };
enum Ints { kRowsDim, kCols, kLdOut, kLdGate, kLdUp, kKind };
}  // namespace gated

enum ActivationKind { kSilu, kGeluTanh, kGeluErf, kRelu, kNumActivations };

extern const Contract kActivation, kGatedActivation, kAdd, kMul, kScale, kSoftcap;

}  // namespace pelton::cpu
