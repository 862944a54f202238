"""The tier amx: what only it has. Its products are checked with those of the other tiers (test_linear.py).

On a machine without AMX, tools/test_amx.sh runs these under an emulator of the instructions.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from pelton.backends.cpu import packing
from pelton.graph.types import BF16, F16, F32, ROW, U8, GroupQuant

from .native import ISAS, NONE, Runner, native
from .test_attention import BF16_CACHE, FORMATS, FP8_CACHE, INT8_CACHE, Model, Sequence, Shape
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


def bits(x: Any) -> Any:
    """Zeros of unlike sign differ here, NaNs do not."""
    return np.where(np.isnan(x), np.uint32(0x7FC00000), np.ascontiguousarray(x).view(np.uint32))


@emulated
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("tokens", [1, 2, 5, 17, 70])
@pytest.mark.parametrize("group", [1, 3, 7])
def test_attention_over_bf16_goes_through_tiles_that_no_thread_keeps(group: int, tokens: int, threads: int) -> None:
    """Whatever the number of rows, or a row's bits would depend on its company."""
    shape = Shape(heads=2 * group, kv_heads=2, head_dim=64)
    model = Model("amx", shape, [Sequence.random(shape, 200, 1)], threads)
    model.write(0, 0, 200 - tokens)
    before = executed()
    model.step([(0, 200 - tokens, 200)])
    # Per KV head, 16 rows and key tile (the first 2 of 4 are seen by all) 4 products and 5 loads for each of two steps
    # in depth and two of 32 values. Tiles of 48 rows are filled one by one.
    tiles = sum(-(-min(48, tokens * group - r) // 16) for r in range(0, tokens * group, 48))
    assert executed() - before >= 2 * tiles * 2 * 9 * 4
    assert EMULATOR.amx_emulator_configured_threads() == 0  # while the executor and its threads live


@emulated
@pytest.mark.parametrize("format", FORMATS)
def test_a_stage_without_products_for_tiles_configures_none(format: int) -> None:
    shape = Shape(heads=1, kv_heads=1, format=format)
    model = Model("amx", shape, [Sequence.random(shape, 3, 1)])
    before = executed()
    model.step([(0, 0, 3)])  # 3 rows of int8 are left to vectors
    assert (executed() > before) == (format in (BF16_CACHE, FP8_CACHE))


INT8_SHAPES = [
    Shape(heads=2, kv_heads=2, head_dim=64),
    Shape(heads=4, kv_heads=1, head_dim=32, block_size=64),
    Shape(heads=9, kv_heads=3, head_dim=80, block_size=48, window=70),
    Shape(heads=14, kv_heads=2, head_dim=20, alibi=True),
    Shape(heads=10, kv_heads=2, head_dim=98, softcap=5.0, window=7),
    Shape(heads=34, kv_heads=1, head_dim=128, block_size=32),
    Shape(heads=4, kv_heads=1, head_dim=16),
]


@emulated
@pytest.mark.parametrize("shape", INT8_SHAPES, ids=str)
def test_attention_over_int8_has_the_bits_of_vectors(shape: Shape) -> None:
    """Sums of int8 are exact, so the tiers may differ in nothing; a few rows stay with vectors."""
    shape = replace(shape, format=INT8_CACHE)
    sequence = Sequence.random(shape, 700, 2)
    sequence.q[650] *= 1e30  # scores overflow
    sequence.q[655, 0] = np.inf
    sequence.v[640:660] *= 1e-20
    models = [Model(isa, shape, [sequence], threads=2) for isa in ("amx", "avx512_bf16")]
    for begin, end in pairwise([0, 1, 3, 7, 37, 96, 150, 511, 513, 641, 657, 698, 699, 700]):
        before = executed()
        tiles, vectors = (model.step([(0, begin, end)])[0] for model in models)
        least = (end - begin) * (shape.heads // shape.kv_heads) >= 4
        assert (executed() > before) == (least and shape.head_dim > 16)
        assert np.array_equal(bits(tiles), bits(vectors)), (begin, end)


BF16_SHAPES = [
    Shape(heads=1, kv_heads=1, head_dim=8),
    Shape(heads=34, kv_heads=2, head_dim=80, block_size=48),
    Shape(heads=8, kv_heads=2, head_dim=34, block_size=64, window=70),
    Shape(heads=10, kv_heads=1, head_dim=128, block_size=32, window=9),
    Shape(heads=3, kv_heads=3, head_dim=256),
]


@emulated
@pytest.mark.parametrize("scale", [1.0, 1e-37])
@pytest.mark.parametrize("shape", BF16_SHAPES, ids=str)
def test_a_row_of_tiles_has_the_same_bits_whatever_is_beside_and_behind_it(shape: Shape, scale: float) -> None:
    """Chunks that end anywhere in a key tile, on one thread and on five; what was not written yet is a NaN. With the
    small scale products underflow, where a zero might get the sign of a value that a row does not see."""
    length = 300
    sequence, old = Sequence.random(shape, length, 5), Sequence.random(shape, length, 6)
    sequence.v *= scale
    for part in (old.k, old.v):
        part[:] = np.nan
    whole = Model("amx", shape, [sequence], threads=1).step([(0, 0, length)])[0]
    for threads, cuts in [(1, [0, 1, 40, 64, 65, 81, 127, 130, length]), (5, [0, 17, 191, 192, 200, 298, 299, length])]:
        model = Model("amx", shape, [sequence, old, old], threads)
        model.blocks[1] = model.blocks[0]
        model.write(1, 0, length)
        parts = [model.step([(0, a, b), (2, a, b)])[0] for a, b in pairwise(cuts)]
        assert np.array_equal(bits(np.concatenate(parts)), bits(whole)), threads


@emulated
@pytest.mark.parametrize("value", [np.inf, np.nan])
@pytest.mark.parametrize("window", [0, 5, 40, 90])
@pytest.mark.parametrize("group", [1, 2, 5])
def test_rows_of_a_tile_do_not_share_what_only_some_of_them_see(group: int, window: int, value: float) -> None:
    # With a window of 90 and positions from 50 on, tiles that see a part of 64 keys, all, and a part take turns.
    shape = Shape(heads=group, kv_heads=1, head_dim=40, block_size=64 if window == 90 else 16, window=window)
    clean = Sequence.random(shape, 120, 0)
    spoilt = clean.v.copy()
    spoilt[[0, 66, 69, 100], [0, 3, 39, 17]] = value
    want = Model("amx", shape, [clean]).step([(0, 0, 120)])[0].reshape(120, group, 40)
    model = Model("amx", shape, [replace(clean, v=spoilt)])
    model.write(0, 0, 120)
    for cuts in ([0, 120], [0, 50, 98, 120], [0, 64, 67, 68, 71, 90, 119, 120]):
        got = np.concatenate([model.step([(0, a, b)])[0] for a, b in pairwise(cuts)]).reshape(120, group, 40)
        reached = np.zeros((120, 1, 40), bool)
        for token, column in [(0, 0), (66, 3), (69, 39), (100, 17)]:
            reached[token : token + window if window else 120, :, column] = True
        assert np.array_equal(bits(got[~reached.repeat(group, 1)]), bits(want[~reached.repeat(group, 1)]))
        assert not np.isfinite(got[reached.repeat(group, 1)]).any()


@emulated
def test_a_zero_keeps_its_sign_beside_rows_that_see_more_keys() -> None:
    """What was -6e-12 before a score 83 higher is -0 behind it, to which a row that sees no more adds nothing."""
    shape = Shape(heads=1, kv_heads=1, head_dim=8)
    sequence = Sequence(*(np.zeros((132, 8), np.float32) for _ in range(3)))
    sequence.q[:] = 1
    sequence.k[100] = 29.375
    sequence.v[:64] = -1e-13
    model = Model("amx", shape, [sequence])
    model.write(0, 0, 132)
    alone = np.concatenate([model.step([(0, p, p + 1)])[0] for p in range(120, 132)])
    assert (np.signbit(alone[:8]) & (alone[:8] == 0)).all()
    assert np.array_equal(bits(model.step([(0, 120, 132)])[0]), bits(alone))


@emulated
def test_other_tiers_leave_amx_alone() -> None:
    before = executed()
    native.measure_peaks("avx512_bf16", 1, 0.0)
    shape = Shape(heads=8, kv_heads=2)
    Model("avx512_bf16", shape, [Sequence.random(shape, 70, 0)]).step([(0, 0, 70)])
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
