"""Seconds per kernel of one prefill step and of decode steps, by torch.profiler: what there is to tune."""

from __future__ import annotations

import time
from collections.abc import Callable
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

    (asked,) = requests(part, [(part.scale.prompt_len, 1)])

    def step() -> None:
        engine = engine_of(built, config)
        engine.add_request("0", asked.prompt_token_ids, asked.params)
        engine.step()

    step()
    part.row(step=f"prefill of {part.scale.prompt_len} tokens", **_kernels(part, step, 1))


def _decode(part: Part, built: Built, config: Any, batch: int, prompt: int, output: int) -> None:
    from pelton.llm import engine_of

    engine = engine_of(built, config)
    for i, asked in enumerate(requests(part, [(prompt, output)] * batch)):
        engine.add_request(str(i), asked.prompt_token_ids, asked.params)
    while engine.stats().decode_steps < 2:
        engine.step()
    part.row(step=f"decode of {batch}, context {prompt}", **_kernels(part, engine.step, _STEPS))
    engine.drain()


def _kernels(part: Part, step: Callable[[], object], count: int) -> Row:
    """Of ``count`` steps, per step: microseconds of wall time and of kernels, and of each of the longest."""
    from torch.profiler import ProfilerActivity

    on_gpu = torch_device().type == "cuda"
    # Recording what the host does slows it down; some versions see no kernels otherwise.
    wall, spans = _recorded(step, count, [ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU])
    if not spans:
        wall, spans = _recorded(step, count, [ProfilerActivity.CPU, ProfilerActivity.CUDA])
    if not spans:
        raise RuntimeError("the profiler saw no kernels")
    sums: dict[str, tuple[float, int]] = {}
    for name, begin, end in spans:
        us, calls = sums.get(name, (0.0, 0))
        sums[name] = (us + end - begin, calls + 1)
    total = sum(us for us, _ in sums.values())
    longest = sorted(sums.items(), key=lambda item: -item[1][0])[:_TOP]
    rows = [
        {"kernel": name[:100], "calls": calls / count, "us": us / count, "share": us / total}
        for name, (us, calls) in longest
    ]
    for row in rows:
        part.say(f"{100 * row['share']:5.1f}% {row['us']:9.1f} us {row['calls']:6.1f} × {row['kernel']}")
    span = max(end for _, _, end in spans) - min(begin for _, begin, _ in spans)
    return {"wall_us": 1e6 * wall / count, "kernels_us": total / count, "busy": total / span, "kernels": rows}


def _recorded(step: Callable[[], object], count: int, activities: list[Any]) -> tuple[float, list[Any]]:
    """Seconds of wall time, and (name, begin, end) in microseconds of what ran on the device."""
    from torch.autograd import DeviceType
    from torch.profiler import profile

    kind = DeviceType.CUDA if torch_device().type == "cuda" else DeviceType.CPU
    synchronize()
    with profile(activities=activities) as profiler:
        start = time.perf_counter()
        for _ in range(count):
            step()
        synchronize()
        wall = time.perf_counter() - start
    found = [(e.name, e.time_range.start, e.time_range.end) for e in profiler.events() if e.device_type == kind]
    return wall, found
