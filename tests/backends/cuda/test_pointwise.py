"""Elementwise kernels and copies of rows on the device against the op table."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pelton.graph import OPS
from pelton.graph.ops import ACTIVATIONS, GATE_BLOCK
from tests.backends.cuda.device import DEVICE
from tests.backends.cuda.test_norms import BF16, F16, F32, ROUNDING, f64, gaps_untouched, strided
from tests.backends.cuda.test_quantize import KINDS, assert_codes, empty_codes
from tests.helpers.tolerance import F32_EPS, assert_within

from pelton.backends.cuda.triton import pointwise  # isort: skip  behind device, which chooses the interpreter

#: (rows, columns): several rows a program; a block of columns that is not whole; neither.
SHAPES = [(35, 37), (2, 1500), (1, 1)]
DTYPES = [(F32, F32), (BF16, BF16), (F16, F32), (F32, BF16)]


def stored(want: npt.NDArray[Any], dtype: torch.dtype) -> npt.NDArray[Any]:
    """What storing a result may change; what is subnormal in f16 has an absolute error."""
    bound: npt.NDArray[Any] = ROUNDING[dtype] * np.abs(want) + 1e-7 * (dtype == F16)
    return bound


@pytest.mark.parametrize(("source", "target"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_products_and_multiples(shape: tuple[int, int], source: torch.dtype, target: torch.dtype) -> None:
    a, b, out = strided(*shape, source, 1), strided(*shape, source, 2), strided(*shape, target)
    for op in ("add", "mul", "scale"):
        if op == "scale":
            pointwise.scale(out, a, 1.7)
            want = OPS[op].reference({"factor": 1.7}, f64(a))
        else:
            getattr(pointwise, op)(out, a, b)
            want = OPS[op].reference({}, f64(a), f64(b))
        assert_within(f64(out), want, F32_EPS * np.abs(want) + stored(want, target))
    assert gaps_untouched(out)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the interpreter's NumPy
@pytest.mark.parametrize(("source", "target"), DTYPES)
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations(kind: str, source: torch.dtype, target: torch.dtype) -> None:
    # The derivative damps what exp's argument lost: 8 roundings of what is about x's size.
    x, up, out = strided(5, 300, source, 1, 4.0), strided(5, 300, source, 2), strided(5, 300, target)
    x[0, :4] = torch.tensor([-200.0, 200.0, 0.0, -0.0])
    bound = 8 * F32_EPS * np.abs(f64(x))
    want = OPS["activation"].reference({"kind": kind}, f64(x))
    pointwise.activation(out, x, kind)
    assert_within(f64(out), want, bound + stored(want, target))
    pointwise.gated_activation(out, x, up, kind)
    gated = want * f64(up)
    assert_within(f64(out), gated, bound * np.abs(f64(up)) + F32_EPS * np.abs(gated) + stored(gated, target))
    assert gaps_untouched(out)
    for number in (float("nan"), float("inf")):  # broken states stay visible
        x[1, 1] = number
        pointwise.activation(out, x, kind)
        assert not np.isfinite(f64(out)[1, 1])


@pytest.mark.parametrize("blocks", [1, 3, 40])
@pytest.mark.parametrize("kind", ["silu", "gelu"])
def test_gates_and_ups_in_turns(blocks: int, kind: str) -> None:
    columns = blocks * GATE_BLOCK
    x, out = strided(3, 2 * columns, BF16, 1), strided(3, columns, F32)
    pointwise.gated_blocks(out, x, kind)
    want = OPS["gated_linear"].reference({"kind": kind}, f64(x), np.eye(2 * columns, dtype=np.float32))
    parts = np.abs(f64(x)).reshape(3, -1, 2, GATE_BLOCK)
    bound = 8 * F32_EPS * (parts[:, :, 0] * parts[:, :, 1]).reshape(3, -1)
    assert_within(f64(out), want, bound + F32_EPS * np.abs(want))
    assert gaps_untouched(out)


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.parametrize(
    ("columns", "groups"), [(37, 1), (96, 6), (1500, 1), (1536, 12), (4096, 2), (16416, 1)]
)  # several rows a program; several programs a row; groups above a tile; rows above registers
@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_those_of_float32_results(kind: torch.dtype, columns: int, groups: int) -> None:
    count = 18 if columns < 100 else 8
    both, rows = strided(count, 2 * columns, BF16, 1, 4.0), strided(count, columns, F32)
    both[3] = 0.0
    both[4] *= 1e-5
    both[5, 2], both[6, 2], both[7, :4] = float("nan"), float("inf"), 3e38
    gate, up = both[:, :columns], both[:, columns:]
    for name, inputs in (("activation", (gate,)), ("gated_activation", (gate, up)), ("gated_blocks", (both,))):
        if columns % GATE_BLOCK if name == "gated_blocks" else columns > 16384:
            continue
        launch = getattr(pointwise, name)
        launch(rows, *inputs, "silu")
        codes = empty_codes(count, columns, groups, kind)
        launch(codes, *inputs, "silu")
        assert_codes(codes, rows, 2 * F32_EPS * np.nan_to_num(np.abs(f64(rows)), posinf=0))
        assert torch.isinf(codes.scales[0, 5]) and not codes.codes[5, :1].float().any()
        launch(empty_codes(0, columns, groups, kind), *(x[:0] for x in inputs), "silu")


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("shape", SHAPES)
def test_softcap(shape: tuple[int, int]) -> None:
    x, out = strided(*shape, F32, 1, 30.0), strided(*shape, F32)
    x[0, 0] = 1e6
    pointwise.softcap(out, x, 5.0)
    want = OPS["softcap"].reference({"cap": 5.0}, f64(x))
    assert_within(f64(out), want, 8 * F32_EPS * 5)  # 1 - 2 / (e + 1): roundings of numbers about 1
    assert gaps_untouched(out)


def test_an_output_may_be_an_input() -> None:
    a, b = strided(5, 37, F32, 1), strided(5, 37, F32, 2)
    sums, product = a + b, (a + b) * b
    pointwise.add(a, a, b)
    assert torch.equal(a, sums)
    pointwise.mul(b, a, b)
    assert torch.equal(b, product)
    gate, want = strided(5, 37, BF16, 1), strided(5, 37, BF16)
    pointwise.gated_activation(want, gate, gate, "silu")
    pointwise.gated_activation(gate, gate, gate, "silu")
    assert torch.equal(gate, want)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize(("source", "target"), DTYPES)
@pytest.mark.parametrize("columns", [37, 1500])
def test_rows_of_a_table(columns: int, source: torch.dtype, target: torch.dtype, index: torch.dtype) -> None:
    table, out = strided(11, columns, source, 1), strided(4, columns, target)
    indices = torch.tensor([10, 0, 3, 3], dtype=index, device=DEVICE)
    pointwise.gather_rows(out, table, indices)
    want = OPS["take_rows"].reference({}, f64(table), indices.cpu().numpy())
    assert_within(f64(out), want, stored(want, target) if source == F32 else np.zeros(want.shape))
    assert gaps_untouched(out)


@pytest.mark.parametrize("count", [1, 300])
def test_pending_tokens_are_those_sampled_before(count: int) -> None:
    rng = np.random.default_rng(count)
    sources = rng.integers(-1, 5, count).astype(np.int32)
    sampled, ids = rng.integers(0, 99, 5).astype(np.int32), rng.integers(100, 199, count).astype(np.int32)
    token_ids = torch.from_numpy(ids.copy()).to(DEVICE)
    pointwise.fill_pending(token_ids, *(torch.from_numpy(x).to(DEVICE) for x in (sources, sampled)))
    assert token_ids.tolist() == np.where(sources >= 0, sampled[sources], ids).tolist()


def test_no_rows() -> None:
    x, none = torch.ones(0, 64, device=DEVICE), torch.ones(0, dtype=torch.int32, device=DEVICE)
    pointwise.add(x, x, x)
    pointwise.gated_blocks(x[:, :32], x, "silu")
    pointwise.gather_rows(x, torch.ones(3, 64, device=DEVICE), none)
    pointwise.fill_pending(none, none, none)
