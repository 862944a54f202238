"""The CPU as the composition root sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ...config import EngineConfig
from ...graph import Graph
from ...ledger import RUNTIME_BYTES, available_memory
from ...program import Program, lower
from ..backend import Model, Sizes
from ..base import Executor
from .executor import CpuExecutor, adapter_bytes, cache_bytes_per_block, choose_isa, constant_bytes
from .peaks import measured_peaks

#: The KV cache unless asked for otherwise, or for one sequence at full length if that is more. It is
#: reserved address space: memory is taken when blocks are first used.
_DEFAULT_KV_BYTES = 4 << 30


class CpuBackend:
    """A :class:`~pelton.backends.backend.Backend`."""

    fuses_gates = True
    #: The 16-bit type that CPUs multiply.
    half = "bf16"
    device_name = None

    def __init__(self, isa: str | None, threads: int) -> None:
        self.isa = choose_isa(isa)
        self.threads = threads

    def lower(self, graph: Graph, limits: Mapping[str, int], max_positions: int) -> Program:
        return lower(graph, limits, max_positions)

    def sizes(self, graph: Graph, program: Program) -> Sizes:
        return host_sizes(program)

    def notes(self, graph: Graph) -> list[str]:
        return []

    def block_bytes(self, program: Program, block_size: int) -> int:
        return cache_bytes_per_block(program, block_size)

    def available(self) -> int:
        return available_memory()

    def remedy(self, graph: Graph, needed: int, available: int) -> str:
        return "use a smaller or more strongly quantized model"

    def kv_share(self, free: int, one_sequence: int) -> int:
        # Every sequence at full length, within reason: others live on this machine too.
        return min(free // 2, max(_DEFAULT_KV_BYTES, one_sequence))

    def executor(self, model: Model, on_packed: Callable[[int], None]) -> Executor:
        return CpuExecutor(
            model.program, model.read, model.kv_spec, isa=self.isa, threads=self.threads,
            activations=model.config.product_activations,
            content_key=model.content_key() if model.config.packed_cache else None, on_packed=on_packed,
        )  # fmt: skip

    def settle(self, executors: Sequence[Executor], config: EngineConfig) -> None:
        pass  # they have their KV caches

    def read_bandwidth(self, achieved: float) -> float | None:
        return measured_peaks(self.isa, self.threads, achieved=achieved)["read_bandwidth"]

    def peak_flops(self, executor: Executor) -> float | None:
        assert isinstance(executor, CpuExecutor)
        peaks = measured_peaks(self.isa, self.threads)
        return peaks.get(executor.precision, peaks["f32"])


def host_sizes(program: Program, *, as_floats: bool = False) -> Sizes:
    """as_floats: as the oracle keeps weights."""
    sizes: dict[str, int] = {}
    for constant in program.constants:
        size = constant_bytes(constant, as_floats=as_floats)
        sizes[constant.packing] = sizes.get(constant.packing, 0) + size
    mapped = sizes.pop("rows", 0)
    return Sizes(sum(sizes.values()), mapped, program.arena_bytes, adapter_bytes(program), RUNTIME_BYTES)
