"""What the benchmarks of engines report alike: where they ran, latencies, fractions of the peaks."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from ..build import Built
    from ..config import EngineConfig

LATENCIES = {"ttft_ms": "TTFT", "tpot_ms": "TPOT", "itl_ms": "ITL", "e2e_ms": "E2E"}


def record(benchmark: str, built: Built, config: EngineConfig) -> dict[str, Any]:
    """The part of a row that says what ran where and when. config: the engine's, every field that is set."""
    from .. import __version__
    from ..backends.cpu import _native

    plan, spec = built.plan, built.executor.kv_spec
    elsewhere = ("model", "isa", "threads", "packed_cache")
    fields = {name: value for name, value in asdict(config).items() if value is not None and name not in elsewhere}
    return {
        "benchmark": benchmark,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "pelton": __version__,
        "model": plan.checkpoint.path.name,
        "machine": {
            "cpu": _native.cpu_features()["model_name"] or None,
            "gpu": plan.backend.device_name,
            "isa": plan.isa,
            "threads": plan.threads,
            "system": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
        },
        "config": {
            **fields, "max_model_len": spec.max_model_len, "kv_cache_tokens": spec.num_blocks * spec.block_size,
        },
    }  # fmt: skip


def where(built: Built) -> str:
    """``SmolLM2-135M-Instruct, avx512_bf16, 2 threads``"""
    return f"{built.plan.checkpoint.path.name}, {machine_text(built)}"


def machine_text(built: Built) -> str:
    """``avx512_bf16, 2 threads``, or the name of the GPU."""
    from .roofs import threads_text

    plan = built.plan
    if (gpu := plan.backend.device_name) is not None:
        return gpu
    backend = plan.isa if plan.config.device == "cpu" else plan.config.device
    return f"{backend}, {threads_text(plan.threads)}"


def milliseconds(value: float | None) -> str:
    from ..bench.units import number

    return "–" if value is None else number(value)


def print_latencies(out: Console, row: Mapping[str, Any], names: Sequence[str] = ("mean", "p50", "p90", "p99")) -> None:
    """A line for each latency; one that nothing has (TPOT of single tokens) is left out."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    table.add_column("latency, ms")
    for name in names:
        table.add_column(name, justify="right", min_width=7)
    for key, name in LATENCIES.items():
        if row[key]["mean"] is not None:
            table.add_row(name, *(milliseconds(row[key][p]) for p in names))
    out.print(table)
    out.print()


def print_fractions(out: Console, peaks: Mapping[str, float] | None, precision: str | None, *,
                    mbu: Mapping[str, float | None], mfu: Mapping[str, float | None]) -> None:  # fmt: skip
    """Bars of MBU and MFU by label, and what the peaks are. Nothing for a device without peaks."""
    from rich.table import Table

    from ..bench.units import number
    from .roofs import bar

    if peaks is None or precision is None:
        return
    bandwidth, compute = peaks["read_bandwidth"], peaks.get(precision, peaks["f32"])
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column("")
    table.add_column("", justify="right", min_width=5)
    table.add_column("")
    table.add_column("", style="dim")
    for values, peak in ((mbu, f"of {bandwidth / 1e9:.1f} GB/s"),
                         (mfu, f"of {number(compute / 1e12)} TFLOP/s ({precision})")):  # fmt: skip
        for label, value in values.items():
            if value is not None:
                # The peak is that of memory; a small model is read from the last-level cache, which is faster.
                cached = ", partly from cache" if values is mbu and value > 1 else ""
                table.add_row(label, f"{value:.0%}", bar(value, 20), peak + cached)
    out.print(table)
    out.print()


def neighbours_note(cores: float | None) -> str | None:
    """What to know of figures that were taken while others used the machine."""
    from ..bench.neighbours import noticeable

    if not noticeable(cores):
        return None
    return f"others kept {cores:.1f} of this machine's {os.cpu_count()} cores busy meanwhile: figures are too low"
