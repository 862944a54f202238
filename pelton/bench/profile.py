"""Where the time of a real model's steps goes, per call, against the roofline."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast

import numpy as np

from ..backends.base import Batch, Executor, SampleSpec, ScheduledSequence, StepProfile
from ..build import Built
from ..config import SamplingParams
from ..errors import PeltonError
from ..program import Program
from .roofline import Peaks
from .throughput import Meter, peak_meter

_LEAST_REPEATS = 3
_GREEDY = SamplingParams(temperature=0.0)


@dataclass(slots=True)
class Part:
    """A call, or several together: what they took and what the roofline allows, in seconds.

    bounds: the roofline's seconds by what sets them.
    """

    name: str
    op: str = ""
    calls: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0
    bounds: dict[str, float] = field(default_factory=dict)
    children: dict[str, Part] = field(default_factory=dict)

    @property
    def bound_seconds(self) -> float:
        return sum(self.bounds.values())

    @property
    def bound_by(self) -> str:
        return max(self.bounds, key=lambda by: self.bounds[by], default="")

    @property
    def roof_fraction(self) -> float:
        return self.bound_seconds / self.seconds if self.seconds > 0 else 0.0

    def add(self, other: Part) -> None:
        self.calls += other.calls
        self.seconds += other.seconds
        self.flops += other.flops
        self.bytes += other.bytes
        for by, seconds in other.bounds.items():
            self.bounds[by] = self.bounds.get(by, 0.0) + seconds


@dataclass(frozen=True)
class Phase:
    """What was measured of one kind of work: a whole prefill, or a decode step.

    seconds: from the batch to its tokens, as the engine sees it, without profiling; of these native_seconds in native
    code; the best of ``repeats`` runs. calls: in order, each over all steps, of as many runs with a barrier and a
    clock reading after every call; outside_seconds: what those runs took besides. These are medians, of each call by
    itself: what else the machine does hits another call each time.
    """

    kind: str
    num_tokens: int
    context: int
    batch_size: int
    steps: int
    repeats: int
    seconds: float
    native_seconds: float
    outside_seconds: float
    calls: tuple[Part, ...]
    peaks: Peaks

    @property
    def title(self) -> str:
        several = f" × {self.batch_size}" if self.batch_size > 1 else ""
        return f"{self.kind}{several}, {self.context:,} tokens" + (" of context" if self.kind == "decode" else "")

    @property
    def call_seconds(self) -> float:
        return sum(call.seconds for call in self.calls)

    @property
    def profiled_seconds(self) -> float:
        return self.call_seconds + self.outside_seconds

    @property
    def bound_seconds(self) -> float:
        return sum(call.bound_seconds for call in self.calls)

    def by_op(self) -> list[Part]:
        """Calls of the same op, and products of the same module, added up over the layers; the longest first."""
        groups: dict[tuple[str, str], Part] = {}
        for call in self.calls:
            name = call.name.rpartition(".")[2] if call.op in ("linear", "gated_linear") else call.op
            groups.setdefault((call.op, name), Part(name, call.op)).add(call)
        return sorted(groups.values(), key=lambda part: -part.seconds)

    def tree(self, *, merge: bool) -> Part:
        """step -> layer -> module -> op. merge: all layers as one."""
        root = Part("step")
        layers: dict[str, set[str]] = {}
        for call in self.calls:
            layers.setdefault(path(call.name, merge=merge)[0], set()).add(path(call.name, merge=False)[0])
            node = root
            root.add(call)
            for name in path(call.name, merge=merge):
                node = node.children.setdefault(name, Part(name, call.op))
                node.add(call)
        for name, child in root.children.items():
            if len(layers[name]) > 1:
                child.name = f"{name} × {len(layers[name])}"
        return root


def path(name: str, *, merge: bool) -> list[str]:
    """``model.layers.3.mlp.down_proj`` -> ["layers.3", "mlp", "down_proj"]; merged -> ["layers", ...]."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if number is None:
        return parts[-1:]
    stack = parts[number - 1] if number else "layers"
    return [stack if merge else f"{stack}.{parts[number]}", *parts[number + 1 :]]


