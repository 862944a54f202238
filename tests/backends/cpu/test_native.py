"""The native module's own promises: refusals instead of wild writes, threads, constants, views, peaks."""

from __future__ import annotations

import gc
import resource
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .native import BF16_DOT, ISAS, NONE, Runner, native

ADD = [0, 8, 8, 8, 8]


def test_tiers_and_features() -> None:
    assert ISAS[0] == "generic"
    features = native.cpu_features()
    assert {"vendor", "model_name", "flags", "l1_bytes", "l2_bytes", "l3_bytes"} <= set(features)
    order = ["generic", "avx2", "avx512", "avx512_bf16", "amx"]
    for isa in ISAS:
        table = native.kernels(isa)
        assert {"embedding", "linear", "attention", "rope_kv_write", "take_rows"} <= set(table)
        assert all(order.index(tier) <= order.index(isa) for tier in table.values())
        assert table["linear"] == isa


def test_unknown_isa_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="generic"):
        native.Executor("sparc", 1, 64)
    with pytest.raises(ValueError, match="generic"):
        native.kernels("sparc")


@pytest.mark.parametrize("threads", [0, -1, 5000])
def test_thread_counts(threads: int) -> None:
    with pytest.raises(ValueError, match="threads"):
        native.Executor("generic", threads, 64)


def arena(i: int) -> tuple[str, int, int]:
    return ("arena", 0, 32 * i)


BAD_CALLS: list[tuple[str, list[Any], list[int], list[float], str]] = [
    ("multiply", [arena(0)], [], [], "unknown kernel"),
    ("add", [arena(0), arena(1)], ADD, [], "2 operands, not 3.*contract: operands"),
    ("add", [arena(0), arena(1), arena(2)], ADD[:4], [], "4 ints, not 5"),
    ("add", [arena(0), arena(1), arena(2)], ADD, [1.0], "1 floats, not 0"),
    ("add", [arena(0), arena(1), NONE], ADD, [], "must not be absent"),
    ("add", [arena(0), arena(1), ("const", 0, 0)], ADD, [], "must be in space 'arena'"),
    ("add", [arena(0), arena(1), ("arena", 0, -4)], ADD, [], "offset"),
    ("add", [arena(0), arena(1), ("arena", 0, 1 << 20)], ADD, [], "offset"),
    ("add", [arena(0), arena(1), ("arena", 0, 2)], ADD, [], "multiple of 4"),
    ("add", [arena(0), arena(1), arena(2)], [0, -8, 8, 8, 8], [], "ints must be"),
    ("activation", [arena(0), arena(1)], [0, 8, 8, 8, 9], [], "kind"),
    ("softcap", [arena(0), arena(1)], [0, 8, 8, 8], [0.0], "cap"),
    ("rms_norm", [arena(0), arena(1), ("const", 0, 0)], [0, 8, 3, 8, 8], [0, 0], "chunk"),
    ("rms_norm", [arena(0), arena(1), ("const", 0, 0)], [0, 64, 64, 64, 64], [0, 0], "weight"),
    ("rms_norm", [arena(0), arena(1), ("const", 7, 0)], [0, 8, 8, 8, 8], [0, 0], "no such index"),
    ("linear", [arena(0), arena(1), ("const", 0, 0), NONE], [0, 8, 8, 8, 8, *[0] * 9], [], "too small"),
    ("linear", [arena(0), arena(1), ("const", 0, 0), NONE], [0, 8, 24, 8, 24, 2, 0, 12, *[0] * 6], [], "multiple of 8"),
    ("linear", [arena(0), arena(1), ("const", 0, 0), NONE], [0, 8, 8, 8, 8, 2, 7, 8, *[0] * 6], [], "codes must be"),
    ("linear", [arena(0), arena(1), ("const", 0, 0), NONE], [0, 8, 12, 8, 8, 2, 1, 8, *[0] * 6], [], "group_size"),
    (
        "linear",
        [arena(0), arena(1), ("const", 0, 0), NONE],
        [0, 8, 48, 8, 48, 2, 2, 16, *[0] * 6],
        [],
        "unit of codes, 32",
    ),
    ("linear", [arena(0), arena(1), ("const", 0, 0), NONE], [0, 8, 32, 8, 8, 2, 1, 8, 7, *[0] * 5], [], "scale_format"),
    ("linear", [arena(0), arena(1), ("const", 0, 0), NONE], [0, 8, 32, 8, 8, 2, 1, 8, 0, 3, 0, 0, 0, 0], [], "zeros"),
    ("linear", [arena(0), arena(1), ("const", 0, 0), NONE], [0, 8, 32, 8, 8, 2, 1, 8, 0, 0, 12, 0, 0, 0], [], "outer"),
    ("linear", [arena(0), arena(1), ("const", 0, 0), NONE], [0, 8, 32, 8, 8, 2, 1, 8, 0, 0, 0, 0, 1, 0], [], "no int8"),
    ("linear", [arena(0), arena(1), ("const", 0, 0), NONE], [0, 8, 8, 8, 8, *[0] * 8, 1], [], "multiple of 64"),
    ("linear", [arena(0), arena(1), ("const", 0, 0), NONE], [0, 64, 8, 8, 8, *[0] * 8, 5], [], "epilogue"),
    ("embedding", [arena(0), ("const", 0, 0), ("input", 0, 0)], [0, 8, 8, 99, 0, 0, 0, 0, 0, 0], [], "too small"),
    ("embedding", [arena(0), ("const", 0, 0), ("input", 999, 0)], [0, 8, 8, 1, 0, 0, 0, 0, 0, 0], [], "input slot"),
    ("rope", [arena(0), arena(1), ("const", 0, 0), ("input", 0, 0)], [0, 1, 8, 7, 8, 8, 0, 1], [], "rot_dim"),
    ("rope", [arena(0), arena(1), ("const", 0, 0), ("input", 0, 0)], [0, 1, 8, 8, 8, 8, 0, 50], [], "table"),
    ("kv_write", [("cache", 0, 0), arena(0), arena(1), ("input", 0, 0)], [1, 8, 8, 8, 24, 1, 0], [], "block_size"),
    ("kv_write", [("cache", 0, 0), arena(0), arena(1), ("input", 0, 0)], [1, 7, 8, 8, 16, 1, 0], [], "head_dim"),
    ("kv_write", [("cache", 0, 0), arena(0), arena(1), ("input", 0, 0)], [1, 8, 8, 8, 16, 9, 0], [], "too small"),
]


