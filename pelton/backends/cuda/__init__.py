"""NVIDIA GPUs: programs lowered to PyTorch and Triton kernels, decode steps replayed as CUDA graphs."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from ...config import EngineConfig
from ...errors import PeltonError

if TYPE_CHECKING:
    from .backend import CudaBackend


def cuda_backend(config: EngineConfig, threads: int) -> CudaBackend:
    """The first GPU. Until here nothing has imported torch, and no kernel before it is known where kernels run.

    Raises:
        PeltonError: a package is missing, there is no GPU, or something is asked for that has no kernel there.
    """
    missing = [name for name in ("torch", "triton") if importlib.util.find_spec(name) is None]
    if missing:
        raise PeltonError(f"device='cuda' needs {' and '.join(missing)}", "pip install 'pelton[cuda]'")
    from .device import Device, chosen_device

    device = Device(chosen_device())
    from .backend import CudaBackend

    return CudaBackend(config, threads, device)
