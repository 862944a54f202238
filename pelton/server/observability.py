"""What an operator sees: Prometheus metrics under the names that vLLM has for them, with the prefix ``pelton:``.

Metrics of requests are counted by the API process that serves them, those of engines come with their states. With
several API processes prometheus_client adds the former up through files (PROMETHEUS_MULTIPROC_DIR).
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from ..config import SamplingParams
from ..engine.stats import EngineStats
from ..metrics import RequestMetrics, mbu, meets, mfu
from ..version import installed_version
from . import wire
from .config import SLO, ServerConfig
from .replicas import Replica

_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
          80.0, 160.0, 640.0)  # fmt: skip
_GAPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0)
_WHOLE = (0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
          480.0, 960.0)  # fmt: skip
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
#: Seconds over which utilisation is averaged.
_WINDOW = 10.0
#: Seconds after which an engine that has said nothing, as it does all the time, hangs.
_SILENT = 2.0


class Observability:
    """The metrics of an API process."""

    def __init__(self, config: ServerConfig) -> None:
        self._slo = config.slo
        self.num_rejected = 0
        self._engines = _Engines(config.model_names[0] if config.model_names else "")
        shared = "PROMETHEUS_MULTIPROC_DIR" in os.environ
        self._own = CollectorRegistry()
        self._registry = CollectorRegistry() if shared else self._own
        if shared:
            multiprocess.MultiProcessCollector(self._registry)  # type: ignore[no-untyped-call]
        self._registry.register(self._engines)
        self._durations: deque[tuple[float, float]] = deque(maxlen=64)  # of requests: end, seconds
        label = ("model_name",)
        name = (config.model_names[0] if config.model_names else "",)

        def histogram(key: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"pelton:{key}", text, label, buckets=buckets, registry=self._own).labels(*name)

        def counter(key: str, text: str, *labels: str) -> Counter:
            return Counter(f"pelton:{key}", text, (*label, *labels), registry=self._own)

        self.ttft = histogram("time_to_first_token_seconds", "From the request to its first token.", _FIRST)
        self.itl = histogram("inter_token_latency_seconds", "Between two tokens of a request.", _GAPS)
        self.tpot = histogram(
            "request_time_per_output_token_seconds", "Mean per token after the first, by request.", _GAPS
        )
        self.e2e = histogram("e2e_request_latency_seconds", "From the request to its last token.", _WHOLE)
        self.queue = histogram("request_queue_time_seconds", "From the request to its first step.", _WHOLE)
        self.prefill = histogram("request_prefill_time_seconds", "From the first step to the first token.", _WHOLE)
        self.decode = histogram("request_decode_time_seconds", "From the first token to the last one.", _WHOLE)
        self.prompt_tokens = histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self.output_tokens = histogram("request_generation_tokens", "Tokens of an answer.", _TOKENS)
        self.max_tokens = histogram("request_params_max_tokens", "max_tokens of a request.", _TOKENS)
        self._success = counter("request_success", "Requests that were answered.", "finished_reason")
        self._failures = counter("request_failures", "Requests that began and were not answered.", "reason")
        self._rejected = counter("requests_rejected", "Requests that were refused unanswered.", "reason")
        self._slo_requests = counter("slo_requests", "Answered requests, by whether they met the objectives.", "met")
        self._names = name
        self._active = Gauge(
            "pelton:api_active_requests", "Requests between their first and last byte.", label, registry=self._own,
            multiprocess_mode="livesum",
        ).labels(*name)  # fmt: skip
        if config.slo != SLO():
            for met in ("true", "false"):
                self._slo_requests.labels(*name, met)

    def request(self, params: SamplingParams, num_prompt_tokens: int) -> ObservedRequest:
        """A request begins."""
        self._active.inc()
        if params.max_tokens is not None:
            self.max_tokens.observe(params.max_tokens)
        self.prompt_tokens.observe(num_prompt_tokens)
        return ObservedRequest(self)

    def rejected(self, reason: str) -> None:
        self.num_rejected += 1
        self._rejected.labels(*self._names, reason).inc()

    def finished(self, metrics: RequestMetrics, reason: str) -> None:
        """A request was answered."""
        self._success.labels(*self._names, reason).inc()
        for histogram, value in (
            (self.ttft, metrics.ttft), (self.tpot, metrics.tpot), (self.e2e, metrics.e2e),
            (self.queue, metrics.queue_time),
        ):  # fmt: skip
            if value is not None:
                histogram.observe(value)
        if metrics.token_times and metrics.first_scheduled_time is not None:
            self.prefill.observe(metrics.token_times[0] - metrics.first_scheduled_time)
            self.decode.observe(metrics.token_times[-1] - metrics.token_times[0])
        if metrics.token_times:  # an embedding has none
            self.output_tokens.observe(metrics.num_output_tokens)
        for gap in metrics.itl:
            self.itl.observe(gap)
        if metrics.e2e is not None:
            self._durations.append((time.monotonic(), metrics.e2e))
        if self._slo != SLO() and metrics.token_times:
            self._slo_requests.labels(*self._names, str(meets(metrics, **self._slo.limits)).lower()).inc()

    def failed(self, reason: str) -> None:
        self._failures.labels(*self._names, reason).inc()

    def ended(self) -> None:
        self._active.dec()

    def retry_after(self) -> float:
        """Seconds after which a place in the queue may be free: the mean gap between the ends of requests."""
        if len(self._durations) < 2:
            return 1.0
        span = self._durations[-1][0] - self._durations[0][0]
        return min(60.0, max(1.0, span / (len(self._durations) - 1)))

    def state_came(self, replica: Replica, state: wire.State) -> None:
        self._engines.state_came(replica, state)

    def utilisation(self, name: str) -> Utilisation:
        """How one engine has used its machine in the last seconds."""
        return self._engines.utilisation(name)

    def joules_per_token(self) -> float | None:
        """What the machine has used in the last seconds, per output token; None where it does not tell."""
        return self._engines.joules_per_token()

    def metrics(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self._registry)


class ObservedRequest:
    """One request; exactly one of its ends counts."""

    __slots__ = ("_books", "_open", "reason")

    def __init__(self, books: Observability) -> None:
        self._books = books
        self._open = True
        self.reason = "abort"  # why it ended

    def finished(self, metrics: RequestMetrics, reason: str) -> None:
        if self._open:
            self._open = False
            self.reason = reason
            self._books.ended()
            self._books.finished(metrics, reason)

    def refused(self, reason: str) -> None:
        """The engine did not take it."""
        if self._open:
            self._open = False
            self.reason = reason
            self._books.ended()
            self._books.rejected(reason)

    def ended(self, reason: str) -> None:
        """Without an answer, unless it had one."""
        if self._open:
            self._open = False
            self.reason = reason
            self._books.ended()
            self._books.failed(reason)


class Utilisation:
    """Of the steps of a window: parts of the measured peaks, None where there is none.

    joules: of the whole machine, whichever engine tells; None where it does not tell.
    """

    def __init__(self, hello: wire.Hello | None, first: wire.State, last: wire.State) -> None:
        def gained(name: str) -> float:
            return float(getattr(last.stats, name) - getattr(first.stats, name))

        seconds, elapsed = gained("seconds"), last.time - first.time
        peaks = (None, None) if hello is None else (hello.peak_bandwidth, hello.peak_flops)
        self.mbu = None if peaks[0] is None else mbu(gained("bytes"), seconds, peaks[0])
        self.mfu = None if peaks[1] is None else mfu(gained("flops"), seconds, peaks[1])
        self.busy = min(1.0, seconds / elapsed) if elapsed > 0 else 0.0
        self.output_tokens = gained("output_tokens")
        self.joules = None if first.joules is None or last.joules is None else last.joules - first.joules


class _Engines(Collector):
    """The metrics that engines' states carry."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self._states: dict[str, deque[wire.State]] = {}
        self._replicas: dict[str, Replica] = {}
        self._hellos: dict[str, wire.Hello] = {}

    def state_came(self, replica: Replica, state: wire.State) -> None:
        self._replicas[replica.name] = replica
        states = self._states.setdefault(replica.name, deque())
        if states and state.stats.steps < states[-1].stats.steps:
            states.clear()  # another process
        light = wire.State(state.time, state.stalled, state.stats, state.adapters, state.joules)
        states.append(light)
        while len(states) > 2 and states[-1].time - states[1].time > _WINDOW:
            states.popleft()
        if replica.hello is not None:
            self._hellos[replica.name] = replica.hello

    def utilisation(self, name: str) -> Utilisation:
        states = self._states.get(name)
        if not states:
            return Utilisation(None, _NOTHING, _NOTHING)
        return Utilisation(self._hellos.get(name), states[0], states[-1])

    def joules_per_token(self) -> float | None:
        uses = [self.utilisation(name) for name in self._states if self._replicas[name].ready]
        tokens = sum(use.output_tokens for use in uses)
        joules = [use.joules for use in uses if use.joules is not None]
        return max(joules) / tokens if joules and tokens else None

    def collect(self) -> Iterator[Metric]:
        label = ("model_name", "engine")
        gauges: dict[str, GaugeMetricFamily] = {}
        counters: dict[str, CounterMetricFamily] = {}
        for key, text in _GAUGES.items():
            gauges[key] = GaugeMetricFamily(f"pelton:{key}", text, labels=label)
        for key, text in _COUNTERS.items():
            counters[key] = CounterMetricFamily(f"pelton:{key}", text, labels=label)
        for name, states in self._states.items():
            labels = (self._model_name, name)
            stats, hello = states[-1].stats, self._hellos.get(name)
            use, replica = self.utilisation(name), self._replicas[name]
            blocks = stats.num_blocks
            silent = time.monotonic() - replica.state_time
            now = {} if not replica.ready else {  # of one that is gone only its totals are true
                "num_requests_running": stats.num_running, "num_requests_waiting": stats.num_waiting,
                "kv_cache_usage_perc": (blocks - stats.num_free_blocks) / blocks if blocks else 0.0,
                "mbu_perc": use.mbu, "mfu_perc": use.mfu, "engine_busy_perc": use.busy,
                "peak_bandwidth_bytes_per_second": None if hello is None else hello.peak_bandwidth,
                "peak_flops_per_second": None if hello is None else hello.peak_flops,
                "engine_stalled_seconds": silent + states[-1].stalled if silent > _SILENT else states[-1].stalled,
            }  # fmt: skip
            for key, value in now.items():
                if value is not None:
                    gauges[key].add_metric(labels, value)
            for key, total in {
                "prompt_tokens": stats.prompt_tokens, "generation_tokens": stats.output_tokens,
                "prefix_cache_queries": stats.prompt_tokens, "prefix_cache_hits": stats.cached_tokens,
                "num_preemptions": stats.preemptions, "engine_steps": stats.steps,
                "engine_step_seconds": stats.seconds, "spec_decode_num_draft_tokens": stats.draft_tokens,
                "spec_decode_num_accepted_tokens": stats.accepted_tokens,
            }.items():  # fmt: skip
                if total is not None:
                    counters[key].add_metric(labels, total)
        yield from gauges.values()
        yield from counters.values()
        yield from self._energy()
        info = InfoMetricFamily("pelton:build", "The version that runs.")
        info.add_metric((), {"version": installed_version()})
        yield info
        if self._hellos:
            hello = next(iter(self._hellos.values()))
            cache = GaugeMetricFamily(
                "pelton:cache_config_info", "The KV cache.", labels=("block_size", "num_gpu_blocks", "max_model_len")
            )
            cache.add_metric((str(hello.block_size), str(hello.num_blocks), str(hello.max_model_len)), 1)
            yield cache

    def _energy(self) -> Iterator[Metric]:
        """Of the machine: every engine tells of all of it."""
        joules = [states[-1].joules for states in self._states.values() if states[-1].joules is not None]
        if joules:
            text = "What the machine's processors used since its engines started."
            counter = CounterMetricFamily("pelton:energy_joules", text, labels=("model_name",))
            counter.add_metric((self._model_name,), max(joules))
            yield counter
        per_token = self.joules_per_token()
        if per_token is not None:
            text = "What the machine's processors used in the last seconds, per output token."
            gauge = GaugeMetricFamily("pelton:joules_per_token", text, labels=("model_name",))
            gauge.add_metric((self._model_name,), per_token)
            yield gauge


