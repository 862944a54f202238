"""linear: every weight type and remainder against NumPy, and the same bits whatever the batch."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from pelton.backends.cpu import packing
from pelton.graph.quantized import QuantizedArray
from pelton.graph.types import BF16, F16, F32, GroupQuant
from tests.helpers.tolerance import BF16_EPS, assert_within, dot_tolerance

from .native import BF16_DOT, ISAS, NONE, Runner
from .test_rowwise import quantized

QUANTIZED = [
    GroupQuant(4, 32, False, F16),
    GroupQuant(4, 32, True, F16),
    GroupQuant(4, 128, True, F32),
    GroupQuant(2, 16, True, F16),
    GroupQuant(3, 8, False, F32),
    GroupQuant(8, 32, False, F16),
    GroupQuant(6, 16, False, F32),
    GroupQuant(5, 64, True, F16),
    GroupQuant(8, 384, True, F32),
]
TYPES: list[Any] = [F32, BF16, F16, *QUANTIZED]


def make_weight(n: int, k: int, dtype: Any, seed: int = 0) -> tuple[Any, Any]:
    """The weight and its exact values in double precision."""
    r = np.random.default_rng([n, k, seed])
    if isinstance(dtype, GroupQuant):
        weight: Any = quantized(r, n, k, dtype)
        codes = weight.codes.reshape(n, -1, dtype.group_size).astype(np.float64)
        scale = weight.scale.astype(np.float64)[..., None]
        minimum = -dtype.offset * scale if weight.minimum is None else weight.minimum.astype(np.float64)[..., None]
        return weight, (codes * scale + minimum).reshape(n, k)
    kind: Any = {F32: np.float32, F16: np.float16, BF16: ml_dtypes.bfloat16}[dtype]
    weight = r.normal(size=(n, k)).astype(kind)
    return weight, weight.astype(np.float64)


def magnitudes(weight: Any, exact: Any) -> Any:
    """What the kernel adds up: with groups, codes and constant are summed apart, so |code|scale + |min|."""
    if not isinstance(weight, QuantizedArray):
        return np.abs(exact)
    q = weight.type
    scale = weight.scale.astype(np.float64)[..., None]
    low = q.offset * scale if weight.minimum is None else np.abs(weight.minimum.astype(np.float64))[..., None]
    return (weight.codes.reshape(*weight.scale.shape, -1) * scale + low).reshape(weight.shape)


def linear(isa: str, x: Any, weight: Any, bias: Any = None, threads: int = 1, rows: int | None = None) -> Any:
    """out [M, N] through an arena with odd strides."""
    (m, k), (n, _) = x.shape, weight.shape
    run = Runner(isa, threads, 1 << 21)
    packed = packing.pack_linear(weight)
    dtype = packing.dtype_of(weight)
    assert packed.nbytes == packing.linear_nbytes(n, k, dtype)
    ints = [0, n, k, n + 3, k + 5, *packing.linear_packing(dtype).ints()]
    out = run.place("out", m, n, n + 3)
    run.call(
        "linear", [out, run.put("x", x, k + 5), run.const(packed), NONE if bias is None else run.const(bias)], ints
    )
    run.run(m if rows is None else rows)
    assert run.gaps_untouched("out")
    return run.view("out").copy()


def check(isa: str, m: int, n: int, k: int, dtype: Any, bias: bool, threads: int) -> None:
    r = np.random.default_rng([m, n, k])
    weight, exact = make_weight(n, k, dtype)
    x = r.normal(size=(m, k)).astype(np.float32)
    b = r.normal(size=n).astype(np.float32) if bias else None
    got = linear(isa, x, weight, b, threads)
    rounds = isa in BF16_DOT and packing.linear_packing(dtype).format != packing.LINEAR_F32
    used = x.astype(ml_dtypes.bfloat16).astype(np.float64) if rounds else x.astype(np.float64)
    want = used @ exact.T
    if b is not None:
        want = want + b
    # The rounding of x to bf16 is part of the definition, so only sums of f32 products err.
    assert_within(got, want, dot_tolerance(used, magnitudes(weight, exact), k) + 1e-6 * np.abs(want))
    loose = dot_tolerance(x, magnitudes(weight, exact), k, BF16_EPS)
    assert_within(got, x.astype(np.float64) @ exact.T + (0 if b is None else b), loose + 1e-6 * np.abs(want))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("m", [1, 2, 3, 5, 6, 7, 17, 64])
def test_row_counts(isa: str, dtype: Any, m: int) -> None:
    check(isa, m, 100, 384, dtype, bias=m % 2 == 1, threads=1 + m % 2)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("n,k", [(1, 1), (3, 7), (64, 2), (65, 33), (127, 1023), (192, 1025), (40, 2051)])
def test_odd_shapes(isa: str, dtype: Any, n: int, k: int) -> None:
    for m in (1, 4, 13):
        check(isa, m, n, k, dtype, bias=True, threads=2)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", QUANTIZED, ids=str)
def test_depth_in_several_blocks(isa: str, dtype: Any) -> None:
    for m in (1, 8):
        check(isa, m, 70, 1152, dtype, bias=True, threads=2)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [F32, BF16, QUANTIZED[0], QUANTIZED[1], QUANTIZED[5]], ids=str)
def test_a_row_has_the_same_bits_in_any_batch(isa: str, dtype: Any) -> None:
    n, k = 130, 1152
    weight, _ = make_weight(n, k, dtype)
    x = np.random.default_rng(9).normal(size=(203, k)).astype(np.float32)
    bias = np.linspace(-1, 1, n).astype(np.float32)
    whole = linear(isa, x, weight, bias, threads=2)
    for m in (1, 2, 3, 4, 5, 6, 7, 12, 50, 193):
        for begin in (0, 10):
            part = linear(isa, x[begin : begin + m], weight, bias, threads=1 + m % 2)
            assert np.array_equal(part, whole[begin : begin + m])


@pytest.mark.parametrize("isa", ISAS)
def test_rows_beyond_the_step_are_not_written(isa: str) -> None:
    weight, _ = make_weight(64, 32, BF16)
    got = linear(isa, np.ones((9, 32), np.float32), weight, rows=5)
    assert np.isfinite(got[:5]).all() and np.isnan(got[5:]).all()


@pytest.mark.parametrize("isa", ISAS)
def test_the_longest_step_may_come_last(isa: str) -> None:
    """Scratch for rounded activations grows; earlier calls keep working."""
    weight, _ = make_weight(64, 64, BF16)
    x = np.random.default_rng(0).normal(size=(300, 64)).astype(np.float32)
    run = Runner(isa, 2)
    packed = run.const(packing.pack_linear(weight))
    run.call(
        "linear", [run.place("out", 300, 64), run.put("x", x), packed, NONE], [0, 64, 64, 64, 64, 1, 0, 0, 0, 0, 0]
    )
    want = linear(isa, x, weight)
    for m in (1, 5, 40, 300, 2):
        run.view("out")[:] = np.nan
        run.run(m)
        assert np.array_equal(run.view("out")[:m], want[:m])


def test_packing_places_every_code_where_the_contract_says() -> None:
    weight, _ = make_weight(70, 32, GroupQuant(4, 16, True, F16))
    groups = packing.pack_linear(weight).reshape(2, 2, -1)
    for row, k in [(0, 0), (1, 5), (63, 31), (64, 16), (69, 8)]:
        panel, group = groups[row // 64, k // 16], k % 16
        word = int(panel[: 16 * 32].view(np.uint32).reshape(-1, 64)[group // 8, row % 64])
        j = group % 8
        assert word >> (j // 2 * 4 + j % 2 * 16) & 15 == weight.codes[row, k]
        assert panel[512:640].view(np.float16)[row % 64] == weight.scale[row, k // 16]
        assert panel[640:].view(np.float16)[row % 64] == weight.minimum[row, k // 16]


def test_packing_refuses_what_would_lose_something() -> None:
    exact = np.ones((3, 8), np.float16)
    assert packing.pack_linear(exact, BF16).nbytes == packing.linear_nbytes(3, 8, BF16)
    with pytest.raises(ValueError, match="bfloat16"):
        packing.pack_linear(exact + np.float16(2**-9), BF16)
    with pytest.raises(ValueError, match="quantize it first"):
        packing.pack_linear(exact, GroupQuant(4, 8, False))
    with pytest.raises(ValueError, match="multiple of 8"):
        packing.linear_nbytes(4, 12, GroupQuant(4, 12, False))
    with pytest.raises(ValueError, match="contiguous bytes"):
        packing.pack_linear(exact, out=np.empty(5, np.uint8))