@pytest.mark.parametrize(
    "kernel,operands,ints,floats,message", BAD_CALLS, ids=lambda v: v if isinstance(v, str) else ""
)
def test_a_call_that_does_not_fit_its_contract_is_refused(
    kernel: str, operands: list[Any], ints: list[int], floats: list[float], message: str
) -> None:
    executor = native.Executor("generic", 1, 4096)
    executor.add_constant(np.zeros(32, np.uint8))
    executor.add_cache(native.cache_bytes(1, 8, 16, 1, 0))
    with pytest.raises(ValueError, match=message):
        executor.add_call(kernel, operands, ints, floats)


@pytest.mark.parametrize("isa", ISAS)
def test_a_step_that_would_leave_its_buffers_is_refused(isa: str) -> None:
    run = Runner(isa, 2, 4096)
    out = run.place("out", 4, 8)
    ids = run.input([0, 1, 2, 3])
    run.call("embedding", [out, run.const(np.zeros((5, 8), np.float32)), ids], [0, 8, 8, 5, 0, 0, 0, 0, 0, 0])
    run.run(4)
    assert (run.view("out") == 0).all()
    for bad, message in [([0, 5, 0, 0], "0 to 4"), ([0, -1, 0, 0], "0 to 4"), ([1, 2], "has 2 values")]:
        run.inputs = [np.array(bad, np.int32)]
        with pytest.raises(ValueError, match=message):
            run.run(4)
    run.inputs = []
    with pytest.raises(ValueError, match="need 1 inputs"):
        run.run(4)
    run.inputs = [np.zeros(1000, np.int32)]
    with pytest.raises(ValueError, match="leaves the arena"):
        run.run(1000)
    with pytest.raises(ValueError, match="dims"):
        run.run(-1)


