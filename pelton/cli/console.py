"""Consoles: results to stdout, everything else to stderr."""

from __future__ import annotations

from rich.console import Console


def stdout() -> Console:
    return Console(highlight=False)


def stderr() -> Console:
    return Console(stderr=True, highlight=False)
