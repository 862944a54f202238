"""The CPU executor: packs the program's constants, hands its calls to the native side, runs steps."""

from __future__ import annotations

import hashlib
import os
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ...graph.cost import StepShape
from ...graph.quantized import HostTensor
from ...program import Constant, Program, View, constant_text
from ...program.weights import evaluate, vector
from ..base import Batch, KVSpec, Sampler, StepProfile
from ..call_cost import CallCost
from ..host import AdapterPart, HostExecutor
from ..step_inputs import StepInputs
from . import packing
from .adapters import table_bytes, write_slot
from .calls import CACHE_FORMATS, native_calls
from .costs import call_costs
from .packed_cache import open_or_pack
from .sampler import NativeSampler

Bytes = npt.NDArray[np.uint8]


def constant_bytes(constant: Constant, *, as_floats: bool = False) -> int:
    """Size of a constant after packing, known without reading it; or as the oracle keeps it, in float32."""
    if constant.expr is None:
        attrs = dict(constant.attrs)
        count = attrs["positions"] * attrs["rotary_dim"] if constant.packing == "rope" else attrs["num_heads"]
        return 4 * int(count)
    type = constant.expr.tensor
    if constant.packing == "vector":
        return 4 * int(type.shape[0])
    rows, cols = (int(d) for d in type.shape)
    if as_floats:
        return 4 * rows * cols
    sizes = {"panels": packing.linear_nbytes, "rows": packing.rows_nbytes}
    return sizes[constant.packing](rows, cols, type.dtype)


def pack_constant(constant: Constant, read: Callable[[str], HostTensor]) -> Bytes:
    """The bytes of a constant in the layout that kernels read."""
    if constant.expr is None or constant.packing == "vector":
        return vector(constant, read).view(np.uint8).reshape(-1)
    value = evaluate(constant.expr, read)
    return packing.pack_linear(value) if constant.packing == "panels" else packing.pack_rows(value)


def cache_bytes_per_block(program: Program, block_size: int) -> int:
    """Bytes that one block of ``block_size`` tokens takes in all layers together."""
    from . import _native

    return sum(
        _native.cache_bytes(c.num_kv_heads, c.head_dim, block_size, 1, CACHE_FORMATS[c.dtype]) for c in program.caches
    )


def adapter_bytes(program: Program) -> int:
    """Bytes of all tables that adapters are kept in."""
    return sum(table_bytes(table.type) for table in program.adapters)


def choose_isa(requested: str | None) -> str:
    """The requested tier, else ``PELTON_CPU_ISA``, else the best one this machine has.

    Raises:
        PeltonError: this machine or this build does not have the tier, or ``PELTON_ASSUME_FEATURES`` names
            a feature that there is not.
    """
    from ...errors import PeltonError
    from . import _native

    try:
        known: list[str] = _native.supported_isas()
    except ValueError as error:
        raise PeltonError(str(error), "correct the variable or unset it") from None
    isa = requested or os.environ.get("PELTON_CPU_ISA") or known[-1]
    if isa not in known:
        raise PeltonError(f"this machine cannot run ISA {isa!r}", f"choose one of {', '.join(known)}")
    return isa


