"""The driver's side of the protocol: a worker process, spoken to in lines of JSON."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class WorkerError(Exception):
    """A worker refused, died or took too long; the text says which."""


class Worker:
    """A process that can be paused and ended with everything it started.

    Raises (in every call):
        WorkerError: see there. The worker is closed then.
    """

    def __init__(self, command: Sequence[str | Path], variables: Mapping[str, str], log: Path) -> None:
        self.log = log
        self.started = time.perf_counter()
        with log.open("ab") as stderr:
            self._process = subprocess.Popen(
                [str(c) for c in command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=_environment(variables),
                start_new_session=True,
            )
        self._pending = b""
        self._paused = False

    def call(self, op: str, timeout: float, **fields: Any) -> dict[str, Any]:
        """Send one request and wait for its reply. timeout: seconds."""
        assert self._process.stdin is not None
        self.resume()
        try:
            self._process.stdin.write(json.dumps({"op": op, **fields}).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._died(op) from None
        line = self._line(op, time.monotonic() + timeout, timeout)
        try:
            reply = json.loads(line)
        except ValueError:
            self.kill()
            raise WorkerError(f"{op}: the reply is no JSON: {line[:80]!r}") from None
        if not isinstance(reply, dict):
            self.kill()
            raise WorkerError(f"{op}: the reply is no object: {line[:80]!r}")
        if "error" in reply:
            self.close()
            raise WorkerError(f"{op}: {reply['error']}")
        return reply

    def _line(self, op: str, deadline: float, timeout: float) -> bytes:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._pending:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                self.kill()
                raise WorkerError(f"{op}: no reply within {timeout:.0f} s")
            data = os.read(descriptor, 1 << 16)
            if not data:
                raise self._died(op)
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def _died(self, op: str) -> WorkerError:
        try:
            code = self._process.wait(10)
        except subprocess.TimeoutExpired:
            code = None
        self.kill()
        how = "closed its output" if code is None else f"ended with {_status(code)}"
        return WorkerError(f"{op}: the worker {how}; {last_line(self.log)}")

    def peak_rss(self) -> int:
        """Bytes: the sum of the peaks of all processes of this worker."""
        total = 0
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError, IndexError):
                if not entry.name.isdigit() or os.getsid(int(entry.name)) != self._process.pid:
                    continue
                match = re.search(r"VmHWM:\s*(\d+) kB", (entry / "status").read_text())
                total += int(match[1]) * 1024 if match else 0
        return total

    def pause(self) -> None:
        """Stop all its threads, so that none of them spins while another engine is measured."""
        if not self._paused and self._process.poll() is None:
            self._signal(signal.SIGSTOP)
            self._paused = True

    def resume(self) -> None:
        if self._paused:
            self._signal(signal.SIGCONT)
            self._paused = False

    def close(self) -> None:
        """Ask it to quit, and make sure."""
        if self._process.poll() is None:
            self.resume()
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                assert self._process.stdin is not None
                self._process.stdin.write(b'{"op": "quit"}\n')
                self._process.stdin.flush()
                self._process.wait(20)
        self.kill()

    def kill(self) -> None:
        """End it and everything it started. Idempotent."""
        self._signal(signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def _environment(variables: Mapping[str, str]) -> dict[str, str]:
    inherited = dict(os.environ)
    # An installed package has its bytecode; a checkout that may not write any would be compiled at every start.
    inherited.pop("PYTHONDONTWRITEBYTECODE", None)
    return {**inherited, **variables}


def last_line(log: Path) -> str:
    """The last line that says something, for a reason in one line."""
    try:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    return lines[-1][:300] if lines else "it wrote nothing"


def _status(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
