"""How fractions of the roofline look: colours and bars, the same in every table and picture."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
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


def threads_text(threads: int) -> str:
    return "1 thread" if threads == 1 else f"{threads} threads"


def console() -> Console:
    """Standard output: a terminal's width, and in a pipe as wide as it needs to be."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


class Working:
    """A progress bar on stderr if that is a terminal, nothing otherwise. Use as a context.

    calm: draw it only in ``at``, once a second at most, so that no thread runs beside what is measured.
    """

    def __init__(self, total: float | None = None, *, calm: bool = False) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        self._progress = Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal, auto_refresh=not calm
        )
        self._calm = calm
        self._drawn = 0.0
        self._task = self._progress.add_task("measuring peaks", total=total)

    def __enter__(self) -> Working:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def at(self, what: str, done: float, total: float) -> None:
        draw = self._calm and time.monotonic() - self._drawn > 1
        if draw:
            self._drawn = time.monotonic()
        self._progress.update(self._task, description=what, completed=done, total=total, refresh=draw)

    def advance(self, what: str | None, by: float) -> None:
        self._progress.update(self._task, advance=by, description=what)

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Out of the way of what is printed."""
        self._progress.stop()
        try:
            yield
        finally:
            self._progress.start()