ATTENTION_INPUTS: list[tuple[list[int], list[int], list[int], str]] = [
    ([0, 9], [17], [0, 1], "block id 9"),
    ([0, -1], [17], [0, 1], "block id -1"),
    ([0, 1], [33], [0, 1], "too narrow"),
    ([0, 1], [1], [0, 2], "include the tokens"),
    ([0, 1], [17], [0, 3], "query_start_loc"),
    ([0, 1], [17], [1, 1], "query_start_loc"),
    ([0, 1], [17], [0], "has 1 values"),
    ([0, 1], [-2], [0, 1], "values from -2"),
    ([0, 1, 1, 1], [17, 20], [0, 2, 1], "must not decrease"),
    ([0, 1, 1], [17, 20], [0, 1, 2], "same number"),
]


@pytest.mark.parametrize("table,lens,starts,message", ATTENTION_INPUTS)
def test_a_ragged_batch_that_does_not_add_up_is_refused(
    table: list[int], lens: list[int], starts: list[int], message: str
) -> None:
    run = Runner("generic", 1, 4096)
    cache = run.cache(native.cache_bytes(1, 8, 16, 2, 1))
    operands = [run.place("out", 2, 8), run.put("q", np.zeros((2, 8))), cache]
    operands += [run.input(a) for a in (table, lens, starts)]
    run.call("attention", [*operands, NONE], [1, 1, 8, 8, 8, 16, 2, 1, 0], [1.0, 0.0])
    with pytest.raises(ValueError, match=message):
        run.run(2, len(lens))


def test_slots_and_rows_are_bounded() -> None:
    run = Runner("generic", 1, 4096)
    cache = run.cache(native.cache_bytes(1, 8, 16, 2, 0))
    x = run.put("x", np.zeros((2, 8)))
    slots, rows = run.input([0, 31]), run.input([1])
    run.call("kv_write", [cache, x, x, slots], [1, 8, 8, 8, 16, 2, 0])
    run.call("take_rows", [run.place("out", 1, 8), x, rows], [8, 8, 8])
    run.run(2, 0, 1)
    for slot, row in [(32, 0), (-1, 0), (0, 2), (0, -1)]:
        run.inputs = [np.array([0, slot], np.int32), np.array([row], np.int32)]
        with pytest.raises(ValueError, match="allowed are"):
            run.run(2, 0, 1)


def test_constants_are_referenced_not_copied() -> None:
    run = Runner("generic", 1, 4096)
    bias = np.zeros(8, np.float32)
    weight = run.const(np.zeros((8, 64), np.float32))
    run.call("linear", [run.place("out", 1, 8), run.put("x", np.ones((1, 8))), weight, run.const(bias)],
             [0, 8, 8, 8, 8, *[0] * 9])  # fmt: skip
    frozen = np.ones(4, np.uint8)
    frozen.flags.writeable = False
    run.executor.add_constant(frozen)
    bias[:] = 7
    gc.collect()
    run.run(1)
    assert (run.view("out") == 7).all()


def test_views_outlive_close_and_everything_else_does_not() -> None:
    executor = native.Executor("generic", 2, 4096)
    view = executor.arena(64, 2, 3, 8)
    assert view.shape == (2, 3) and view.strides == (32, 4) and view.dtype == np.float32
    view[:] = 3
    executor.close()
    executor.close()
    assert (view == 3).all()
    with pytest.raises(RuntimeError, match="closed"):
        executor.run((0, 0, 0, 0), [])
    for bad in [(0, 1, 2000, 2000), (-4, 1, 1, 1), (0, 5, 8, 4), (2, 1, 1, 1), (0, 1 << 40, 1, 1 << 40)]:
        with pytest.raises(ValueError, match="arena"):
            native.Executor("generic", 1, 4096).arena(*bad)


