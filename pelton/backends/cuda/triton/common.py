"""What kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

#: Kernels run in Triton's interpreter, on the host. ``TRITON_INTERPRET=1`` at the first import asks for it.
INTERPRETED = bool(triton.knobs.runtime.interpret)
#: The same for kernels.
INTERPRETED_CONSTEXPR: tl.constexpr = tl.constexpr(INTERPRETED)

#: Of a launch: a product and a sum may be one instruction. Said aloud, as Triton's default changes with its versions.
FUSED = {"enable_fp_fusion": True}


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is n or more: sizes of Triton's blocks."""
    return 1 << max(0, n - 1).bit_length()


@triton.jit
def dot(a, b, acc, EXACT: tl.constexpr):
    """acc + a @ b in float32, or of int8 in int32. EXACT: float32 operands keep all their bits (no TF32)."""
    if a.dtype == tl.int8:
        return tl.dot(a, b, acc, out_dtype=tl.int32)
    elif INTERPRETED_CONSTEXPR:  # the interpreter has no bfloat16 products
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    elif EXACT:
        return tl.dot(a, b, acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc)


@triton.jit
def tanh(x):
    """Of float32; there is no such instruction in ``tl``. Right for large arguments, too: exp gives inf or 0."""
    return 1 - 2 / (tl.exp(2 * x) + 1)


@triton.jit
def to_e4m3(x):
    """FP8 E4M3 codes, uint8, of float32 in -448..448, ties to even.

    In integers: Ampere has no such conversion, and the interpreter's does not round to nearest.
    """
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    magnitude = tl.abs(x)
    bits = magnitude.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2**-6 codes are multiples of 2**-9, the last bit of floats at 2**14.
    subnormal = (magnitude + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    return (sign | tl.where(magnitude < 0.015625, subnormal, normal)).to(tl.uint8)


@triton.jit
def from_e4m3(codes):
    """Float16, exact, of FP8 E4M3 codes, uint8; those of NaN become 480.

    The exponent's bits, moved to those of float16, stand for 2**-8 of the value: subnormal ones, too.
    """
    c = codes.to(tl.int16)
    return (((c & 0x80) << 8) | ((c & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0


@triton.jit
def from_e2m1(codes):
    """Float16, exact, of FP4 E2M1 codes, 0 to 15 in uint8."""
    c = codes.to(tl.int16)
    return (((c & 8) << 12) | ((c & 7) << 9)).to(tl.float16, bitcast=True) * 16384.0
