"""Peaks of a GPU: the denominators of MBU and MFU."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...graph import F32
from ..kept_peaks import kept_peaks
from .device import Device
from .memory import TORCH_TYPES


def measured_peaks(device: Device, *, fresh: bool = False) -> dict[str, float]:
    """``read_bandwidth`` in bytes/s, of a copy within the device's memory, and FLOP/s of matrix products by precision.

    fresh: measure now (about a second) even if a figure less than a week old is kept.
    """
    key = f"{device.name}:cuda{torch.version.cuda}"
    if not device.is_cuda:  # the interpreter's arithmetic is NumPy's: figures of nothing, for tests
        return measure_peaks(device, 1 << 16, 64, 1)
    return kept_peaks(key, lambda: measure_peaks(device), fresh=fresh)


def measure_peaks(device: Device, num_bytes: int = 1 << 28, size: int = 8192, tries: int = 10) -> dict[str, float]:
    """The best of some tries. num_bytes: copied, much more than caches hold. size: rows and columns of matrices."""
    with device.active():
        on = device.torch_device
        source = torch.zeros(num_bytes, dtype=torch.uint8, device=on)
        target = torch.empty_like(source)
        seconds = _best(device, lambda: target.copy_(source), tries)
        peaks = {"read_bandwidth": 2 * num_bytes / seconds}  # bytes that are read, and bytes that are written
        for type, dtype in TORCH_TYPES.items():
            edge = size if type != F32 else size // 4  # no tensor cores
            # Not zeros: they take less power, and the clock stays higher than with any model's numbers.
            a, b = (torch.randn(edge, edge, device=on).to(dtype) for _ in range(2))
            out = torch.empty_like(a)
            product: Callable[[], object] = lambda a=a, b=b, out=out: torch.mm(a, b, out=out)  # type: ignore[misc]  # noqa: E731
            peaks[type.name] = 2 * edge**3 / _best(device, product, tries)
        codes = (32 * torch.randn(2, size, size, device=on)).clamp(-127, 127)
        a, b = codes.to(torch.int8).unbind()
        peaks["int8"] = 2 * size**3 / _best(device, lambda: torch._int_mm(a, b.t()), tries)
        if device.has_fp8_products:
            c, d = codes.to(torch.float8_e4m3fn).unbind()
            one = torch.ones((), device=on)
            fp8 = lambda: torch._scaled_mm(c, d.t(), one, one, out_dtype=torch.bfloat16)  # noqa: E731
            peaks["fp8"] = 2 * size**3 / _best(device, fp8, tries)
    return peaks


def _best(device: Device, run: Callable[[], object], tries: int) -> float:
    """Seconds of the fastest of some runs, after one that warms up."""
    run()
    seconds = []
    for _ in range(tries):
        device.hold(1e-3)  # until the host has started it
        begin = device.mark()
        run()
        end = device.mark()
        end.wait()
        seconds.append(end.seconds_since(begin))
    return min(seconds)
