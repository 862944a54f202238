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
from pelton.graph.types import ROW, GroupQuant

from .native import ISAS, NONE, Runner, native
from .test_linear import linear, make_weight

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
