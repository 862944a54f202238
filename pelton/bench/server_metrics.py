"""What a server says of itself at /metrics (Prometheus text format), before, during and after a load."""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .http_client import ExchangeError, HttpClient

_SAMPLE = re.compile(r'([a-zA-Z_:][\w:]*)(?:\{((?:[^"}]|"(?:[^"\\]|\\.)*")*)\})?\s+(\S+)(?:\s+-?\d+)?\s*')
_SERVERS = ("pelton", "vllm", "sglang", "llamacpp", "tgi")
_POLL_SECONDS = 1.0

#: What is reported -> names of the counter, without the server's. Differences over the run.
_COUNTERS = {
    "prefix_cache_queries": ("prefix_cache_queries", "gpu_prefix_cache_queries"),
    "prefix_cache_hits": ("prefix_cache_hits", "gpu_prefix_cache_hits"),
    "preemptions": ("num_preemptions", "preemptions"),
    "prompt_tokens": ("prompt_tokens",),
    "output_tokens": ("generation_tokens", "output_tokens", "tokens_predicted"),
    "joules": ("energy_joules", "joules"),
}
#: The highest, and the mean, of what was seen. Fractions of 1 but for the numbers of requests.
_GAUGES = {
    "kv_use": ("kv_cache_usage_perc", "gpu_cache_usage_perc", "kv_cache_usage_ratio", "token_usage", "kv_cache_usage"),
    "running": ("num_requests_running", "num_running_reqs", "requests_processing", "requests_running"),
    "waiting": ("num_requests_waiting", "num_queue_reqs", "requests_deferred", "requests_waiting"),
    "mbu": ("mbu_perc",),
    "mfu": ("mfu_perc",),
    "cache_hit_rate": ("cache_hit_rate",),
}
#: Mean of what a histogram got during the run, in seconds.
_HISTOGRAMS = {
    "ttft": ("time_to_first_token_seconds",),
    "queue_time": ("request_queue_time_seconds", "queue_time_seconds"),
}
#: Of several processes these are averaged; everything else is added up, but for joules: each engine measures the
#: whole machine.
_SHARES = ("kv_use", "mbu", "mfu", "cache_hit_rate")


def parse(text: str) -> dict[str, list[float]]:
    """The samples by name, the server's prefix and ``_total`` left out; one for each set of labels."""
    samples: dict[str, list[float]] = {}
    for line in text.splitlines():
        found = _SAMPLE.fullmatch(line)
        if line.startswith("#") or not found:
            continue
        server, separator, name = _split(found.group(1))
        if not separator or server not in _SERVERS:
            continue
        with contextlib.suppress(ValueError):
            value = float(found.group(3))
            if math.isfinite(value):
                samples.setdefault(name.removesuffix("_total"), []).append(value)
    return samples


def _split(name: str) -> tuple[str, str, str]:
    return name.partition(":") if ":" in name else name.partition("_")


def _of(samples: Mapping[str, list[float]], names: Sequence[str]) -> list[float] | None:
    return next((samples[name] for name in names if name in samples), None)


class ServerMetrics:
    """Looks at /metrics at the start and the end of a ``with`` and every second in between. Never fails.

    A server that does not have it, or stops to have it, has no figures. client: None: do not look.
    """

    def __init__(self, client: HttpClient | None) -> None:
        self._client = client
        self._seen: list[dict[str, list[float]]] = []
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> ServerMetrics:
        await self._look()
        if self._seen:
            self._task = asyncio.create_task(self._poll())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            await self._look()

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(_POLL_SECONDS)
            await self._look()

    async def _look(self) -> None:
        if self._client is None:
            return
        with contextlib.suppress(ExchangeError):
            status, body = await self._client.get("/metrics", timeout=5.0)
            samples = parse(body.decode("utf-8", "replace")) if status == 200 else {}
            if samples:
                self._seen.append(samples)

    def row(self) -> dict[str, Any] | None:
        """Differences of counters, highest and mean of gauges, means of histograms; only what the server has.

        ``prefix_hit_rate`` is of the tokens that were looked up. None: no metrics of a server that is known.
        """
        if len(self._seen) < 2:
            return None
        first, last = self._seen[0], self._seen[-1]
        row: dict[str, Any] = {}
        for what, names in _COUNTERS.items():
            before, after = _of(first, names), _of(last, names)
            if after is not None:
                total = max if what == "joules" else sum
                row[what] = total(after) - total(before or [0.0])
        for what, names in _GAUGES.items():
            values = list(self._gauge(what, names))
            if values:
                row[f"{what}_max"], row[f"{what}_mean"] = max(values), math.fsum(values) / len(values)
        for what, names in _HISTOGRAMS.items():
            sums, counts = ([_delta(first, last, f"{name}_{part}") for name in names] for part in ("sum", "count"))
            number = sum(c for c in counts if c)
            if number:
                row[f"{what}_ms_mean"] = 1e3 * sum(s for s in sums if s) / number
        if row.get("prefix_cache_queries"):
            row["prefix_hit_rate"] = row.get("prefix_cache_hits", 0.0) / row["prefix_cache_queries"]
        return row or None

    def _gauge(self, what: str, names: Sequence[str]) -> Iterator[float]:
        for samples in self._seen[1:-1] or self._seen:  # at the first and the last look the server has nothing to do
            values = _of(samples, names)
            if values:
                yield sum(values) / (len(values) if what in _SHARES else 1)


def _delta(first: Mapping[str, list[float]], last: Mapping[str, list[float]], name: str) -> float | None:
    return sum(last[name]) - sum(first.get(name, ())) if name in last else None
