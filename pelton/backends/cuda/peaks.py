"""Peaks of a GPU: the denominators of MBU and MFU."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...graph import E4M3, F32, I8, DType
from ..kept_peaks import kept_peaks
from .device import Device
from .memory import TORCH_TYPES

#: As costs name the precision of calls.
_NAMES = {I8: "int8", E4M3: "fp8"}


def measured_peaks(device: Device, *, fresh: bool = False) -> dict[str, float]:
    """``read_bandwidth`` in bytes/s, of a copy within the device's memory, and FLOP/s of matrix products by precision.

    fresh: measure now (about a second) even if a figure less than a week old is kept.
    """
    key = f"{device.name}:cuda{torch.version.cuda}:8 bits"  # figures kept before had none of these
    if not device.is_cuda:  # the interpreter's arithmetic is NumPy's: figures of nothing, for tests
        return measure_peaks(device, 1 << 16, 64, 1)
    return kept_peaks(key, lambda: measure_peaks(device), fresh=fresh)


def measure_peaks(device: Device, num_bytes: int = 1 << 28, size: int = 8192, tries: int = 10) -> dict[str, float]:
    """The best of some tries. num_bytes: copied, much more than caches hold. size: rows and columns of matrices."""
    with device.active():
        peaks = {"read_bandwidth": _copied(device, num_bytes, tries)}
        for type in (*TORCH_TYPES, I8, *([E4M3] if device.has_fp8_products else [])):
            edge = size if type != F32 else size // 4  # no tensor cores
            peaks[_NAMES.get(type, type.name)] = _multiplied(device, type, edge, tries)
    return peaks


def _copied(device: Device, num_bytes: int, tries: int) -> float:
    """Bytes per second, those that are read and those that are written."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device.torch_device)
    target = torch.empty_like(source)
    return 2 * num_bytes / _best(device, lambda: target.copy_(source), tries)


def _multiplied(device: Device, type: DType, edge: int, tries: int) -> float:
    """FLOP per second. Codes are made as codes: there may be little memory left beside the KV cache."""
    on = device.torch_device
    if type in (I8, E4M3):
        codes = torch.randint(-127, 128, (2, edge, edge), dtype=torch.int8, device=on)
        a, b = codes if type == I8 else codes.to(torch.float8_e4m3fn)
        one = torch.ones((), device=on)
        run: Callable[[], object] = (
            (lambda: torch._int_mm(a, b.t()))
            if type == I8
            else (lambda: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16))
        )
    else:
        # Not zeros: they take less power, and the clock stays higher than with any model's numbers.
        a, b = (torch.randn(edge, edge, device=on).to(TORCH_TYPES[type]) for _ in range(2))
        out = torch.empty_like(a)
        run = lambda: torch.mm(a, b, out=out)  # noqa: E731
    return 2 * edge**3 / _best(device, run, tries)


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
