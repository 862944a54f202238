"""The oracle as the composition root sees it."""

from __future__ import annotations

from collections.abc import Callable

from ...graph import Graph
from ...program import Program
from ..backend import Model, Sizes
from ..base import Executor, Sampler
from ..cpu.backend import CpuBackend, host_sizes
from .executor import ReferenceExecutor


class ReferenceBackend(CpuBackend):
    """A :class:`~pelton.backends.backend.Backend`: graphs and memory as the CPU has them, interpreted in NumPy."""

    def __init__(self, isa: str | None, threads: int, sampler: Sampler) -> None:
        super().__init__(isa, threads)
        self._sampler = sampler

    def sizes(self, graph: Graph, program: Program) -> Sizes:
        return host_sizes(program, as_floats=True)

    def executor(self, model: Model, on_packed: Callable[[int], None]) -> Executor:
        return ReferenceExecutor(model.graph, model.read, model.kv_spec, self._sampler)

    def read_bandwidth(self, achieved: float) -> float | None:
        return None

    def peak_flops(self, executor: Executor) -> float | None:
        return None
