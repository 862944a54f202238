"""One sequence, and batches of 1 to 256: latencies, tokens per second, and what part of the device's peaks that is.

Bytes and FLOPs are those of the op table. *Device* seconds lie between two marks in the device's stream, before a
step's inputs are sent and after its tokens have come back, so they hold gaps between kernels that are launched one by
one; *wall* seconds go from one token to the next and have Python's share.
"""

from __future__ import annotations

import statistics
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .model import loaded
from .part import OutOfTimeError, Part, Row
from .peaks import Meter

if TYPE_CHECKING:
    from pelton.bench.replay import Replay
    from pelton.bench.workloads import WorkloadRequest
    from pelton.build import Built
    from pelton.engine.stats import StepRecord


#: Batches up to this size are run once before they are measured: larger ones take long, and a first call little of it.
_WARM = 16


@dataclass
class Steps:
    """Sums over steps of one kind."""

    count: int = 0
    device: float = 0.0  # seconds
    wall: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0

    def add(self, record: StepRecord, wall: float) -> None:
        self.count += 1
        self.device += record.seconds
        self.wall += wall
        self.flops += record.flops
        self.bytes += record.bytes


def requests(part: Part, lengths: Sequence[tuple[int, int]], seed: int = 0) -> list[WorkloadRequest]:
    """Random prompts, greedy answers of exactly the length asked for. lengths: (prompt, output) of each."""
    import numpy as np

    from pelton import SamplingParams
    from pelton.bench.workloads import WorkloadRequest

    rng = np.random.default_rng(seed)
    return [
        WorkloadRequest(
            tuple(rng.integers(2, part.scale.config["vocab_size"], prompt).tolist()),
            SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True),
        )
        for prompt, output in lengths
    ]


def replayed(part: Part, built: Built, config: Any, asked: Sequence[WorkloadRequest]) -> Replay:
    """All requests at once on a new engine. Raises OutOfTimeError in the middle if it must."""
    from pelton.bench.replay import replay
    from pelton.llm import engine_of

    engine = engine_of(built, config)
    try:
        return replay(engine, asked, [0.0] * len(asked), on_tokens=lambda total: part.check())
    finally:
        engine.drain()


def steady(done: Replay, batch: int) -> Steps:
    """Steps that decode ``batch`` sequences and nothing else, behind another such step."""
    found, before = Steps(), None
    for record in done.steps:
        if record.num_prefills or record.num_decodes != batch:
            before = None
            continue
        if before is not None:
            found.add(record, record.time - before)
        before = record.time
    return found


def prefills(done: Replay) -> Steps:
    """Steps with a part of a prompt."""
    found = Steps()
    for record in done.steps:
        if record.num_prefills:
            found.add(record, 0.0)
    return found


def merged(parts: Sequence[Steps]) -> Steps:
    names = ("count", "device", "wall", "flops", "bytes")
    return Steps(*(sum(getattr(p, name) for p in parts) for name in names))


def utilization(decode: Steps, prefill: Steps, meter: Meter, product: str | None = None) -> Row:
    """Fractions of 1. product: the type of most products, None for the model's; without a peak there is no MFU."""
    from pelton.metrics import mbu, mfu

    flops = meter.flops if product is None else meter.rate(product)
    return {
        "mbu_device": mbu(decode.bytes, decode.device, meter.bandwidth),
        "mbu_wall": mbu(decode.bytes, decode.wall, meter.bandwidth),
        "mfu_decode": None if flops is None else mfu(decode.flops, decode.device, flops),
        "mfu_prefill": None if flops is None else mfu(prefill.flops, prefill.device, flops),
        "device_to_wall": decode.device / decode.wall if decode.wall else 0.0,
        "device_ms": 1e3 * decode.device / max(decode.count, 1),
        "step_ms": 1e3 * decode.wall / max(decode.count, 1),
    }


