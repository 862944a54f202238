"""Seconds per kernel of one prefill step and of decode steps, by torch.profiler: what there is to tune."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from .decode import requests
from .device import synchronize, torch_device
from .model import loaded
from .part import Part, Row

if TYPE_CHECKING:
    from pelton.build import Built

#: Kernels that are listed, and decode steps that they are summed over.
_TOP, _STEPS = 15, 8


def run(part: Part) -> None:
    scale = part.scale
    batches = [b for b in (1, 64) if b <= max(scale.batches)]
    prompt, output = scale.batch_prompt_len, 4 * _STEPS
    limits: dict[str, Any] = {
        "max_num_seqs": max(batches), "max_num_batched_tokens": max(scale.chunk, max(batches)),
        "max_model_len": max(scale.prompt_len, prompt) + output,
    }  # fmt: skip
    with loaded(part, **limits) as (built, config):
        _prefill(part, built, config)
        for batch in batches:
            part.check()
            _decode(part, built, config, batch, prompt, output)


def _prefill(part: Part, built: Built, config: Any) -> None:
    from pelton.llm import engine_of

    for measured in (False, True):
        engine = engine_of(built, config)
        (asked,) = requests(part, [(part.scale.prompt_len, 1)])
        engine.add_request("0", asked.prompt_token_ids, asked.params)
        if measured:
            part.row(step=f"prefill of {part.scale.prompt_len} tokens", **_kernels(part, lambda e=engine: e.step(), 1))
        else:
            engine.step()


def _decode(part: Part, built: Built, config: Any, batch: int, prompt: int, output: int) -> None:
    from pelton.llm import engine_of

    engine = engine_of(built, config)
    for i, asked in enumerate(requests(part, [(prompt, output)] * batch)):
        engine.add_request(str(i), asked.prompt_token_ids, asked.params)
    while engine.stats().decode_steps < 2:
        engine.step()
    part.row(step=f"decode of {batch}, context {prompt}", **_kernels(part, engine.step, _STEPS))
    while engine.has_unfinished:
        engine.step()


def _kernels(part: Part, step: Any, count: int) -> Row:
    """Of ``count`` steps, per step: microseconds of wall time and of kernels, and of each of the longest."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch_device().type == "cuda"
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    synchronize()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        for _ in range(count):
            step()
        synchronize()
        wall = time.perf_counter() - start
    sums: dict[str, tuple[float, int]] = {}
    begin, end = float("inf"), 0.0
    for event in profiler.events():
        if event.device_type != kind:
            continue
        span = event.time_range
        seconds, calls = sums.get(event.name, (0.0, 0))
        sums[event.name] = (seconds + span.elapsed_us(), calls + 1)
        begin, end = min(begin, span.start), max(end, span.end)
    total = sum(seconds for seconds, _ in sums.values())
    longest = sorted(sums.items(), key=lambda item: -item[1][0])[:_TOP]
    rows = [
        {"kernel": name[:100], "calls": calls / count, "us": us / count, "share": us / total if total else 0.0}
        for name, (us, calls) in longest
    ]
    for row in rows:
        part.say(f"{100 * row['share']:5.1f}% {row['us']:9.1f} us {row['calls']:6.1f} × {row['kernel']}")
    return {
        "wall_us": 1e6 * wall / count, "kernels_us": total / count,
        "busy": total / (end - begin) if end > begin else 0.0, "kernels": rows,
    }  # fmt: skip
