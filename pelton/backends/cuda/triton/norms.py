"""Norms of rows, alone or of the sum of two: ``rms_norm``, ``layer_norm`` and both behind an addition.

Zhang and Sennrich 2019 (RMSNorm), Ba et al. 2016 (LayerNorm). Rows stay in registers: 16,384 columns are the most that
fit there, more still work.

Where ``out`` is :class:`Codes`, normed rows are quantized as they are in float32, and stored only so. Codes are for
norms of whole rows, not of chunks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import FUSED, next_power_of_2
from .quantize import Codes, store_codes, target


@triton.jit(do_not_specialize=["units", "scales_stride"])
def _norm_kernel(
    out_ptr,
    scales_ptr,  # None: out is no codes
    total_ptr,  # None: nothing is added
    a_ptr,
    b_ptr,
    weight_ptr,
    bias_ptr,  # may be None
    units,
    out_stride,
    scales_stride,
    total_stride,
    a_stride,
    b_stride,
    eps,
    weight_offset,
    CENTRED: tl.constexpr,
    CHUNKS: tl.constexpr,
    SIZE: tl.constexpr,
    UNITS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    INT8: tl.constexpr,
):
    """A unit is one of CHUNKS parts of a row, SIZE columns that are normed together."""
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    within = column < SIZE
    mask = (unit < units) & within
    row = (unit // CHUNKS).to(tl.int64)
    at = unit % CHUNKS * SIZE + column
    x = tl.load(a_ptr + row * a_stride + at, mask=mask, other=0.0).to(tl.float32)
    if total_ptr is not None:
        x += tl.load(b_ptr + row * b_stride + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(total_ptr + row * total_stride + at, x, mask=mask)
    if CENTRED:
        mean = tl.sum(x, axis=1, keep_dims=True) / SIZE
        x = tl.where(mask, x - mean, 0.0)
    root = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / SIZE + eps)
    weight = tl.load(weight_ptr + column, mask=within, other=0.0).to(tl.float32) + weight_offset
    y = x * root * weight
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=within, other=0.0).to(tl.float32)
    if scales_ptr is None:
        tl.store(out_ptr + row * out_stride + at, y, mask=mask)
    else:
        store_codes(out_ptr, scales_ptr, out_stride, scales_stride, y, row, 0, units, SIZE, GROUP, INT8)


def _norm(
    out: torch.Tensor | Codes,
    total: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    weight_offset: float,
    centred: bool,
) -> None:
    rows, columns = a.shape
    size = weight.shape[0]
    chunks = columns // size
    if rows == 0:
        return
    block = next_power_of_2(size)
    # 1,024 columns or more a program, 8 or more a thread: so no thread holds a copy of what another one holds. A copy
    # could be read when ``total``, in the place of ``a``, has already been written.
    units = max(1, 1024 // block)
    codes, scales, group, int8 = target(out, block)
    _norm_kernel[(triton.cdiv(rows * chunks, units),)](
        codes,
        scales,
        total,
        a,
        b,
        weight,
        bias,
        rows * chunks,
        codes.stride(0),
        0 if scales is None else scales.stride(0),
        0 if total is None else total.stride(0),
        a.stride(0),
        0 if b is None else b.stride(0),
        eps,
        weight_offset,
        CENTRED=centred,
        CHUNKS=chunks,
        SIZE=size,
        UNITS=units,
        BLOCK=block,
        GROUP=group,
        INT8=int8,
        num_warps=min(16, units * block // 256),
        **FUSED,
    )


def rms_norm(
    out: torch.Tensor | Codes, x: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float
) -> None:
    """out, x: float [T, n * chunk]; weight: float32 [chunk], each chunk of columns is normed by itself.

    out may be x.
    """
    _norm(out, None, x, None, weight, None, eps, weight_offset, False)


def layer_norm(
    out: torch.Tensor | Codes, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> None:
    """out, x: float [T, columns]; weight, bias: float32 [columns]. out may be x."""
    _norm(out, None, x, None, weight, bias, eps, 0.0, True)


def add_rms_norm(
    total: torch.Tensor,
    out: torch.Tensor | Codes,
    a: torch.Tensor,
    b: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    weight_offset: float,
) -> None:
    """total = a + b, out = rms_norm of the float32 sum, before it is rounded to total's type.

    All [T, n * chunk]; each of total and out may be a or b.
    """
    _norm(out, total, a, b, weight, None, eps, weight_offset, False)


def add_layer_norm(
    total: torch.Tensor,
    out: torch.Tensor | Codes,
    a: torch.Tensor,
    b: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
) -> None:
    """total = a + b, out = layer_norm of the float32 sum, before it is rounded to total's type.

    All [T, columns]; each of total and out may be a or b.
    """
    _norm(out, total, a, b, weight, bias, eps, 0.0, True)
