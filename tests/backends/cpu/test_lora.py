"""Low-rank adapters against NumPy in double precision: odd shapes, ragged rows, every tier."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from pelton.backends.cpu.adapters import table_bytes, write_slot
from pelton.graph import BF16, F32, AdapterType, DType
from tests.helpers.tolerance import F32_EPS, assert_within

from .native import BF16_DOT, ISAS, Runner

F = npt.NDArray[np.float32]


def rng(*key: int) -> np.random.Generator:
    return np.random.default_rng(list(key))


def adapter(type: AdapterType, ranks: tuple[int, ...], seed: int) -> list[tuple[F, F] | None]:
    """A random adapter, with values that the table's type has exactly."""
    exact: Any = ml_dtypes.bfloat16 if type.dtype == BF16 else np.float32
    parts: list[tuple[F, F] | None] = []
    for part, (width, rank) in enumerate(zip(type.widths, ranks, strict=True)):
        r = rng(seed, part)
        pair = (r.normal(size=(rank, type.in_features)), r.normal(size=(width, rank)))
        parts.append(tuple(v.astype(exact).astype(np.float32) for v in pair) if rank else None)  # type: ignore[arg-type]
    return parts


def expected(y: F, x: F, slots: list[int], adapters: dict[int, list[tuple[F, F] | None]], type: AdapterType) -> Any:
    """(y + B A x in double precision, the same with the magnitudes of all terms: what roundings are relative to)."""
    out, size = y.astype(np.float64), np.abs(y).astype(np.float64)
    for row, slot in enumerate(slots):
        start = 0
        for width, pair in zip(type.widths, adapters[slot], strict=True) if slot else ():
            if pair is not None:
                a, b = (v.astype(np.float64) for v in pair)
                out[row, start : start + width] += b @ (a @ x[row])
                size[row, start : start + width] += np.abs(b) @ (np.abs(a) @ np.abs(x[row]))
            start += width
    return out, size


class Lora(Runner):
    """A lora call on rows of its own, behind row strides that are no multiples of a vector."""

    def __init__(self, isa: str, type: AdapterType, threads: int = 1) -> None:
        super().__init__(isa, threads)
        self.type = type
        self.table = self.cache(table_bytes(type))

    def set(self, slot: int, parts: list[tuple[F, F] | None]) -> None:
        write_slot(self.type, slot, parts, self.executor.cache(self.table[1]))

    def ints(self, ld_y: int, ld_x: int) -> list[int]:
        type = self.type
        widths = [*type.widths, *[0] * (8 - len(type.widths))]
        sizes = [type.slots, type.max_rank, int(type.dtype == BF16), len(type.widths)]
        return [0, type.in_features, ld_y, ld_x, *sizes, *widths]

    def apply(self, y: F, x: F, slots: list[int]) -> F:
        operands = [self.put("y", y, y.shape[1] + 3), self.put("x", x, x.shape[1] + 5), self.table, self.input(slots)]
        self.call("lora", operands, self.ints(y.shape[1] + 3, x.shape[1] + 5))
        self.run(len(y))
        assert self.gaps_untouched("y")
        assert self.gaps_untouched("x")
        return np.array(self.view("y"))


