"""Tables on stdout: aligned columns that fit a terminal and are complete in a pipe."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence

import click

_GAP = "  "


def print_table(title: str, rows: Sequence[Sequence[str]], align: str = "l") -> None:
    """Print a title and indented rows, then an empty line.

    align: "l" or "r" per column, "l" for the columns beyond. Only the last column is wrapped, and only
    on a terminal: what is piped on keeps one line per row.
    """
    click.secho(title, bold=True)
    columns = max((len(row) for row in rows), default=0)
    widths = [max((len(row[i]) for row in rows if i < len(row) - 1), default=0) for i in range(columns)]
    for row in rows:
        lead = _GAP
        for i, cell in enumerate(row[:-1]):
            lead += (cell.rjust(widths[i]) if align[i : i + 1] == "r" else cell.ljust(widths[i])) + _GAP
        if align[len(row) - 1 : len(row)] == "r":
            lines = [row[-1].rjust(max(len(other[-1]) for other in rows))]
        else:
            lines = _wrapped(row[-1], len(lead))
        for number, line in enumerate(lines):
            click.echo(((" " * len(lead) if number else lead) + line).rstrip())
    click.echo()


def _wrapped(text: str, indent: int) -> list[str]:
    if not sys.stdout.isatty():
        return [text]
    room = max(20, shutil.get_terminal_size().columns - indent - 1)
    # A path is never cut: one long line can be copied, two halves cannot.
    return textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False) or [""]
