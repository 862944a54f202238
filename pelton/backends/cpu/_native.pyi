"""The native extension (csrc/bindings.cpp). Contracts of the kernels: csrc/cpu/ops/*/contract.h."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

#: (logprob, rank, ids of the likeliest, their logprobs)
LogprobEntry: TypeAlias = tuple[float, int, list[int], list[float]]

def supported_isas() -> list[str]: ...
def memory_nodes() -> dict[int, list[int]]: ...
def cpu_features() -> dict[str, Any]: ...
def kernels(isa: str) -> dict[str, str]: ...
def has_int8_products(isa: str) -> bool: ...
def measure_peaks(isa: str, threads: int, seconds: float = 0.2, names: list[str] = ...) -> dict[str, float]: ...
def cache_bytes(kv_heads: int, head_dim: int, block_size: int, num_blocks: int, format: int) -> int: ...

def philox(key: int, counter: int) -> int: ...

class SampleRequest:
    def __init__(
        self,
        *,
        output: Sequence[int],
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        typical_p: float,
        repetition_penalty: float,
        presence_penalty: float,
        frequency_penalty: float,
        seed: int,
        min_tokens: int,
        logprobs: int,
        prompt: list[int],
        stop_ids: list[int],
        allowed_ids: list[int] | None,
        biases: list[tuple[int, float]],
        bad_words: list[list[int]],
    ) -> None: ...

class Executor:
    def __init__(self, isa: str, threads: int, arena_bytes: int) -> None: ...
    def add_constant(self, data: npt.NDArray[np.uint8]) -> int: ...
    def add_cache(self, num_bytes: int) -> int: ...
    def add_call(
        self, kernel: str, operands: list[tuple[str, int, int]], ints: list[int], floats: list[float]
    ) -> None: ...
    def run(self, dims: tuple[int, int, int], inputs: list[npt.NDArray[np.int32]]) -> float: ...
    def run_profiled(self, dims: tuple[int, int, int], inputs: list[npt.NDArray[np.int32]]) -> list[float]: ...
    def run_calls(
        self, dims: tuple[int, int, int], inputs: list[npt.NDArray[np.int32]], first: int, last: int
    ) -> float: ...
    def arena(self, offset: int, rows: int, cols: int, ld: int) -> npt.NDArray[np.float32]: ...
    def sample(
        self,
        logits: npt.NDArray[np.float32],
        requests: list[SampleRequest],
        extras: list[tuple[int, list[int], npt.NDArray[np.int32] | None, npt.NDArray[np.float32] | None]],
    ) -> tuple[list[int], list[tuple[int, LogprobEntry]], tuple[int, int, float] | None]: ...
    def logprobs(
        self, logits: npt.NDArray[np.float32], tokens: npt.NDArray[np.int32], count: int
    ) -> list[LogprobEntry]: ...
    def close(self) -> None: ...
