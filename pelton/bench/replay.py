"""A workload replayed on an engine, open loop: requests come when they are due, whatever the engine does."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..engine.engine import LLMEngine
from ..engine.stats import EngineStats, StepRecord
from ..metrics import RequestMetrics
from .workloads import WorkloadRequest


@dataclass(frozen=True, slots=True)
class Replay:
    """What happened, in seconds of the engine's clock.

    requests and token_ids: in the order of the workload. stats: the engine's totals over the replay. start: when the
    first request was due. idle_seconds: spent waiting for the next arrival with nothing to run.
    """

    start: float
    requests: tuple[RequestMetrics, ...]
    token_ids: tuple[tuple[int, ...], ...]
    stats: EngineStats
    steps: tuple[StepRecord, ...] = ()
    idle_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """From the first arrival to the last token."""
        return max(r.token_times[-1] for r in self.requests) - self.start

    @property
    def busy_seconds(self) -> float:
        return self.seconds - self.idle_seconds

    @property
    def prompt_tokens(self) -> int:
        return sum(r.num_prompt_tokens for r in self.requests)

    @property
    def output_tokens(self) -> int:
        return sum(r.num_output_tokens for r in self.requests)


#: Seconds between two looks at a static or dynamic batch that waits to be filled.
_POLL = 0.001


def replay(
    engine: LLMEngine,
    requests: Sequence[WorkloadRequest],
    times: Sequence[float],
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    on_tokens: Callable[[int], None] = lambda total: None,
) -> Replay:
    """Run all requests to their ends.

    Args:
        engine: a new one: what it counted before would be counted in.
        times: when each request is due, seconds after the start, not decreasing. TTFT counts from there, even if the
            engine was in the middle of a step.
        clock: the engine's clock.
        sleep: called when nothing runs and the next request is not due yet.
        on_tokens: called after each step with the output tokens so far.

    Raises:
        RequestError: a request that the engine refuses.
    """
    count = len(requests)
    metrics: list[RequestMetrics | None] = [None] * count
    token_ids: list[list[int]] = [[] for _ in requests]
    records: list[StepRecord] = []
    added, total, idle = 0, 0, 0.0
    start = clock()
    while added < count or engine.has_unfinished:
        now = clock() - start
        while added < count and times[added] <= now:
            request = requests[added]
            due = start + times[added]
            engine.add_request(str(added), request.prompt_token_ids, request.params, arrival_time=due)
            added += 1
        if not engine.has_unfinished:
            sleep(times[added] - now)
            idle += clock() - start - now
            continue
        steps_before = engine.stats().steps
        for output in engine.step(flush=added == count):
            index = int(output.request_id)
            token_ids[index].extend(output.token_ids)
            total += len(output.token_ids)
            if output.metrics is not None:
                metrics[index] = output.metrics
        count_new = engine.stats().steps - steps_before
        if not count_new:  # a batch waits to be filled
            sleep(_POLL)
            idle += _POLL
            continue
        records += engine.steps(count_new)
        on_tokens(total)
    finished = tuple(m for m in metrics if m is not None)
    if len(finished) != count:
        raise RuntimeError(f"{count - len(finished)} of {count} requests never ended")
    return Replay(start, finished, tuple(map(tuple, token_ids)), engine.stats(), tuple(records), idle)


def output_rate(replay: Replay, bins: int) -> list[float]:
    """Output tokens per second over time: the rate in each of ``bins`` equal spans of the replay.

    A token belongs to the span in which it became known; the last token closes the last span.
    """
    width = replay.seconds / bins
    counts = [0] * bins
    for request in replay.requests:
        for stamp in request.token_times:
            counts[min(int((stamp - replay.start) / width), bins - 1)] += 1
    return [count / width for count in counts]
