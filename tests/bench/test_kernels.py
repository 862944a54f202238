"""Kernel benchmarks on tiny shapes: everything but the seconds is known beforehand."""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import numpy as np
import pytest

from pelton.backends.cpu import packing
from pelton.backends.cpu.executor import CpuExecutor
from pelton.bench import kernels
from pelton.bench.kernels import OPS, STREAMING, WEIGHT_TYPES, Row, Settings, bench, sections
from pelton.bench.shapes import MODELS, ModelShape
from pelton.bench.weights import random_weight
from pelton.graph import BF16, F16, F32, GroupQuant, TensorType
from pelton.graph.ops import f32
from pelton.graph.text import parse_dtype
from tests.backends.cpu.native import ISAS, native

TINY = ModelShape("tiny", 64, 96, 4, 2, 16, 128, 1e4)
KEYS = {
    "op", "weight_type", "activation_type", "m", "n", "k", "isa", "threads", "seconds", "gb_per_s", "tflop_per_s",
    "peak_fraction",
}  # fmt: skip


#: Real peaks, measured once for all tests of this file.
measure_peaks = native.measure_peaks


@functools.cache
def once(isa: str, threads: int, names: tuple[str, ...]) -> dict[str, float]:
    return measure_peaks(isa, threads, 0.01, list(names))  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(isa: str, threads: int, seconds: float, names: list[str]) -> dict[str, float]:
        return once(isa, threads, tuple(names))

    monkeypatch.setattr(native, "measure_peaks", measure)
    monkeypatch.setitem(MODELS, "tiny", TINY)
    monkeypatch.setattr(kernels, "_cold_bytes", lambda: 100_000)


def rows_of(**changes: Any) -> list[Row]:
    settings = {
        "models": ("tiny",), "isas": (ISAS[-1],), "ms": (1, 3, 70), "contexts": (96,), "types": ("f32", "int4g32:f16"),
        "seconds": 1e-3,
    }  # fmt: skip
    rows: list[Row] = []
    skipped: list[str] = []
    bench(
        Settings(**{**settings, **changes}),
        lambda section, found: rows.extend(found),
        on_skip=lambda case, why: skipped.append(why),
    )
    assert not skipped
    return rows


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("op", OPS)
def test_every_op_on_every_place_gives_sane_numbers(op: str, threads: int) -> None:
    rows = rows_of(ops=(op,), weights="both", threads=threads)
    assert rows
    for row in rows:
        assert set(row) >= KEYS and row["op"] == op and row["threads"] == threads
        numbers = [row[key] for key in ("seconds", "gb_per_s", "peak_fraction", "spread")]
        assert all(math.isfinite(n) and n > 0 for n in numbers)
        assert row["seconds"] < 1
    assert {row["weights"] for row in rows} == ({"dram", "cache"} if op in STREAMING else {"cache"})


def test_flops_and_bytes_of_a_product() -> None:
    for row in rows_of(ops=("linear",), names=("gate_up", "down")):
        n, k = TINY.linears[row["name"]]
        assert (row["n"], row["k"]) == (n, k)
        moved = packing.linear_nbytes(n, k, parse_dtype(row["weight_type"])) + 4 * row["m"] * (n + k)
        assert row["tflop_per_s"] * row["seconds"] * 1e12 == pytest.approx(2 * row["m"] * n * k)
        assert row["gb_per_s"] * row["seconds"] * 1e9 == pytest.approx(moved)


def test_flops_and_bytes_of_attention() -> None:
    (decode,) = rows_of(ops=("attention_decode",), ms=(3,))
    assert decode["weight_type"] == "bf16" and (decode["n"], decode["k"]) == (96, 64)
    assert decode["tflop_per_s"] * decode["seconds"] * 1e12 == pytest.approx(4 * 64 * 96 * 3)
    assert decode["gb_per_s"] * decode["seconds"] * 1e9 == pytest.approx(3 * 96 * 2 * 2 * 16 * 2 + 2 * 3 * 64 * 4)
    (prefill,) = rows_of(ops=("attention_prefill",), ms=(70,), types=("f32",))
    assert prefill["weight_type"] == "f32"
    pairs = sum(range(96 - 70 + 1, 96 + 1))
    assert prefill["tflop_per_s"] * prefill["seconds"] * 1e12 == pytest.approx(4 * 64 * pairs)


def test_rows_follow_the_request() -> None:
    rows = rows_of(ops=("linear",))
    assert [r["name"] for r in rows if r["m"] == 1] == [n for n in TINY.linears for _ in range(2)]
    assert {r["m"] for r in rows if r["name"] == "lm_head"} == {1, 3}  # no step samples from 70 sequences
    assert {r["m"] for r in rows if r["name"] == "o"} == {1, 3, 70}
    tiers = rows_of(ops=("rms_norm",), isas=ISAS, ms=(2,))
    assert [r["isa"] for r in tiers] == ISAS


