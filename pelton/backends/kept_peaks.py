"""Measured peaks, kept on disk: the denominators of MBU and MFU."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable

from ..paths import cache_dir

#: Clouds migrate machines and neighbours come and go: an old figure is measured again.
_MAX_AGE = 7 * 24 * 3600.0  # seconds
#: Of a figure that somebody exceeds: taken in a bad moment, or he reads from a cache.
_MAX_AGE_EXCEEDED = 600.0


def kept_peaks(
    key: str, measure: Callable[[], dict[str, float]], *, fresh: bool = False, achieved: float = 0.0
) -> dict[str, float]:
    """``read_bandwidth`` in bytes/s and FLOP/s per precision, of the machine that ``key`` names.

    fresh: measure now even if a figure less than a week old is kept. achieved: bytes/s that somebody has read. A
    bandwidth below that is measured again if it is not of the last minutes, and the better one is kept.
    """
    path = cache_dir() / "peaks.json"
    try:
        kept = json.loads(path.read_text())
    except (OSError, ValueError):
        kept = None
    kept = kept if isinstance(kept, dict) else {}
    before: dict[str, float] = {}
    with contextlib.suppress(LookupError, TypeError, ValueError):  # no such figure, or a damaged file
        figures = {str(name): float(value) for name, value in kept[key]["peaks"].items()}
        age, exceeded = time.time() - kept[key]["time"], figures["read_bandwidth"] < achieved
        if not fresh and age < _MAX_AGE:
            if not exceeded or age < _MAX_AGE_EXCEEDED:
                return figures
            before = figures
    peaks = {name: max(rate, before.get(name, 0.0)) for name, rate in measure().items()}
    kept[key] = {"time": time.time(), "peaks": peaks}
    with contextlib.suppress(OSError):  # only a shortcut: without it the next start measures again
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(kept, indent=1))
    return peaks
