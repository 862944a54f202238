"""The tier amx: what only it has. Its products are checked with those of the other tiers (test_linear.py).

On a machine without AMX, tools/test_amx.sh runs these under an emulator of the instructions.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from pelton.backends.cpu import packing
from pelton.graph.types import BF16, F16, F32, ROW, U8, GroupQuant

from .native import ISAS, NONE, Runner, native
from .test_linear import QUANTIZED, linear, make_weight

EMULATOR = ctypes.CDLL(None)
emulated = pytest.mark.skipif(
    "amx" not in ISAS or not hasattr(EMULATOR, "amx_emulator_executed"), reason="asks the AMX emulator"
)


def executed() -> int:
    """AMX instructions that the emulator has carried out so far."""
    EMULATOR.amx_emulator_executed.restype = ctypes.c_int64
    return int(EMULATOR.amx_emulator_executed())


@emulated
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_bf16_weights_go_through_tiles_that_no_thread_keeps(rows: int, threads: int) -> None:
    """Whatever the number of rows, or a row's bits would depend on its company."""
    run = Runner("amx", threads)
    weight = np.ones((640, 64), ml_dtypes.bfloat16)
    out, x = run.place("out", rows, 640), run.put("x", np.ones((rows, 64), np.float32))
    packed = run.const(packing.pack_linear(weight))
    run.call("linear", [out, x, packed, NONE], [0, 640, 64, 640, 64, *packing.linear_packing(packing.BF16).ints(), 0])
    before = executed()
    run.run(rows)
    # Per panel, 32 rows and half of the columns at least 4 products and 4 loads for each of two steps of 32.
    assert executed() - before >= 10 * -(-rows // 32) * 2 * 2 * 4
    assert np.array_equal(run.view("out"), np.full((rows, 640), 64.0))
    assert EMULATOR.amx_emulator_configured_threads() == 0  # while the executor and its threads live


@emulated
@pytest.mark.parametrize("dtype", [GroupQuant(8, ROW), GroupQuant(4, ROW, True), GroupQuant(6, ROW)], ids=str)
@pytest.mark.parametrize("rows", [4, 5, 40])
def test_int8_tiles_give_the_bits_of_vectors(rows: int, dtype: GroupQuant) -> None:
    """Sums of int8 are exact, so the tiers may differ in nothing; a few rows stay with vectors."""
    weight, _ = make_weight(130, 1352, dtype)
    x = np.random.default_rng(1).normal(size=(rows, 1352)).astype(np.float32)
    bias = np.linspace(-1, 1, 130).astype(np.float32)
    before = executed()
    tiles = linear("amx", x, weight, bias, mode=packing.INT8)
    assert (executed() > before) == (rows >= 5 and (dtype.bits == 8 or rows > 8))
    assert np.array_equal(tiles, linear("avx512_bf16", x, weight, bias, mode=packing.INT8))


# Every format of codes, of scales and of zeros, and every size of a group that tiles take.
GROUPED = [
    *(q for q in QUANTIZED if 16 <= q.group_size <= 128),
    GroupQuant(4, 16, False, F16),
    GroupQuant(5, 128, True, F16),
    GroupQuant(6, 64, False, F16),
    GroupQuant(8, 16, True, F16),
    GroupQuant(8, 64, False, BF16),
    GroupQuant(8, 128, False, F32),
    GroupQuant(4, 32, True, U8, outer=576),  # 18 groups share an outer factor, 6 of them are a block
]
INT8_GROUPED = [q for q in GROUPED if packing.int8_activations(q, "int8")]
ROWS = [4, 5, 8, 9, 16, 17, 33, 40, 200]


def products(rows: int, n: int, k: int, group_bytes: int, groups: int) -> int:
    """Of tiles, at least: 16 rows x 64 bytes of k x 16 columns, of a group at a time."""
    return -(-rows // 16) * -(-n // 64) * 4 * groups * -(-group_bytes // 64)


@emulated
@pytest.mark.parametrize("dtype", INT8_GROUPED, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_int8_groups_in_tiles_have_the_bits_of_vectors(rows: int, dtype: GroupQuant) -> None:
    n, k = 70, 1152
    weight, _ = make_weight(n, k, dtype)
    x = np.random.default_rng(2).normal(size=(rows, k)).astype(np.float32)
    x[rows // 2, k // 2 :] *= 1000
    x[rows - 1, :130] = 0
    bias = np.linspace(-1, 1, n).astype(np.float32)
    before = executed()
    tiles = linear("amx", x, weight, bias, mode=packing.INT8)
    count = executed() - before
    if rows >= (5 if packing.code_format(dtype) == packing.BYTE else 9):
        assert count >= products(rows, n, k, dtype.group_size, k // dtype.group_size)
    else:
        assert count == 0
    assert np.array_equal(tiles, linear("avx512_bf16", x, weight, bias, mode=packing.INT8))


@emulated
@pytest.mark.parametrize("group", [8, 72])
def test_groups_that_fill_no_steps_stay_with_vectors(group: int) -> None:
    x = np.random.default_rng(3).normal(size=(40, 288)).astype(np.float32)
    weight, _ = make_weight(70, 288, GroupQuant(4, group, True, F16))
    before = executed()
    for mode in (packing.INT8, packing.FLOATS):
        assert np.array_equal(linear("amx", x, weight, mode=mode), linear("avx512_bf16", x, weight, mode=mode))
    assert executed() == before


@emulated
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e-39, 1e30])
def test_rows_that_int8_cannot_hold_come_from_tiles_as_from_vectors(value: float) -> None:
    weight, _ = make_weight(64, 64, GroupQuant(8, 32, False, F16))
    x = np.random.default_rng(4).normal(size=(20, 64)).astype(np.float32)
    x[[0, 17], [40, 3]] = value
    got = linear("amx", x, weight, mode=packing.INT8)
    assert np.array_equal(got, linear("avx512_bf16", x, weight, mode=packing.INT8), equal_nan=True)
    assert np.isfinite(np.delete(got, [0, 17], axis=0)).all()


@emulated
@pytest.mark.parametrize("dtype", [*GROUPED, *(q for q in QUANTIZED if not q.group_size)], ids=str)
def test_codes_next_to_floats_go_through_tiles_for_any_number_of_rows(dtype: GroupQuant) -> None:
    n, k = 70, 1152
    weight, _ = make_weight(n, k, dtype)
    x = np.random.default_rng(5).normal(size=(40, k)).astype(np.float32)
    bias = np.linspace(-1, 1, n).astype(np.float32)
    group = dtype.group_size or k
    many = linear("amx", x, weight, bias)
    for rows in (slice(0, 1), slice(39, 40), slice(31, 34), slice(20, 37)):
        before = executed()
        part = linear("amx", x[rows], weight, bias)
        assert executed() - before >= products(len(x[rows]), n, k, 2 * group, k // group)
        assert np.array_equal(part, many[rows])


@emulated
def test_other_tiers_leave_amx_alone() -> None:
    before = executed()
    native.measure_peaks("avx512_bf16", 1, 0.0)
    assert executed() == before


def features_with(assumed: str) -> subprocess.CompletedProcess[str]:
    code = "from pelton.backends.cpu import _native; print(_native.supported_isas(), _native.cpu_features()['flags'])"
    env = {**os.environ, "PELTON_ASSUME_FEATURES": assumed}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)


@pytest.mark.skipif("avx512_bf16" not in ISAS, reason="the tier below is not there")
def test_assumed_features_offer_the_tier() -> None:
    done = features_with("amx_tile,amx_bf16,amx_int8")
    assert done.returncode == 0 and "'amx'" in done.stdout


def test_an_unknown_assumed_feature_is_refused_by_name() -> None:
    done = features_with("amx_tiles")
    assert done.returncode != 0 and "there is no feature 'amx_tiles'" in done.stderr