class Utilization:
    """Fills rows in again when the peaks behind the measurements are known as well."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self._rows: list[tuple[Row, Steps, Steps, str | None]] = []

    def row(self, part: Part, decode: Steps, prefill: Steps, product: str | None = None, **values: Any) -> None:
        if product is not None:
            values["product"] = product
        row = part.row(**values, **utilization(decode, prefill, self.meter, product))
        self._rows.append((row, decode, prefill, product))

    def finish(self, part: Part) -> None:
        with suppress(RuntimeError):  # a broken device: what broke it is to be told
            self.meter.measure()
        for row, decode, prefill, product in self._rows:
            row.update(utilization(decode, prefill, self.meter, product))
        part.save()


def run(part: Part) -> None:
    """One sequence: with CUDA graphs and steps decided ahead, without the one, without the other."""
    scale = part.scale
    found = Utilization(Meter(part))
    limits: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": scale.chunk,
                              "max_model_len": scale.prompt_len + scale.output_len}  # fmt: skip
    try:
        for graphs in (True, False):
            part.check()
            try:
                with loaded(part, **limits, enforce_eager=not graphs) as (built, config):
                    for ahead in (True, False) if graphs else (True,):
                        _one_sequence(part, built, replace(config, async_scheduling=ahead), found, graphs)
            except OutOfTimeError:
                raise
            except Exception as error:  # the other way may work
                part.say(traceback.format_exc())
                part.data["problem"] = f"CUDA graphs {'on' if graphs else 'off'}: {error!r:.300}"
                part.data["error"] = part.data.get("error", "") + traceback.format_exc()
    finally:
        found.finish(part)


def _one_sequence(part: Part, built: Built, config: Any, found: Utilization, graphs: bool) -> None:
    scale = part.scale
    asked = requests(part, [(scale.prompt_len, scale.output_len)])
    replayed(part, built, config, asked)  # compiles kernels
    done = []
    for _ in range(scale.iterations):
        done.append(replayed(part, built, config, asked))
        part.check()
    times = [d.requests[0] for d in done]
    found.row(
        part, merged([steady(d, 1) for d in done]), merged([prefills(d) for d in done]),
        graphs=graphs, async_scheduling=config.async_scheduling, prompt=scale.prompt_len, output=scale.output_len,
        ttft_ms=1e3 * statistics.median(t.ttft for t in times if t.ttft is not None),
        tpot_ms=1e3 * statistics.median(t.tpot for t in times if t.tpot is not None),
        prefill_device_ms=1e3 * min(prefills(d).device for d in done),
    )  # fmt: skip


def run_sweep(part: Part) -> None:
    """Batches whose prompts come together: the rate of steps that only decode, and that of all of it."""
    from pelton.bench.latency import check_capacity
    from pelton.errors import RequestError
    from pelton.metrics import throughput

    scale = part.scale
    found = Utilization(Meter(part))
    prompt, output = scale.batch_prompt_len, scale.batch_output_len
    # The cache has room for as many sequences of this length; they need a little more to be all admitted.
    limits: dict[str, Any] = {"max_num_seqs": max(scale.batches), "max_num_batched_tokens": scale.batch_chunk,
                              "max_model_len": prompt + output + 32, "async_scheduling": True}  # fmt: skip
    try:
        with loaded(part, **limits) as (built, config):
            replayed(part, built, config, requests(part, [(prompt, 4)] * max(scale.batches)))  # compiles kernels
            for batch in scale.batches:
                try:
                    check_capacity(built.executor.kv_spec, batch, prompt + output)
                except RequestError as error:
                    part.say(f"batch {batch}: {error}")
                    break
                if batch <= _WARM:
                    replayed(part, built, config, requests(part, [(prompt, 2)] * batch))
                done = replayed(part, built, config, requests(part, [(prompt, output)] * batch, seed=1))
                decode = steady(done, batch)
                found.row(
                    part, decode, prefills(done), batch=batch, prompt=prompt, output=output,
                    decode_tokens_per_s=throughput(batch * decode.count, decode.wall),
                    output_tokens_per_s=throughput(done.output_tokens, done.seconds), seconds=done.seconds,
                    ttft_ms=1e3 * statistics.median(r.ttft for r in done.requests if r.ttft is not None),
                    tpot_ms=1e3 * statistics.median(r.tpot for r in done.requests if r.tpot is not None),
                )  # fmt: skip
    finally:
        found.finish(part)
