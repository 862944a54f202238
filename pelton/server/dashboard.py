"""What the dashboard shows, as server-sent events: states of the engines, put together twice a second.

All but ``rejected`` comes from the engines, so that it is the same whichever API process one asks.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from ..engine.stats import StepRecord
from ..metrics import RequestMetrics, distribution, meets
from ..version import installed_version
from . import wire
from .config import SLO
from .http import Context, Reply
from .replicas import Replica
from .service import Service
from .streaming import sse

#: Seconds between two events, and those that percentiles look back on.
_PERIOD, _WINDOW = 0.5, 60.0
#: Answered requests, and decoding steps, whose latencies are kept.
_MOST = 20_000


@dataclass(frozen=True, slots=True)
class _Answered:
    """A request that was answered: when, and its latencies in seconds."""

    time: float
    ttft: float
    tpot: float | None
    e2e: float
    is_good: bool


@dataclass(frozen=True, slots=True)
class _Rates:
    """Of one engine, between its last two states."""

    time: float  # of the second
    num_finished: int  # until then
    prompt_tokens: float = 0.0  # per second, as are the others
    output_tokens: float = 0.0
    requests: float = 0.0


class Dashboard:
    """Gathers what engines say while somebody looks."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._viewers: dict[_Viewer, None] = {}
        self._answered: deque[_Answered] = deque(maxlen=_MOST)
        # Of decoding steps: when, the gap to the one before in seconds, for how many sequences.
        self._gaps: deque[tuple[float, float, int]] = deque(maxlen=_MOST)
        self._last_decode: dict[str, float] = {}
        self._rates: dict[str, _Rates] = {}
        service.on_state(self._state_came)

    async def events(self, body: bytes, context: Context) -> Reply | AsyncIterator[bytes]:
        """The handler of /dashboard/events."""
        return self._events()

    async def _events(self) -> AsyncIterator[bytes]:
        viewer = _Viewer(self._service)
        if not self._viewers:
            self._last_decode.clear()  # nobody has told of the steps since
            self._service.replicas.watch(True)
        self._viewers[viewer] = None
        try:
            while not self._service.gate.draining:
                yield sse(self._message(viewer))
                await asyncio.sleep(_PERIOD)
        finally:
            del self._viewers[viewer]
            if not self._viewers:
                self._service.replicas.watch(False)

    def _state_came(self, replica: Replica, state: wire.State) -> None:
        for record in state.requests:
            if record.finished is not None and record.reason in ("stop", "length"):
                self._count(record)
        for step in state.steps:
            last = self._last_decode.get(replica.name)
            if step.num_decodes:
                if last is not None:
                    self._gaps.append((step.time, step.time - last, step.num_decodes))
                self._last_decode[replica.name] = step.time
            if not step.num_running:  # the next gap is no one's
                self._last_decode.pop(replica.name, None)
        self._measure(replica.name, state)
        for viewer in self._viewers:
            viewer.state_came(replica, state)

    def _count(self, record: wire.RequestRecord) -> None:
        if record.first_token is None or record.last_token is None or record.finished is None:
            return
        count = record.output_tokens
        # As far as latencies need them: the tokens between the first and the last are evenly spread.
        gap = (record.last_token - record.first_token) / max(1, count - 1)
        times = tuple(record.first_token + gap * i for i in range(count))
        metrics = RequestMetrics(record.arrived, record.scheduled, times)
        if metrics.ttft is not None and metrics.e2e is not None:
            good = meets(metrics, **self._service.config.slo.limits)
            self._answered.append(_Answered(record.finished, metrics.ttft, metrics.tpot, metrics.e2e, good))

    def _measure(self, name: str, state: wire.State) -> None:
        """By the engine's clock and totals: a message may come between two states, or behind several."""
        last, num_finished = self._rates.get(name), sum(state.finished.values())
        seconds = 0.0 if last is None else state.time - last.time
        if last is None or seconds <= 0 or num_finished < last.num_finished:  # another process
            self._rates[name] = _Rates(state.time, num_finished)
            return
        self._rates[name] = _Rates(
            state.time, num_finished,
            sum(step.prefill_tokens for step in state.steps) / seconds,
            sum(step.output_tokens for step in state.steps) / seconds,
            (num_finished - last.num_finished) / seconds,
        )  # fmt: skip

    def _message(self, viewer: _Viewer) -> dict[str, Any]:
        service = self._service
        now = time.monotonic()
        to_unix = time.time() - now
        ready = [replica for replica in service.replicas.replicas if replica.ready and replica.state is not None]
        stats = service.replicas.stats()
        blocks = stats.num_blocks
        while self._answered and self._answered[0].time <= now - _WINDOW:
            self._answered.popleft()
        while self._gaps and self._gaps[0][0] <= now - _WINDOW:
            self._gaps.popleft()
        rates = [self._rates[replica.name] for replica in ready if replica.name in self._rates]
        slo = service.config.slo
        use = [service.observability.utilisation(replica.name) for replica in ready]
        finished: Counter[str] = Counter()
        for replica in ready:
            finished.update(replica.state.finished if replica.state is not None else {})
        hellos = [replica.hello for replica in ready if replica.hello is not None]
        message = {
            "time": now + to_unix, "model": service.config.model_names[0], "version": installed_version(),
            "uptime_s": time.time() - service.started,
            "replicas": [{"name": r.name, "ready": r.ready} for r in service.replicas.replicas],
            "prompt_tokens_per_s": sum(r.prompt_tokens for r in rates),
            "output_tokens_per_s": sum(r.output_tokens for r in rates),
            "requests_per_s": sum(r.requests for r in rates),
            "running": stats.num_running, "waiting": stats.num_waiting,
            "max_num_seqs": sum(hello.max_num_seqs for hello in hellos),
            "kv_use": (blocks - stats.num_free_blocks) / blocks if blocks else 0.0,
            "prefix_hit_rate": stats.cached_tokens / stats.prompt_tokens if stats.prompt_tokens else None,
            "preemptions": stats.preemptions,
            "mbu": _mean([u.mbu for u in use]), "mfu": _mean([u.mfu for u in use]),
            "busy": _mean([u.busy for u in use]) or 0.0,
            "peak_bandwidth": hellos[0].peak_bandwidth if hellos else None,
            "peak_flops": hellos[0].peak_flops if hellos else None,
            "joules_per_token": service.observability.joules_per_token(),
            "latency": self._latency(),
            "finished": dict(finished), "rejected": service.observability.num_rejected,
            "goodput": None if slo == SLO() else {
                "slo": {f"{name}_ms": None if value is None else 1e3 * value
                        for name, value in (("ttft", slo.ttft), ("tpot", slo.tpot), ("e2e", slo.e2e))},
                "fraction": _mean([float(answered.is_good) for answered in self._answered]),
            },
        }  # fmt: skip
        return message | viewer.take(to_unix)

    def _latency(self) -> dict[str, Any]:
        answered = self._answered
        values = {
            "ttft_ms": [a.ttft for a in answered],
            "tpot_ms": [a.tpot for a in answered if a.tpot is not None],
            "itl_ms": [gap for _, gap, count in self._gaps for _ in range(min(count, 8))],
            "e2e_ms": [a.e2e for a in answered],
        }
        return {name: distribution([1e3 * v for v in given]) if given else None for name, given in values.items()}


