"""Products of many rows of FP8 codes with FP8 weights, on tensor cores that multiply such codes.

Those of Hopper and Ada keep few bits of their sums, so no sum runs over more than 128 columns there: float32 registers
add these up. Factors of a group are applied to its sum, as in :mod:`.products`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ....graph.types import E4M3, E8M0
from ..packing import PackedWeight
from .common import FUSED, INTERPRETED_CONSTEXPR, dot, from_e4m3
from .products import _factors
from .quantize import Codes

#: Tiles of rows whose programs are neighbours: they read the same weights.
_TALL: tl.constexpr = tl.constexpr(8)


class Fp8Tile(NamedTuple):
    """A program's rows of x and of the weight, and what it is compiled with."""

    rows: int
    cols: int
    num_warps: int
    num_stages: int


@triton.jit
def _e4m3(ptr):
    """A pointer to codes, in the interpreter to bytes.

    Bytes that became codes after they were loaded would go from shared memory to tensor cores by way of registers.
    """
    if INTERPRETED_CONSTEXPR:
        return ptr
    return ptr.to(tl.pointer_type(tl.float8e4nv), bitcast=True)


@triton.jit
def dot_fp8(a, b):
    """a @ b of what :func:`_e4m3` points to.

    The limit of imprecise sums keeps the compiler from adding products to the sum that a caller adds them to.
    """
    if INTERPRETED_CONSTEXPR:
        zero = tl.zeros((a.shape[0], b.shape[1]), tl.float32)
        return dot(from_e4m3(a).to(tl.float32), from_e4m3(b).to(tl.float32), zero, True)
    return tl.dot(a, b, max_num_imprecise_acc=a.shape[1])


@triton.jit(do_not_specialize=["m", "x_scales_stride"])
def _fp8_product_kernel(
    out_ptr, x_ptr, x_scales_ptr, weight_ptr, scale_ptr, outer_ptr, bias_ptr,
    m, n, k, out_stride, x_stride, x_scales_stride, weight_stride,
    GROUP: tl.constexpr, OUTER: tl.constexpr, KIND: tl.constexpr, SHARED: tl.constexpr, EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program per tile of rows of x and of the weight.

    GROUP: columns that share factors, a multiple of BLOCK_K, or 0 for all. SHARED: so do the rows of the weight in a
    tile. EVEN_N, EVEN_K: there are only whole tiles and whole steps.
    """
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    program = tl.program_id(0)
    first = program // (_TALL * tiles_n) * _TALL
    tall = tl.minimum(tiles_m - first, _TALL)
    within = program % (_TALL * tiles_n)
    row = (first + within % tall) * BLOCK_M + tl.arange(0, BLOCK_M)
    tile = within // tall * BLOCK_N
    own = tile + tl.arange(0, BLOCK_N)
    x_rows, w_rows = tl.minimum(row, m - 1), own  # what surplus rows yield is not stored
    if not EVEN_N:  # known to be neighbours otherwise
        w_rows = tl.minimum(own, n - 1)
    column = tl.arange(0, BLOCK_K)
    x_at = _e4m3(x_ptr) + x_rows.to(tl.int64)[:, None] * x_stride + column[None, :]
    w_at = _e4m3(weight_ptr) + w_rows.to(tl.int64)[:, None] * weight_stride + column[None, :]
    zero = tl.zeros((1, 1), x_at.dtype.element_ty)  # no number becomes a code

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, k, BLOCK_K):
        if EVEN_K:
            x, w = tl.load(x_at + start), tl.load(w_at + start)
        else:
            there = (start + column < k)[None, :]
            x, w = tl.load(x_at + start, mask=there, other=zero), tl.load(w_at + start, mask=there, other=zero)
        if GROUP:
            group = start // GROUP
            by_x = tl.load(x_scales_ptr + tl.cast(group, tl.int64) * x_scales_stride + x_rows)
            if SHARED:
                by_x *= _factors(scale_ptr, outer_ptr, group, start, tile, n, OUTER, KIND)
                total += dot_fp8(x, tl.trans(w)) * by_x[:, None]
            else:
                by_row = _factors(scale_ptr, outer_ptr, group, start, w_rows, n, OUTER, KIND)
                total += dot_fp8(x, tl.trans(w)) * by_x[:, None] * by_row[None, :]
        else:
            total += dot_fp8(x, tl.trans(w))
    if GROUP == 0:
        by_row = _factors(scale_ptr, outer_ptr, tl.cast(0, tl.int32), 0, w_rows, n, OUTER, KIND)
        total *= tl.load(x_scales_ptr + x_rows)[:, None]
        total *= by_row[None, :]
    if bias_ptr is not None:
        total += tl.load(bias_ptr + w_rows).to(tl.float32)[None, :]
    at = out_ptr + row.to(tl.int64)[:, None] * out_stride + own[None, :]
    tl.store(at, total.to(out_ptr.dtype.element_ty), mask=(row < m)[:, None] & (own < n)[None, :])


def candidate_tiles(m: int, n: int, num_sms: int) -> list[Fp8Tile]:
    """Tiles to try for a product [m, k] @ [n, k].T, the best guess first; at most 6.

    Larger ones do not leave registers for two sums of a tile: the tensor cores' and the total.
    """
    shapes = [(128, 128, 8, 4), (64, 128, 4, 3), (128, 128, 8, 3), (64, 256, 8, 4), (64, 256, 8, 3)]
    tiles = [Fp8Tile(*shape) for shape in shapes]
    # Three programs of four warps are a multiprocessor's: they multiply while others add.
    if m <= 64 or triton.cdiv(m, 128) * triton.cdiv(n, 128) < num_sms:
        tiles = [tile for tile in tiles if tile.rows == 64] + [tile for tile in tiles if tile.rows > 64 and m > 64]
    return tiles


def fp8_product(
    out: torch.Tensor, x: Codes, weight: PackedWeight, bias: torch.Tensor | None, tile: Fp8Tile,
    shared: bool = False,
) -> None:  # fmt: skip
    """out = x @ weight.T + bias.

    out: float [M, N]. x: float8_e4m3fn [M, K]; rows are read fast if they begin at multiples of 16 bytes. weight:
    E4M3 codes [N, K] in groups of whole 32 columns, or one; x has the same. bias: float [N]. shared: rows of the
    weight, 128 at a time from the first on, have the same scales.
    """
    m, k = x.codes.shape
    if m == 0:
        return
    type, n = weight.type, weight.rows
    group = type.group_size if len(weight.scale) > 1 else 0
    assert len(x.scales) == len(weight.scale)
    block = math.gcd(128, group)
    codes = weight.codes.view(torch.uint8)
    grid = (triton.cdiv(m, tile.rows) * triton.cdiv(n, tile.cols),)
    _fp8_product_kernel[grid](
        out, x.codes.view(torch.uint8), x.scales, codes, weight.scale, weight.outer_scale, bias, m, n, k, out.stride(0),
        x.codes.stride(0), x.scales.stride(0), codes.stride(0), GROUP=group, OUTER=type.outer,
        KIND=str(type.scale) if type.scale in (E8M0, E4M3) else "number", SHARED=shared and 128 % tile.cols == 0,
        EVEN_N=n % tile.cols == 0, EVEN_K=k % block == 0, BLOCK_M=tile.rows, BLOCK_N=tile.cols, BLOCK_K=block,
        num_warps=tile.num_warps, num_stages=tile.num_stages, **FUSED,
    )  # fmt: skip
