"""Products with packed and with dense weights, against double precision."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pelton.graph.quantized import CODE_VALUES, QuantizedArray
from pelton.graph.types import E4M3, E8M0, F16, ROW, GroupQuant
from tests.backends.cuda.device import DEVICE
from tests.backends.cuda.test_norms import ROUNDING, f64, vector
from tests.backends.cuda.test_packing import ROWS, TYPES, packed, quantized
from tests.helpers.tolerance import F32_EPS, assert_within

from pelton.backends.cuda.triton import products  # isort: skip  behind device, which chooses the interpreter

F32, HALF, BF16, INT8, FP8 = torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn


def terms(array: QuantizedArray) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Values of a weight in double precision, and the size of what their products add up."""
    rows, cols = array.shape
    scale = array.scales().astype(np.float64)[:, :, None]
    codes = array.codes.reshape(rows, scale.shape[1], -1).astype(np.float64)
    least = np.zeros_like(scale)
    if array.type.floating:
        codes = CODE_VALUES[array.type.bits].astype(np.float64)[codes.astype(np.uint8)]
    elif array.type.minimum:
        minima = array.minima()
        assert minima is not None
        least = minima.astype(np.float64)[:, :, None]
    else:
        codes -= array.type.offset if array.minimum is None else array.minimum.astype(np.float64)[:, :, None]
    size = np.abs(scale * codes) + np.abs(least)
    return (scale * codes + least).reshape(rows, cols), size.reshape(rows, cols)