_NOTHING = wire.State(0.0, 0.0, EngineStats(), [])

_GAUGES = {
    "num_requests_running": "Sequences that hold KV blocks.",
    "num_requests_waiting": "Sequences that wait for their first step, or to go on.",
    "kv_cache_usage_perc": "KV blocks that sequences hold; 1 is all.",
    "mbu_perc": "Bytes that steps moved, of what the measured memory bandwidth allows in their time; 1 is all.",
    "mfu_perc": "FLOPs of steps, of what the measured peak allows in their time; 1 is all.",
    "engine_busy_perc": "The part of the last seconds in which a step ran; 1 is all.",
    "peak_bandwidth_bytes_per_second": "Measured on this machine.",
    "peak_flops_per_second": "Measured on this machine, in the precision of the model's products.",
    "engine_stalled_seconds": "Time in which nothing happened although there is something to do.",
}
_COUNTERS = {
    "prompt_tokens": "Prompt tokens of requests that reached their first token.",
    "generation_tokens": "Tokens that were generated.",
    "prefix_cache_queries": "Prompt tokens that were looked up in the prefix cache.",
    "prefix_cache_hits": "Of these, found there.",
    "num_preemptions": "Sequences that gave their blocks back and were computed again.",
    "engine_steps": "Steps.",
    "engine_step_seconds": "Time in steps.",
    "spec_decode_num_draft_tokens": "Tokens that were guessed.",
    "spec_decode_num_accepted_tokens": "Of these, right.",
}
