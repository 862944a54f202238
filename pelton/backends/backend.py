"""What the composition root must know of a device: sizes before anything is loaded, then the executor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..config import EngineConfig
from ..graph import Graph
from ..program import Program
from .base import Executor, KVSpec


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes that a program needs but for its KV cache. weights: packed matrices and vectors; mapped: looked-up tables
    that stay on disk; step: activations, inputs and workspaces of the largest step; runtime: libraries."""

    weights: int
    mapped: int
    step: int
    adapters: int
    runtime: int


@dataclass(frozen=True, slots=True)
class Model:
    """What an executor is made of. read: yields a checkpoint tensor by name. content_key: see ``CpuExecutor``."""

    config: EngineConfig
    graph: Graph
    program: Program
    read: Callable[[str], Any]
    kv_spec: KVSpec
    content_key: Callable[[], str]


class Backend(Protocol):
    """isa: the tier of instructions. threads: of the host that it uses. fuses_gates: whether it has a kernel for
    products whose columns are gates and ups in turns. half: "bf16" or "f16": what stored f16 runs as."""

    isa: str
    threads: int
    fuses_gates: bool
    half: str

    @property
    def device_name(self) -> str | None:
        """Of the GPU; None on the CPU."""
        ...

    def lower(self, graph: Graph, limits: Mapping[str, int], max_positions: int) -> Program: ...

    def sizes(self, graph: Graph, program: Program) -> Sizes:
        """
        Raises:
            ValueError: there is no kernel for the type of a weight.
        """
        ...

    def notes(self, graph: Graph) -> list[str]:
        """What this device does to the model that a user might not expect."""
        ...

    def block_bytes(self, program: Program, block_size: int) -> int:
        """Of a block of the KV cache, in all layers together."""
        ...

    def available(self) -> int:
        """Bytes that the model may take."""
        ...

    def remedy(self, graph: Graph, needed: int, available: int) -> str:
        """What to do if a model does not even fit without a KV cache."""
        ...

    def kv_share(self, free: int, one_sequence: int) -> int:
        """Bytes of the KV cache, unless asked for otherwise, out of what is free beside everything else.

        one_sequence: bytes of a sequence of full length.
        """
        ...

    def executor(self, model: Model, on_packed: Callable[[int], None]) -> Executor:
        """Load a model. on_packed: called with the bytes of each weight that is ready."""
        ...

    def settle(self, executors: Sequence[Executor], config: EngineConfig) -> None:
        """When all models are loaded: the executors, which share blocks, get their KV caches."""
        ...

    def read_bandwidth(self, achieved: float) -> float | None:
        """Measured bytes/s of memory; None if nobody measures it. achieved: what somebody has read."""
        ...

    def peak_flops(self, executor: Executor) -> float | None:
        """Measured FLOP/s in the precision of most products; None if nobody measures it."""
        ...
