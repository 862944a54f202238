"""Colours and pictures."""

from __future__ import annotations

_SCALE = ((0.0, (0xC9, 0x3A, 0x4B)), (0.5, (0xE8, 0xA8, 0x38)), (1.0, (0x2A, 0x9D, 0x8F)))


def colour(fraction: float) -> str:
    """#rrggbb: red far below the roofline, amber halfway, teal on it."""
    fraction = min(max(fraction, 0.0), 1.0)
    for (low, a), (high, b) in zip(_SCALE, _SCALE[1:], strict=False):
        if fraction <= high:
            t = (fraction - low) / (high - low)
            return "#" + "".join(f"{round(x + (y - x) * t):02x}" for x, y in zip(a, b, strict=True))
    raise AssertionError
