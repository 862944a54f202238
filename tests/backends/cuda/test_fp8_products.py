"""Products of many rows of FP8 codes with FP8 weights, against double precision."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pelton.graph.quantized import QuantizedArray
from pelton.graph.types import E4M3, E8M0, F16, ROW, GroupQuant
from tests.backends.cuda.device import DEVICE
from tests.backends.cuda.test_norms import ROUNDING, f64, vector
from tests.backends.cuda.test_packing import packed, quantized
from tests.backends.cuda.test_products import activations, bound, terms
from tests.helpers.tolerance import F32_EPS, assert_within

from pelton.backends.cuda.triton import fp8_products  # isort: skip  behind device, which chooses the interpreter
from pelton.backends.cuda.triton.fp8_products import Fp8Tile  # isort: skip
from pelton.backends.cuda.triton.quantize import Codes  # isort: skip

F32, HALF, BF16, FP8 = torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn
TILE = Fp8Tile(64, 128, 4, 3)
#: Tensor cores cut what they add, 32 products and the sum before, four times for 128 columns, to 13 bits.
TENSOR_CORES = math.sqrt(4 * 33) * 2.0**-13 if DEVICE.type == "cuda" else 0.0


def codes_of(m: int, type: GroupQuant, cols: int) -> tuple[Codes, npt.NDArray[np.float64]]:
    """Views of wider tensors, and what they stand for."""
    codes, groups = activations(m, cols, FP8), type.groups(cols)
    scales = torch.rand(groups, m + 3, device=DEVICE)[:, :m] + 0.5
    return Codes(codes, scales), f64(codes) * np.repeat(f64(scales).T, cols // groups, axis=1)


def run(
    x: Codes, array: QuantizedArray, tile: Fp8Tile = TILE, bias: Any = None, dtype: torch.dtype = F32,
    shared: bool = False,
) -> torch.Tensor:  # fmt: skip
    """The product in a view of a wider tensor, of which the rest stays as it is."""
    m, n = len(x.codes), array.shape[0]
    out = torch.full((m, n + 5), 7.0, dtype=dtype, device=DEVICE)
    fp8_products.fp8_product(out[:, 2:-3], x, packed(array), bias, tile, shared)
    assert bool((out[:, :2] == 7).all() and (out[:, -3:] == 7).all())
    return out[:, 2:-3]


def check(
    got: torch.Tensor, exact: npt.NDArray[np.float64], array: QuantizedArray, bias: torch.Tensor | None = None
) -> None:
    values, size = terms(array)
    want = exact @ values.T + (0 if bias is None else f64(bias))
    limit = bound(exact, size) + TENSOR_CORES * (np.abs(exact) @ size.T)
    assert_within(f64(got), want, limit + (ROUNDING[got.dtype] + F32_EPS) * np.abs(want))


@pytest.mark.parametrize(
    ("type", "cols", "whole"),
    [
        (GroupQuant(8, ROW, floating=True), 256, True),
        (GroupQuant(8, ROW, floating=True), 400, False),  # no whole steps
        (GroupQuant(8, 128, floating=True), 384, False),
        (GroupQuant(8, 256, scale=F16, floating=True), 512, True),
        (GroupQuant(8, 96, floating=True), 192, False),
        (GroupQuant(8, 64, floating=True), 64, True),  # one group
        (GroupQuant(8, 32, scale=E8M0, floating=True), 96, False),
        (GroupQuant(8, 32, scale=E4M3, floating=True, outer=ROW), 96, False),
        (GroupQuant(8, 64, scale=E4M3, floating=True, outer=128), 256, True),
    ],
    ids=str,
)
def test_product(type: GroupQuant, cols: int, whole: bool) -> None:
    """whole: tiles of the weight."""
    n, tile = (128, Fp8Tile(128, 64, 4, 3)) if whole else (37, TILE)
    array, (x, exact) = quantized(type, n, cols), codes_of(70, type, cols)
    bias = None if whole else vector(n, 1)
    check(run(x, array, tile, bias), exact, array, bias)


@pytest.mark.parametrize("dtype", [BF16, HALF])
def test_output_is_rounded_once(dtype: torch.dtype) -> None:
    type = GroupQuant(8, 128, floating=True)
    array, (x, exact) = quantized(type, 37, 256), codes_of(5, type, 256)
    array.scale[:] *= 2.0**-8  # so that float16 holds the results
    bias = vector(37, 1)
    check(run(x, array, bias=bias, dtype=dtype), exact, array, bias)


@pytest.mark.parametrize("cols", [128, 256])
def test_rows_that_share_scales(cols: int) -> None:
    type = GroupQuant(8, 128, floating=True)
    array, (x, exact) = quantized(type, 300, 256), codes_of(5, type, 256)
    array = replace(array, scale=array.scale[np.arange(300) // 128 * 128])
    check(run(x, array, Fp8Tile(64, cols, 4, 3), shared=True), exact, array)


def test_all_tiles_of_many_rows() -> None:
    type = GroupQuant(8, ROW, floating=True)
    array, (x, exact) = quantized(type, 70, 32), codes_of(64 * 8 + 3, type, 32)
    check(run(x, array, Fp8Tile(64, 64, 4, 3)), exact, array)


def test_a_row_does_not_depend_on_the_others() -> None:
    type = GroupQuant(8, 128, floating=True)
    array, (x, _) = quantized(type, 37, 256), codes_of(69, type, 256)
    every = run(x, array)
    x.codes[:68].view(torch.uint8)[:] = 0x7E
    assert torch.equal(run(x, array)[68], every[68])
    assert torch.equal(run(Codes(x.codes[68:], x.scales[:, 68:]), array)[0], every[68])


@pytest.mark.parametrize("type", [GroupQuant(8, ROW, floating=True), GroupQuant(8, 64, floating=True)], ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_what_is_broken_stays_broken(type: GroupQuant, shared: bool) -> None:
    """Infinite scales of x, with codes of 0."""
    x, _ = codes_of(3, type, 192)
    x.codes.zero_()
    x.scales[-1, 1] = torch.inf
    got = run(x, quantized(type, 37, 192), shared=shared)
    assert bool(got[1].isnan().all()) and bool((got[::2] == 0).all())


def test_no_rows() -> None:
    type = GroupQuant(8, ROW, floating=True)
    run(codes_of(0, type, 64)[0], quantized(type, 37, 64))


def test_tiles_to_try_fill_the_device() -> None:
    for m in (64, 256, 1024, 4096):
        tiles = fp8_products.candidate_tiles(m, 4096, 132)
        assert 1 < len(tiles) <= 6 and len(set(tiles)) == len(tiles)
        assert m > 64 or all(tile.rows == 64 for tile in tiles)
    assert fp8_products.candidate_tiles(256, 4096, 132)[0].rows == 64
    assert fp8_products.candidate_tiles(4096, 4096, 132)[0].rows == 128
