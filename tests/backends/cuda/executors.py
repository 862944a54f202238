"""CUDA executors of tiny models, with decode steps that are recorded as on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pelton.backends.cpu import _native
from pelton.backends.cpu.sampler import NativeSampler
from pelton.backends.cuda.backend import CudaBackend
from pelton.backends.cuda.device import Device
from pelton.backends.cuda.executor import CudaExecutor
from pelton.backends.cuda.graphs import CudaCapture
from pelton.build import plan
from pelton.config import EngineConfig
from tests.backends.cuda.device import DEVICE


class HostCapture:
    """In place of a CUDA graph: runs the same launches again, on the same memory."""

    def __init__(self, device: Device) -> None:
        pass

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        run()  # as a capture does, to warm up
        return run


def executor(folder: Any, *, graphs: bool = True, **options: Any) -> CudaExecutor:
    """A model on the device, with 64 blocks of KV cache."""
    options = {"max_num_batched_tokens": 64, "max_num_seqs": 6, "threads": 2} | options
    planned = plan(EngineConfig(model=str(folder), device="cuda", kv_cache_memory=1 << 23, **options))
    capture = (CudaCapture if DEVICE.type == "cuda" else HostCapture) if graphs else None
    read: Callable[[str], Any] = lambda name: planned.checkpoint.tensors[name].read()  # noqa: E731
    backend = planned.backend
    assert isinstance(backend, CudaBackend)
    made = CudaExecutor(
        planned.program, backend.numerics(planned.graph, planned.program), read, planned.kv_spec,
        NativeSampler(_native.Executor("generic", 1, 64)), Device(DEVICE), capture=capture,
    )  # fmt: skip
    made.run_largest_step()
    made.allocate(planned.kv_spec)
    return made
