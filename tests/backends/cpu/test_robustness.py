"""What a careless or hostile caller cannot do to the native module, and what odd values cannot do to their
neighbours. Whatever could crash runs in a process of its own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from pelton.backends.cpu import packing

from .native import ISAS, NONE, Runner, native
from .test_attention import BF16_CACHE, FORMATS, Model, Sequence, Shape

SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")
limits_memory = pytest.mark.skipif(
    sys.platform != "linux" or SANITIZED, reason="limits the address space, which sanitizers need"
)

PRELUDE = """
import importlib.util, os, sys, threading, time
import numpy as np
spec = importlib.util.spec_from_file_location("_native", sys.argv[1])
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
NONE = ("none", 0, 0)

def limit_memory(more):
    import resource
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + more, resource.RLIM_INFINITY))
"""


def survives(script: str, *arguments: Any, timeout: float = 60) -> str:
    """What the script prints, run in a process of its own that must end well."""
    command = [sys.executable, "-c", PRELUDE + script, native.__file__, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("threads", [1, 2])
def test_close_while_a_step_runs_takes_nothing_away_from_it(threads: int) -> None:
    survives(
        """
K = 2048
executor = native.Executor("generic", int(sys.argv[2]), 2 * 64 * K * 4)
executor.add_constant(np.ones(K * K, np.float32).view(np.uint8))
for _ in range(6):
    executor.add_call("linear", [("arena", 0, 64 * K * 4), ("arena", 0, 0), ("const", 0, 0), NONE],
                      [0, K, K, K, K, *[0] * 9], [])
executor.arena(0, 64, K, K)[:] = 1
out = executor.arena(64 * K * 4, 64, K, K)
seconds = []
step = threading.Thread(target=lambda: seconds.append(executor.run((64, 0, 0, 0), [])))
step.start()
time.sleep(0.02)
executor.close()
step.join()
assert len(seconds) == 1 and (out == K).all()
""",
        threads,
    )


@limits_memory
def test_a_step_without_memory_fails_and_the_next_one_works() -> None:
    survives(
        """
import resource
executor = native.Executor("generic", 2, 1 << 20)
executor.add_constant(np.zeros(64 * 64 * 8, np.uint8))
executor.add_call("linear", [("arena", 0, 0), ("arena", 0, 1 << 19), ("const", 0, 0), NONE],
                  [0, 64, 64, 64, 64, 2, 0, 64, *[0] * 6], [])
limit_memory(20000)
try:
    executor.run((1, 0, 0, 0), [])
    raise SystemExit("the limit had no effect")
except MemoryError:
    pass
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
executor.run((1, 0, 0, 0), [])
"""
    )


@limits_memory
def test_threads_that_cannot_start_are_an_error() -> None:
    survives(
        """
limit_memory(100 << 20)
try:
    native.Executor("generic", 64, 4096)
    raise SystemExit("the limit had no effect")
except RuntimeError as error:
    assert "of 64 threads" in str(error), error
native.Executor("generic", 2, 4096).run((0, 0, 0, 0), [])
"""
    )


LARGEST = 2**31 - 1
WRAPPING_CALLS: list[tuple[str, list[Any], list[int], str]] = [
    ("linear", [("arena", 0, 0), ("arena", 0, 0), ("const", 0, 0), NONE],
     [0, 2**31 - 64, LARGEST, LARGEST, LARGEST, *[0] * 9], "packed weight"),
    ("embedding", [("arena", 0, 0), ("const", 0, 0), ("input", 0, 0)],
     [0, LARGEST, LARGEST, LARGEST, 0, 0, 0, 0, 0, 0], "table"),
    ("kv_write", [("cache", 0, 0), ("arena", 0, 0), ("arena", 0, 0), ("input", 0, 0)],
     [2**30, 512, LARGEST, LARGEST, 2**30, 4, 0], "cache"),
    ("attention", [("arena", 0, 0), ("arena", 0, 0), ("cache", 0, 0), *[("input", i, 0) for i in range(3)], NONE],
     [2**30, 2**30, 512, LARGEST, LARGEST, 2**30, 4, 0, 0], "cache"),
]  # fmt: skip


@pytest.mark.parametrize("kernel,operands,ints,message", WRAPPING_CALLS, ids=[c[0] for c in WRAPPING_CALLS])
def test_sizes_beyond_64_bits_do_not_wrap(kernel: str, operands: list[Any], ints: list[int], message: str) -> None:
    executor = native.Executor("generic", 1, 4096)
    executor.add_constant(np.zeros(4096, np.uint8))
    executor.add_cache(4096)
    with pytest.raises(ValueError, match=f"{message} is too small"):
        executor.add_call(kernel, operands, ints, [1.0, 0.0][: 2 * (kernel == "attention")])


def test_cache_bytes_beyond_64_bits_are_refused() -> None:
    for shape in [(LARGEST, 512, 2**30, 1), (2**20, 512, 2**20, 2**12), (1, 512, 2**62, 1), (1, 2, 16, 2**60)]:
        with pytest.raises(ValueError, match="cache of that size"):
            native.cache_bytes(*shape, 0)


def test_rows_beyond_64_bits_are_refused() -> None:
    survives(
        f"""
