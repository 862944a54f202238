"""A virtual environment per peer. What cannot be installed is a reason, never a silence."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from .catalogue import Peer

FREE = 8 << 30  # bytes of disk that an installation must find: vLLM's takes about 3 GiB
INSTALL = 1800.0  # seconds
#: A line of a requirements file: packages that come along, that no text model needs, and that do not load beside a
#: CPU build of torch.
WITHOUT = "# without:"


class SetupError(Exception):
    """A peer cannot take part; the text is the reason."""


def python_of(peer: Peer, work: Path) -> Path:
    """The interpreter of the peer's environment, which is made if it is not there.

    Raises:
        SetupError: with the reason.
    """
    if not peer.own_environment:
        return Path(sys.executable)
    folder = work / "venvs" / peer.name
    python = folder / "bin" / "python"
    requirements = peer.requirements.read_text()
    stamp = folder / ".installed"
    key = hashlib.sha256((requirements + sys.version).encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == key:
        return python
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < FREE:
        raise SetupError(f"{free >> 30} GiB of disk are free, an installation may need {FREE >> 30}: choose --work")
    print(f"  installing {peer.title}", file=sys.stderr, flush=True)
    if not python.exists():
        _run([sys.executable, "-m", "venv", str(folder)])
        _run([str(python), "-m", "pip", "install", "-q", "--upgrade", "pip"])
    pip = [str(python), "-m", "pip", "install", "-q"]
    torch = [line.strip() for line in requirements.splitlines() if line.startswith("torch==")]
    if torch:
        # First and alone: whatever comes after it finds a torch, and cannot ask for another build.
        _refuse_cuda([*pip, "--dry-run", "--report", "-", *torch])
        _run([*pip, *torch])
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(torch) + "\n")
    _run([*pip, "-c", str(constraints), "-r", str(peer.requirements)])
    unwanted = [
        w for line in requirements.splitlines() if line.startswith(WITHOUT) for w in line[len(WITHOUT) :].split()
    ]
    if unwanted:
        _run([str(python), "-m", "pip", "uninstall", "-q", "-y", *unwanted])
    stamp.write_text(key)
    return python


def _refuse_cuda(command: list[str]) -> None:
    report = _run(command)
    try:
        names = [item["metadata"]["name"] for item in json.loads(report)["install"]]
    except (ValueError, KeyError, TypeError):
        raise SetupError("pip's report of what torch brings cannot be read") from None
    heavy = cuda_packages(names)
    if heavy:
        raise SetupError(
            f"pip would install a CUDA build of torch ({len(heavy)} NVIDIA packages): "
            "set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels"
        )


def cuda_packages(names: list[str]) -> list[str]:
    return [n for n in names if n.lower().startswith(("nvidia-", "cuda-"))]


def _run(command: list[str]) -> str:
    # What is compiled (llama.cpp) is compiled for this CPU.
    environment = {"CMAKE_ARGS": "-DGGML_NATIVE=ON", **os.environ}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL, env=environment)
    except subprocess.TimeoutExpired:
        raise SetupError(f"the installation took longer than {INSTALL / 60:.0f} minutes") from None
    except OSError as error:
        raise SetupError(str(error)) from None
    if done.returncode:
        raise SetupError(reason(done.stderr))
    return done.stdout


def reason(text: str) -> str:
    """One line of pip's complaints: the first error rather than the advice that follows it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")]
    return (errors or lines or ["no message"])[0][:300]
