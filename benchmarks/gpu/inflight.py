"""In-flight batching beside static, on the lengths of real conversations, all requests there from the start."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

from . import sharegpt_lengths
from .decode import Utilization, replayed, requests, steady
from .decode import prefills as prefill_steps
from .model import loaded
from .part import Part
from .peaks import Meter


def lengths(part: Part) -> list[tuple[int, int]]:
    """(prompt, output) of the requests, cut to what the scale allows."""
    scale = part.scale
    most = scale.longest // 2 if scale.longest < 2048 else scale.longest
    return [(min(p, most), min(o, most)) for p, o in sharegpt_lengths.read()[: scale.requests]]


def run(part: Part) -> None:
    from pelton.bench.throughput import output_digest
    from pelton.metrics import percentile, pooled_itl, throughput

    scale = part.scale
    found = Utilization(Meter(part))
    asked = requests(part, lengths(part))
    limits: dict[str, Any] = {"max_num_seqs": scale.seats, "max_num_batched_tokens": scale.chunk,
                              "max_model_len": scale.longest, "async_scheduling": True}  # fmt: skip
    rates: dict[str, float] = {}
    try:
        with loaded(part, **limits) as (built, config):
            warm = [replace(r, params=replace(r.params, max_tokens=2)) for r in asked[: 2 * scale.seats]]
            replayed(part, built, config, warm)
            for batching in ("inflight", "static"):
                done = replayed(part, built, replace(config, batching=batching), asked)  # type: ignore[arg-type]
                rates[batching] = throughput(done.output_tokens, done.seconds)
                ttft = [m.ttft for m in done.requests if m.ttft is not None]
                itl = pooled_itl(done.requests)
                found.row(
                    part, steady(done, scale.seats), prefill_steps(done), batching=batching, requests=len(asked),
                    seats=scale.seats, output_tokens_per_s=rates[batching], seconds=done.seconds,
                    to_static=None, running_mean=statistics.fmean(s.num_running for s in done.steps),
                    device_to_wall_of_all=sum(s.seconds for s in done.steps) / done.seconds,
                    ttft_p50_ms=1e3 * percentile(ttft, 50), ttft_p99_ms=1e3 * percentile(ttft, 99),
                    itl_p50_ms=1e3 * percentile(itl, 50), itl_p99_ms=1e3 * percentile(itl, 99),
                    output_sha256=output_digest(done),
                )  # fmt: skip
    finally:
        for row in part.data["rows"]:
            if "static" in rates:
                row["to_static"] = rates[row["batching"]] / rates["static"]
        found.finish(part)
