"""Every precision beside bf16: one sequence, whose prompt shows products and whose answer bandwidth; batches.

MBU counts the bytes that the precision has, MFU is of the peak of the type that is multiplied: bf16 where only weights
are quantized. Weights are random codes of the types that the engine would make of bf16.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .decode import _WARM, Utilization, merged, prefills, replayed, requests, steady
from .model import loaded
from .part import Part, Row
from .peaks import Meter
from .precision import Precision, each, precisions, with_ratios

if TYPE_CHECKING:
    from pelton.build import Built


def run(part: Part) -> None:
    found = Utilization(Meter(part, [p.product for p in precisions(part)]))
    try:
        each(part, lambda precision, left: _measure(part, precision, left, found))
    finally:
        found.finish(part)
        summarize(part.data)
        part.save()


def summarize(data: Row) -> None:
    """Ratios to bf16, of whatever rows there are."""
    with_ratios(data["rows"], ("what", "batch"), ("decode_tokens_per_s", "prefill_tokens_per_s"))


def _measure(part: Part, precision: Precision, left: Callable[[], float], found: Utilization) -> None:
    scale = part.scale
    longest = max(scale.prompt_len + scale.output_len, scale.batch_prompt_len + scale.batch_output_len + 32)
    # Steps as small as other parts have them: what is found out about products of some size is used again.
    limits: dict[str, Any] = {"max_num_seqs": max(scale.precision_batches), "max_num_batched_tokens": scale.chunk,
                              "max_model_len": longest, "async_scheduling": True}  # fmt: skip
    with loaded(part, **limits, **precision.options) as (built, config):
        _one(part, precision, built, config, found)
        _batches(part, precision, built, config, left, found)


def _product(built: Built) -> str:
    """The type that most products run in, as the engine says: a device without FP8 has bf16 in its place."""
    return str(built.executor.precision)  # type: ignore[attr-defined]


def _about(precision: Precision, built: Built) -> Row:
    return {"precision": precision.name, "weights": built.plan.ledger.weights,
            "kv_bytes_per_token": built.plan.ledger.kv_bytes_per_token}  # fmt: skip


def _one(part: Part, precision: Precision, built: Built, config: Any, found: Utilization) -> None:
    from pelton.metrics import throughput

    scale = part.scale
    asked = requests(part, [(scale.prompt_len, scale.output_len)])
    replayed(part, built, config, asked)  # compiles kernels
    done = [replayed(part, built, config, asked) for _ in range(scale.precision_iterations)]
    times = [d.requests[0] for d in done]
    decode, prefill = merged([steady(d, 1) for d in done]), merged([prefills(d) for d in done])
    found.row(
        part, decode, prefill, _product(built), what="one", batch=1, **_about(precision, built),
        prompt=scale.prompt_len, output=scale.output_len,
        decode_tokens_per_s=throughput(decode.count, decode.wall),
        prefill_tokens_per_s=throughput(len(done) * scale.prompt_len, prefill.device),
        ttft_ms=1e3 * statistics.median(t.ttft for t in times if t.ttft is not None),
        tpot_ms=1e3 * statistics.median(t.tpot for t in times if t.tpot is not None),
        step_bytes=decode.bytes / max(decode.count, 1),
    )  # fmt: skip


def _batches(
    part: Part, precision: Precision, built: Built, config: Any, left: Callable[[], float], found: Utilization
) -> None:
    """As many as this precision's share of the time allows: the next takes up to four times as long as the last."""
    from pelton.bench.latency import check_capacity
    from pelton.errors import RequestError
    from pelton.metrics import throughput

    scale = part.scale
    prompt, output = scale.batch_prompt_len, scale.batch_output_len
    took = 0.0
    for batch in scale.precision_batches:
        if took and left() < 3 * took:
            part.data.setdefault("cut_short", {})[precision.name] = batch
            part.say(f"{precision.name}: no time for batches of {batch} and more")
            break
        try:
            check_capacity(built.executor.kv_spec, batch, prompt + output)
        except RequestError as error:
            part.say(f"batch {batch}: {error}")
            break
        before = left()
        if batch <= _WARM:
            replayed(part, built, config, requests(part, [(prompt, 2)] * batch))
        done = replayed(part, built, config, requests(part, [(prompt, output)] * batch, seed=1))
        took = before - left()
        decode = steady(done, batch)
        found.row(
            part, decode, prefills(done), _product(built), what="batch", batch=batch, precision=precision.name,
            prompt=prompt, output=output,
            decode_tokens_per_s=throughput(batch * decode.count, decode.wall),
            output_tokens_per_s=throughput(done.output_tokens, done.seconds), seconds=done.seconds,
        )  # fmt: skip