class _Viewer:
    """What one reader of the events has not been told yet."""

    def __init__(self, service: Service) -> None:
        self._steps: list[StepRecord] = []
        self._requests: dict[str, tuple[str, wire.RequestRecord]] = {}
        self._latest: dict[str, wire.State] = {}
        self._operations: list[tuple[str, float, float | None]] | None = None
        self._service = service

    def state_came(self, replica: Replica, state: wire.State) -> None:
        self._steps += state.steps
        del self._steps[:-4096]
        self._latest[replica.name] = state
        # An unfinished request of an older state has ended since, or comes again.
        self._requests = {
            key: (name, record) for key, (name, record) in self._requests.items()
            if name != replica.name or record.finished is not None
        }  # fmt: skip
        for record in state.requests:
            self._requests[f"{replica.name}/{record.request_id}"] = (replica.name, record)
        if state.operations is not None:
            self._operations = state.operations

    def take(self, to_unix: float) -> dict[str, Any]:
        steps, self._steps = self._steps, []
        requests = self._requests
        self._requests = {key: value for key, value in requests.items() if value[1].finished is None}
        operations = self._operations
        whole = sum(seconds for _, seconds, _ in operations) if operations else 0.0
        return {
            "steps": [
                {"t": step.time + to_unix, "s": step.seconds, "prefill": step.prefill_tokens,
                 "decode": step.decode_tokens}
                for step in steps
            ],
            "requests": [_request(name, record, to_unix) for name, record in requests.values()],
            "kv_map": [self._kv_map(name, state) for name, state in self._latest.items() if state.kv_map is not None],
            "ops": None if not operations else [
                {"op": op, "seconds": seconds, "fraction": seconds / whole if whole else 0.0, "roof": roof}
                for op, seconds, roof in sorted(operations, key=lambda o: -o[1])
            ],
        }  # fmt: skip

    def _kv_map(self, name: str, state: wire.State) -> dict[str, Any]:
        hello = self._service.hello
        digits = bytes.maketrans(bytes(range(256)), b"02" + b"3" * 252 + b"13")
        assert state.kv_map is not None
        return {
            "replica": name, "num_blocks": hello.num_blocks, "block_size": hello.block_size,
            "blocks_per_cell": state.blocks_per_cell, "cells": state.kv_map.translate(digits).decode(),
        }  # fmt: skip


def _request(name: str, record: wire.RequestRecord, to_unix: float) -> dict[str, Any]:
    def unix(value: float | None) -> float | None:
        return None if value is None else value + to_unix

    return {
        "id": record.request_id, "replica": name, "arrived": unix(record.arrived), "scheduled": unix(record.scheduled),
        "first_token": unix(record.first_token), "finished": unix(record.finished), "reason": record.reason,
        "prompt_tokens": record.prompt_tokens, "cached_tokens": record.cached_tokens,
        "output_tokens": record.output_tokens,
    }  # fmt: skip


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
