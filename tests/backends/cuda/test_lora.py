"""Adapters on the device against their row of the op table in double precision."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from pelton.graph import OPS
from tests.backends.cuda.device import DEVICE
from tests.backends.cuda.test_norms import BF16, F16, F32, ROUNDING, f64, gaps_untouched, strided
from tests.helpers.tolerance import F32_EPS, assert_within

from pelton.backends.cuda.triton import lora  # isort: skip  behind device, which chooses the interpreter

#: Ranks of each adapter in three parts; 0: none. 20 is more than a block, with float32 tables.
RANKS = [(5, 3, 1), (1, 0, 4), (20, 20, 20), (0, 0, 0), (2, 2, 2), (3, 1, 0)]
WIDTHS, MAX_RANK = (67, 5, 140), 20
#: More than two blocks of a sum, by the type of the tables.
FEATURES = {F32: 70, F16: 260, BF16: 260}
#: More adapters in a tile than programs that share them, tiles without any, a ragged last one.
SLOTS = np.array([0, 1, 2, 3, 4, 5, 6, 1, 0, 0, 2, 6, 5, 4, 3, 0] + [0] * 16 + [3] * 3, np.int32)


class Adapters:
    """Tables of the device, and the same as the op table's reference takes them."""

    def __init__(self, dtype: torch.dtype, widths: tuple[int, ...] = WIDTHS, ranks: Any = RANKS) -> None:
        rng = np.random.default_rng(len(widths))
        a = torch.zeros(len(ranks), len(widths) * MAX_RANK, FEATURES[dtype], dtype=dtype)
        b = torch.zeros(len(ranks), sum(widths), MAX_RANK, dtype=dtype)
        self.table: list[list[tuple[int, Any]]] = []
        for slot, of_parts in enumerate(ranks):
            parts: list[tuple[int, Any]] = []
            for part, (width, rank) in enumerate(zip(widths, of_parts, strict=True)):
                first = sum(widths[:part])
                down = a[slot, part * MAX_RANK : part * MAX_RANK + rank]
                up = b[slot, first : first + width, :rank]
                down.copy_(torch.from_numpy(rng.normal(size=(rank, FEATURES[dtype]))))
                up.copy_(torch.from_numpy(rng.normal(size=(width, rank))))
                parts.append((width, (f64(down), f64(up)) if rank else None))
            self.table.append(parts)
        self.a, self.b = a.to(DEVICE), b.to(DEVICE)
        self.parts = lora.lora_parts(widths, DEVICE)

    def __call__(self, out: torch.Tensor, y: torch.Tensor, x: torch.Tensor, slots: np.ndarray[Any, Any]) -> None:
        scratch = torch.full((len(slots) + 1, self.a.shape[1]), torch.nan, device=DEVICE)  # of any content
        lora.lora(out, y, x, self.a, self.b, torch.from_numpy(slots).to(DEVICE), self.parts, scratch)

    def bound(self, y: Any, x: Any, slots: np.ndarray[Any, Any], x_rounding: float, out_rounding: float) -> Any:
        """Sums of two products in any order (8 * sqrt(terms)), their operands rounded to the tables' type."""
        operand = ROUNDING[self.a.dtype]
        first, second = 8 * math.sqrt(x.shape[1]) * F32_EPS + x_rounding, 8 * math.sqrt(MAX_RANK) * F32_EPS + operand
        every = [[(w, pair and tuple(map(np.abs, pair))) for w, pair in parts] for parts in self.table]
        size = OPS["lora"].reference({}, np.zeros(y.shape), np.abs(x), every, slots)
        return (first + second) * (1 + first) * size + out_rounding * (np.abs(y) + size)


@pytest.mark.parametrize(
    ("dtype", "x_dtype", "y_dtype"), [(F32, F32, F32), (BF16, BF16, BF16), (BF16, F32, F32), (F16, F16, F32)]
)
def test_lora(dtype: torch.dtype, x_dtype: torch.dtype, y_dtype: torch.dtype) -> None:
    adapters = Adapters(dtype)
    x, y = strided(len(SLOTS), FEATURES[dtype], x_dtype, 1), strided(len(SLOTS), sum(WIDTHS), y_dtype, 2)
    y[0] = -0.0  # a row without an adapter, which adding 0 would change
    before = y.clone()
    want = OPS["lora"].reference({}, f64(y), f64(x), adapters.table, SLOTS)
    adapters(y, y, x, SLOTS)
    x_rounding = 0.0 if dtype == x_dtype else ROUNDING[dtype]
    limit = adapters.bound(f64(before), f64(x), SLOTS, x_rounding, ROUNDING[y_dtype] + F32_EPS)
    assert_within(f64(y), want, limit)
    assert torch.equal(y[SLOTS == 0], before[SLOTS == 0]) and bool(torch.signbit(y[0]).all())
    assert gaps_untouched(y)


def test_one_part_of_aligned_width_and_one_adapter() -> None:
    adapters = Adapters(F32, (256,), [(16,)])
    assert adapters.parts.align == 128
    x, y = strided(3, FEATURES[F32], F32, 1), strided(3, 256, F32, 2)
    slots = np.array([1, 0, 1], np.int32)
    want = OPS["lora"].reference({}, f64(y), f64(x), adapters.table, slots)
    limit = adapters.bound(f64(y), f64(x), slots, 0.0, F32_EPS)
    adapters(y, y, x, slots)
    assert_within(f64(y), want, limit)


def test_a_row_does_not_depend_on_the_others() -> None:
    adapters = Adapters(BF16)
    x, y = strided(len(SLOTS), FEATURES[BF16], BF16, 1), strided(len(SLOTS), sum(WIDTHS), BF16, 2)
    alone = y[12:13].clone()
    adapters(alone, alone, x[12:13], SLOTS[12:13])
    adapters(y, y, x, SLOTS)
    assert torch.equal(alone, y[12:13])


def test_another_output_and_a_program_for_all_adapters_of_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    adapters, slots = Adapters(F32), SLOTS[:14]
    x, y, out = (strided(14, columns, F32, 1) for columns in (FEATURES[F32], sum(WIDTHS), sum(WIDTHS)))
    adapters(out, y, x, slots)
    assert torch.equal(out[slots == 0], y[slots == 0]) and gaps_untouched(out)
    monkeypatch.setattr(lora, "_FEW_ROWS", 0)
    adapters(y, y, x, slots)
    assert torch.equal(out, y)


def test_no_rows() -> None:
    adapters = Adapters(F32)
    y = torch.ones(0, sum(WIDTHS), device=DEVICE)
    adapters(y, y, torch.ones(0, FEATURES[F32], device=DEVICE), SLOTS[:0])