class CpuExecutor(HostExecutor):
    """Runs a program with native kernels.

    read: yields a checkpoint tensor by name. content_key: identifies the checkpoint's content for the
    packed-weight cache, None to keep packed weights in memory only. on_packed(bytes) reports progress
    while packing. Activations are float32 between products. Next to quantized weights they become int8 with
    a scale per group where ``activations`` says so (see ``packing.int8_activations``) and the ISA has int8 products;
    next to other weights than float32 they are rounded to bf16 where the ISA has products of pairs.
    sampler: None: the native one, on the executor's threads.
    """

    def __init__(
        self,
        program: Program,
        read: Callable[[str], HostTensor],
        kv_spec: KVSpec,
        sampler: Sampler | None = None,
        *,
        isa: str,
        threads: int,
        activations: str = "auto",
        content_key: str | None = None,
        on_packed: Callable[[int], None] = lambda size: None,
    ) -> None:
        from . import _native

        # A step reads all matrices and vectors once, in the form they are packed in.
        read_once = sum(constant_bytes(c) for c in program.constants if c.packing in ("panels", "vector"))
        self._native = _native.Executor(isa, threads, max(program.arena_bytes, 64))
        sampler = sampler or NativeSampler(self._native)
        super().__init__(kv_spec, sampler, program.flops, {**program.bytes, "1": float(read_once)}, program.adapters)
        self.program = program
        self._isa = isa
        self._publishing: threading.Thread | None = None
        for data in self._pack(read, content_key, on_packed):
            self._native.add_constant(data)
        self._caches: list[Bytes] = []  # [num_blocks, bytes of a block], all that the native side has
        for cache in program.caches:
            format = CACHE_FORMATS[cache.dtype]
            index = self._native.add_cache(
                _native.cache_bytes(cache.num_kv_heads, cache.head_dim, kv_spec.block_size, kv_spec.num_blocks, format)
            )
            self._caches.append(self._native.cache(index).reshape(kv_spec.num_blocks, -1))
        self._native.prefault_caches(kv_spec.num_blocks)
        self._tables: list[Bytes] = []
        for table in program.adapters:
            index = self._native.add_cache(table_bytes(table.type))
            self._tables.append(self._native.cache(index))
        self._activations = activations if _native.has_int8_products(isa) else "float"
        for call in native_calls(program, kv_spec.block_size, kv_spec.num_blocks, self._activations):
            self._native.add_call(call.kernel, call.operands, call.ints, call.floats)

    def _pack(
        self, read: Callable[[str], HostTensor], content_key: str | None, on_packed: Callable[[int], None]
    ) -> list[Bytes]:
        constants = self.program.constants
        # Tables of cosines are quick to make and depend on max_model_len: they stay out of the cache.
        weights = [c for c in constants if c.expr is not None]
        sizes = [constant_bytes(c) for c in weights]

        def pack(index: int) -> Bytes:
            return pack_constant(weights[index], read)

        def report(index: int) -> None:
            on_packed(sizes[index])

        packed: list[Bytes] | None = None
        if content_key is not None:
            recipe = "\n".join([str(packing.VERSION), content_key, *map(constant_text, weights)])
            key = hashlib.sha256(recipe.encode()).hexdigest()[:32]
            try:
                packed, self._publishing = open_or_pack(key, sizes, pack, report)
            except OSError as error:
                warnings.warn(
                    f"packed weights are not kept: {error}; set PELTON_CACHE to a writable folder", stacklevel=2
                )
        if packed is None:
            packed = []
            for index in range(len(weights)):
                packed.append(pack(index))
                report(index)
        rest = iter(packed)
        return [pack_constant(c, read) if c.expr is None else next(rest) for c in constants]

    def _block_bytes(self) -> list[Bytes]:
        return self._caches

    def _write_adapter(self, index: int, slot: int, parts: Sequence[AdapterPart]) -> None:
        write_slot(self.program.adapters[index].type, slot, parts, self._tables[index])

    def _run(self, inputs: StepInputs) -> tuple[npt.NDArray[np.float32], float]:
        return self._logits(inputs, self._native.run(inputs.dims, self._inputs(inputs)))

    def _begin(self, inputs: StepInputs) -> None:
        self._native.start(inputs.dims, self._inputs(inputs))

    def _wait(self, inputs: StepInputs) -> tuple[npt.NDArray[np.float32], float]:
        return self._logits(inputs, self._native.wait())

    def _logits(self, inputs: StepInputs, seconds: float) -> tuple[npt.NDArray[np.float32], float]:
        return self._rows(self.program.output, inputs.shape.num_logits), seconds

    def _hidden(self, inputs: StepInputs) -> npt.NDArray[np.float32]:
        return self._rows(self.program.hidden, inputs.shape.num_logits + inputs.shape.num_hidden)

    def _rows(self, view: View, count: int) -> npt.NDArray[np.float32]:
        buffer = self.program.buffers[view.buffer]
        rows: npt.NDArray[np.float32] = self._native.arena(
            buffer.offset + 4 * view.start, count, view.cols, buffer.cols
        )
        return rows

    def _inputs(self, inputs: StepInputs) -> list[npt.NDArray[np.int32]]:
        self._native.use_block(int(inputs.arrays["slot_mapping"].max()) // self._kv_spec.block_size)
        return [inputs.arrays[name].reshape(-1) for name in self.program.inputs]

    @cached_property
    def costs(self) -> list[CallCost]:
        """What each call costs, in order."""
        return call_costs(
            self.program, [constant_bytes(c) for c in self.program.constants], self._isa, self._activations
        )

    @cached_property
    def precision(self) -> str:
        """The one that most FLOPs of a token are done in: MFU is against its peak."""
        flops: dict[str, float] = {}
        one_token = StepShape((1,), (1,), 1)
        for cost in self.costs:
            flops[cost.precision] = flops.get(cost.precision, 0.0) + one_token.evaluate(cost.flops)
        return max(flops, key=lambda name: flops[name])

    def profile(self, batch: Batch) -> StepProfile:
        """Run a step without sampling from it and measure each call, with a barrier after it."""
        inputs = self._inputs_of(batch)
        start = time.perf_counter()
        seconds = self._native.run_profiled(inputs.dims, self._inputs(inputs))
        wall = time.perf_counter() - start
        calls = zip(self.costs, seconds, strict=True)
        return StepProfile(wall, tuple(cost.stats(inputs.shape, s) for cost, s in calls))

    def run_calls(self, inputs: StepInputs, first: int, last: int) -> float:
        """Seconds of the calls [first, last) of a step alone, on what earlier steps left in the arena."""
        seconds: float = self._native.run_calls(inputs.dims, self._inputs(inputs), first, last)
        return seconds

    def close(self) -> None:
        self._caches.clear()
        self._tables.clear()
        self._native.close()
        if self._publishing is not None:
            self._publishing.join()