def profile(
    built: Built,
    *,
    prompt_len: int,
    contexts: Sequence[int],
    batch_size: int,
    phases: Sequence[str],
    seconds: float = 2.0,
    on_work: Callable[[str, float, float], None] = lambda what, done, total: None,
) -> Iterator[Phase]:
    """Run and measure: the prefill of ``batch_size`` prompts, then one decode step of as many sequences per context.

    seconds: per phase, more if three runs take longer. on_work(what, done, total) reports progress.

    Raises:
        PeltonError: the model runs on no backend that can be profiled, or the KV cache is too small.
    """
    executor, meter = cast(ProfiledExecutor, built.executor), peak_meter(built)
    if meter is None:
        raise PeltonError("this backend cannot be profiled", "choose --device cpu or cuda")
    need = batch_size * (max(prompt_len, *contexts) + 1)
    spec = executor.kv_spec
    if batch_size * -(-need // batch_size // spec.block_size) > spec.num_blocks:
        raise PeltonError(
            f"the KV cache holds {spec.num_blocks * spec.block_size:,} tokens, {need:,} are needed",
            "lower --batch-size, --prompt-len or --context",
        )
    runner = _Runner(executor, built.vocab_size, batch_size, max(prompt_len, *contexts) + 1)
    limit = executor.program.limits["T"]
    meter.measure()
    if "prefill" in phases:
        yield runner.measure("prefill", prompt_len, runner.prefill(0, prompt_len, limit), meter, seconds, on_work)
    if "decode" in phases:
        filled = 0
        for context in sorted(contexts):
            batches = runner.prefill(filled, context, limit)
            for i, batch in enumerate(batches):
                on_work(f"filling {context:,} tokens of context", i, len(batches))
                executor.collect(executor.submit(batch))
            filled = context
            yield runner.measure("decode", context, [runner.decode(context)], meter, seconds, on_work)


class ProfiledExecutor(Executor, Protocol):
    """An executor that can measure its calls."""

    program: Program

    def profile(self, batch: Batch) -> StepProfile: ...


class _Runner:
    def __init__(self, executor: ProfiledExecutor, vocab_size: int, batch_size: int, length: int) -> None:
        self.executor = executor
        self.batch_size = batch_size
        size = executor.kv_spec.block_size
        blocks = -(-length // size)
        self.blocks = np.arange(batch_size * blocks).reshape(batch_size, blocks).tolist()
        self.ids = np.random.default_rng(0).integers(0, vocab_size, (batch_size, length)).tolist()

    def _scheduled(self, s: int, first: int, last: int, sample: bool) -> ScheduledSequence:
        spec = SampleSpec(_GREEDY, (), (), 0) if sample else None
        blocks = -(-last // self.executor.kv_spec.block_size)
        return ScheduledSequence(str(s), tuple(self.ids[s][first:last]), first, tuple(self.blocks[s][:blocks]), spec)

    def prefill(self, first: int, last: int, limit: int) -> list[Batch]:
        """Steps of at most ``limit`` tokens that compute positions [first, last) of all sequences, in order."""
        steps: list[list[ScheduledSequence]] = [[]]
        room = limit
        for s in range(self.batch_size):
            at = first
            while at < last:
                count = min(room, last - at)
                steps[-1].append(self._scheduled(s, at, at + count, at + count == last))
                at, room = at + count, room - count
                if room == 0:
                    steps.append([])
                    room = limit
        return [Batch(tuple(step)) for step in steps if step]

    def decode(self, context: int) -> Batch:
        return Batch(tuple(self._scheduled(s, context, context + 1, True) for s in range(self.batch_size)))

    def measure(
        self, kind: str, context: int, batches: list[Batch], meter: Meter, seconds: float,
        on_work: Callable[[str, float, float], None],
    ) -> Phase:  # fmt: skip
        """Profiled and other runs in turns, so that drift of the machine hits both."""
        plain: list[tuple[float, float]] = []
        profiled: list[list[StepProfile]] = []
        self._plain(batches)  # the first run touches memory
        start = time.perf_counter()
        while len(plain) < _LEAST_REPEATS or time.perf_counter() - start < seconds:
            spent = time.perf_counter() - start
            done = min(spent / max(seconds, 1e-9), len(plain) / _LEAST_REPEATS)
            on_work(f"{kind}, {context:,} tokens", done, 1.0)
            plain.append(self._plain(batches))
            profiled.append([self.executor.profile(batch) for batch in batches])
        meter.measure()
        peaks = meter.peaks()
        outside = [sum(s.seconds - sum(c.seconds for c in s.calls) for s in steps) for steps in profiled]
        return Phase(
            kind, sum(b.num_tokens for b in batches), context, self.batch_size, len(batches), len(plain),
            *min(plain),
            max(statistics.median(outside), 0.0), calls_of(profiled, peaks), peaks,
        )  # fmt: skip

    def _plain(self, batches: list[Batch]) -> tuple[float, float]:
        start = time.perf_counter()
        native = sum(self.executor.collect(self.executor.submit(batch)).stats.seconds for batch in batches)
        return time.perf_counter() - start, native


def calls_of(runs: Sequence[Sequence[StepProfile]], peaks: Peaks) -> tuple[Part, ...]:
    """Each call of the program over the steps of a run, its time the median of the runs."""
    parts = [Part(call.name, call.op) for call in runs[0][0].calls]
    for number, step in enumerate(runs[0]):
        for index, call in enumerate(step.calls):
            seconds = statistics.median(run[number].calls[index].seconds for run in runs)
            bound = peaks.bound(call)
            parts[index].add(Part("", "", 1, seconds, call.flops, call.bytes, {bound.by: bound.seconds}))
    return tuple(parts)


def as_json(phase: Phase) -> dict[str, object]:
    """One phase for machines: seconds, bytes, FLOPs; calls in order."""
    return {
        "phase": phase.kind,
        "context": phase.context,
        "batch_size": phase.batch_size,
        "tokens": phase.num_tokens,
        "steps": phase.steps,
        "repeats": phase.repeats,
        "step_seconds": phase.seconds,
        "native_seconds": phase.native_seconds,
        "profiled_seconds": phase.profiled_seconds,
        "call_seconds": phase.call_seconds,
        "roofline_seconds": phase.bound_seconds,
        "peaks": dict(phase.peaks.rates),
        "ops": [_row(part) for part in phase.by_op()],
        "calls": [_row(part) for part in phase.calls],
    }


def _row(part: Part) -> dict[str, object]:
    rate = 1 / part.seconds if part.seconds > 0 else 0.0
    return {
        "name": part.name,
        "op": part.op,
        "calls": part.calls,
        "seconds": part.seconds,
        "bytes": part.bytes,
        "flops": part.flops,
        "gb_per_s": part.bytes * rate / 1e9,
        "tflop_per_s": part.flops * rate / 1e12,
        "peak_fraction": part.roof_fraction,
        "bound_by": part.bound_by,
    }
