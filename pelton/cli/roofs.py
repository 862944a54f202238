"""How fractions of the roofline look: colours and bars, the same in every table and picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_EIGHTHS = " ▏▎▍▌▋▊▉"


def bar(fraction: float, width: int) -> Text:
    """A bar of ``width`` columns in eighths, coloured from far below the roofline to on it."""
    from rich.text import Text

    from ..bench.flame import colour

    eighths = round(min(max(fraction, 0.0), 1.0) * width * 8)
    blocks = "█" * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")
    return Text(blocks.ljust(width), style=f"{colour(fraction)} on grey15")


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
        if seconds * factor >= 1:
            return f"{number(seconds * factor)} {unit}"
    return f"{number(seconds * 1e9)} ns"


def number(value: float) -> str:
    """Three digits: 0.123, 1.23, 12.3, 123, 1,234."""
    return f"{value:,.{0 if value >= 99.95 else 1 if value >= 9.995 else 2 if value >= 0.9995 else 3}f}"


def console(*, stderr: bool = False) -> Console:
    """A console of the terminal's width; what is piped on is as wide as it needs to be."""
    import sys

    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, highlight=False, width=None if stream.isatty() else 160)
