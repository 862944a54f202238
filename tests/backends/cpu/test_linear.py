"""linear: every weight type and remainder against NumPy, and the same bits whatever the batch."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from pelton.backends.cpu import packing
from pelton.graph.quantized import CODE_VALUES, QuantizedArray
from pelton.graph.types import BF16, E4M3, E8M0, F16, F32, I8, ROW, U8, GroupQuant
from tests.helpers.tolerance import BF16_EPS, assert_within, dot_tolerance

from .native import BF16_DOT, ISAS, NONE, Runner, native
from .test_rowwise import quantized

QUANTIZED = [
    GroupQuant(4, 32, False, F16),  # Q4_0
    GroupQuant(4, 32, True, F16),  # Q4_1
    GroupQuant(4, 128, True, F32),
    GroupQuant(4, 128, scale=F16, zero_point=True),  # GPTQ, AWQ
    GroupQuant(4, 64, scale=BF16),
    GroupQuant(2, 16, True, F16),
    GroupQuant(2, 8, True, F16),  # no whole unit of 2-bit codes
    GroupQuant(3, 8, False, F32),
    GroupQuant(5, 32, False, F16),  # Q5_0
    GroupQuant(5, 64, True, F16),
    GroupQuant(5, 16, True, F16),
    GroupQuant(6, 16, False, F32),
    GroupQuant(8, 32, False, F16),  # Q8_0
    GroupQuant(8, 384, True, F32),
    GroupQuant(8, 128, scale=F16, zero_point=True),
    GroupQuant(2, 16, True, U8, outer=128),
    GroupQuant(4, 32, True, U8, outer=128),  # as Q4_K, Q5_K, Q6_K, whose outer is 256
    GroupQuant(5, 32, True, U8, outer=384),
    GroupQuant(6, 16, False, I8, outer=128),
    GroupQuant(8, ROW),  # W8A8
    GroupQuant(4, ROW, True, F32),
    GroupQuant(6, ROW),
    GroupQuant(8, ROW, floating=True),  # FP8 per channel
    GroupQuant(8, 128, floating=True),  # FP8 in blocks
    GroupQuant(4, 32, scale=E8M0, floating=True),  # MXFP4
    GroupQuant(4, 16, scale=E4M3, floating=True, outer=ROW),  # NVFP4
]
TYPES: list[Any] = [F32, BF16, F16, *QUANTIZED]


def make_weight(n: int, k: int, dtype: Any, seed: int = 0) -> tuple[Any, Any]:
    """The weight and its exact values in double precision."""
    r = np.random.default_rng([n, k, seed])
    if isinstance(dtype, GroupQuant):
        weight: Any = quantized(r, n, k, dtype)
        return weight, exact_values(weight)[0]
    kind: Any = {F32: np.float32, F16: np.float16, BF16: ml_dtypes.bfloat16}[dtype]
    weight = r.normal(size=(n, k)).astype(kind)
    return weight, weight.astype(np.float64)


def exact_values(weight: QuantizedArray) -> tuple[Any, Any]:
    """[n, k] in double precision: the values, and what the kernel adds up: |code| scale and |constant| apart."""
    dtype, (n, k) = weight.type, weight.shape

    def factors(values: Any, outer: Any) -> Any:
        values = np.asarray(values).astype(np.float64)
        if outer is not None:
            values = values * np.repeat(outer.astype(np.float64), values.shape[1] // outer.shape[1], axis=1)
        return values[..., None]

    codes = weight.codes.reshape(n, dtype.groups(k), -1).astype(np.float64)
    scale = factors(weight.scale, weight.outer_scale)
    low: Any = -dtype.offset * scale
    if dtype.floating:
        values = CODE_VALUES[dtype.bits][weight.codes].reshape(codes.shape).astype(np.float64)
        exact, parts = values * scale, np.abs(values * scale) + 6 * (dtype.bits == 4) * np.abs(scale)
        return exact.reshape(n, k), parts.reshape(n, k)
    if dtype.zero_point:
        low = -scale * weight.minimum.astype(np.float64)[..., None]
    elif dtype.minimum:
        low = factors(weight.minimum, weight.outer_minimum)
    return (codes * scale + low).reshape(n, k), (codes * np.abs(scale) + np.abs(low)).reshape(n, k)


def magnitudes(weight: Any, exact: Any) -> Any:
    return exact_values(weight)[1] if isinstance(weight, QuantizedArray) else np.abs(exact)


def int8_rows(x: Any, dtype: GroupQuant) -> Any:
    """x as the kernels round it: per group to integers of up to 127."""
    groups = x.reshape(len(x), dtype.groups(x.shape[1]), -1)
    most = np.abs(groups).max(axis=2, keepdims=True)
    scale = (most * np.float32(1 / 127)).astype(np.float32)
    inverse = np.where(most > 0, np.float32(127) / np.where(most > 0, most, 1), 0).astype(np.float32)
    return (np.rint(groups * inverse).astype(np.float64) * scale.astype(np.float64)).reshape(x.shape)


def modes(isa: str, dtype: Any) -> list[int]:
    """The kinds of activations that a tier has for a type."""
    int8 = isinstance(dtype, GroupQuant) and packing.int8_activations(dtype, "int8") and native.has_int8_products(isa)
    return [packing.FLOATS, packing.INT8] if int8 else [packing.FLOATS]


def linear(
    isa: str, x: Any, weight: Any, bias: Any = None, threads: int = 1, rows: int | None = None, mode: int = 0,
    epilogue: int = 0,
) -> Any:  # fmt: skip
    """out [M, N] through an arena with odd strides."""
    (m, k), (n, _) = x.shape, weight.shape
    columns = n // 2 if epilogue else n
    run = Runner(isa, threads, 1 << 21)
    packed = packing.pack_linear(weight)
    dtype = packing.dtype_of(weight)
    assert packed.nbytes == packing.linear_nbytes(n, k, dtype)
    ints = [0, n, k, columns + 3, k + 5, *packing.linear_packing(dtype).ints(mode), epilogue]
    out = run.place("out", m, columns, columns + 3)
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
    for mode in modes(isa, dtype):
        got = linear(isa, x, weight, b, threads, mode=mode)
        rounds = isa in BF16_DOT and packing.linear_packing(dtype).format != packing.LINEAR_F32
        used = x.astype(ml_dtypes.bfloat16).astype(np.float64) if rounds else x.astype(np.float64)
        if mode == packing.INT8:
            used = int8_rows(x, dtype)
        want = used @ exact.T
        if b is not None:
            want = want + b
        # The rounding of x is part of the definition, so only sums of f32 products err.
        assert_within(got, want, dot_tolerance(used, magnitudes(weight, exact), k) + 1e-6 * np.abs(want))
        # Half a step of 127 for the largest of a group is at most 2^-8 of it.
        worst = np.broadcast_to(np.abs(x).max(axis=1, keepdims=True), x.shape) if mode == packing.INT8 else x
        loose = dot_tolerance(worst, magnitudes(weight, exact), k, BF16_EPS)
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
@pytest.mark.parametrize("dtype", [F32, BF16, *QUANTIZED], ids=str)
def test_a_row_has_the_same_bits_in_any_batch(isa: str, dtype: Any) -> None:
    n, k = 130, 1152
    weight, _ = make_weight(n, k, dtype)
    x = np.random.default_rng(9).normal(size=(203, k)).astype(np.float32)
    bias = np.linspace(-1, 1, n).astype(np.float32)
    for mode in modes(isa, dtype):
        whole = linear(isa, x, weight, bias, threads=2, mode=mode)
        for m in (1, 2, 3, 4, 5, 6, 7, 12, 50, 193):
            for begin in (0, 10):
                part = linear(isa, x[begin : begin + m], weight, bias, threads=1 + m % 2, mode=mode)
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
    run.call("linear", [run.place("out", 300, 64), run.put("x", x), packed, NONE], [0, 64, 64, 64, 64, 1, *[0] * 8])
    want = linear(isa, x, weight)
    for m in (1, 5, 40, 300, 2):
        run.view("out")[:] = np.nan
        run.run(m)
        assert np.array_equal(run.view("out")[:m], want[:m])


@pytest.mark.parametrize("kind,activation", [(0, lambda g: g / (1 + np.exp(-g))), (3, lambda g: np.maximum(g, 0))])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [F32, BF16, QUANTIZED[1], GroupQuant(8, ROW)], ids=str)
def test_gated_products(isa: str, dtype: Any, kind: int, activation: Any) -> None:
    """Columns come in blocks of 32 gates and their 32 ups."""
    r = np.random.default_rng(3)
    weight, _ = make_weight(192, 128, dtype)
    bias = r.normal(size=192).astype(np.float32)
    for m in (1, 7, 200):
        x = r.normal(size=(m, 128)).astype(np.float32)
        for mode in modes(isa, dtype):
            plain = linear(isa, x, weight, bias, mode=mode).astype(np.float64).reshape(m, 3, 2, 32)
            want = (activation(plain[:, :, 0]) * plain[:, :, 1]).reshape(m, 96)
            got = linear(isa, x, weight, bias, threads=2, mode=mode, epilogue=1 + kind)
            assert_within(got, want, 1e-6 * np.abs(want) + 1e-30)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.0, 1e-39, 1e30])
def test_rows_that_int8_cannot_hold(isa: str, value: float) -> None:
    """What is not finite shows in the result; zeros and the smallest numbers count as zeros."""
    weight, _ = make_weight(64, 64, GroupQuant(8, 32, False, F16))
    for mode in modes(isa, weight.type)[1:]:
        x = np.zeros((3, 64), np.float32)
        x[1] = 1
        x[1, 5] = x[0, 40] = value
        got = linear(isa, x, weight, mode=mode)
        assert np.isfinite(got[2]).all() and np.array_equal(got[2], np.zeros(64))
        assert np.isfinite(got[:2]).all() == bool(np.isfinite(value))
        if np.isfinite(value) and abs(value) < 1e-30:
            assert np.array_equal(got[0], np.zeros(64))


def unpacked(packed: Any, n: int, dtype: GroupQuant, group: int, groups: int) -> Any:
    """Codes [n, k] of panels of one group after the other, by the words of contract.h."""
    layout = packing.CODE_LAYOUTS[packing.code_format(dtype)]
    panels = packed.reshape(-(-n // 64), groups, -1)[:, :, : group // layout.codes * layout.nbytes * 64]
    words = panels.view(np.uint32).reshape(len(panels), groups, -1, layout.nbytes // 4, 64)
    codes = np.zeros((len(panels), 64, groups, group), np.uint8)
    for code in range(group):
        unit, place = divmod(code, layout.codes)
        quad, byte = divmod(place, 4)
        word, h = divmod(quad, 8 // layout.bits)
        low = words[:, :, unit, word] >> (8 * byte + layout.bits * h) & ((1 << layout.bits) - 1)
        if layout.plane:
            width = 8 // (layout.codes // 4)
            low |= (words[:, :, unit, layout.words] >> (8 * byte + width * quad) & ((1 << width) - 1)) << layout.bits
        codes[:, :, :, code] = low.transpose(0, 2, 1)
    return codes.reshape(-1, groups * group)[:n]


@pytest.mark.parametrize("dtype", [q for q in QUANTIZED if q.outer is None and q.group_size], ids=str)
def test_packing_places_every_code_where_the_contract_says(dtype: GroupQuant) -> None:
    weight, _ = make_weight(70, 384, dtype)
    groups = dtype.groups(384)
    packed = packing.pack_linear(weight)
    assert np.array_equal(unpacked(packed, 70, dtype, dtype.group_size, groups), weight.codes)


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


@pytest.mark.parametrize(
    ("dtype", "auto"),
    [
        (GroupQuant(4, 32, True, F16), True),
        (GroupQuant(6, 16, scale=I8, outer=256), True),
        (GroupQuant(8, 32, scale=F16), True),
        (GroupQuant(4, 16, scale=E4M3, floating=True, outer=ROW), True),
        (GroupQuant(4, 128, scale=F16, zero_point=True), True),  # GPTQ, AWQ: small beside the error of 4 bits
        (GroupQuant(8, 128, scale=F16), False),
        (GroupQuant(8, ROW), False),
        (GroupQuant(4, ROW), False),
    ],
    ids=str,
)
def test_activations_are_int8_by_themselves_where_groups_are_small(dtype: GroupQuant, auto: bool) -> None:
    assert packing.int8_activations(dtype, "auto") is auto
    assert packing.int8_activations(dtype, "int8") and not packing.int8_activations(dtype, "float")


def test_no_int8_activations_beside_floating_bytes_and_plain_weights() -> None:
    for dtype in (GroupQuant(8, ROW, floating=True), F32, BF16):
        assert not packing.int8_activations(dtype, "int8") and not packing.int8_activations(dtype, "auto")
