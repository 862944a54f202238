"""Low-rank adapters, one per row: y += (x @ A.T) @ B.T (Hu et al. 2021; many at once: Chen et al. 2023, Punica).

Two launches, both over tiles of neighbouring rows: those of a sequence use the same adapter, so a tile has few. A
program takes one adapter after the other, as many as its rows use, and ends at once if they use none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .common import FUSED, dot, next_power_of_2

#: Rows of a tile: the fewest that a product takes.
_ROWS = 16
#: Columns of y of a program. Blocks of them do not reach over the border of two parts.
_COLUMNS = 128
#: Programs that share the adapters of a tile, so that decode tokens with an adapter each are not done in sequence.
_SHARES = 4
#: Up to here; more rows than that are long prompts, and fill the device.
_FEW_ROWS = 1024


@triton.jit
def _next_slot(slots, slot):
    """The smallest slot of ``slots`` above ``slot``, or the largest int32."""
    return tl.min(tl.where(slots > slot, slots, 0x7FFFFFFF), axis=0)


@triton.jit(do_not_specialize=["rows"])
def _shrink_kernel(
    scratch_ptr,
    x_ptr,
    a_ptr,
    slots_ptr,
    rows,
    scratch_stride,
    x_stride,
    RANKS: tl.constexpr,
    IN: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """scratch[t] = x[t] @ A.T for the rows that have an adapter."""
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    slots = tl.load(slots_ptr + row, mask=row < rows, other=0)
    row = row.to(tl.int64)
    rank = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    share = tl.program_id(2)
    turn = 0
    slot = _next_slot(slots, 0)
    while slot < 0x7FFFFFFF:
        if turn % tl.num_programs(2) == share:
            mine = slots == slot
            a_slot = a_ptr + (slot - 1).to(tl.int64) * (RANKS * IN)
            sums = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
            for start in range(0, IN, BLOCK_K):
                k = start + tl.arange(0, BLOCK_K)
                x = tl.load(
                    x_ptr + row[:, None] * x_stride + k[None, :], mask=mine[:, None] & (k < IN)[None, :], other=0.0
                )
                a = tl.load(
                    a_slot + rank[None, :] * IN + k[:, None],
                    mask=(rank < RANKS)[None, :] & (k < IN)[:, None],
                    other=0.0,
                )
                sums = dot(x.to(a.dtype), a, sums, EXACT)
            tl.store(
                scratch_ptr + row[:, None] * scratch_stride + rank[None, :],
                sums,
                mask=mine[:, None] & (rank < RANKS)[None, :],
            )
        turn += 1
        slot = _next_slot(slots, slot)


@triton.jit(do_not_specialize=["rows"])
def _expand_kernel(
    y_ptr,
    scratch_ptr,
    b_ptr,
    slots_ptr,
    parts_ptr,
    rows,
    y_stride,
    scratch_stride,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    ALIGN: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """y[t, block of columns] += scratch[t, part of the block] @ B.T for the rows that have an adapter."""
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    slots = tl.load(slots_ptr + row, mask=row < rows, other=0)
    row = row.to(tl.int64)
    share = tl.program_id(2)
    turn = 0
    slot = _next_slot(slots, 0)
    while slot < 0x7FFFFFFF:
        if turn % tl.num_programs(2) == share:
            block = parts_ptr + tl.program_id(1) * 3
            part = tl.load(block)
            column = tl.multiple_of(tl.load(block + 1), ALIGN) + tl.arange(0, BLOCK_C)
            inside = column < tl.multiple_of(tl.load(block + 2), ALIGN)
            mine = slots == slot
            b_slot = b_ptr + (slot - 1).to(tl.int64) * (WIDTH * RANK)
            sums = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
            for start in range(0, RANK, BLOCK_R):
                r = start + tl.arange(0, BLOCK_R)
                h = tl.load(
                    scratch_ptr + row[:, None] * scratch_stride + part * RANK + r[None, :],
                    mask=mine[:, None] & (r < RANK)[None, :],
                    other=0.0,
                )
                b = tl.load(
                    b_slot + column[None, :] * RANK + r[:, None],
                    mask=inside[None, :] & (r < RANK)[:, None],
                    other=0.0,
                )
                sums = dot(h.to(b.dtype), b, sums, EXACT)
            y_ptrs = y_ptr + row[:, None] * y_stride + column[None, :]
            mask = mine[:, None] & inside[None, :]
            y = tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32)
            tl.store(y_ptrs, y + sums, mask=mask)
        turn += 1
        slot = _next_slot(slots, slot)


class Parts(NamedTuple):
    """Blocks of columns of a product, int32 [blocks, 3]: part, first column, end of the part.

    align: a power of two that divides all first columns and ends.
    """

    blocks: torch.Tensor
    align: int


def lora_parts(widths: Sequence[int], device: torch.device) -> Parts:
    """To be made once per product: ``widths`` columns for each of its parts."""
    blocks, end = [], 0
    for part, width in enumerate(widths):
        first, end = end, end + width
        blocks += [(part, column, end) for column in range(first, end, _COLUMNS)]
    return Parts(torch.tensor(blocks, dtype=torch.int32, device=device), math.gcd(_COLUMNS, *widths))


def lora(
    out: torch.Tensor,
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    slots: torch.Tensor,
    parts: Parts,
    scratch: torch.Tensor,
) -> None:
    """out = y, and in rows with an adapter, slots[t] > 0, plus (x @ A.T) @ B.T of the adapter slots[t] - 1.

    out, y: float [T, sum(widths)], out may be y and usually is; x: float [T, in]; slots: int32 [T].
    a: float [adapters, parts * max_rank, in]; b: float [adapters, sum(widths), max_rank], both of one type and
    contiguous, zeros where an adapter has a lower rank or no pair. x, and x @ A.T, are rounded to that type; sums are
    float32. parts: of :func:`lora_parts`. scratch: float32 [T or more, parts * max_rank], of any content.
    """
    rows, features = x.shape
    if rows == 0:
        return
    if out.data_ptr() != y.data_ptr():
        out.copy_(y)
    adapters, ranks, _ = a.shape
    width, rank = b.shape[1:]
    exact = a.dtype == torch.float32
    tiles, shares = triton.cdiv(rows, _ROWS), min(adapters, _SHARES if rows <= _FEW_ROWS else 1)
    block_r = 16 if ranks <= 16 else 32
    _shrink_kernel[(tiles, triton.cdiv(ranks, block_r), min(adapters, _ROWS))](
        scratch,
        x,
        a,
        slots,
        rows,
        scratch.stride(0),
        x.stride(0),
        RANKS=ranks,
        IN=features,
        EXACT=exact,
        BLOCK_T=_ROWS,
        BLOCK_R=block_r,
        BLOCK_K=32 if exact else 256,
        num_stages=4,
        **FUSED,
    )
    _expand_kernel[(tiles, parts.blocks.shape[0], shares)](
        out,
        scratch,
        b,
        slots,
        parts.blocks,
        rows,
        out.stride(0),
        scratch.stride(0),
        WIDTH=width,
        RANK=rank,
        ALIGN=parts.align,
        EXACT=exact,
        BLOCK_T=_ROWS,
        BLOCK_C=_COLUMNS,
        BLOCK_R=16 if exact else min(64, max(16, next_power_of_2(rank))),
        **FUSED,
    )
