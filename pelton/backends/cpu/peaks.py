"""Peaks measured on this machine, kept on disk: the denominators of MBU and MFU."""

from __future__ import annotations

import contextlib
import json
import time

from ...paths import cache_dir

#: Clouds migrate machines and neighbours come and go: an old figure is measured again.
_MAX_AGE = 7 * 24 * 3600.0  # seconds


def measured_peaks(isa: str, threads: int, *, fresh: bool = False) -> dict[str, float]:
    """``read_bandwidth`` in bytes/s and FLOP/s per precision ("f32", "bf16", "int8" where there is one).

    fresh: measure now (about a second) even if a figure less than a week old is kept.
    """
    from . import _native

    path = cache_dir() / "peaks.json"
    key = f"{_native.cpu_features()['model_name'] or 'cpu'}:{isa}:{threads}"
    try:
        kept = json.loads(path.read_text())
    except (OSError, ValueError):
        kept = None
    kept = kept if isinstance(kept, dict) else {}
    with contextlib.suppress(LookupError, TypeError, ValueError):  # no such figure, or a damaged file
        if not fresh and time.time() - kept[key]["time"] < _MAX_AGE:
            return {str(name): float(value) for name, value in kept[key]["peaks"].items()}
    peaks: dict[str, float] = _native.measure_peaks(isa, threads)
    kept[key] = {"time": time.time(), "peaks": peaks}
    with contextlib.suppress(OSError):  # only a shortcut: without it the next start measures again
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(kept, indent=1))
    return peaks
