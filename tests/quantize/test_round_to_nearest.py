"""The quantizer: never worse than the plain rule, exact on what the type can hold, and clear about what it refuses."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pelton.errors import CheckpointError
from pelton.graph.quantized import CODE_VALUES, SCALE_ARRAYS, QuantizedArray
from pelton.graph.types import BF16, E4M3, F16, F32, ROW, U8, GroupQuant
from pelton.quantize import quantize
from pelton.quantize.recipes import QUANTIZATIONS, fitting, weight_type

TYPES = [
    *(weight_type(name) for name in QUANTIZATIONS),
    GroupQuant(2, 16, scale=F16),
    GroupQuant(3, 16, minimum=True, scale=BF16),
    GroupQuant(4, 32, scale=F16),
    GroupQuant(5, 32, minimum=True, scale=F32),
    GroupQuant(8, 32, scale=F16),
    GroupQuant(8, 64, floating=True, scale=F32),
    GroupQuant(4, 32, floating=True, scale=F16),
]
ROWS, COLS = 12, 192


def error(value: QuantizedArray, weight: np.ndarray) -> float:
    return float(np.square(value.dequantize().astype(np.float64) - weight).sum())


def plain(weight: np.ndarray, type: GroupQuant) -> np.ndarray:
    """The largest magnitude becomes the largest code, everything else the nearest one; scales as they are stored."""
    groups = weight.reshape(len(weight), -1, type.group_size or weight.shape[1]).astype(np.float64)
    kept = lambda v: v.astype(np.float32).astype(SCALE_ARRAYS[type.scale]).astype(np.float64)  # noqa: E731
    if type.floating:
        numbers = np.unique(CODE_VALUES[type.bits][np.isfinite(CODE_VALUES[type.bits])]).astype(np.float64)
        peak = np.abs(groups).max(2, keepdims=True) / numbers[-1]
        if type.outer is not None:
            outer = np.maximum(peak.max(1, keepdims=True) / 448, 1e-300)
            scale = kept(peak / outer) * outer
        else:
            scale = kept(peak)
        at = groups / np.where(scale == 0, 1, scale)
        near = numbers[np.abs(at[..., None] - numbers).argmin(-1)]
        return (near * scale).reshape(weight.shape)
    top = (1 << type.bits) - 1
    low, high = groups.min(2, keepdims=True), groups.max(2, keepdims=True)
    if type.minimum:
        scale, base = kept((high - low) / top), kept(low)
    else:
        scale = kept(np.where(high > -low, high, low) / -(1 << (type.bits - 1)))
        base = -scale * (1 << (type.bits - 1))
    codes = np.clip(np.rint((groups - base) / np.where(scale == 0, 1, scale)), 0, top)
    return (codes * scale + base).reshape(weight.shape)


@pytest.mark.parametrize("type", TYPES, ids=str)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), spread=st.sampled_from([1e-4, 0.02, 30.0]), tail=st.sampled_from([2, 4, 100]))
def test_the_search_is_never_worse_than_the_plain_rule(type, seed, spread, tail):
    weight = (np.random.default_rng(seed).standard_t(tail, (ROWS, COLS)) * spread).astype(np.float32)
    best = np.square(plain(weight, type) - weight).sum()
    assert error(quantize(weight, type), weight) <= best * (1 + 1e-4)


def test_the_search_pays_where_bits_are_few():
    weight = np.random.default_rng(0).standard_normal((64, 512)).astype(np.float32)
    for type, gain in ((weight_type("int4"), 0.9), (weight_type("nvfp4"), 0.85), (GroupQuant(2, 16, scale=F16), 0.9)):
        assert error(quantize(weight, type), weight) < gain * np.square(plain(weight, type) - weight).sum()


@pytest.mark.parametrize("name", QUANTIZATIONS)
@pytest.mark.parametrize(("data", "factor"), [("gauss", 1.0), ("laplace", 1.25)])
def test_errors_are_of_the_size_that_is_documented(name, data, factor):
    """Root mean square error over that of the weights, by docs/quantization.md."""
    rng = np.random.default_rng(3)
    weight = (rng.standard_normal((128, 1024)) if data == "gauss" else rng.laplace(size=(128, 1024))).astype(np.float32)
    relative = (error(quantize(weight, weight_type(name)), weight) / np.square(weight).sum()) ** 0.5
    assert relative < factor * {"int8": 0.0105, "int4": 0.075, "fp8": 0.027, "nvfp4": 0.086, "w8a8": 0.0105}[name]


@pytest.mark.parametrize("type", TYPES, ids=str)
def test_what_the_type_can_hold_comes_back(type):
    rng = np.random.default_rng(1)
    size = type.group_size or COLS
    codes = rng.integers(0, 1 << type.bits, (ROWS, COLS // size, size)).astype(np.uint8)
    codes[:, :, 0], codes[:, :, 1] = 0, (1 << type.bits) - 1  # the whole range, as any sensible quantizer uses it
    if type.floating:
        codes[:, :, 0] = 7 if type.bits == 4 else 0x7E
        codes[:, :, 1] = 0
        codes[(codes & 0x7F) == 0x7F] = 3
    scale = (rng.uniform(0.5, 1, codes.shape[:2]) * 0.01).astype(np.float32)
    outer = None
    if type.outer is not None:
        scale[:, 0] = 448
        scale[:, 1:] = rng.uniform(100, 400, scale[:, 1:].shape)
        outer = rng.uniform(1e-5, 1e-4, (ROWS, 1)).astype(np.float32)
    scale = scale.astype(SCALE_ARRAYS[type.scale])
    minimum = (-8 * scale.astype(np.float32)).astype(SCALE_ARRAYS[type.scale]) if type.minimum else None
    weight = QuantizedArray(codes.reshape(ROWS, COLS), scale, minimum, type, outer).dequantize()
    again = quantize(weight, type).dequantize()
    # The last bit of a scale may differ, no code may.
    np.testing.assert_allclose(again, weight, rtol=3e-3 if type.minimum else 1e-6, atol=np.abs(weight).max() * 1e-6)


@pytest.mark.parametrize("type", TYPES, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_twice_is_as_good_as_once(type, dtype):
    weight = np.random.default_rng(2).standard_normal((ROWS, COLS)).astype(dtype)
    once = quantize(weight, type).dequantize()
    # The factor of a row follows its largest value, which rounding may have changed: other scales, other errors.
    limit = 0.5 if type.outer is not None else 1e-3
    assert error(quantize(once, type), once) <= limit * error(quantize(weight, type), weight.astype(np.float64))


@pytest.mark.parametrize("type", TYPES, ids=str)
def test_zeros_stay_zeros_and_constants_constants(type):
    weight = np.zeros((4, COLS), np.float32)
    weight[1] = 0.25
    weight[2] = -0.25
    weight[3, ::7] = 1e-38  # far below what most scales can hold
    values = quantize(weight, type).dequantize()
    assert np.all(values[0] == 0) and not np.any(np.isnan(values))
    np.testing.assert_allclose(values[1:3], weight[1:3], rtol=2e-3)
    np.testing.assert_allclose(values[3], weight[3], atol=1e-6)


@pytest.mark.parametrize("type", TYPES, ids=str)
def test_the_result_depends_on_neither_threads_nor_chunks(type, monkeypatch):
    weight = np.random.default_rng(4).standard_normal((37, COLS)).astype(np.float32)
    want = quantize(weight, type, threads=1)
    monkeypatch.setattr("pelton.quantize.round_to_nearest._CHUNK", 5 * COLS)
    got = quantize(weight, type, threads=3)
    for a, b in zip(want.parts(), got.parts(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("type", TYPES, ids=str)
def test_what_is_not_finite_is_refused(type, bad):
    weight = np.ones((3, COLS), np.float32)
    weight[2, 5] = bad
    with pytest.raises(CheckpointError, match=r"^tensor q holds NaN or infinity; it cannot be quantized"):
        quantize(weight, type, "tensor q")


@pytest.mark.parametrize("type", TYPES, ids=str)
def test_huge_numbers_are_held_or_refused(type):
    weight = np.full((2, COLS), 3e38, np.float32)
    weight[:, ::2] = -3e38
    try:
        value = quantize(weight, type, "tensor q")
    except CheckpointError as caught:
        assert f"tensor q holds numbers too large for {type}" in str(caught)
    else:
        np.testing.assert_allclose(value.dequantize(), weight, rtol=0.3)


@pytest.mark.parametrize(
    "type", [GroupQuant(4, 32, zero_point=True), GroupQuant(4, 32, scale=U8, minimum=True, outer=256)], ids=str
)
def test_types_without_a_quantizer_say_so(type):
    with pytest.raises(ValueError, match="not implemented"):
        quantize(np.zeros((2, 256), np.float32), type)


@pytest.mark.parametrize(
    ("name", "cols", "expected"),
    [
        ("int8", 33, "int8g0:f32"), ("int4", 96, "int4g32m:f16"), ("int4", 48, "int4g16m:f16"),
        ("int4", 40, "int4g8m:f16"), ("int4", 36, "int8g0:f32"), ("nvfp4", 48, "fp4g16:e4m3/0"),
        ("nvfp4", 40, "int8g8:f16"), ("fp8", 7, "fp8g0:f32"),
    ],
)  # fmt: skip
def test_rows_that_are_no_whole_groups_get_the_next_best_type(name, cols, expected):
    assert str(fitting(weight_type(name), cols)) == expected


def test_outlines_of_the_recipes():
    assert weight_type("nvfp4") == GroupQuant(4, 16, scale=E4M3, floating=True, outer=ROW)
    assert {weight_type(name, head=True) for name in QUANTIZATIONS} == {GroupQuant(8, 32, scale=F16)}