executor = native.Executor("generic", 1, 4096)
executor.add_call("add", [("arena", 0, 0)] * 3, [0, 1, *[{LARGEST}] * 3], [])
try:
    executor.run((2**30 + 10, 0, 0, 0), [])
    raise SystemExit("accepted")
except ValueError as error:
    assert "leaves the arena" in str(error), error
"""
    )


def test_rows_must_not_overlap() -> None:
    run = Runner("generic", 2, 4096)
    run.call("add", [run.place("out", 4, 8)] * 3, [0, 8, 7, 8, 8])
    with pytest.raises(ValueError, match="8 columns in rows of 7 floats"):
        run.run(2)


def test_more_rows_of_attention_than_a_tile_can_number_are_refused() -> None:
    tokens, heads = 2**22, 512
    executor = native.Executor("generic", 1, tokens * heads * 2 * 4)  # 16 GB that nobody touches
    executor.add_cache(native.cache_bytes(1, 2, tokens, 1, 0))
    operands = [("arena", 0, 0), ("arena", 0, 0), ("cache", 0, 0), *[("input", i, 0) for i in range(3)], NONE]
    executor.add_call("attention", operands, [heads, 1, 2, 2 * heads, 2 * heads, tokens, 1, 0, 0], [1.0, 0.0])
    inputs = [np.array(a, np.int32) for a in ([0], [tokens], [0, 0])]
    with pytest.raises(ValueError, match="T times heads"):
        executor.run((tokens, 1, 0, 0), inputs)


def test_inputs_may_change_while_a_step_runs() -> None:
    survives(
        """
executor = native.Executor("generic", 1, 64 << 20)
rows, cols = 4000, 1024
executor.add_constant(np.zeros(4 * cols * 4, np.uint8))
for _ in range(10):
    executor.add_call("embedding", [("arena", 0, 0), ("const", 0, 0), ("input", 0, 0)],
                      [0, cols, cols, 4, 0, 0, 0, 0, 0, 0], [])
ids = np.zeros(rows, np.int32)
stop = False

def change():
    while not stop:
        ids[-1] = 2**30
        ids[-1] = 0

thread = threading.Thread(target=change)
thread.start()
end = time.monotonic() + 0.7
while time.monotonic() < end:
    try:
        executor.run((rows, 0, 0, 0), [ids])
    except ValueError:
        pass
stop = True
thread.join()
"""
    )


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"),
    reason="knows these two layouts of fenv_t",
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_results_do_not_depend_on_the_callers_float_mode(when: str) -> None:
    """Subnormals flushed and rounding towards zero, before or after the threads are started."""
    survives(
        """
import ctypes, platform
# glibc's fenv_t ends in MXCSR on x86-64 and starts with FPCR on aarch64; the bits flush and round towards zero.
x86 = platform.machine() == "x86_64"
word, flags, bits = (7, 0x3f, 0x8040 | 0x6000) if x86 else (0, 0, 1 << 24 | 3 << 22)
libm = ctypes.CDLL("libm.so.6")
mode, odd, kept = ((ctypes.c_uint32 * 8)() for _ in range(3))

def load(env):
    assert libm.fesetenv(env) == 0

def store(env):
    assert libm.fegetenv(env) == 0

