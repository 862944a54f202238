"""The CPU executor: packs the program's constants, hands its calls to the native side, runs steps."""

from __future__ import annotations

import hashlib
import os
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from ...graph.quantized import HostTensor
from ...program import Constant, Program, constant_text
from ...program.weights import evaluate, vector
from ..base import KVSpec, Sampler
from ..host import HostExecutor
from ..step_inputs import StepInputs
from . import packing
from .calls import CACHE_FORMATS, native_calls
from .packed_cache import open_or_pack

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


def cache_bytes_per_block(program: Program, block_size: int) -> int:
    """Bytes that one block of ``block_size`` tokens takes in all layers together."""
    from . import _native

    return sum(
        _native.cache_bytes(c.num_kv_heads, c.head_dim, block_size, 1, CACHE_FORMATS[c.dtype]) for c in program.caches
    )


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
    a scale per group, unless ``activations`` is "float" or the ISA has no int8 products; next to other weights
    than float32 they are rounded to bf16 where the ISA has products of pairs.
    """

    def __init__(
        self,
        program: Program,
        read: Callable[[str], HostTensor],
        kv_spec: KVSpec,
        sampler: Sampler,
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
        super().__init__(kv_spec, sampler, program.flops, {**program.bytes, "1": float(read_once)})
        self.program = program
        self._publishing: threading.Thread | None = None
        self._native = _native.Executor(isa, threads, max(program.arena_bytes, 64))
        for data in self._pack(read, content_key, on_packed):
            self._native.add_constant(data)
        for cache in program.caches:
            format = CACHE_FORMATS[cache.dtype]
            self._native.add_cache(
                _native.cache_bytes(cache.num_kv_heads, cache.head_dim, kv_spec.block_size, kv_spec.num_blocks, format)
            )
        int8 = activations != "float" and _native.has_int8_products(isa)
        for call in native_calls(program, kv_spec.block_size, kv_spec.num_blocks, int8):
            self._native.add_call(call.kernel, call.operands, call.ints, call.floats)

    def _pack(
        self, read: Callable[[str], HostTensor], content_key: str | None, on_packed: Callable[[int], None]
    ) -> list[Bytes]:
        constants = self.program.constants
        # Tables of cosines are quick to make and depend on max_model_len: they stay out of the cache.
        weights = [c for c in constants if c.expr is not None]
        sizes = [constant_bytes(c) for c in weights]

        def pack(index: int) -> Bytes:
            constant = weights[index]
            if constant.packing == "vector":
                return _bytes(vector(constant, read))
            value = evaluate(_expr(constant), read)
            return packing.pack_linear(value) if constant.packing == "panels" else packing.pack_rows(value)

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
        return [_bytes(vector(c, read)) if c.expr is None else next(rest) for c in constants]

    def _run(self, inputs: StepInputs) -> tuple[npt.NDArray[np.float32], float]:
        seconds: float = self._native.run(
            inputs.dims, [inputs.arrays[name].reshape(-1) for name in self.program.inputs]
        )
        output = self.program.output
        buffer = self.program.buffers[output.buffer]
        logits = self._native.arena(buffer.offset + 4 * output.start, inputs.dims[2], output.cols, buffer.cols)
        return logits, seconds

    def close(self) -> None:
        self._native.close()
        if self._publishing is not None:
            self._publishing.join()


def _bytes(values: npt.NDArray[np.float32]) -> Bytes:
    return values.view(np.uint8).reshape(-1)


def _expr(constant: Constant) -> Any:
    assert constant.expr is not None
    return constant.expr
