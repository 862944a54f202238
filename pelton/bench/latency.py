"""Latency of one batch of known shape: prompts go in together, again and again, and nothing else runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..backends.base import KVSpec
from ..engine.engine import LLMEngine
from ..errors import RequestError
from ..metrics import latencies_ms, mbu, mfu, throughput
from .replay import Replay, replay
from .roofline import Peaks
from .workloads import Workload


@dataclass(frozen=True, slots=True)
class Phases:
    """A replay of requests that came together, cut when the last of them has its first token.

    Tokens that others got before that are decoded while prefills run, so they count for neither rate.
    """

    prefill_seconds: float
    prompt_tokens: int
    decode_seconds: float
    decode_tokens: int


def phases(done: Replay) -> Phases:
    cut = max(r.token_times[0] for r in done.requests)
    after = sum(stamp > cut for r in done.requests for stamp in r.token_times)
    return Phases(cut - done.start, done.prompt_tokens, done.start + done.seconds - cut, after)


def check_capacity(spec: KVSpec, batch_size: int, tokens: int) -> None:
    """Raises RequestError unless ``batch_size`` sequences of ``tokens`` fit into the KV cache together.

    They would take turns otherwise, and that is not the latency of the batch. The scheduler admits the last one
    only if every other has a block left to grow into.
    """
    need = batch_size * -(-tokens // spec.block_size) + batch_size - 1
    if need > spec.num_blocks:
        raise RequestError(
            f"the KV cache holds {spec.num_blocks * spec.block_size:,} tokens, {need * spec.block_size:,} are needed",
            "lower --batch-size, --input-len or --output-len",
        )


def run_iterations(new_engine: Callable[[], LLMEngine], workload: Workload, count: int) -> Iterator[Replay]:
    """The same batch ``count`` times, each on a new engine, so that no prefix is found in the KV cache."""
    for _ in range(count):
        yield replay(new_engine(), workload.requests, [0.0] * len(workload.requests))


def summary(replays: Sequence[Replay], peaks: Peaks | None, precision: str | None) -> dict[str, Any]:
    """The figures over all iterations: latencies of every request in ms, rates in tokens per second.

    ``mbu_decode`` is of the steps that only decode, ``mfu_prefill`` of all others, over their time in native code.
    """
    parts = [phases(done) for done in replays]
    stats = [done.stats for done in replays]
    decode_seconds, decode_bytes = sum(s.decode_seconds for s in stats), sum(s.decode_bytes for s in stats)
    prefill_seconds = sum(s.seconds for s in stats) - decode_seconds
    prefill_flops = sum(s.flops - s.decode_flops for s in stats)
    known = peaks is not None and precision is not None
    decodes = known and any(s.decode_steps for s in stats)
    return {
        "output_tokens_per_s": throughput(sum(d.output_tokens for d in replays), sum(d.seconds for d in replays)),
        **latencies_ms([request for done in replays for request in done.requests]),
        "prefill_tokens_per_s": throughput(
            sum(p.prompt_tokens for p in parts), sum(p.prefill_seconds for p in parts)
        ),
        "decode_tokens_per_s": (
            throughput(sum(p.decode_tokens for p in parts), sum(p.decode_seconds for p in parts))
            if any(p.decode_tokens for p in parts) else None
        ),
        "mbu_decode": mbu(decode_bytes, decode_seconds, peaks.rates["read_bandwidth"]) if peaks and decodes else None,
        "mfu_prefill": mfu(prefill_flops, prefill_seconds, peaks.compute(precision)) if peaks and precision else None,
        "mfu_precision": precision,
        "preemptions": sum(s.preemptions for s in stats),
        "peaks": None if peaks is None else dict(peaks.rates),
    }  # fmt: skip


def gaps_by_position(replays: Sequence[Replay]) -> list[list[float]]:
    """ITL in seconds before output token 2, 3, ..., each of all requests of all iterations."""
    gaps = [request.itl for done in replays for request in done.requests]
    longest = max(map(len, gaps), default=0)
    return [[gap[i] for gap in gaps if i < len(gap)] for i in range(longest)]