def activations(rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
    """A view of some columns of a wider tensor."""
    rng = np.random.default_rng([rows, cols])
    wide = np.full((rows, cols + 16), np.nan, np.float32) if dtype.is_floating_point else np.ones((rows, cols + 16))
    wide[:, 8:-8] = rng.integers(-127, 128, (rows, cols)) if dtype == INT8 else rng.normal(size=(rows, cols))
    return torch.from_numpy(wide).to(dtype).to(DEVICE)[:, 8:-8]


def run(
    m: int, weight: Any, x: torch.Tensor, scales: torch.Tensor | None, tile: products.ProductTile, bias: Any = None,
    dtype: torch.dtype = F32,
) -> torch.Tensor:  # fmt: skip
    """The product in a view of a wider tensor, of which the rest stays as it is."""
    n = weight.shape[0] if isinstance(weight, torch.Tensor) else weight.rows
    out = torch.full((m, n + 5), 7.0, dtype=dtype, device=DEVICE)
    workspace = torch.full((products.workspace_size(m, n, tile),), torch.nan, device=DEVICE)
    products.product(out[:, 2:-3], x, scales, weight, bias, tile, workspace)
    assert bool((out[:, :2] == 7).all() and (out[:, -3:] == 7).all())
    return out[:, 2:-3]


def bound(x: npt.NDArray[np.float64], size: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Float32 sums in any order, of which factors and their products are rounded: the scale by its outer factor, the
    sum by the scale, the minimum by its outer factor, what is added, x's scale."""
    return (8 * math.sqrt(x.shape[1]) + 5) * F32_EPS * (np.abs(x) @ size.T) + 1e-30


#: Type of x, rows, tile: all rows of tiles and all kinds of operands, with the sums of one program and of three.
CASES = [
    (BF16, 33, products.ProductTile(64, 64, 1, 4, 2)),
    (HALF, 5, products.ProductTile(8, 64, 3, 2, 3)),
    (F32, 1, products.ProductTile(16, 32, 1, 2, 2)),
    (INT8, 5, products.ProductTile(16, 64, 3, 2, 3)),
    (FP8, 5, products.ProductTile(8, 64, 1, 2, 3)),
]


def fits(dtype: torch.dtype, type: GroupQuant) -> bool:
    """Whether activations of a type are multiplied with weights of another."""
    if dtype == INT8:
        return not type.floating
    if dtype == HALF:  # one of each way to make a float of a code
        return (type.bits in (3, 4, 7, 8) and type.scale in (F16, E8M0)) or type.zero_point
    return dtype != FP8 or (type.floating and type.bits == 8)


@pytest.mark.parametrize(
    ("type", "dtype", "m", "tile"),
    [(type, *case) for type in TYPES for case in CASES if fits(case[0], type)],
    ids=lambda value: str(value).rpartition(".")[2] if isinstance(value, torch.dtype | GroupQuant) else "",
)
def test_product(type: GroupQuant, dtype: torch.dtype, m: int, tile: products.ProductTile) -> None:
    array = quantized(type)
    cols = array.shape[1]
    x, scales, bias = activations(m, cols, dtype), None, vector(ROWS, 1) if m == 5 else None
    exact = f64(x)
    if dtype in (INT8, FP8):
        groups = type.groups(cols) if type.group_size else 1
        scales = torch.rand(groups, m + 1, device=DEVICE)[:, :m] + 0.5
        exact = exact * np.repeat(f64(scales).T, cols // groups, axis=1)
    values, size = terms(array)
    want = exact @ values.T + (0 if bias is None else f64(bias))
    limit = bound(exact, size) + F32_EPS * np.abs(want)
    assert_within(f64(run(m, packed(array), x, scales, tile, bias)), want, limit)


@pytest.mark.parametrize("x_groups", [1, 3])
@pytest.mark.parametrize("group", [128, ROW])
def test_e4m3_with_other_groups(group: int, x_groups: int) -> None:
    array = quantized(GroupQuant(8, group, floating=True), cols=384)
    x, scales = activations(5, 384, FP8), torch.rand(x_groups, 5, device=DEVICE)
    exact = f64(x) * np.repeat(f64(scales).T, 384 // x_groups, axis=1)
    values, size = terms(array)
    got = run(5, packed(array), x, scales, products.ProductTile(8, 64, 1, 2, 3))
    assert_within(f64(got), exact @ values.T, bound(exact, size))


def test_output_is_rounded_once() -> None:
    array = quantized(GroupQuant(4, 32, scale=F16), cols=640)
    x, bias = activations(3, 640, BF16), vector(ROWS, 1)
    values, size = terms(array)
    want = f64(x) @ values.T + f64(bias)
    for splits in (1, 2):
        got = run(3, packed(array), x, None, products.ProductTile(8, 32, splits, 2, 3), bias, BF16)
        assert_within(f64(got), want, bound(f64(x), size) + (ROUNDING[BF16] + F32_EPS) * np.abs(want))


@pytest.mark.parametrize("dtype", [BF16, HALF, F32])
@pytest.mark.parametrize(("m", "cols", "splits"), [(1, 130, 1), (5, 96, 2), (33, 64, 1)])
def test_dense(dtype: torch.dtype, m: int, cols: int, splits: int) -> None:
    x, weight, bias = activations(m, cols, dtype), activations(ROWS, cols, dtype), vector(ROWS, 1)
    want = f64(x) @ f64(weight).T + f64(bias)
    got = run(m, weight, x, None, products.ProductTile(8, 32, splits, 2, 3), bias)
    assert_within(f64(got), want, bound(f64(x), np.abs(f64(weight))) + F32_EPS * np.abs(want))


@pytest.mark.parametrize("dtype", [BF16, INT8])
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    weight = packed(quantized(GroupQuant(4, 32, True, F16), cols=640))
    x = activations(9, 640, dtype)
    scales = torch.rand(20, 9, device=DEVICE) if dtype == INT8 else None
    tile = products.ProductTile(8, 64, 2, 2, 3)
    every = run(9, weight, x, scales, tile)
    x[:8] = float("nan") if dtype == BF16 else 127
    alone = run(1, weight, x[8:], None if scales is None else scales[:, 8:], tile)
    assert torch.equal(every[8:], alone) and torch.equal(run(9, weight, x, scales, tile)[8:], alone)


def test_what_is_broken_stays_broken() -> None:
    """Infinite scales of x, with codes of 0, and floats that are NaN."""
    weight = packed(quantized(GroupQuant(4, 32, scale=F16), cols=96))
    tile = products.ProductTile(8, 64, 1, 2, 3)
    codes, scales = torch.zeros(2, 96, dtype=INT8, device=DEVICE), torch.ones(3, 2, device=DEVICE)
    scales[1, 0] = torch.inf
    got = run(2, weight, codes, scales, tile)
    assert bool(got[0].isnan().all()) and bool((got[1] == 0).all())
    x = activations(2, 96, BF16)
    x[0, 40] = float("nan")
    got = run(2, weight, x, None, tile)
    assert bool(got[0].isnan().all()) and not bool(got[1].isnan().any())


@pytest.mark.parametrize(
    ("type", "code"),
    [(GroupQuant(4, 32, scale=E8M0, floating=True), 255)]
    + [(GroupQuant(4, 16, scale=E4M3, floating=True, outer=ROW), code) for code in (0x7F, 0xFF)],
)
def test_scales_that_are_nan(type: GroupQuant, code: int) -> None:
    weight = packed(quantized(type, cols=96))
    weight.scale[1, 2] = code
    got = run(1, weight, activations(1, 96, BF16), None, products.ProductTile(8, 64, 1, 2, 3))
    assert torch.equal(got[0].isnan().nonzero()[:, 0], torch.tensor([2], device=DEVICE))


def emulated(asm: str, units: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """$0 of PTX with $1."""
    values = {"$1": units}
    pattern = r"(shl|shr|lop3)\.b32 ([$\w]+), ([$\w]+), (\w+)(?:, (\w+), (\w+))?;"
    for name, into, first, second, third, table in re.findall(pattern, asm):
        a, b = values[first], np.uint32(int(second, 0))
        if name == "lop3":  # bit 4 a + 2 b + c of the table
            c = np.uint32(int(third, 0))
            terms = [(a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c) for i in range(8)]
            values[into] = np.bitwise_or.reduce([term for i, term in enumerate(terms) if int(table, 0) >> i & 1])
        else:
            values[into] = a << b if name == "shl" else a >> b
    return values["$0"]


@pytest.mark.parametrize("one", [0x6400, 0x4300, 0x6480, 0x4380])
def test_ptx_that_selects_bits(one: int) -> None:
    """As the interpreter, which runs none, has it: both units of a register, whatever is beside the field."""
    both = np.random.default_rng(0).integers(0, 1 << 32, 1000, dtype=np.uint32)
    units = both.view(np.uint16).astype(np.int64)
    for move in range(-4, 16):
        for mask in (0x01, 0x03, 0x0F, 0x06, 0x1E, 0x3C, 0x7F, 0xFF, 0x80):
            if mask << move >> 16 if move > 0 else mask & ((1 << -move) - 1):
                continue  # bits of the neighbour
            field = (units >> move if move > 0 else units << -move) & mask
            for flip, want in ((False, field | one), (True, field ^ one)):
                got = emulated(products.select_asm(move, mask, one, flip), both)
                np.testing.assert_array_equal(got.view(np.uint16), want)


def test_no_rows() -> None:
    array = quantized(GroupQuant(4, 32, scale=F16))
    run(0, packed(array), activations(0, array.shape[1], BF16), None, products.ProductTile(8, 64, 2, 2, 3))


def test_tiles_to_try_fill_the_device() -> None:
    for kind in (GroupQuant(4, 32), BF16, F32):
        for m in (1, 8, 9, 64, 300):
            tiles = products.candidate_tiles(m, 4096, 4096, kind, 132)
            assert 1 <= len(tiles) <= 8 and len(set(tiles)) == len(tiles)
            assert all(tile.splits * 256 <= 4096 for tile in tiles if tile.splits > 1)
    few = products.candidate_tiles(1, 1024, 8192, GroupQuant(4, 32), 132)[0]
    assert few.splits > 1 and products.workspace_size(1, 1024, few) == few.splits * 1024
    assert products.candidate_tiles(1, 128256, 4096, GroupQuant(4, 32), 132)[0].splits == 1