store(mode)
store(odd)
odd[word] |= bits
rows = 4000
third = np.full((rows, 64), 1 / 3, np.float32)
scales = np.full((8, 2), 3e-5, np.float16)  # subnormal in f16
table = np.concatenate([np.full((8, 64), 138, np.uint8), scales.view(np.uint8)], 1).reshape(-1)
want = np.float32(10) * scales[0, 0].astype(np.float32)
tiny = np.float32(1e-40)
for isa, threads in [(isa, t) for isa in native.supported_isas() for t in (1, 2)]:
    if sys.argv[2] == "before":
        load(odd)
    executor = native.Executor(isa, threads, 4 << 20)
    executor.add_constant(table)
    executor.add_call("embedding", [("arena", 0, 0), ("const", 0, 0), ("input", 0, 0)],
                      [0, 64, 64, 8, 3, 8, 32, 0, 0, 128], [])
    executor.add_call("scale", [("arena", 0, 1 << 20), ("arena", 0, 2 << 20)], [1, 64, 64, 64], [1 / 3])
    load(mode)
    x = executor.arena(2 << 20, rows, 64, 64)
    x[:] = third
    x[:, 0] = tiny
    load(odd)
    executor.run((4, rows, 0, 0), [np.zeros(4, np.int32)])
    store(kept)
    load(mode)
    assert (kept[word] ^ odd[word]) & ~flags == 0, hex(kept[word])  # but for the flags that operations leave
    assert (executor.arena(0, 4, 64, 64) == want).all(), isa
    out = executor.arena(1 << 20, rows, 64, 64)
    assert (out[:, 0] == tiny * np.float32(1 / 3)).all() and (out[:, 0] > 0).all(), isa
    assert (out[:, 1:] == third[:, 1:] * np.float32(1 / 3)).all(), isa
""",
        when,
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cols", [1, 256])
def test_every_f16_is_converted_exactly(isa: str, cols: int) -> None:
    halves = np.arange(65536, dtype=np.uint16).view(np.float16).reshape(-1, cols)
    run = Runner(isa)
    ids = run.input(np.arange(len(halves)))
    run.call("embedding", [run.place("out", *halves.shape), run.const(packing.pack_rows(halves)), ids],
             [0, cols, cols, len(halves), 2, 0, 0, 0, 0, 0])  # fmt: skip
    run.run(len(halves))
    got, want = run.view("out"), halves.astype(np.float32)
    assert np.array_equal(np.isnan(got), np.isnan(want))
    assert np.array_equal(got.view(np.uint32)[~np.isnan(want)], want.view(np.uint32)[~np.isnan(want)])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_forked_child_is_told_to_make_its_own(threads: int) -> None:
    survives(
        """
def make():
    executor = native.Executor("generic", int(sys.argv[2]), 1 << 20)
    executor.add_call("add", [("arena", 0, 0)] * 3, [0, 1024, 1024, 1024, 1024], [])
    return executor

executor = make()
executor.run((64, 0, 0, 0), [])
child = os.fork()
if child == 0:
    try:
        executor.run((64, 0, 0, 0), [])
        os._exit(1)
    except RuntimeError as error:
        if "make the model in the child process" not in str(error):
            os._exit(2)
    executor.close()
    make().run((64, 0, 0, 0), [])
    os._exit(0)
end = time.monotonic() + 20
while time.monotonic() < end:
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
        break
    time.sleep(0.01)
else:
    os.kill(child, 9)
    raise SystemExit("the child hangs")
assert status == 0, status
executor.run((64, 0, 0, 0), [])
""",
        threads,
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_does_not_wait_for_a_thread_that_it_has_not() -> None:
    survives(
        """
executor = native.Executor("generic", 1, 64)
executor.add_cache(256 << 20)
executor.prefault_caches(1024)
for block in range(1, 1000, 20):
    executor.use_block(block)  # the thread is at work
    child = os.fork()
    if child == 0:
        executor.use_block(block + 9)
        executor.close()
        os._exit(0)
    end = time.monotonic() + 20
    while not os.waitpid(child, os.WNOHANG)[0]:
        if time.monotonic() > end:
            os.kill(child, 9)
            raise SystemExit("the child hangs")
        time.sleep(0.001)
