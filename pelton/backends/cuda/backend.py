"""A GPU as the composition root sees it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...config import EngineConfig
from ...errors import OutOfMemoryError
from ...graph import F32, Graph, GroupQuant
from ...ledger import human
from ...program import Program, lower
from ..backend import Model, Sizes
from ..base import Executor
from ..cpu import _native
from ..cpu.executor import choose_isa
from ..cpu.sampler import NativeSampler
from .activations import Numerics
from .device import Device
from .executor import CudaExecutor
from .graphs import CudaCapture
from .lora import adapter_bytes
from .memory import memory_bytes
from .packing import has_kernel
from .peaks import measured_peaks
from .providers import PROVIDERS, scratch_sizes
from .stored import compute_type, device_bytes
from .tuning import kept_choices, problems_of

#: What libraries take for themselves when a model runs: workspaces of cuBLAS, kernels, recorded graphs. An estimate,
#: which the largest step puts right before the KV cache is made.
_RUNTIME_BYTES = 1 << 30
#: Of that, what is still to come when the KV cache is made: recorded graphs, workspaces of other threads.
_RESERVE = 256 << 20


class CudaBackend:
    """A :class:`~pelton.backends.backend.Backend`; made by :func:`pelton.backends.cuda.cuda_backend`."""

    fuses_gates = False
    half = "f16"

    def __init__(self, config: EngineConfig, threads: int, device: Device) -> None:
        self._config = config
        self._device = device
        self.isa = self._device.architecture
        self.threads = threads

    def lower(self, graph: Graph, limits: Mapping[str, int], max_positions: int) -> Program:
        return lower(graph, limits, max_positions, compute_type(graph, self._config.dtype))

    def numerics(self, graph: Graph, program: Program) -> Numerics:
        """What the program's products run in."""
        compute = compute_type(graph, self._config.dtype)
        return Numerics.of(program, compute, self._config.product_activations, self._device.has_fp8_products)

    def sizes(self, graph: Graph, program: Program) -> Sizes:
        numerics = self.numerics(graph, program)
        adapters = sum(adapter_bytes(table.type) for table in program.adapters)
        scratch = sum(scratch_sizes(problems_of(program, numerics), self._device))
        step = memory_bytes(program, numerics) + scratch
        return Sizes(device_bytes(program, numerics.compute), 0, step, adapters, _RUNTIME_BYTES)

    def notes(self, graph: Graph) -> list[str]:
        weights = [(n.tensor.dtype, int(n.tensor.shape[-1])) for n in graph.leaves("weight")]
        quantized = [(type, cols) for type, cols in weights if isinstance(type, GroupQuant)]
        expanded = sorted({str(type) for type, cols in quantized if not has_kernel(type, cols)})
        if not expanded:
            return []
        compute = compute_type(graph, self._config.dtype)
        return [f"weights of type {', '.join(expanded)} run as {compute} on GPUs: kernels need groups of 16 columns"]

    def block_bytes(self, program: Program, block_size: int) -> int:
        return sum(int(cache.token_bytes) for cache in program.caches) * block_size

    def available(self) -> int:
        return self._device.available(self._config.gpu_memory_utilization)

    def remedy(self, graph: Graph, needed: int, available: int) -> str:
        gpus = -(-needed // max(1, available))
        narrower = "dtype='bf16' takes half of it; or " if compute_type(graph) == F32 else ""
        return f"{narrower}choose a smaller model, or device='cpu': it would take {gpus} such GPUs, and one is used"

    def kv_share(self, free: int, one_sequence: int) -> int:
        return free

    def executor(self, model: Model, on_packed: Callable[[int], None]) -> Executor:
        sampler = NativeSampler(_native.Executor(choose_isa(None), self.threads, 64))
        capture = CudaCapture if self._device.is_cuda and not model.config.enforce_eager else None
        return CudaExecutor(
            model.program, self.numerics(model.graph, model.program), model.read, model.kv_spec, sampler, self._device,
            on_sent=on_packed, capture=capture,
        )  # fmt: skip

    def settle(self, executors: Sequence[Executor], config: EngineConfig) -> None:
        mine = [e for e in executors if isinstance(e, CudaExecutor)]
        for executor in mine:
            executor.run_largest_step()
        spec = mine[-1].kv_spec
        bytes_per_block = sum(e.kv_spec.bytes_per_block for e in mine)
        # The ledger's number of blocks, unless what is left by now holds fewer.
        num_blocks = min(spec.num_blocks, max(0, self.available() - _RESERVE) // bytes_per_block)
        length = min(spec.max_model_len, num_blocks * spec.block_size)
        if config.kv_cache_memory is not None and num_blocks < spec.num_blocks:
            raise OutOfMemoryError(
                f"weights and steps leave {human(self.available())} for a KV cache of {human(config.kv_cache_memory)}",
                f"kv_cache_memory of {human(num_blocks * bytes_per_block)} would fit",
            )
        if num_blocks < 1 or (config.max_model_len is not None and length < config.max_model_len):
            remedy = f"max_model_len={length} would fit" if length else "raise gpu_memory_utilization"
            needed = -(-spec.max_model_len // spec.block_size) * bytes_per_block
            raise OutOfMemoryError(
                f"weights and steps leave {human(self.available())} for the KV cache, a context of "
                f"{spec.max_model_len:,} tokens needs {human(needed)}",
                remedy,
            )
        if length < spec.max_model_len:
            warnings.warn(
                f"memory holds a context of {length:,} tokens, not of {spec.max_model_len:,}: weights and steps took "
                "more than was expected",
                stacklevel=4,
            )
        for executor in mine:
            own = executor.kv_spec
            executor.allocate(replace(own, num_blocks=num_blocks, max_model_len=min(own.max_model_len, length)))

    def read_bandwidth(self, achieved: float) -> float | None:
        return measured_peaks(self._device)["read_bandwidth"]

    def peak_flops(self, executor: Executor) -> float | None:
        assert isinstance(executor, CudaExecutor)
        return measured_peaks(self._device)[executor.precision]

    def peaks(self) -> dict[str, float]:
        """Measured now: bytes/s as ``read_bandwidth``, FLOP/s by precision."""
        return measured_peaks(self._device, fresh=True)

    def providers(self) -> list[tuple[str, str, str]]:
        """Who computes matrix products: (name, of which types, why it cannot be asked here, or nothing)."""
        return [(p.name, p.what, p.missing(self._device) or "") for p in PROVIDERS]

    def choices(self) -> dict[str, Any]:
        """What was found fastest on this device: see :func:`~pelton.backends.cuda.tuning.kept_choices`."""
        return kept_choices(self._device)

    @property
    def device_name(self) -> str | None:
        return self._device.name