def assert_right(isa: str, type: AdapterType, got: F, want: Any) -> None:
    values, size = want
    terms = type.in_features + type.max_rank
    # Roundings add up like a random walk; the sizes of the terms bound each. bf16 rounds x and the sums in these
    # tiers, by 2**-8 each.
    error = (4 + math.sqrt(terms)) * F32_EPS
    if type.dtype == BF16 and isa in BF16_DOT:
        error += 2**-7
    assert_within(got, values, error * size + 1e-30)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("cols", "widths", "max_rank", "ranks"),
    [
        (1, (1,), 1, ((1,), (1,))),
        (37, (67,), 5, ((5,), (3,))),
        (576, (576, 192, 192), 16, ((16, 16, 16), (8, 0, 7))),
        (513, (64, 130), 17, ((17, 1), (0, 16))),
        (1100, (3, 65, 1, 9, 2, 64, 128, 5), 3, ((3, 2, 1, 3, 2, 1, 3, 2), (0, 0, 0, 0, 0, 0, 0, 1))),
        (64, (200,), 300, ((300,), (33,))),
    ],
)
def test_rows_get_what_their_adapter_adds(
    isa: str, dtype: DType, threads: int, cols: int, widths: tuple[int, ...], max_rank: int, ranks: Any
) -> None:
    type = AdapterType(3, max_rank, cols, widths, dtype)
    adapters = {1: adapter(type, ranks[0], 1), 3: adapter(type, ranks[1], 3)}
    # Runs of rows, single ones, more than a block takes, and rows without an adapter between them.
    slots = [1] * 61 + [0, 3, 1, 3, 3, 0] + [3] * 7 + [0, 1]
    r = rng(cols, max_rank)
    y, x = (r.normal(size=(len(slots), n)).astype(np.float32) for n in (sum(widths), cols))
    run = Lora(isa, type, threads)
    for slot, parts in adapters.items():
        run.set(slot, parts)
    got = run.apply(y, x, slots)
    none = [i for i, slot in enumerate(slots) if slot == 0]
    assert np.array_equal(got[none], y[none])
    assert_right(isa, type, got, expected(y, x, slots, adapters, type))
    # A row alone, and in other company, has the same bits.
    for row in (0, 3, 60, 63, 64, len(slots) - 1):
        alone = Lora(isa, type, 3 - threads)
        alone.set(slots[row] or 1, adapters[slots[row] or 1])
        assert np.array_equal(alone.apply(y[row : row + 1], x[row : row + 1], [slots[row]])[0], got[row])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_slot_is_written_over_and_emptied(isa: str, dtype: DType) -> None:
    type = AdapterType(2, 9, 70, (70, 33), dtype)
    r = rng(7)
    y, x = (r.normal(size=(5, n)).astype(np.float32) for n in (103, 70))
    small = adapter(type, (1, 2), 5)
    run = Lora(isa, type)
    run.set(2, adapter(type, (9, 9), 4))
    run.set(2, small)
    fresh = Lora(isa, type)
    fresh.set(2, small)
    got = run.apply(y, x, [2] * 5)
    assert np.array_equal(got, fresh.apply(y, x, [2] * 5))
    assert not np.array_equal(got, y)
    run.set(2, [None, None])
    run.view("y")[:] = y
    run.run(5)
    assert np.array_equal(run.view("y"), y)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_what_is_not_finite_stays_in_its_row(isa: str, dtype: DType) -> None:
    type = AdapterType(1, 4, 40, (40,), dtype)
    y, x = (rng(n).normal(size=(7, 40)).astype(np.float32) for n in (1, 2))
    x[3, 5], x[4, 0] = np.nan, np.inf
    run = Lora(isa, type)
    run.set(1, adapter(type, (3,), 1))
    got = run.apply(y, x, [1] * 7)
    assert np.isfinite(got).all(axis=1).tolist() == [True, True, True, False, False, True, True]


def test_calls_that_would_leave_the_table_are_refused() -> None:
    type = AdapterType(2, 4, 40, (40, 8), F32)
    y, x = np.zeros((3, 48), np.float32), np.zeros((3, 40), np.float32)
    run = Lora(ISAS[0], type)
    place, from_ = run.put("y", y), run.put("x", x)
    good = run.ints(48, 40)

    def refused(match: str, slots: Any = (0, 0, 0), table: Any = None, **changed: int) -> None:
        ints = [changed.get(str(i), v) for i, v in enumerate(good)]
        one = Lora(ISAS[0], type)
        one.put("y", y), one.put("x", x)
        one.set(1, adapter(type, (4, 4), 1))
        with pytest.raises(ValueError, match=match):
            one.call("lora", [place, from_, table or one.table, one.input(slots)], ints)
            one.run(3)

    refused("too small", **{"4": 3})
    refused("max_rank", **{"5": 513})
    refused("format", **{"6": 2})
    refused("parts", **{"7": 9})
    refused("widths", **{"9": 0})
    refused("widths", **{"10": 1})
    refused("values from", slots=(0, 3, 0))
    refused("values from", slots=(0, -1, 0))
    refused("has 2 values", slots=(0, 1))
    refused("columns in rows", slots=(1, 1, 1), **{"3": 39})
    run.set(1, adapter(type, (4, 4), 1))
    run.executor.cache(run.table[1])[4:8].view(np.int32)[:] = 5  # a rank that the slot has no room for
    run.call("lora", [place, from_, run.table, run.input([1, 0, 0])], good)
    with pytest.raises(ValueError, match="impossible ranks"):
        run.run(3)
