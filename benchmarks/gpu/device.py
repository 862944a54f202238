"""The GPU, or the host in its place: there Triton's interpreter runs the kernels, to see that the scripts work."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any


def use_interpreter() -> None:
    """Take the host for a GPU. Before Triton's first use."""
    import torch

    os.environ["PELTON_CUDA_DEVICE"] = "cpu"
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)  # the little that it computes takes longer to share out


def torch_device() -> Any:
    import torch

    return torch.device(os.environ.get("PELTON_CUDA_DEVICE", "cuda"))


def synchronize() -> None:
    import torch

    if torch_device().type == "cuda":
        torch.cuda.synchronize()


def empty_cache() -> None:
    """Give back what torch keeps of memory that nobody uses, for whoever asks how much is free."""
    import gc

    import torch

    gc.collect()
    if torch_device().type == "cuda":
        torch.cuda.empty_cache()


def seconds_of(run: Callable[[], object], repeats: int, warmup: int = 2) -> list[float]:
    """Seconds of device time that ``run`` takes, each time."""
    import torch

    for _ in range(warmup):
        run()
    synchronize()
    if torch_device().type != "cuda":
        stamps = [time.perf_counter()]
        for _ in range(repeats):
            run()
            stamps.append(time.perf_counter())
        return [b - a for a, b in pairwise(stamps)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    # Cycles in which the host gets ahead: a small product takes less time than its launch.
    torch.cuda._sleep(100_000 * repeats)
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return [float(a.elapsed_time(b)) / 1e3 for a, b in pairwise(events)]


def best_and_median(seconds: list[float], amount: float) -> dict[str, float]:
    """amount / s, at best and usually."""
    return {"best": amount / min(seconds), "median": amount / statistics.median(seconds)}


def describe() -> dict[str, Any]:
    """Device and versions."""
    import platform

    import torch

    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    if not torch.cuda.is_available():
        return {"device": "none: Triton's interpreter on the host", **found}
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "memory": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "driver": _driver(),
        "cuda": torch.version.cuda,
        **found,
    }


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.split("\n")[0].strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None
