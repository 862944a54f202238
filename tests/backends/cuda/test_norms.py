"""Norms on the device against their rows of the op table in double precision."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pelton.graph import OPS
from tests.backends.cuda.device import DEVICE
from tests.backends.cuda.test_quantize import KINDS, assert_codes, empty_codes
from tests.helpers.tolerance import BF16_EPS, F32_EPS, assert_within

from pelton.backends.cuda.triton import norms  # isort: skip  behind device, which chooses the interpreter

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
#: What storing as a type may change, relatively. Triton's interpreter cuts bf16 off instead of rounding it.
ROUNDING = {F32: 0.0, F16: 2.0**-11, BF16: BF16_EPS if DEVICE.type == "cuda" else 2 * BF16_EPS}
_LEFT, _RIGHT, _GAP = 3, 2, 7.0


def strided(rows: int, columns: int, dtype: torch.dtype, seed: int = 0, spread: float = 1.0) -> torch.Tensor:
    """Random numbers in a column view of a wider tensor; other seeds, other strides."""
    base = torch.full((rows, _LEFT + columns + _RIGHT + seed % 8), _GAP, dtype=dtype)
    values = np.random.default_rng(seed).normal(size=(rows, columns)) * spread
    base[:, _LEFT : _LEFT + columns] = torch.from_numpy(values).to(dtype)
    return base.to(DEVICE)[:, _LEFT : _LEFT + columns]


def gaps_untouched(view: torch.Tensor) -> bool:
    base = view._base
    assert base is not None
    return bool((base[:, :_LEFT] == _GAP).all() and (base[:, _LEFT + view.shape[1] :] == _GAP).all())


def f64(x: torch.Tensor) -> npt.NDArray[np.float64]:
    return x.cpu().to(torch.float64).numpy()


def vector(size: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng([size, seed]).normal(size=size).astype(np.float32)).to(DEVICE)


def rms_bound(want: npt.NDArray[Any], chunk: int, dtype: torch.dtype) -> npt.NDArray[Any]:
    """A sum of squares in any order, a root and three products; an addition before it."""
    return ((8 + math.sqrt(chunk)) * F32_EPS + ROUNDING[dtype]) * np.abs(want) + 1e-7 * (dtype == F16)


def layer_bound(x: npt.NDArray[Any], want: npt.NDArray[Any], w: torch.Tensor, b: Any, dtype: torch.dtype) -> Any:
    """As above, but the mean's error, and what its difference loses, are as large as x is."""
    spread = x.std(axis=1, keepdims=True) + 1e-30
    size = np.abs(x).max(axis=1, keepdims=True) / spread * np.abs(f64(w)) + (0 if b is None else np.abs(f64(b)))
    return (8 + math.sqrt(x.shape[1])) * F32_EPS * size + ROUNDING[dtype] * np.abs(want)


@pytest.mark.parametrize(("columns", "chunk"), [(37, 37), (36, 12), (2, 2), (1200, 1200), (640, 128)])
@pytest.mark.parametrize(("source", "target"), [(F32, F32), (F32, BF16), (BF16, BF16), (F16, F32)])
def test_rms_norm(columns: int, chunk: int, source: torch.dtype, target: torch.dtype) -> None:
    x, w = strided(19, columns, source, columns), vector(chunk, 1)
    out = strided(19, columns, target)
    norms.rms_norm(out, x, w, 1e-5, 0.5)
    want = OPS["rms_norm"].reference({"eps": 1e-5, "weight_offset": 0.5}, f64(x), f64(w))
    assert_within(f64(out), want, rms_bound(want, chunk, target))
    assert gaps_untouched(out)
    if source == target:
        norms.rms_norm(x, x, w, 1e-5, 0.5)
        assert torch.equal(x, out)


def test_rms_norm_of_zeros_and_of_no_rows() -> None:
    x, w = torch.zeros(2, 37, device=DEVICE), vector(37, 1)
    out = torch.ones_like(x)
    norms.rms_norm(out[:0], x[:0], w, 1e-5, 0.0)
    assert bool((out == 1).all())
    norms.rms_norm(out, x, w, 1e-5, 0.0)
    assert bool((out == 0).all())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("columns", "target"), [(37, F32), (1200, BF16), (3, F16)])
def test_layer_norm_of_numbers_far_from_zero(columns: int, target: torch.dtype, bias: bool) -> None:
    x, w, b = strided(5, columns, F32, columns), vector(columns, 1), vector(columns, 2) if bias else None
    x += 50  # what a variance of one pass would not survive
    out = strided(5, columns, target)
    norms.layer_norm(out, x, w, b, 1e-5)
    want = OPS["layer_norm"].reference({"eps": 1e-5}, f64(x), f64(w), *([f64(b)] if b is not None else []))
    assert_within(f64(out), want, layer_bound(f64(x), want, w, b, target))
    assert gaps_untouched(out)


