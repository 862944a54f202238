"""The progress bar of packing weights: it appears only if there is something to wait for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn


@contextmanager
def packing_progress(console: Console) -> Iterator[Callable[[int, int], None]]:
    """Yields progress(done, total) in bytes."""
    columns = (
        TextColumn("packing weights"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("pack", total=None, visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)
