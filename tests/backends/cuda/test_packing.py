"""Packed weights: every bit of a type comes back, and none is added."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pelton.graph.quantized import SCALE_ARRAYS, Array, QuantizedArray
from pelton.graph.types import BF16, E4M3, E8M0, F16, F32, I8, ROW, U8, GroupQuant
from tests.backends.cuda.device import DEVICE

from pelton.backends.cuda import packing  # isort: skip  behind device, which chooses the interpreter
from pelton.backends.cuda.triton import products  # isort: skip

#: Every row of the table in docs/quantization.md, and what no format of the table has.
TYPES = [
    GroupQuant(4, 32, scale=F16),
    GroupQuant(5, 32, scale=F16),
    GroupQuant(8, 32, scale=F16),
    GroupQuant(4, 32, True, F16),
    GroupQuant(5, 32, True, F16),
    GroupQuant(2, 16, True, U8, outer=256),
    GroupQuant(4, 32, True, U8, outer=256),
    GroupQuant(5, 32, True, U8, outer=256),
    GroupQuant(3, 16, scale=I8, outer=256),
    GroupQuant(6, 16, scale=I8, outer=256),
    GroupQuant(4, 32, scale=E8M0, floating=True),
    GroupQuant(4, 16, scale=E4M3, floating=True, outer=ROW),
    GroupQuant(2, 128, scale=F16, zero_point=True),
    GroupQuant(3, 128, scale=F16),
    GroupQuant(4, 128, scale=BF16),
    GroupQuant(4, 128, scale=BF16, zero_point=True),
    GroupQuant(8, 128, scale=F16, zero_point=True),
    GroupQuant(8, ROW),
    GroupQuant(8, ROW, zero_point=True),
    GroupQuant(8, ROW, floating=True),
    GroupQuant(8, 64, floating=True),
    GroupQuant(8, 128, floating=True),
    GroupQuant(8, 32, scale=E8M0, floating=True),
    GroupQuant(7, 64, True),
    GroupQuant(6, 48, zero_point=True),
    GroupQuant(8, 16, True, I8, outer=ROW),
    GroupQuant(4, ROW, True),
]
ROWS = 37


def columns(type: GroupQuant) -> int:
    """Three groups, or three outer ones: for most types no whole chunks."""
    return 3 * (type.outer or type.group_size or 48)


def quantized(type: GroupQuant, rows: int = ROWS, cols: int | None = None) -> QuantizedArray:
    """Any codes and scales; no FP8 that is NaN."""
    rng = np.random.default_rng(type.bits)
    cols = columns(type) if cols is None else cols
    groups = type.groups(cols)

    def scales() -> Array:
        dtype = SCALE_ARRAYS[type.scale]
        if type.scale == E8M0:
            return rng.integers(120, 130, (rows, groups), np.uint8).view(dtype)
        if type.scale == E4M3:
            return rng.integers(0, 0x7F, (rows, groups), np.uint8).view(dtype)
        if type.scale.bits == 8:
            return rng.integers(0, 256, (rows, groups), np.uint8).view(dtype)
        return rng.normal(size=(rows, groups)).astype(dtype)

    def outer() -> Array:
        return rng.normal(size=(rows, cols // (type.outer or cols))).astype(np.float16 if type.outer else np.float32)

    codes = rng.integers(0, 1 << type.bits, (rows, cols), np.uint8)
    if type.floating and type.bits == 8:
        codes[codes & 0x7F == 0x7F] ^= 1
    minimum = scales() if type.minimum else None
    if type.zero_point:
        minimum = rng.integers(0, 1 << type.bits, (rows, groups), np.uint8)
    pair = (outer() if type.outer is not None else None, outer() if type.outer is not None and type.minimum else None)
    return QuantizedArray(codes, scales(), minimum, type, *pair)


def packed(array: QuantizedArray) -> packing.PackedWeight:
    """Written in two slices."""
    weight = packing.empty(array.type, *array.shape, DEVICE)
    for rows in (slice(0, 5), slice(5, None)):
        parts = [None if part is None else _tensor(part[rows]) for part in array.parts()]
        assert parts[0] is not None and parts[1] is not None
        packing.write(weight, rows.start, parts[0], parts[1], *parts[2:])
    return weight


def _tensor(part: npt.NDArray[Any]) -> torch.Tensor:
    if part.dtype == SCALE_ARRAYS[BF16]:
        return torch.from_numpy(part.view(np.int16)).view(torch.bfloat16).to(DEVICE)
    narrow = part.dtype in (SCALE_ARRAYS[E4M3], SCALE_ARRAYS[E8M0])
    return torch.from_numpy(part.view(np.uint8) if narrow else part).to(DEVICE)


@pytest.mark.parametrize("type", TYPES, ids=str)
def test_values_come_back_bit_for_bit(type: GroupQuant, monkeypatch: pytest.MonkeyPatch) -> None:
    array = quantized(type)
    monkeypatch.setattr(packing, "_PIECE", 7 * array.shape[1])  # so that slices are packed in pieces
    weight = packed(array)
    out = torch.full((ROWS, array.shape[1] + 3), torch.nan, device=DEVICE)
    products.dequantize_rows(out[:, :-3], weight, None)
    np.testing.assert_array_equal(out[:, :-3].cpu().numpy(), array.dequantize())
    assert bool(out[:, -3:].isnan().all())
    assert weight.nbytes == packing.packed_bytes(type, *array.shape)


@pytest.mark.parametrize("type", [GroupQuant(3, 16, scale=I8, outer=256), GroupQuant(8, ROW)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_some_rows_in_any_order(type: GroupQuant, dtype: torch.dtype) -> None:
    array = quantized(type)
    indices = torch.tensor([36, 0, 5, 5], dtype=torch.int32, device=DEVICE)
    out = torch.empty(4, array.shape[1], dtype=dtype, device=DEVICE)
    products.dequantize_rows(out, packed(array), indices)
    every = torch.from_numpy(array.dequantize())[indices.cpu().long()]
    np.testing.assert_allclose(out.float().cpu(), every.to(dtype).float(), rtol=torch.finfo(dtype).eps)
    products.dequantize_rows(out[:0], packed(array), indices[:0])


@pytest.mark.parametrize("type", TYPES, ids=str)
def test_no_more_bits_than_the_type_has(type: GroupQuant) -> None:
    rows, cols = 64, 4096
    bits = type.bits_per_weight - type.bits + (8 if type.bits == 7 else type.bits)
    if ROW in (type.group_size, type.outer):
        bits += 0.1  # what the type counts for rows of 2,048
    if type.zero_point:
        bits += (8 - type.bits) / (type.group_size or cols)
    if type.group_size != 48:
        assert packing.packed_bytes(type, rows, cols) <= rows * cols * bits / 8


def test_8_bit_codes_are_a_matrix_for_other_libraries() -> None:
    for type, dtype in ((GroupQuant(8, ROW), torch.int8), (GroupQuant(8, ROW, floating=True), torch.float8_e4m3fn)):
        array = quantized(type)
        codes = packed(array).codes
        assert codes.dtype == dtype and codes.stride(1) == 1 and codes.stride(0) % 16 == 0
        want = array.codes.astype(np.int16) - 128 if dtype == torch.int8 else array.codes
        np.testing.assert_array_equal((codes if dtype == torch.int8 else codes.view(torch.uint8)).cpu(), want)


def test_groups_that_have_no_kernel() -> None:
    assert all(packing.has_kernel(type, columns(type)) for type in TYPES)
    assert not packing.has_kernel(GroupQuant(4, 8), 64)
    assert not packing.has_kernel(GroupQuant(8, ROW), 100)
    assert packing.has_kernel(GroupQuant(8, ROW, scale=F32), 112)
