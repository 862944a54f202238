"""Every kernel compiles for GPUs: the interpreter of the other tests lets much pass that a compiler refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys


def test_kernels_compile_and_fit() -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.backends.cuda.compile_kernels", "--some", "90"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len({row["kernel"] for row in rows}) == 22
    for row in rows:
        assert row["shared"] <= 227 << 10, row  # of a program on sm_90
        # Chunks with heads of 256 columns, a window and a soft-cap need a few bytes more than there are registers, and
        # so do, with some compilers, the draw and products of some types.
        assert row["stack"] <= 64, row