@pytest.mark.parametrize("in_place", ["neither", "a", "b"])
@pytest.mark.parametrize(("stream", "branch"), [(F32, F32), (F32, BF16), (BF16, BF16), (F16, F32)])
def test_norm_of_a_sum(stream: torch.dtype, branch: torch.dtype, in_place: str) -> None:
    columns, chunk, rows = 1100, 1100, 3
    if in_place == "neither":
        columns, chunk, rows = 36, 12, 41
    for op in ("add_rms_norm", "add_layer_norm"):
        a, b = strided(rows, columns, stream, 1, 20.0), strided(rows, columns, branch, 2)
        if in_place == "b":
            a, b = b, a
        sums = (a.float() + b.float()).clone()
        total = {"neither": strided(rows, columns, stream), "a": a, "b": b}[in_place]
        out = strided(rows, columns, branch)
        if op == "add_rms_norm":
            w = vector(chunk, 1)
            norms.add_rms_norm(total, out, a, b, w, 1e-5, 1.0)
            want = OPS["rms_norm"].reference({"eps": 1e-5, "weight_offset": 1.0}, f64(sums), f64(w))
            bound = rms_bound(want, chunk, branch)
        else:
            w, c = vector(columns, 1), vector(columns, 2)
            norms.add_layer_norm(total, out, a, b, w, c, 1e-5)
            want = OPS["layer_norm"].reference({"eps": 1e-5}, f64(sums), f64(w), f64(c))
            bound = layer_bound(f64(sums), want, w, c, branch)
        assert_within(f64(out), want, bound)
        assert_within(f64(total), f64(sums), ROUNDING[stream] * np.abs(f64(sums)))
        assert gaps_untouched(out) and gaps_untouched(total)


def test_a_row_does_not_depend_on_the_others() -> None:
    a, b, w = strided(21, 36, BF16, 1), strided(21, 36, BF16, 2), vector(12, 1)
    total, out = torch.zeros(21, 36, device=DEVICE), torch.zeros(21, 36, device=DEVICE)
    norms.add_rms_norm(total, out, a, b, w, 1e-5, 0.0)
    alone = torch.zeros(1, 36, device=DEVICE)
    norms.add_rms_norm(torch.empty_like(alone), alone, a[20:], b[20:], w, 1e-5, 0.0)
    assert torch.equal(alone, out[20:])


@pytest.mark.filterwarnings(
    "ignore:overflow encountered", "ignore:invalid value encountered"
)  # the interpreter's NumPy
@pytest.mark.parametrize(("columns", "groups"), [(37, 1), (48, 3), (1200, 1), (1024, 8)])
@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_those_of_float32_rows(kind: torch.dtype, columns: int, groups: int) -> None:
    count = 18 if columns < 100 else 8
    a, b = strided(count, columns, F32, 1, 20.0), strided(count, columns, BF16, 2)
    a[3], b[3] = 0.0, 0.0
    a[4] *= 1e-5
    a[5, 2], b[6, 2], a[7, 2] = float("nan"), float("inf"), 3e38  # whose square is infinite
    w, c = vector(columns, 1), vector(columns, 2)
    w[: columns // groups] *= 1e-3
    launches: list[tuple[Any, Any, list[Any]]] = [
        (norms.rms_norm, norms.add_rms_norm, [w, 1e-5, 1.0]),
        (norms.layer_norm, norms.add_layer_norm, [w, c, 1e-5]),
    ]
    for norm, add_norm, rest in launches:
        total, rows = strided(count, columns, F32), strided(count, columns, F32)
        add_norm(total, rows, a, b, *rest)
        with np.errstate(all="ignore"):  # used on a GPU only; rows that are not finite need none
            slack = layer_bound(f64(total), f64(rows), w.abs() + 1.0, c, F32)
            slack = np.where(np.isfinite(slack), slack, 0)
        again, codes = a.clone(), empty_codes(count, columns, groups, kind)
        add_norm(again, codes, again, b, *rest)
        assert torch.equal(torch.nan_to_num(again), torch.nan_to_num(total))
        assert_codes(codes, rows, slack)
        assert torch.isinf(codes.scales[:, 5]).all() and not codes.codes[5].float().any()
        norm(rows, total, *rest)
        norm(codes, total, *rest)
        assert_codes(codes, rows, slack)
        norm(empty_codes(0, columns, groups, kind), total[:0], *rest)
