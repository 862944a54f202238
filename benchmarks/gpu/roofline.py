"""Kernel by kernel: bytes and FLOPs per precision, the time that they take at best, and the time that they take.

Decode steps of some sequences, and the prefill of one prompt. A kernel's *roof* is the longer one of its bytes over the
memory bandwidth and its FLOPs over the rate of the type that it multiplies, both of all calls of that kind in a step.
Bytes and FLOPs are those that the backend counts for MBU and MFU. Activations count as if they came from memory, though
a GPU's cache may hold them. The time of a call lies between two marks in the device's stream, which are some
microseconds apart even with nothing between them (``mark_us``); the time of a step has no marks within, and a decode
step is a recorded graph.

With --estimate nothing runs: rates are those of a data sheet, and there are no times but the roofs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from .device import seconds_of
from .model import loaded, random_checkpoint
from .part import Part, Row
from .peaks import Meter
from .precision import Precision, each, precisions

if TYPE_CHECKING:
    from pelton.backends.base import CallStats
    from pelton.build import Plan
    from pelton.graph.cost import StepShape

#: Data sheets: bytes per second, and operations per second of dense products (without sparsity), by type. f32 is what
#: all else than products is computed in.
DATA_SHEETS: dict[str, dict[str, Any]] = {
    "h100": {
        "device": "H100 SXM5 80 GB", "source": "NVIDIA H100 Tensor Core GPU data sheet, dense rates",
        "bandwidth": 3.35e12, "bf16": 989e12, "f16": 989e12, "fp8": 1979e12, "int8": 1979e12, "f32": 67e12,
    },
}  # fmt: skip
#: Seconds that each step is repeated for.
_SECONDS = 0.5


# ---------------------------------------------------------------------- what a step costs


def steps(part: Part) -> dict[str, StepShape]:
    """The steps by name: decode behind ``prompt_len`` tokens, and the prompt in one piece."""
    from pelton.graph.cost import StepShape

    scale, context = part.scale, part.scale.prompt_len
    found = {f"decode of {b}": StepShape([1] * b, [context + 1] * b, b) for b in scale.roofline_batches}
    return {**found, "prefill": StepShape([context], [context], 1)}


def kinds(calls: Sequence[CallStats]) -> list[Row]:
    """Calls of one kernel, products by module: number, bytes, FLOPs and the type they are multiplied in; in order."""
    found: dict[tuple[str, str], Row] = {}
    for call in calls:
        row = found.setdefault(kind_of(call.op, call.name), {
            "kernel": kind_of(call.op, call.name)[1], "calls": 0, "bytes": 0.0, "flops": 0.0,
            "precision_of_products": call.precision,
        })  # fmt: skip
        row["calls"] += 1
        row["bytes"] += call.streamed_bytes + call.activation_bytes
        row["flops"] += call.flops
    return list(found.values())


def kind_of(op: str, name: str) -> tuple[str, str]:
    """As ``pelton.bench.profile`` groups calls: (op, what it is called)."""
    return op, name.rpartition(".")[2] if op in ("linear", "gated_linear") else op


def roof(row: Row, rates: Mapping[str, float | None]) -> Row:
    """``memory_us``, ``compute_us`` and the longer one as ``roof_us``, with what it is bound ``by``. A type without a
    rate has no time for its products."""
    rate = rates.get(row["precision_of_products"])
    memory = 1e6 * row["bytes"] / (rates["bandwidth"] or 0.0)
    compute = None if rate is None else 1e6 * row["flops"] / rate
    by = "compute" if compute is not None and compute > memory else "memory"
    return {"memory_us": memory, "compute_us": compute, "roof_us": max(memory, compute or 0.0), "by": by}


def planned(part: Part, precision: Precision) -> Plan:
    """What would run, without weights."""
    from pelton import EngineConfig
    from pelton.build import plan

    config = EngineConfig(device="cuda", dtype=part.scale.dtype, **_limits(part), **precision.options)  # type: ignore[arg-type]
    return plan(config, random_checkpoint(part.scale.config))


def costs(plan: Plan, shape: StepShape) -> list[Row]:
    from pelton.backends.cuda.costs import call_costs

    numerics = plan.backend.numerics(plan.graph, plan.program)  # type: ignore[attr-defined]
    return kinds([cost.stats(shape, 0.0) for cost in call_costs(plan.program, numerics)])


def _limits(part: Part) -> dict[str, Any]:
    scale = part.scale
    most = max(scale.roofline_batches)
    return {"max_num_seqs": most, "max_num_batched_tokens": max(scale.prompt_len, most),
            "max_model_len": scale.prompt_len + 16}  # fmt: skip


def summarize(data: Row) -> None:
    """``steps``: sums over the kernels of each step and precision."""
    found: dict[tuple[str, str], Row] = {}
    for row in data["rows"]:
        if "kernel" not in row:
            continue
        total = found.setdefault((row["step"], row["precision"]), {
            "step": row["step"], "precision": row["precision"], "tokens": row["tokens"],
            **dict.fromkeys(("bytes", "flops", "roof_us"), 0.0),
        })  # fmt: skip
        for key in ("bytes", "flops", "roof_us"):
            total[key] += row[key]
        if "us" in row:
            total |= {"us": total.get("us", 0.0) + row["us"], "step_us": row["step_us"]}
    for (step, _), total in found.items():
        plain = found.get((step, "bf16"))
        total["tokens_per_s"] = total["tokens"] / total["roof_us"] * 1e6
        total["roof_to_bf16"] = None if plain is None else plain["roof_us"] / total["roof_us"]
        if "us" in total:
            total["share"] = total["roof_us"] / total["step_us"]
    data["steps"] = list(found.values())


# ---------------------------------------------------------------------- the part


def run(part: Part) -> None:
    """Measured."""
    meter = Meter(part, [p.product for p in precisions(part)])
    part.data["mark_us"] = 1e6 * min(seconds_of(lambda: None, part.scale.repeats))
    measured: list[Row] = []

    def fill() -> None:
        rates = {name: meter.rate(name) for name in ("bf16", "f16", "fp8", "int8", "f32")}
        for row in measured:
            row.update(roof(row, rates | {"bandwidth": meter.bandwidth}))
            row["share"] = row["roof_us"] / row["us"] if row["us"] else None
        summarize(part.data)
        part.save()

    try:
        each(part, lambda precision, left: _measure(part, precision, left, measured, fill))
    finally:
        with suppress(RuntimeError):  # a broken device: what broke it is to be told
            meter.measure()
        fill()


def _measure(
    part: Part, precision: Precision, left: Callable[[], float], measured: list[Row], fill: Callable[[], None]
) -> None:
    from pelton.bench.profile import profile

    scale, shapes = part.scale, steps(part)
    with loaded(part, **_limits(part), **precision.options) as (built, _):
        for name, shape in shapes.items():
            part.check()
            batch = len(shape.seq_lens)
            phases = profile(
                built, prompt_len=scale.prompt_len, contexts=[scale.prompt_len], batch_size=batch,
                phases=[name.split()[0]], seconds=min(_SECONDS, left()), on_work=lambda *_: part.check(),
            )  # fmt: skip
            for phase in phases:
                times = {kind_of(p.op, p.name): p.seconds for p in phase.by_op()}
                for row in costs(built.plan, shape):
                    seconds = next(s for (_, kernel), s in times.items() if kernel == row["kernel"])
                    row |= {"step": name, "precision": precision.name, "tokens": sum(shape.query_lens)}
                    measured.append(row | {"us": 1e6 * seconds, "step_us": 1e6 * phase.native_seconds})
                    part.data["rows"].append(measured[-1])
                part.say(f"{precision.name}, {name}: {1e6 * phase.native_seconds:,.0f} us")
            fill()


def estimate(part: Part, sheet: str) -> None:
    """From a data sheet. Nothing runs, and no GPU is needed."""
    rates = DATA_SHEETS[sheet]
    part.data["estimate"] = dict(rates)

    def add(precision: Precision, left: Callable[[], float]) -> None:
        plan = planned(part, precision)
        for name, shape in steps(part).items():
            for row in costs(plan, shape):
                about = {"step": name, "precision": precision.name, "tokens": sum(shape.query_lens)}
                part.data["rows"].append(row | about | roof(row, rates))
        part.say(precision.name)

    try:
        each(part, add)
    finally:
        summarize(part.data)
        part.save()
