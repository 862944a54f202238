"""Installs the package and what the machine lacks of it into a folder, without a network."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from .part import ROOT, Part


def site_of(work: Path) -> Path:
    """The folder that packages are installed in."""
    return work / "site"


def environment(work: Path) -> dict[str, str]:
    """For processes that use what was installed. The tests and benchmarks are this repository's."""
    known = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and Path(p).resolve() != ROOT]
    paths = [str(site_of(work)), *known, str(ROOT)]
    cache = os.environ.get("PELTON_CACHE", str(work / "cache"))
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PELTON_CACHE": cache, "PYTHONUNBUFFERED": "1"}


def run(part: Part, wheels: Path | None) -> None:
    """Wheels first: the build may need one of them."""
    files = sorted(wheels.expanduser().resolve().glob("*.whl")) if wheels is not None else []
    if wheels is not None and not files:
        raise FileNotFoundError(f"no wheels in {wheels}")
    if files:
        _pip(part, f"{len(files)} wheels", [str(file) for file in files])
    # Not in the repository's own build folder, which may be of another machine.
    build = f"--config-settings=build-dir={part.work / 'build'}"
    _pip(part, "pelton", ["--no-build-isolation", build, str(ROOT)])
    _look(part)


def _pip(part: Part, what: str, arguments: list[str]) -> None:
    part.say(f"installing {what}")
    start = time.monotonic()
    command = [
        sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-compile", "--upgrade", "--quiet",
        "--disable-pip-version-check", "--target", str(site_of(part.work)), *arguments,
    ]  # fmt: skip
    cores = {"CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1)}  # CMake's default is one where it uses make
    done = subprocess.run(
        command, cwd=part.work, env=environment(part.work) | cores, timeout=max(1.0, part.left() - 5),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"pip failed with {done.returncode}\n{done.stdout[-4000:]}")
    part.row(what=what, seconds=time.monotonic() - start)


def _look(part: Part) -> None:
    """What is there and what is not, and whether the package can be imported."""
    sys.path.insert(0, str(site_of(part.work)))
    missing = []
    for line in importlib.metadata.requires("pelton") or []:
        name, _, marker = line.partition(";")
        package = re.match(r"[A-Za-z0-9_.-]+", name.strip())
        if package is None or "extra" in marker:
            continue
        try:
            importlib.metadata.version(package.group())
        except importlib.metadata.PackageNotFoundError:
            missing.append(package.group())
    part.data["missing"] = missing
    part.say(f"missing of its dependencies: {', '.join(missing) or 'none'}")
    code = "import pelton, pelton.backends.cpu._native as n; print(n.__file__); import torch, triton; print(pelton.LLM)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=part.work, env=environment(part.work), capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"the installed package cannot be imported\n{done.stderr[-4000:]}")
    native = Path(done.stdout.split("\n")[0])
    part.row(what="extension", file=native.name, bytes=native.stat().st_size)
