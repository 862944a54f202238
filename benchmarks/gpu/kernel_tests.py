"""The repository's own tests of the CUDA backend. They use the GPU if there is one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from .part import ROOT, Part

#: Of a failure's message.
_MOST = 3000


def run(part: Part) -> None:
    report = part.work / "kernel-tests.xml"
    report.unlink(missing_ok=True)
    command = [
        sys.executable, "-m", "pytest", str(ROOT / "tests" / "backends" / "cuda"), f"--rootdir={ROOT}",
        "-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider", f"--junitxml={report}", "--tb=short", "-vv",
    ]  # fmt: skip
    if part.select:
        command += ["-k", part.select]
    # Not from the root: its folder "pelton" has no compiled extension, the installed one has.
    log = part.work / "kernel-tests.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=part.work, stdout=file, stderr=subprocess.STDOUT)
    try:
        process.wait(max(1.0, part.left() - 15))
    except subprocess.TimeoutExpired:
        part.say("out of time: the tests are interrupted")
        part.data["interrupted"] = True
        process.send_signal(signal.SIGINT)  # pytest then writes what it has
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
    part.data["exit_code"] = process.returncode
    if not report.exists():  # the last line names the test that hung or took the process with it
        part.data["log"] = log.read_text(errors="replace")[-_MOST:]
        print(part.data["log"])
        raise RuntimeError(f"pytest ended with {process.returncode} and wrote no report")
    summarize(part, report)


def summarize(part: Part, report: Path) -> None:
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    slowest = []
    for case in ElementTree.parse(report).getroot().iter("testcase"):
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
