"""The paged KV cache of a layer on the device, and the codes of int8 and FP8 caches.

What codes and scales mean is ``_scaled_tokens`` and ``_cached`` of :mod:`pelton.graph.ops`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .common import INTERPRETED, from_e4m3, to_e4m3

_UPCAST: tl.constexpr = tl.constexpr(INTERPRETED)

#: Element types of codes that have scales; uint8: FP8 E4M3.
SCALED = (torch.int8, torch.uint8)


class Cache(NamedTuple):
    """Blocks of tokens.

    memory: uint8 [blocks, bytes], contiguous; the others are views of it, first all codes of a block, then its scales.
    codes: floats, or a type of ``SCALED``, [blocks, 2 (keys, values), kv_heads, block_size, head_dim]; a block's are
    contiguous. scales: float32 [blocks, 2, kv_heads, block_size], likewise; None for floats, which mean themselves.
    """

    memory: torch.Tensor
    codes: torch.Tensor
    scales: torch.Tensor | None

    @classmethod
    def zeros(
        cls, dtype: torch.dtype, num_blocks: int, kv_heads: int, block_size: int, head_dim: int, device: torch.device
    ) -> Cache:
        tokens = 2 * kv_heads * block_size  # and heads, in a block
        split = tokens * head_dim * dtype.itemsize
        size = split + (4 * tokens if dtype in SCALED else 0)
        memory = torch.zeros(num_blocks, size, dtype=torch.uint8, device=device)
        codes = memory[:, :split].view(dtype).unflatten(1, (2, kv_heads, block_size, head_dim))
        scales = memory[:, split:].view(torch.float32).unflatten(1, (2, kv_heads, block_size)) if size > split else None
        return cls(memory, codes, scales)


@triton.jit
def magnitude(x):
    """Of float32, as integers of the same order, infinity and then NaN above all else: maxima keep them."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(largest, INTEGERS: tl.constexpr):
    """float32 of the largest ``magnitude`` among elements that share a scale; infinite if one is not finite."""
    finite = largest < 0x7F800000
    most: tl.constexpr = 127.0 if INTEGERS else 448.0
    scale = tl.div_rn(largest.to(tl.float32, bitcast=True), tl.full(largest.shape, most, tl.float32))
    return tl.where(finite, scale, float("inf"))


@triton.jit
def encode(x, scale, INTEGERS: tl.constexpr):
    """Codes of float32, ties to even; 0 where the scale is infinite."""
    most: tl.constexpr = 127.0 if INTEGERS else 448.0
    finite = scale < float("inf")
    x = tl.where(finite, x, 0.0)
    divisor = tl.where(finite & (scale > 0), scale, 1.0)
    units = tl.div_rn(x, tl.broadcast_to(divisor, x.shape))
    units = tl.minimum(tl.maximum(units, -most), most)
    if INTEGERS:  # from 1.5 * 2**23 on, the last bit of a float is 1
        codes = ((units + 12582912.0).to(tl.int32, bitcast=True) & 0xFF).to(tl.int8)
    else:
        codes = to_e4m3(units)
    return codes


@triton.jit
def decode(codes, TYPE: tl.constexpr):
    """Codes as numbers of this type, exact."""
    if codes.dtype == tl.int8:
        x = codes.to(tl.float32).to(TYPE)
    else:
        x = from_e4m3(codes).to(tl.float32).to(TYPE)
    return x
