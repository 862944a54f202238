"""Rows of floats become int8 or FP8 codes (:mod:`.codes`) with a scale per row or per group of columns."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .codes import encode, magnitude, scale_of
from .common import FUSED, next_power_of_2

#: Columns of which a program holds a row in registers: 32 a thread. Of longer rows it reads all but these twice.
ROW_COLUMNS = 16384


class Codes(NamedTuple):
    """Quantized rows. As a kernel's output they overlap none of its inputs.

    codes: int8 or float8_e4m3fn [T, columns], rows may be strided. scales: float32 [groups, T], a row of scales is
    contiguous; group g of row t stands for columns / groups columns: codes * scales[g, t].
    """

    codes: torch.Tensor
    scales: torch.Tensor


def supports_groups(columns: int, groups: int) -> bool:
    """Norms and activations can write such :class:`Codes`; :func:`quantize_rows` can write any."""
    size, rest = divmod(columns, groups)
    return rest == 0 and (groups == 1 or size & (size - 1) == 0)


def target(out: torch.Tensor | Codes, block: int) -> tuple[torch.Tensor, torch.Tensor | None, int, bool]:
    """What a kernel whose tiles have ``block`` columns writes: elements; scales, if any, of how many columns; int8?"""
    if isinstance(out, torch.Tensor):
        return out, None, block, False
    groups = out.scales.shape[0]
    group = block if groups == 1 else out.codes.shape[1] // groups
    return out.codes.view(torch.uint8), out.scales, group, out.codes.dtype == torch.int8


@triton.jit
def store_codes(
    codes_ptr,
    scales_ptr,
    codes_stride,
    scales_stride,
    x,  # float32 [ROWS, COLUMNS], 0 beyond rows and columns
    row,  # int64 [ROWS, 1]
    first,  # a multiple of GROUP
    rows,
    columns,
    GROUP: tl.constexpr,
    INT8: tl.constexpr,
):
    """Stores x, columns from ``first`` on. GROUP divides COLUMNS; if it is COLUMNS, x is all that shares a scale."""
    column = first + tl.arange(0, x.shape[1])[None, :]
    group = first // GROUP + tl.arange(0, x.shape[1] // GROUP)[None, :]
    grouped = tl.reshape(x, [x.shape[0], x.shape[1] // GROUP, GROUP])
    scale = scale_of(tl.max(magnitude(grouped), 2), INT8)
    mask = (row < rows) & (group * GROUP < columns)
    tl.store(scales_ptr + group.to(tl.int64) * scales_stride + row, scale, mask=mask)
    mask = (row < rows) & (column < columns)
    codes = tl.reshape(encode(grouped, scale[:, :, None], INT8), x.shape)
    tl.store(codes_ptr + row * codes_stride + column, codes, mask=mask)


@triton.jit(do_not_specialize=["units", "scales_stride"])
def _quantize_rows_kernel(
    codes_ptr,
    scales_ptr,
    x_ptr,
    units,
    codes_stride,
    scales_stride,
    x_stride,
    INT8: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    UNITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A unit is one of GROUPS groups of a row, SIZE columns. What is beyond the first BLOCK of them is read twice."""
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)[:, None]
    row = (unit // GROUPS).to(tl.int64)
    group = unit % GROUPS
    x_ptr += row * x_stride + group * SIZE
    codes_ptr += row * codes_stride + group * SIZE
    column = tl.arange(0, BLOCK)[None, :]
    valid = unit < units
    mask = valid & (column < SIZE)
    x = tl.load(x_ptr + column, mask=mask, other=0.0).to(tl.float32)
    largest = tl.max(magnitude(x), 1, keep_dims=True)
    for first in range(BLOCK, SIZE, BLOCK):
        more = tl.load(x_ptr + first + column, mask=valid & (first + column < SIZE), other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(magnitude(more), 1, keep_dims=True))
    scale = scale_of(largest, INT8)
    tl.store(scales_ptr + group.to(tl.int64) * scales_stride + row, scale, mask=valid)
    tl.store(codes_ptr + column, encode(x, scale, INT8), mask=mask)
    for first in range(BLOCK, SIZE, BLOCK):
        mask = valid & (first + column < SIZE)
        more = tl.load(x_ptr + first + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(codes_ptr + first + column, encode(more, scale, INT8), mask=mask)


def quantize_rows(out: Codes, x: torch.Tensor) -> None:
    """x: float [T, columns], a multiple of out's groups."""
    rows, columns = x.shape
    groups = out.scales.shape[0]
    if rows == 0:
        return
    size = columns // groups
    block = min(ROW_COLUMNS, next_power_of_2(size))
    units = max(1, 1024 // block)
    codes, _, _, int8 = target(out, block)
    _quantize_rows_kernel[(triton.cdiv(rows * groups, units),)](
        codes,
        out.scales,
        x,
        rows * groups,
        codes.stride(0),
        out.scales.stride(0),
        x.stride(0),
        INT8=int8,
        GROUPS=groups,
        SIZE=size,
        UNITS=units,
        BLOCK=block,
        num_warps=min(16, units * block // 256),
        **FUSED,
    )
