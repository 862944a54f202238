"""Where the tests of the CUDA backend run: on a GPU, or in Triton's interpreter on the host."""

from __future__ import annotations

import os

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of a kernel
    os.environ["PELTON_CUDA_DEVICE"] = "cpu"
