"""Each op at the shapes of real models, through the normal path: graph -> program -> CPU executor.

What is timed is the op's call inside a step, so packing, kernel choice and threads are those of a real run. The
step's other calls only prepare operands and are left out (``CpuExecutor.run_calls``).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..backends.base import Batch, KVSpec, ScheduledSequence
from ..backends.cpu.executor import CpuExecutor, cache_bytes_per_block, constant_bytes, pack_constant
from ..backends.step_inputs import StepInputs, step_inputs
from ..graph import BF16, F32, CacheType, Graph, Node, make
from ..graph import builder as g
from ..graph.rope import RopeSpec
from ..graph.text import parse_dtype
from ..graph.types import ElementType
from ..ledger import available_memory, human
from ..nn import Step
from ..program import Program, lower, plan_memory
from .roofline import Bound, PeakMeter
from .shapes import MODELS, ModelShape
from .weights import random_weight

#: The types that matrices are benchmarked in unless others are asked for, as graphs write them: adding one here
#: is all it takes.
WEIGHT_TYPES = (
    "f32", "bf16", "int8g0:f32", "int8g32:f16", "int6g16:i8/256", "int5g32m:u8/256", "int4g32:f16", "int4g32m:u8/256",
    "int4g128z:f16", "fp8g0:f32", "fp4g32:e8m0", "fp4g16:e4m3/0",
)  # fmt: skip
DEFAULT_MODELS = ("smollm2-135m", "llama-3.2-1b")
DEFAULT_M = (1, 4, 8, 16, 64, 512, 2048)
DEFAULT_CONTEXTS = (512, 4096)
OPS = (
    "linear", "attention_decode", "attention_prefill", "rms_norm", "add_rms_norm", "rope_kv_write",
    "gated_activation", "embedding",
)  # fmt: skip

LINEARS = ("qkv", "o", "gate_up", "down", "lm_head")

#: A step samples from at most so many sequences: the output layer sees no more rows, a decode no more queries.
_MAX_SEQUENCES = 64
_BLOCK_SIZE = 16
_FILL = 512  # tokens of a step that fills the KV cache
_REPEATED = 1024  # calls of an op without weights: together they dwarf the wake-up of the threads
_SAMPLE = 4e-3  # seconds of consecutive calls that one sample times
_TABLE_ROWS = 256  # of the random tables that activations are looked up in


@dataclass(frozen=True, slots=True)
class Settings:
    """What to measure. names: of the products; types: texts of element types; weights: where they lie, "dram",
    "cache" or "both"; seconds: per point, more if a single call takes longer."""

    models: Sequence[str] = DEFAULT_MODELS
    ops: Sequence[str] = OPS
    names: Sequence[str] = LINEARS
    types: Sequence[str] = WEIGHT_TYPES
    ms: Sequence[int] = DEFAULT_M
    contexts: Sequence[int] = DEFAULT_CONTEXTS
    weights: str = "dram"
    isas: Sequence[str] = ()
    threads: int = 1
    seconds: float = 0.1


@dataclass(frozen=True, slots=True)
class Case:
    """One op of a model in one weight type, at one or more numbers of rows that share an executor.

    n, k: columns of the result and of the operand; for attention the context and the columns of q. graph(copies):
    the op on so many weights or caches. call_bytes: what one call streams, weights or KV cache.
    """

    model: ModelShape
    op: str
    name: str
    weight_type: str
    n: int
    k: int
    ms: tuple[int, ...]
    graph: Callable[[int], Graph]
    call_bytes: int
    context: int = 0

    @property
    def kernel(self) -> str:
        return "attention" if self.op.startswith("attention") else self.op


@dataclass(frozen=True, slots=True)
class Section:
    """Cases that are shown in one table: an op of a model on one tier, in several types."""

    model: ModelShape
    name: str
    isa: str
    cases: tuple[Case, ...]

    @property
    def num_points(self) -> int:
        return sum(len(case.ms) for case in self.cases)


#: A measured point: the keys of the JSON rows.
Row = dict[str, Any]


def sections(settings: Settings) -> list[Section]:
    """Everything that is to be measured, in order."""
    out = []
    for isa in settings.isas:
        for model in (MODELS[name] for name in settings.models):
            for op in settings.ops:
                by_name: dict[str, list[Case]] = {}
                for case in _cases(model, op, settings):
                    if case.ms:
                        by_name.setdefault(case.name, []).append(case)
                out += [Section(model, name, isa, tuple(cases)) for name, cases in by_name.items()]
    return out


def bench(
    settings: Settings,
    on_section: Callable[[Section, list[Row]], None],
    on_point: Callable[[Section], None] = lambda section: None,
    on_skip: Callable[[Case, str], None] = lambda case, why: None,
) -> None:
    """Measure section by section; the peaks before and after each. An interrupted section is reported, too."""
    for isa in settings.isas:
        meter = PeakMeter(isa, settings.threads)
        meter.measure()
        for section in (s for s in sections(settings) if s.isa == isa):
            points: list[_Point] = []
            try:
                for case in section.cases:
                    for place in _places(case, settings):
                        try:
                            for point in _measure(case, place, isa, settings):
                                points.append(point)
                                on_point(section)
                        except _SkippedError as skipped:
                            on_skip(case, str(skipped))
            finally:
                if points:
                    meter.measure()
                    on_section(section, [p.row(meter, isa, settings.threads) for p in points])


def _places(case: Case, settings: Settings) -> Sequence[str]:
    if case.op not in STREAMING:
        return ("cache",)  # activations, which the call before has just written
    places = ("dram", "cache") if settings.weights == "both" else (settings.weights,)
    fits = case.call_bytes <= _l3_bytes() / 2
    return [place for place in places if place == "dram" or fits]


def _l3_bytes() -> int:
    from ..backends.cpu import _native

    return int(_native.cpu_features()["l3_bytes"])


class _SkippedError(Exception):
    """A case that cannot run here; the text says why."""


@dataclass(frozen=True, slots=True)
class _Point:
    case: Case
    place: str
    m: int
    seconds: float
    spread: float
    stats: Any  # CallStats

    def row(self, meter: PeakMeter, isa: str, threads: int) -> Row:
        case, peaks = self.case, meter.peaks()
        size = self.stats.bytes
        bound: Bound = peaks.bound(self.stats, streamed_from="memory" if self.place == "dram" else peaks.level(size))
        return {
            "op": case.op,
            "weight_type": case.weight_type,
            "activation_type": self.stats.precision,
            "m": self.m,
            "n": case.n,
            "k": case.k,
            "isa": isa,
            "threads": threads,
            "seconds": self.seconds,
            "gb_per_s": size / self.seconds / 1e9,
            "tflop_per_s": self.stats.flops / self.seconds / 1e12,
            "peak_fraction": bound.seconds / self.seconds,
            "bound_by": bound.by,
            "model": case.model.name,
            "name": case.name,
            "weights": self.place,
            "spread": self.spread,
        }


# ------------------------------------------------------------------ what is measured


def _activations(step: Step, cols: int, name: str = "x") -> Node:
    """Random activations [T, cols]."""
    return g.embedding(step.token_ids, g.weight(f"{name}.table", (_TABLE_ROWS, cols), F32))


def _cases(model: ModelShape, op: str, settings: Settings) -> Iterator[Case]:
    types = [(text, parse_dtype(text)) for text in settings.types]
    if op == "linear":
        for name, (n, k) in ((name, model.linears[name]) for name in LINEARS if name in settings.names):
            for text, dtype in types:
                ms = tuple(m for m in settings.ms if name != "lm_head" or m <= _MAX_SEQUENCES)
                yield Case(model, op, name, text, n, k, ms, _linear(n, k, dtype), round(n * k * _bits(dtype) / 8))
    elif op == "embedding":
        for text, dtype in types:
            yield Case(model, op, op, text, model.hidden, model.vocab, tuple(settings.ms), _embedding(model, dtype), 0)
    elif op in ("attention_decode", "attention_prefill"):
        cache = CacheType(model.kv_heads, model.head_dim, F32 if all(t == F32 for _, t in types) else BF16)
        token = 2 * model.kv_heads * model.head_dim * cache.dtype.bits // 8
        decode = op == "attention_decode"
        for context in settings.contexts:
            for m in settings.ms:
                if (m <= _MAX_SEQUENCES) if decode else (_MAX_SEQUENCES <= m <= context):
                    size = token * context * (m if decode else 1)
                    q = model.heads * model.head_dim
                    yield Case(
                        model, op, op, str(cache.dtype), context, q, (m,), _attention(model, cache), size, context
                    )
    else:
        widths = {"rope_kv_write": sum((model.heads, model.kv_heads)) * model.head_dim,
                  "gated_activation": model.intermediate}  # fmt: skip
        n = widths.get(op, model.hidden)
        k = n + model.kv_heads * model.head_dim if op == "rope_kv_write" else n
        yield Case(model, op, op, "f32", n, k, tuple(settings.ms), _plain(model, op), 0)


#: Ops whose weights or caches are larger than what they compute on.
STREAMING = ("linear", "attention_decode", "attention_prefill")


def _bits(dtype: ElementType) -> float:
    return dtype.bits_per_weight if hasattr(dtype, "bits_per_weight") else dtype.bits


def _linear(n: int, k: int, dtype: ElementType) -> Callable[[int], Graph]:
    def graph(copies: int) -> Graph:
        x = _activations(Step(), k)
        return Graph("linear", tuple(g.linear(x, g.weight(f"w{i}", (n, k), dtype)) for i in range(copies)))

    return graph


def _embedding(model: ModelShape, dtype: ElementType) -> Callable[[int], Graph]:
    table = g.weight("w", (model.vocab, model.hidden), dtype)
    return lambda copies: Graph("embedding", (g.embedding(Step().token_ids, table),))


def _attention(model: ModelShape, cache: CacheType) -> Callable[[int], Graph]:
    q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim

    def graph(copies: int) -> Graph:
        step = Step()
        x = _activations(step, q + 2 * kv)
        queries, k, v = g.slice_(x, 0, q), g.slice_(x, q, q + kv), g.slice_(x, q + kv, q + 2 * kv)
        outputs = []
        for i in range(copies):
            written = g.kv_write(g.cache_input(f"kv.{i}", cache), k, v, step.slot_mapping)
            outputs.append(
                g.attention(
                    queries, written, step.block_table, step.seq_lens, step.query_start_loc, num_heads=model.heads,
                    scale=model.head_dim**-0.5, window=0, softcap=0.0, alibi=False,
                )
            )  # fmt: skip
        return Graph("attention", tuple(outputs))

    return graph


def _plain(model: ModelShape, op: str) -> Callable[[int], Graph]:
    """The ops between products: one copy, their operands are what the call before has just written."""
    step, hidden, inner = Step(), model.hidden, model.intermediate
    norm = g.weight("w", (hidden,), F32)
    if op == "rms_norm":
        out = g.rms_norm(_activations(step, hidden), norm, 1e-5)
    elif op == "add_rms_norm":
        a, b = _activations(step, hidden, "a"), _activations(step, hidden, "b")
        out = g.item(make("add_rms_norm", a, b, norm, eps=1e-5, weight_offset=0.0), 1)
    elif op == "gated_activation":
        x = _activations(step, 2 * inner)
        out = g.gated_activation(g.slice_(x, 0, inner), g.slice_(x, inner, 2 * inner), "silu")
    else:
        q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
        x = _activations(step, q + 2 * kv)
        spec = RopeSpec(model.head_dim, model.head_dim, model.rope_theta)
        cache = g.cache_input("kv.0", CacheType(model.kv_heads, model.head_dim, BF16))
        parts = (g.slice_(x, 0, q), g.slice_(x, q, q + kv), g.slice_(x, q + kv, q + 2 * kv))
        fused = make("rope_kv_write", cache, *parts, step.positions, step.slot_mapping, **spec.attrs())
        out = g.item(fused, 0)
    return lambda copies: Graph(op, (out,))


# ------------------------------------------------------------------ how it is measured


def _measure(case: Case, place: str, isa: str, settings: Settings) -> Iterator[_Point]:
    streaming = case.op in STREAMING
    copies = -(-_cold_bytes() // max(1, case.call_bytes)) if place == "dram" and streaming else 1
    limit = max(*case.ms, _FILL if case.context else 1)
    sequences = case.ms[0] if case.op == "attention_decode" else 1
    length = case.context or limit
    blocks = -(-length // _BLOCK_SIZE)
    program = lower(case.graph(copies), {"T": limit, "S": sequences, "N": 1}, max(length, 1))
    before = [c for c in program.calls if c.kernel != case.kernel]
    timed = [c for c in program.calls if c.kernel == case.kernel]
    if place == "cache":  # the same call again and again
        timed = timed * (_REPEATED if not streaming else max(1, min(_REPEATED, (1 << 24) // max(1, case.call_bytes))))
    program = plan_memory(replace(program, calls=(*before, *timed)))
    _check_memory(program, sequences * blocks)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, case.model.vocab if case.op == "embedding" else _TABLE_ROWS, limit)
    order = rng.permutation(sequences * blocks).reshape(sequences, blocks)  # as scattered as in a busy server

    def inputs(parts: Sequence[tuple[int, int, int]]) -> StepInputs:
        """A step of (sequence, first position, tokens)."""
        batch = (
            ScheduledSequence("", tuple(int(t) for t in ids[:n]), at, tuple(int(b) for b in order[s]), None)
            for s, at, n in parts
        )
        return step_inputs(Batch(tuple(batch)), _BLOCK_SIZE)

    executor = _executor(case, program, KVSpec(sequences * blocks, _BLOCK_SIZE, 0, length), isa, settings.threads)
    try:
        for s in range(sequences) if case.context else ():
            for at in range(0, case.context, _FILL):
                executor.run_calls(inputs([(s, at, min(_FILL, case.context - at))]), 0, len(before))
        for m in case.ms:
            if case.op == "attention_decode":
                step = inputs([(s, case.context - 1, 1) for s in range(m)])
            else:
                step = inputs([(0, case.context - m if case.context else 0, m)])
            executor.run_calls(step, 0, len(before))
            seconds, spread = _time(executor, step, len(before), len(program.calls), settings.seconds)
            yield _Point(case, place, m, seconds, spread, executor.costs[-1].stats(step.shape, seconds))
    finally:
        executor.close()


def _cold_bytes() -> int:
    """Weights or caches of this size in turns: each is gone from the caches when its turn comes again.

    Four times the L3: with twice, a cache that replaces lines at random still holds a fifth of them.
    """
    return max(128 << 20, 4 * _l3_bytes())


def _check_memory(program: Program, num_blocks: int) -> None:
    try:
        packed = sum(constant_bytes(c) for c in program.constants)
    except ValueError as error:
        raise _SkippedError(str(error)) from None
    shapes = [c.expr.tensor.shape for c in program.constants if c.expr is not None]
    largest = max((4 * math.prod(int(d) for d in shape) for shape in shapes), default=0)  # random values, unpacked
    need = packed + largest + program.arena_bytes + num_blocks * cache_bytes_per_block(program, _BLOCK_SIZE)
    free = available_memory()
    if need > free:
        raise _SkippedError(f"needs {human(need)}, {human(free)} are free")


class _Executor(CpuExecutor):
    """Packs one of several weights of the same type; the others are copies of its bytes."""

    def _pack(self, read: Any, content_key: str | None, on_packed: Any) -> list[Any]:
        made: dict[Any, Any] = {}
        out = []
        for constant in self.program.constants:
            kind = (constant.packing, constant.expr and constant.expr.type, constant.attrs)
            packed = made[kind].copy() if kind in made else pack_constant(constant, read)
            made.setdefault(kind, packed)
            out.append(packed)
        return out


def _executor(case: Case, program: Program, kv_spec: KVSpec, isa: str, threads: int) -> CpuExecutor:
    types = {c.expr.name: c.expr.tensor for c in program.constants if c.expr is not None}
    try:
        return _Executor(program, lambda name: random_weight(types[name]), kv_spec, isa=isa, threads=threads)
    except ValueError as error:  # a kernel's contract: no such type on this tier
        raise _SkippedError(str(error)) from None


def _time(executor: CpuExecutor, step: StepInputs, first: int, last: int, seconds: float) -> tuple[float, float]:
    """Seconds of one call, the best of many samples, and the samples' median over it.

    A sample is a run of consecutive calls, less what a step without calls takes at best; the next sample goes on
    with the next calls, so that every weight had its turn before one comes again. Calls that memory bounds are all in
    one sample: the best of short ones would be that whose weights happened to be still in a cache.
    """
    executor.run_calls(step, first, min(first + 2, last))  # touches what is written
    count, window = last - first, 1
    while window < count and executor.run_calls(step, first, first + window) < _SAMPLE / 2:
        window = min(2 * window, count)
    samples: list[float] = []
    empty, at, start = float("inf"), first, time.perf_counter()
    while True:
        samples.append(executor.run_calls(step, at, at + window))
        empty = min(empty, executor.run_calls(step, at, at))
        at = at + window if at + 2 * window <= last else first
        spent = time.perf_counter() - start
        if (spent > seconds and len(samples) >= 3) or spent > 3 * seconds:
            break
    best = min(samples)
    return (best - empty if best > 2 * empty else best) / window, statistics.median(samples) / best
