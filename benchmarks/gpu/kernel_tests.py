"""The repository's own tests of the CUDA backend. They use the GPU if there is one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .part import ROOT, Part

#: Of a failure's message.
_MOST = 3000
#: Files that are tested side by side.
_PROCESSES = min(4, os.cpu_count() or 1)


def run(part: Part) -> None:
    """A process per file: what takes a GPU's context with it fails the rest of its file alone. Some run side by side,
    as most of the time is the compiler's."""
    files = sorted((ROOT / "tests" / "backends" / "cuda").glob("test_*.py"))
    with ThreadPoolExecutor(_PROCESSES) as threads:
        reports = list(threads.map(lambda file: _run_file(part, file), files))
    summarize(part, [report for report in reports if report is not None])


def _run_file(part: Part, file: Path) -> Path | None:
    """The file's report; None if pytest wrote none, which is a row."""
    report = part.work / f"{file.stem}.xml"
    report.unlink(missing_ok=True)
    command = [
        sys.executable, "-m", "pytest", str(file), f"--rootdir={ROOT}", "-c", str(ROOT / "pyproject.toml"),
        # The repository's folder comes last: its "pelton" has no compiled extension, the installed one has.
        "--import-mode=append", "-p", "no:cacheprovider", f"--junitxml={report}", "--tb=short", "-vv",
    ]  # fmt: skip
    if part.select:
        command += ["-k", part.select]
    log = part.work / f"{file.stem}.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=part.work, stdout=output, stderr=subprocess.STDOUT)
    try:
        process.wait(max(1.0, part.left() - 15))
    except subprocess.TimeoutExpired:
        part.say(f"out of time: {file.name} is interrupted")
        part.data["interrupted"] = True
        process.send_signal(signal.SIGINT)  # pytest then writes what it has
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
    if report.exists():
        return report
    text = log.read_text(errors="replace")[-_MOST:]  # the last line names the test that hung or took the process along
    part.row(test=file.name, outcome="failed", message=f"pytest ended with {process.returncode}: {text}")
    return None


def summarize(part: Part, reports: Sequence[Path]) -> None:
    counts = {"passed": 0, "failed": len(part.data["rows"]), "skipped": 0}
    slowest = []
    for case in (case for report in reports for case in ElementTree.parse(report).getroot().iter("testcase")):
        name = f"{case.get('classname')}::{case.get('name')}"
        slowest.append((float(case.get("time") or 0), name))
        problems = [*case.findall("failure"), *case.findall("error")]
        outcome = "failed" if problems else "skipped" if case.find("skipped") is not None else "passed"
        counts[outcome] += 1
        if problems:
            text = problems[0].text or problems[0].get("message") or ""
            part.row(test=name, outcome=outcome, message=text[-_MOST:])
    part.data.update(counts, slowest=[{"test": n, "seconds": s} for s, n in sorted(slowest, reverse=True)[:10]])
    part.say(", ".join(f"{count} {name}" for name, count in counts.items()))
    part.save()
    if counts["failed"] or not counts["passed"]:
        part.data["problem"] = f"{counts['failed']} tests failed" if counts["failed"] else "no test ran"
