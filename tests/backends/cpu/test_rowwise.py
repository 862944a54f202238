"""Norms, elementwise kernels, embedding, take_rows and rope against NumPy in double precision."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from pelton.backends.cpu import packing
from pelton.graph.quantized import SCALE_ARRAYS, QuantizedArray
from pelton.graph.types import BF16, E8M0, F16, F32, I8, ROW, U8, GroupQuant
from tests.helpers.tolerance import F32_EPS, assert_within

from .native import ISAS, NONE, Runner

pytestmark = pytest.mark.parametrize("isa", ISAS)
COLS = [1, 3, 8, 17, 64, 200, 576]


def rng(*key: int) -> np.random.Generator:
    return np.random.default_rng(list(key))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("cols", COLS)
def test_rms_norm(isa: str, cols: int, threads: int) -> None:
    r = rng(cols)
    rows, chunks = 65, 2
    x, w = r.normal(size=(rows, cols * chunks)).astype(np.float32), r.normal(size=cols).astype(np.float32)
    run = Runner(isa, threads)
    out = run.place("out", rows, cols * chunks, cols * chunks + 5)
    run.call(
        "rms_norm",
        [out, run.put("x", x, cols * chunks + 3), run.const(w)],
        [0, cols * chunks, cols, cols * chunks + 5, cols * chunks + 3],
        [1e-5, 1.0],
    )
    run.run(rows)
    parts = x.astype(np.float64).reshape(rows, chunks, cols)
    want = parts / np.sqrt((parts**2).mean(-1, keepdims=True) + 1e-5) * (w.astype(np.float64) + 1)
    want = want.reshape(rows, -1)
    assert_within(run.view("out"), want, (8 + math.sqrt(cols)) * F32_EPS * np.abs(want) + 1e-30)
    assert run.gaps_untouched("out")


def layer_norm(x: Any, w: Any, b: Any, eps: float) -> Any:
    centred = x - x.mean(-1, keepdims=True)
    y = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * w
    return y if b is None else y + b


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cols", COLS)
def test_layer_norm_alone_and_after_an_addition(isa: str, cols: int, bias: bool) -> None:
    r = rng(cols, bias)
    a, b = (r.normal(size=(7, cols)).astype(np.float32) for _ in range(2))
    w, c = (r.normal(size=cols).astype(np.float32) for _ in range(2))
    run = Runner(isa)
    pa, pb = run.put("a", a, cols + 1), run.put("b", b)
    weight, shift = run.const(w), run.const(c) if bias else NONE
    run.call("layer_norm", [run.place("out", 7, cols), pa, weight, shift], [0, cols, cols, cols + 1], [1e-2])
    total, normed = run.place("total", 7, cols), run.place("normed", 7, cols)
    run.call("add_layer_norm", [total, normed, pa, pb, weight, shift], [0, cols, cols, cols, cols + 1, cols], [1e-2])
    run.run(7)
    bound = 64 * math.sqrt(cols) * F32_EPS
    want = layer_norm(a.astype(np.float64), w, c if bias else None, 1e-2)
    assert_within(run.view("out"), want, bound * (np.abs(want) + np.abs(w) + np.abs(c)))
    assert np.array_equal(run.view("total"), a + b)
    want = layer_norm((a + b).astype(np.float64), w, c if bias else None, 1e-2)
    assert_within(run.view("normed"), want, bound * (np.abs(want) + np.abs(w) + np.abs(c)))


@pytest.mark.parametrize("cols", COLS)
def test_add_rms_norm(isa: str, cols: int) -> None:
    r = rng(cols)
    a, b = (r.normal(size=(5, cols)).astype(np.float32) for _ in range(2))
    w = r.normal(size=cols).astype(np.float32)
    run = Runner(isa, 2)
    total, out = run.place("total", 5, cols, cols + 2), run.place("out", 5, cols)
    run.call(
        "add_rms_norm",
        [total, out, run.put("a", a), run.put("b", b), run.const(w)],
        [0, cols, cols + 2, cols, cols, cols],
        [1e-6, 0.0],
    )
    run.run(5)
    assert np.array_equal(run.view("total"), a + b)
    x = (a + b).astype(np.float64)
    want = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * w
    assert_within(run.view("out"), want, (8 + math.sqrt(cols)) * F32_EPS * np.abs(want) + 1e-30)


erf = np.vectorize(math.erf)
erfc = np.vectorize(math.erfc)
ACTIVATIONS: list[Any] = [
    lambda x: x / (1 + np.exp(-x)),
    # 1 + tanh(u) = 2 / (1 + exp(-2u)) without its cancellation
    lambda x: x / (1 + np.exp(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    lambda x: 0.5 * x * erfc(-x / math.sqrt(2)),
    lambda x: np.maximum(x, 0),
]
VALUES = np.concatenate(
    [np.linspace(-12, 12, 4001), np.geomspace(1e-20, 80, 500), -np.geomspace(1e-20, 12, 500), [0.0]]
)


@pytest.mark.parametrize("kind", range(4))
def test_activations(isa: str, kind: int) -> None:
    x = VALUES.astype(np.float32)[None]
    up = rng(1).normal(size=x.shape).astype(np.float32)
    cols = x.shape[1]
    run = Runner(isa)
    px, pu = run.put("x", x), run.put("up", up)
    run.call("activation", [run.place("out", 1, cols), px], [0, cols, cols, cols, kind])
    run.call("gated_activation", [run.place("gated", 1, cols), px, pu], [0, cols, cols, cols, cols, kind])
    run.run(1)
    exact = x.astype(np.longdouble)
    want = np.asarray(ACTIVATIONS[kind](exact if kind != 2 else x.astype(np.float64)), np.float64)
    # exp(-x) magnifies the rounding of its argument, which for gelu grows like x^3.
    relative = 1e-6 + (4 * F32_EPS * np.abs(x) ** 3 if kind == 1 else F32_EPS * x.astype(np.float64) ** 2)
    assert_within(run.view("out"), want, relative * np.abs(want) + 1e-36)
    assert_within(run.view("gated"), want * up, (relative + 2 * F32_EPS) * np.abs(want * up) + 1e-36)


def test_softcap(isa: str) -> None:
    x = (VALUES * 20).astype(np.float32)[None]
    run = Runner(isa)
    cols = x.shape[1]
    run.call("softcap", [run.place("out", 1, cols), run.put("x", x)], [0, cols, cols, cols], [30.0])
    run.run(1)
    want = 30 * np.tanh(x.astype(np.float64) / 30)
    assert_within(run.view("out"), want, 1e-6 * np.abs(want))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("cols", [1, 15, 16, 300])
def test_arithmetic_is_exact(isa: str, cols: int, threads: int) -> None:
    r = rng(cols)
    a, b = (r.normal(size=(100, cols)).astype(np.float32) for _ in range(2))
    run = Runner(isa, threads)
    pa, pb = run.put("a", a, cols + 7), run.put("b", b)
    for name in ("add", "mul"):
        run.call(name, [run.place(name, 100, cols, cols + 1), pa, pb], [0, cols, cols + 1, cols + 7, cols])
    run.call("scale", [run.place("scale", 100, cols, cols + 1), pa], [0, cols, cols + 1, cols + 7], [0.3])
    run.run(99)  # the last row stays as it is
    for name, want in (("add", a + b), ("mul", a * b), ("scale", a * np.float32(0.3))):
        assert np.array_equal(run.view(name)[:99], want[:99])
        assert np.isnan(run.view(name)[99]).all()
        assert run.gaps_untouched(name)


def quantized(r: np.random.Generator, n: int, k: int, dtype: GroupQuant) -> QuantizedArray:
    """Random codes and factors of any type; weights are of the order of 1."""
    shape, kind = (n, dtype.groups(k)), SCALE_ARRAYS[dtype.scale]
    integers = dtype.scale in (U8, I8)
    low = -40 if dtype.scale == I8 else 0

    def factors(least: float, most: float) -> Any:
        return (r.integers(low, 64, shape) if integers else r.uniform(least, most, shape)).astype(kind)

    codes = r.integers(0, 2**dtype.bits, (n, k), dtype=np.uint8)
    if dtype.floating and dtype.bits == 8:
        codes[(codes & 127) == 127] = 0  # NaN
    minimum = factors(-1, 0) if dtype.minimum else None
    if dtype.zero_point:
        minimum = r.integers(0, 2**dtype.bits, shape, dtype=np.uint8)
    outer: list[Any] = [None, None]
    if dtype.outer is not None:
        of = (n, k // (dtype.outer or k)), SCALE_ARRAYS[dtype.outer_dtype]
        outer = [r.uniform(0.001, 0.01, of[0]).astype(of[1]), -r.uniform(0.001, 0.01, of[0]).astype(of[1])]
    return QuantizedArray(codes, factors(0.01, 0.1), minimum, dtype, outer[0], outer[1] if dtype.minimum else None)


TABLES = [F32, BF16, F16, GroupQuant(4, 16, True, F16), GroupQuant(4, 32, False, F32), GroupQuant(6, 16, False, F16),
          GroupQuant(8, 32, True, F32), GroupQuant(3, 48, False, F16), GroupQuant(4, 32, True, U8, outer=96),
          GroupQuant(6, 16, False, I8, outer=32), GroupQuant(4, 32, scale=F16, zero_point=True), GroupQuant(8, ROW),
          GroupQuant(4, 32, scale=E8M0, floating=True), GroupQuant(8, 32, floating=True)]  # fmt: skip


@pytest.mark.parametrize("dtype", TABLES, ids=str)
def test_embedding_is_the_dequantized_row(isa: str, dtype: Any) -> None:
    vocab, cols = 37, 96
    r = rng(3)
    if isinstance(dtype, GroupQuant):
        table: Any = quantized(r, vocab, cols, dtype)
        want = table.dequantize()
    else:
        kind = {F32: np.float32, F16: np.float16, BF16: ml_dtypes.bfloat16}[dtype]
        table = r.normal(size=(vocab, cols)).astype(kind)
        want = table.astype(np.float32)
    packed = packing.pack_rows(table)
    assert packed.nbytes == packing.rows_nbytes(vocab, cols, dtype)
    ids = r.integers(0, vocab, 20)
    run = Runner(isa, 2)
    ints = [0, cols, cols + 9, vocab, *packing.rows_packing(dtype).ints()]
    run.call("embedding", [run.place("out", 20, cols, cols + 9), run.const(packed), run.input(ids)], ints)
    run.run(20)
    assert np.array_equal(run.view("out"), want[ids])


def test_take_rows(isa: str) -> None:
    x = rng(5).normal(size=(9, 33)).astype(np.float32)
    run = Runner(isa)
    run.call("take_rows", [run.place("out", 4, 33, 40), run.put("x", x, 35), run.input([8, 0, 3, 3])], [33, 40, 35])
    run.run(9, 0, 4)
    assert np.array_equal(run.view("out"), x[[8, 0, 3, 3]])


def rope_table(positions: int, rot: int) -> Any:
    angle = np.arange(positions)[:, None] / 10000 ** (np.arange(rot // 2) * 2 / rot)
    return np.concatenate([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


def rotate(x: Any, table: Any, rot: int, interleaved: bool) -> Any:
    """x [T, heads, head_dim] in double precision, table [T, rot]."""
    half = rot // 2
    c, s = table[:, None, :half].astype(np.float64), table[:, None, half:].astype(np.float64)
    first, second = (slice(0, rot, 2), slice(1, rot, 2)) if interleaved else (slice(0, half), slice(half, rot))
    y = x.astype(np.float64).copy()
    y[..., first] = x[..., first] * c - x[..., second] * s
    y[..., second] = x[..., second] * c + x[..., first] * s
    return y


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("head_dim,rot", [(64, 64), (80, 32), (12, 6), (8, 2), (128, 96)])
def test_rope(isa: str, head_dim: int, rot: int, interleaved: bool) -> None:
    r = rng(head_dim, rot)
    x = r.normal(size=(11, 3 * head_dim)).astype(np.float32)
    positions = r.integers(0, 50, 11)
    table = rope_table(50, rot)
    cols = 3 * head_dim
    for in_place in (False, True):
        run = Runner(isa, 2)
        px = run.put("x", x, cols + 4)
        out = px if in_place else run.place("out", 11, cols, cols + 4)
        ints = [0, 3, head_dim, rot, cols + 4, cols + 4, int(interleaved), 50]
        run.call("rope", [out, px, run.const(table), run.input(positions)], ints)
        run.run(11)
        got = run.view("x" if in_place else "out")
        want = rotate(x.reshape(11, 3, head_dim), table[positions], rot, interleaved).reshape(11, -1)
        assert_within(got, want, 4 * F32_EPS * 6 + 1e-30)