def test_a_prefill_is_no_longer_than_its_context_and_a_decode_has_few_sequences() -> None:
    settings = Settings(models=("tiny",), isas=("generic",), contexts=(80,), ms=(1, 64, 70, 96))
    ms = {s.name: [m for case in s.cases for m in case.ms] for s in sections(settings)}
    assert ms["attention_decode"] == [1, 64] and ms["attention_prefill"] == [64, 70]


def test_weights_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """From DRAM: consecutive calls are of different weights, and each has its turn before one comes again."""
    ranges: list[tuple[int, int]] = []
    run = CpuExecutor.run_calls

    def spy(self: CpuExecutor, inputs: Any, first: int, last: int) -> float:
        ranges.append((first, last))
        return run(self, inputs, first, last)

    monkeypatch.setattr(CpuExecutor, "run_calls", spy)
    monkeypatch.setattr(kernels, "_SAMPLE", 0.0)
    rows_of(ops=("linear",), names=("o",), types=("f32",), ms=(1,))
    copies = -(-100_000 // (64 * 64 * 4))
    assert ranges[:2] == [(0, 1), (1, 3)]  # the activations, and a first touch; then one to see how long it takes
    timed = [r for r in ranges[3:] if r[1] > r[0]]
    assert timed[: copies + 1] == [(1 + i % copies, 2 + i % copies) for i in range(copies + 1)]


def test_what_cannot_run_is_skipped_with_its_reason_and_the_rest_goes_on() -> None:
    skipped: list[str] = []
    rows: list[Row] = []
    settings = Settings(
        models=("tiny",), isas=("generic",), ops=("linear",), names=("qkv",), types=("int4g128:f16", "bf16"), ms=(1,),
        seconds=1e-3,
    )  # fmt: skip
    bench(settings, lambda section, found: rows.extend(found), on_skip=lambda case, why: skipped.append(why))
    assert [r["weight_type"] for r in rows] == ["bf16"]
    assert len(skipped) == 1 and "64" in skipped[0] and "128" in skipped[0]


def test_too_large_a_case_is_skipped_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "available_memory", lambda: 1000)
    skipped: list[str] = []
    settings = Settings(models=("tiny",), isas=("generic",), ops=("linear",), names=("o",), types=("f32",), ms=(1,))
    bench(settings, lambda section, found: pytest.fail("measured"), on_skip=lambda case, why: skipped.append(why))
    assert len(skipped) == 1 and re.fullmatch(r"needs \d+\.\d KiB, 1000 B are free", skipped[0])


def test_an_interrupted_section_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[Row] = []
    settings = Settings(
        models=("tiny",), isas=("generic",), ops=("rms_norm",), ms=(1, 2, 3), seconds=1e-3, types=("f32",)
    )
    points = 0

    def stop(section: Any) -> None:
        nonlocal points
        points += 1
        if points == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench(settings, lambda section, found: rows.extend(found), stop)
    assert [r["m"] for r in rows] == [1, 2]


@pytest.mark.parametrize("text", WEIGHT_TYPES)
def test_random_weights_have_their_type_and_small_values(text: str) -> None:
    dtype = parse_dtype(text)
    weight = random_weight(TensorType((96, 256), dtype))
    assert packing.dtype_of(weight) == dtype and weight.shape == (96, 256)
    values = f32(weight)
    assert np.isfinite(values).all() and 0.001 < np.abs(values).max() < 0.2
    assert len(np.unique(values)) > 10  # FP4 has 15 values
    packing.pack_linear(weight)


def test_large_random_weights_repeat_but_rows_differ() -> None:
    weight = f32(random_weight(TensorType((3000, 1000), BF16)))
    assert weight.shape == (3000, 1000) and not np.array_equal(weight[0], weight[1])
    assert {str(t) for t in (F32, BF16, GroupQuant(8, 32, False, F16))} <= set(WEIGHT_TYPES)


def test_shapes_of_real_models() -> None:
    assert MODELS["smollm2-135m"].linears == {
        "qkv": (960, 576), "o": (576, 576), "gate_up": (3072, 576), "down": (576, 1536), "lm_head": (49152, 576),
    }  # fmt: skip
    parameters = {
        name: sum(n * k for key, (n, k) in s.linears.items() if key != "lm_head") for name, s in MODELS.items()
    }
    layers = {"smollm2-135m": 30, "qwen2.5-0.5b": 24, "llama-3.2-1b": 16, "llama-3.1-8b": 32}
    published = {"smollm2-135m": 106e6, "qwen2.5-0.5b": 0.36e9, "llama-3.2-1b": 0.97e9, "llama-3.1-8b": 6.98e9}
    for name, count in layers.items():
        assert count * parameters[name] == pytest.approx(published[name], rel=0.02), name
