"""What a part of the benchmark gets: sizes, a clock that runs out, and a file that keeps what it has found so far."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .scale import Scale

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent.parent


class OutOfTimeError(Exception):
    """The deadline has passed. What was measured until then counts."""


class Part:
    """A part while it runs.

    file: gets ``data`` as JSON whenever a row is added; None: nothing is written. seconds: until :meth:`check` raises.
    select: for the tests of kernels, as ``pytest -k`` has it. picture: where a part that has one draws it.
    """

    def __init__(
        self, name: str, scale: Scale, seconds: float, file: Path | None = None, work: Path = Path(), select: str = "",
        picture: Path | None = None,
    ) -> None:  # fmt: skip
        self.name, self.scale, self.work, self.select, self.picture = name, scale, work, select, picture
        self.data: Row = {"rows": []}
        self._file = file
        self._start = time.monotonic()
        self._end = self._start + seconds

    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()

    def check(self, need: float = 0.0) -> None:
        """Raises OutOfTimeError unless ``need`` seconds are left."""
        if self.left() <= need:
            raise OutOfTimeError(f"{self.left():.0f} s are left, {need:.0f} are needed")

    def say(self, text: str) -> None:
        print(f"[{time.strftime('%H:%M:%S')}] {self.name} {time.monotonic() - self._start:6.1f} s: {text}", flush=True)

    def row(self, **values: Any) -> Row:
        """Keep a result, and show it."""
        self.data["rows"].append(values)
        self.say(shown(values))
        self.save()
        return values

    def save(self) -> None:
        if self._file is not None:
            write_json(self._file, self.data)


def shown(values: Mapping[str, Any]) -> str:
    """A row in one line."""

    def text(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.3e}"
        return str(value)

    short = {k: text(v) for k, v in values.items() if v is not None and not isinstance(v, (list, dict))}
    return ", ".join(f"{name} {value}" for name, value in short.items() if "\n" not in value)


def write_json(file: Path, value: Any) -> None:
    """Whoever reads the file finds the old content or the new."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}")
    partial.write_text(json.dumps(private(value), indent=1) + "\n")
    partial.replace(file)


def private(value: Any) -> Any:
    """The same without the paths of this machine, which tracebacks quote."""
    if isinstance(value, dict):
        return {name: private(v) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [private(v) for v in value]
    if isinstance(value, str):
        return value.replace(str(ROOT), ".").replace(str(Path.home()), "~") if len(str(Path.home())) > 1 else value
    return value
