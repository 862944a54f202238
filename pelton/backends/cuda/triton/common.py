"""What kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

#: Kernels run in Triton's interpreter, on the host. ``TRITON_INTERPRET=1`` at the first import asks for it.
INTERPRETED = bool(triton.knobs.runtime.interpret)

#: Of a launch: a product and a sum may be one instruction. Said aloud, as Triton's default changes with its versions.
FUSED = {"enable_fp_fusion": True}

_UPCAST: tl.constexpr = tl.constexpr(INTERPRETED)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is n or more: sizes of Triton's blocks."""
    return 1 << max(0, n - 1).bit_length()


@triton.jit
def dot(a, b, acc, EXACT: tl.constexpr):
    """acc + a @ b in float32. EXACT: float32 operands keep all their bits (no TF32)."""
    if _UPCAST:  # the interpreter has no bfloat16 products
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    if EXACT:
        return tl.dot(a, b, acc, input_precision="ieee")
    return tl.dot(a, b, acc)


@triton.jit
def tanh(x):
    """Of float32; there is no such instruction in ``tl``. Right for large arguments, too: exp gives inf or 0."""
    return 1 - 2 / (tl.exp(2 * x) + 1)
