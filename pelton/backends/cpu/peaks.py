"""Peaks of this processor: the denominators of MBU and MFU."""

from __future__ import annotations

from ..kept_peaks import kept_peaks


def measured_peaks(isa: str, threads: int, *, fresh: bool = False, achieved: float = 0.0) -> dict[str, float]:
    """``read_bandwidth`` in bytes/s and FLOP/s per precision ("f32", "bf16", "int8" where there is one).

    fresh: measure now (about a second) even if a figure less than a week old is kept. achieved: as for ``kept_peaks``.
    """
    from . import _native

    key = f"{_native.cpu_features()['model_name'] or 'cpu'}:{isa}:{threads}"
    return kept_peaks(key, lambda: dict(_native.measure_peaks(isa, threads)), fresh=fresh, achieved=achieved)
