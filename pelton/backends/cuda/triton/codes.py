"""Floats become int8 or FP8 codes that share a scale, in KV caches and in activations.

The rule is ``_scaled_tokens`` of :mod:`pelton.graph.ops`, bit for bit: the largest magnitude is 127 or 448 scales, a
code is the nearest to x / scale, ties to even. Where something is not finite codes are 0 and the scale is infinite:
products with them are NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import to_e4m3


@triton.jit
def magnitude(x):
    """Of float32, as integers of the same order, infinity and then NaN above all else: maxima keep them."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(largest, INT8: tl.constexpr):
    """Float32 of the largest ``magnitude`` among elements that share a scale."""
    most: tl.constexpr = 127.0 if INT8 else 448.0
    exact = tl.div_rn(largest.to(tl.float32, bitcast=True), tl.full(largest.shape, most, tl.float32))
    return tl.where(largest < 0x7F800000, exact, float("inf"))


@triton.jit
def encode(x, scale, INT8: tl.constexpr):
    """Codes, as uint8, of float32 with a scale that broadcasts."""
    most: tl.constexpr = 127.0 if INT8 else 448.0
    units = tl.div_rn(x, tl.broadcast_to(tl.where(scale > 0, scale, 1.0), x.shape))
    units = tl.where(scale < float("inf"), units, 0.0)
    units = tl.minimum(tl.maximum(units, -most), most)  # scales that are subnormal have few digits
    if INT8:  # ulps of 1.5 * 2**23 are 1, and its last byte is 0
        codes = (units + 12582912.0).to(tl.int32, bitcast=True).to(tl.uint8)
    else:
        codes = to_e4m3(units)
    return codes