def test_profile_has_a_time_for_every_call() -> None:
    run = Runner("generic", 2)
    for _ in range(3):
        run.call("add", [arena(0), arena(0), arena(0)], ADD)
    seconds = run.executor.run_profiled((1, 0, 0, 0), [])
    assert len(seconds) == 3 and all(s >= 0 for s in seconds)


def test_executors_run_side_by_side_and_steps_follow_each_other() -> None:
    """The GIL is released, and two pools do not disturb each other."""
    results: list[bool] = []

    def work(seed: int) -> None:
        x = np.full((64, 256), seed, np.float32)
        run = Runner(ISAS[-1], 2)
        out, px = run.place("out", 64, 256), run.put("x", x)
        run.call("add", [out, px, px], [0, 256, 256, 256, 256])
        for _ in range(200):
            run.run(64)
        results.append(bool((run.view("out") == 2 * x).all()))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert results == [True] * 3


@pytest.mark.parametrize("isa", ISAS)
def test_peaks_are_positive(isa: str) -> None:
    peaks = native.measure_peaks(isa, 1, 0.01)
    assert {"read_bandwidth", "f32"} <= set(peaks) and all(v > 1e8 for v in peaks.values())
    assert ("bf16" in peaks) == (isa in BF16_DOT)


def test_cache_bytes() -> None:
    # keys 80 dims, values padded to 80: 16 tokens x (80 + 80) x 2 bytes x 3 heads x 5 blocks
    assert native.cache_bytes(3, 80, 16, 5, 1) == 16 * 160 * 2 * 3 * 5
    assert native.cache_bytes(1, 12, 16, 1, 0) == 16 * (12 + 16) * 4
    with pytest.raises(ValueError, match="head_dim"):
        native.cache_bytes(1, 13, 16, 1, 0)


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def cached(blocks: int, mebibytes: int) -> Any:
    executor = native.Executor("generic", 1, 64)
    for _ in range(2):
        executor.add_cache(mebibytes << 20)
    executor.prefault_caches(blocks)
    return executor


def test_memory_of_a_cache_is_there_before_it_is_used() -> None:
    executor = cached(1024, 64)
    caches = [executor.cache(i) for i in range(2)]
    for cache in caches:
        cache[: 8 << 20] = 7
        cache[-1] = 9
    before = resident()
    time.sleep(0.1)
    assert executor.blocks_ready() == 0 and resident() - before < 4 << 20, "nothing is used yet"
    executor.use_block(3)
    end = time.monotonic() + 20
    while executor.blocks_ready() < 1024:  # no step runs
        assert time.monotonic() < end
        time.sleep(0.01)
    assert resident() - before > 100 << 20
    for cache in caches:
        assert (cache[: 8 << 20] == 7).all() and cache[-1] == 9 and not cache[8 << 20 : -1].any(), "as it was"
    executor.use_block(1023)
    with pytest.raises(ValueError, match="once"):
        executor.prefault_caches(1024)


def test_only_so_much_memory_is_taken_ahead() -> None:
    executor = cached(2048, 512)  # blocks of a quarter of a megabyte
    before = resident()
    executor.use_block(0)
    time.sleep(0.5)
    end = time.monotonic() + 60
    while (ready := executor.blocks_ready()) < 1024:
        assert time.monotonic() < end
        time.sleep(0.05)
    time.sleep(0.2)
    assert executor.blocks_ready() <= ready + 16, "512 MiB ahead"
    assert resident() - before < 544 << 20
    executor.use_block(1500)
    start = time.monotonic()
    executor.close()  # while it is at work
    assert time.monotonic() - start < 5


def test_a_cache_that_is_one_page_is_left_alone() -> None:
    executor = cached(64, 1)
    executor.use_block(63)
    time.sleep(0.2)
    assert executor.blocks_ready() == 0
    native.Executor("generic", 1, 64).use_block(5)  # none at all
