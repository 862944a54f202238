"""Behind a product of integers: scales, and a bias."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import FUSED

_BLOCK = 1024


@triton.jit
def _rescale_kernel(
    out_ptr, sums_ptr, row_scales_ptr, column_scales_ptr, bias_ptr, columns, out_stride, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    sums = tl.load(sums_ptr + row * columns + column, mask=mask).to(tl.float32)
    y = sums * tl.load(row_scales_ptr + row) * tl.load(column_scales_ptr + column, mask=mask)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=mask).to(tl.float32)
    tl.store(out_ptr + row * out_stride + column, y, mask=mask)


def rescale(
    out: torch.Tensor,
    sums: torch.Tensor,
    row_scales: torch.Tensor,
    column_scales: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    """out = sums * row_scales * column_scales + bias.

    out: float [T, columns], rows strided. sums: int32 [T, columns], contiguous. row_scales: float32 [T]; column_scales:
    float32 [columns]; bias: float [columns].
    """
    rows, columns = sums.shape
    if rows == 0:
        return
    _rescale_kernel[(rows, triton.cdiv(columns, _BLOCK))](
        out, sums, row_scales, column_scales, bias, columns, out.stride(0), BLOCK=_BLOCK, **FUSED
    )
