"""Throughput of an engine under a workload, and of several engines beside each other on the same requests."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from ..backends.cpu.executor import CpuExecutor
from ..build import Built
from ..engine.engine import LLMEngine
from ..metrics import latencies_ms, mbu, mfu, throughput
from .neighbours import Neighbours
from .replay import Replay, replay
from .roofline import DeviceMeter, PeakMeter, Peaks
from .workloads import Workload

#: Of each request of a warm-up: enough to decode.
_WARMUP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Variant:
    """An engine to be measured. batching None: what the engine does by itself."""

    max_num_seqs: int
    batching: str | None = None


@dataclass(slots=True)
class Measured:
    """The rounds of a variant, in order, each with the peaks of its time (None: no such device) and the cores that
    others kept busy meanwhile (None: unknown)."""

    variant: Variant
    replays: list[Replay] = field(default_factory=list)
    peaks: list[Peaks | None] = field(default_factory=list)
    others: list[float | None] = field(default_factory=list)

    @property
    def rates(self) -> list[float]:
        """Output tokens per second of each round."""
        return [throughput(r.output_tokens, r.seconds) for r in self.replays]

    @property
    def middle(self) -> int:
        """The round of median throughput: its figures stand for the variant, so that all belong to one run."""
        rates = self.rates
        return rates.index(statistics.median_low(rates))


class Meter(Protocol):
    """Measures peaks before and after what they are compared with."""

    def measure(self) -> None: ...

    def peaks(self) -> Peaks: ...


def peak_meter(built: Built) -> Meter | None:
    """A meter of the machine that a model runs on; None for devices whose peaks nobody measures."""
    if isinstance(built.executor, CpuExecutor):
        return PeakMeter(built.plan.isa, built.plan.threads)
    if built.plan.config.device == "cuda":
        from ..backends.cuda.backend import CudaBackend

        assert isinstance(built.plan.backend, CudaBackend)
        return DeviceMeter(built.plan.backend.peaks)
    return None


def precision_of(executor: object) -> str | None:
    """The precision that MFU is of; None for devices whose peaks nobody measures."""
    precision: str | None = getattr(executor, "precision", None)
    return precision


def warm_up(engine: LLMEngine, workload: Workload, count: int) -> None:
    """A few short requests, so that weights and KV cache are in memory and threads are awake."""
    requests = [
        replace(r, params=replace(r.params, max_tokens=min(r.max_tokens, _WARMUP_TOKENS), min_tokens=0))
        for r in workload.requests[:count]
    ]
    replay(engine, requests, [0.0] * len(requests))


def run_rounds(
    measured: Sequence[Measured],
    new_engine: Callable[[Variant], LLMEngine],
    workload: Workload,
    times: Sequence[float],
    *,
    rounds: int,
    meter: Meter | None,
    on_tokens: Callable[[Measured, int, int], None] = lambda measured, round, total: None,
) -> Iterator[Measured]:
    """Measure all variants once, then all of them again: drift of the machine hits each alike.

    Every second round goes backwards, so that none is always first. Each replay has a new engine, hence an empty KV
    cache. Yields what has just got another round.
    """
    if meter is not None:
        meter.measure()
    for number in range(rounds):
        for each in measured if number % 2 == 0 else reversed(measured):

            def report(total: int, each: Measured = each, number: int = number) -> None:
                on_tokens(each, number, total)

            engine, neighbours = new_engine(each.variant), Neighbours()
            done = replay(engine, workload.requests, times, on_tokens=report)
            each.others.append(neighbours.cores())
            if meter is not None:
                meter.measure()
            each.replays.append(done)
            each.peaks.append(None if meter is None else meter.peaks())
            yield each


def summary(done: Replay, peaks: Peaks | None, precision: str | None) -> dict[str, Any]:
    """The figures of a replay: tokens and requests per second, latencies in ms, fractions of 1.

    MBU and MFU are of the time in which there was something to run, Python's share included; ``mbu_decode`` is of
    the steps that only decode and their time in native code, as ``pelton run`` reports it. None: not measurable.
    """
    stats, seconds = done.stats, done.seconds
    steps = done.steps
    row: dict[str, Any] = {
        "num_requests": len(done.requests),
        "prompt_tokens": done.prompt_tokens,
        "cached_tokens": sum(r.num_cached_tokens for r in done.requests),
        "output_tokens": done.output_tokens,
        "seconds": seconds,
        "idle_seconds": done.idle_seconds,
        "output_tokens_per_s": throughput(done.output_tokens, seconds),
        "prompt_tokens_per_s": throughput(done.prompt_tokens, seconds),
        "total_tokens_per_s": throughput(done.prompt_tokens + done.output_tokens, seconds),
        "requests_per_s": throughput(len(done.requests), seconds),
        **latencies_ms(done.requests),
        **utilization(done, peaks, precision),
        "steps": stats.steps,
        "device_seconds": stats.seconds,
        "preemptions": stats.preemptions,
        "kv_use_max": max((m.kv_use for m in steps), default=0.0),
        "running_mean": statistics.fmean([m.num_running for m in steps]) if steps else 0.0,
        "running_max": max((m.num_running for m in steps), default=0),
        "output_sha256": output_digest(done),
    }
    return row


def utilization(done: Replay, peaks: Peaks | None, precision: str | None) -> dict[str, Any]:
    """``mbu``, ``mfu``, ``mfu_precision`` and ``mbu_decode``."""
    if peaks is None or precision is None:
        return {"mbu": None, "mfu": None, "mfu_precision": precision, "mbu_decode": None}
    stats, bandwidth = done.stats, peaks.rates["read_bandwidth"]
    return {
        "mbu": mbu(stats.bytes, done.busy_seconds, bandwidth),
        "mfu": mfu(stats.flops, done.busy_seconds, peaks.compute(precision)),
        "mfu_precision": precision,
        "mbu_decode": mbu(stats.decode_bytes, stats.decode_seconds, bandwidth) if stats.decode_steps else None,
    }


def output_digest(done: Replay) -> str:
    """Equal for equal tokens: engines that batch differently must not answer differently."""
    return hashlib.sha256(repr(done.token_ids).encode()).hexdigest()


def paired_ratio(rates: Sequence[float], baseline: Sequence[float]) -> float:
    """The median over rounds of one's rate over the other's in the same round."""
    return statistics.median(a / b for a, b in zip(rates, baseline, strict=False))


def row(measured: Measured, baseline: Measured, precision: str | None) -> dict[str, Any]:
    """A variant for machines: the figures of its median round, all rounds' throughput, and the ratio to the first."""
    middle = measured.middle
    peaks = measured.peaks[middle]
    return {
        **summary(measured.replays[middle], peaks, precision),
        "rounds_output_tokens_per_s": measured.rates,
        "ratio_to_first": paired_ratio(measured.rates, baseline.rates),
        "others_cores": measured.others[middle],
        "peaks": None if peaks is None else dict(peaks.rates),
    }