executor.close()
""",
        1,
    )


def test_arrays_of_other_types_are_not_converted() -> None:
    executor = native.Executor("generic", 1, 4096)
    for data in (np.ones(4, np.float32), np.ones(4, np.int64), np.ones((2, 2), np.uint8), np.ones(8, np.uint8)[::2]):
        with pytest.raises(TypeError):
            executor.add_constant(data)
    executor.add_call("take_rows", [("arena", 0, 0), ("arena", 0, 1024), ("input", 0, 0)], [1, 1, 1], [])
    wrong = [np.array([2**32 + 1]), np.array([0.9], np.float32), np.zeros(1, np.uint32), np.zeros((1, 1), np.int32),
             np.zeros(4, np.int32)[::2]]  # fmt: skip
    for run in (executor.run, executor.run_profiled):
        for array in wrong:
            with pytest.raises(TypeError):
                run((2, 0, 1, 0), [array])
        run((2, 0, 1, 0), [np.zeros(1, np.int32)])


def test_constants_start_at_a_multiple_of_4() -> None:
    executor = native.Executor("generic", 1, 64)
    data = np.zeros(64, np.uint8)
    executor.add_constant(data)
    for offset in (1, 2, 3):
        with pytest.raises(ValueError, match="multiple of 4"):
            executor.add_constant(data[offset:])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("window", [0, 1, 5, 70])
@pytest.mark.parametrize("heads", [2, 6, 14])
@pytest.mark.parametrize("value", [np.inf, 3.4e38])
def test_a_value_reaches_only_those_who_see_it(isa: str, format: int, window: int, heads: int, value: float) -> None:
    """3.4e38 becomes infinite in bf16. Earlier tokens and those beyond the window keep their bits."""
    shape = Shape(heads=heads, kv_heads=2, head_dim=24, format=format, window=window)
    length, at = 150, 75
    clean = Sequence.random(shape, length, 0)
    values = clean.v.copy()
    values[at] = value
    bad = replace(clean, v=values)
    whole = Model(isa, shape, [bad], threads=2).step([(0, 0, length)])[0]
    want = Model(isa, shape, [clean]).step([(0, 0, length)])[0]
    unseen = np.ones(length, bool)
    unseen[at : at + window if window else length] = False
    assert np.array_equal(whole[unseen], want[unseen])
    if format == BF16_CACHE or value != 3.4e38:
        assert not np.isfinite(whole[~unseen]).any()
    pieces = Model(isa, shape, [bad])
    cuts = [0, 60, 75, 76, 77, 100, 127, 128, 129, length]
    parts = [pieces.step([(0, a, b)])[0] for a, b in pairwise(cuts)]
    assert np.array_equal(np.concatenate(parts), whole, equal_nan=True)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", range(3))
def test_activations_of_huge_values_reach_their_limits(isa: str, kind: int) -> None:
    x = np.array([[-3.4e38, -1e38, -1e30, -1e5, -1000, -89, 89, 1000, 1e30, 3.4e38, np.inf]], np.float32)
    cols = x.shape[1]
    run = Runner(isa)
    run.call("activation", [run.place("out", 1, cols), run.put("x", x)], [0, cols, cols, cols, kind])
    run.run(1)
    got = run.view("out")
    assert (np.abs(got[x < 0]) <= 1e-36).all() and np.array_equal(got[x > 0], x[x > 0])
    assert (got[x <= -1000] == 0).all()


@pytest.mark.skipif(SANITIZED, reason="measures time")
def test_more_threads_than_cores_do_not_collapse() -> None:
    def milliseconds(threads: int) -> float:
        run = Runner("generic", threads, 1 << 18)
        x = run.place("x", 64, 512)
        for _ in range(100):
            run.call("add", [x, x, x], [0, 512, 512, 512, 512])
        return 1e3 * min(run.run(64) for _ in range(10))

    deadline = time.monotonic() + 10  # other jobs on the machine may come and go
    crowd = 16 * (os.cpu_count() or 1)
    while (crowded := milliseconds(crowd)) > 20 * milliseconds(1) and time.monotonic() < deadline:
        pass
    assert crowded <= 20 * milliseconds(1)
