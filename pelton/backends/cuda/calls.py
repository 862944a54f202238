"""Program calls -> launches: closures over constants and caches that read and write a frame's tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch

from ...graph.rope import RopeSpec
from ...program import AdapterRef, CacheRef, Call, ConstantRef, InputRef, Operand, Program, View
from .activations import Numerics
from .lora import AdapterTensors
from .memory import CodeMemory, Frame, Rows, rows_of
from .packing import PackedWeight
from .stored import device_types
from .triton import attention, lora, norms, pointwise, rope
from .triton.cache import Cache
from .triton.products import dequantize_rows
from .triton.quantize import quantize_rows
from .tuning import Products, product_of
from .weights import Held

#: Starts the kernels of a call, and does not wait for them.
Launch: TypeAlias = Callable[[Frame], None]
Params: TypeAlias = Mapping[str, Any]


class Lowering:
    """The launches of a program.

    constants, caches, adapters: on the device, by the program's numbers. Caches may be replaced in the list, up to the
    first launch that is captured. workspace: float32, for partial results of decode attention. codes: where activations
    become codes that no kernel has made so.
    """

    def __init__(
        self,
        program: Program,
        numerics: Numerics,
        constants: Sequence[Held],
        caches: Sequence[Cache],
        adapters: Sequence[AdapterTensors],
        workspace: torch.Tensor,
        products: Products,
        codes: CodeMemory,
    ) -> None:
        self._program = program
        self._numerics, self._types = numerics, device_types(program, numerics.compute)
        self._constants, self._caches, self._adapters = constants, caches, adapters
        self._workspace = workspace
        self._products, self._codes = products, codes

    def launches(self) -> list[Launch]:
        """One per call, in order."""
        return [self._launch(call) for call in self._program.calls]

    def _launch(self, call: Call) -> Launch:
        operands: list[Any] = [
            rows_of(self._program, call, operand) if isinstance(operand, View) else operand
            for operand in (*call.outputs, *call.operands)
        ]
        launch: Launch = getattr(self, f"_{call.kernel}")(call.params, *operands)
        return launch

    def _input(self, operand: Operand | None) -> str:
        assert isinstance(operand, InputRef)
        return self._program.inputs[operand.index]

    def _constant(self, operand: Operand | None) -> Any:
        """None for an operand that is not there."""
        assert operand is None or isinstance(operand, ConstantRef)
        return None if operand is None else self._constants[operand.index]

    # Each method below takes the call's attributes, then its outputs and operands in the op's order.

    def _embedding(self, params: Params, out: Rows, ids: Operand, table: Operand) -> Launch:
        name, rows = self._input(ids), self._constant(table)
        if isinstance(rows, PackedWeight):
            return lambda f: dequantize_rows(f.tensors[out], rows, f.inputs[name])
        return lambda f: pointwise.gather_rows(f.tensors[out], rows, f.inputs[name])

    def _take_rows(self, params: Params, out: Rows, x: Rows, indices: Operand) -> Launch:
        name = self._input(indices)
        return lambda f: pointwise.gather_rows(f.tensors[out], f.tensors[x], f.inputs[name])

    def _linear(self, params: Params, out: Rows, x: Rows, w: Operand, bias: Operand | None = None) -> Launch:
        _, multiply = self._product(out, x, w, bias)
        return lambda f: multiply(f, f.tensors[out])

    def _gated_linear(self, params: Params, out: Rows, x: Rows, w: Operand, bias: Operand | None = None) -> Launch:
        kind, (columns, multiply) = params["kind"], self._product(out, x, w, bias)

        def launch(f: Frame) -> None:
            both = f.tensors[out].new_empty(len(f.tensors[out]), columns)
            multiply(f, both)
            pointwise.gated_blocks(f.tensors[out], both, kind)

        return launch

    def _product(
        self, out: Rows, x: Rows, w: Operand, bias: Operand | None
    ) -> tuple[int, Callable[[Frame, torch.Tensor], None]]:
        """The columns of a product, and what computes it into a tensor, activations quantized before if need be."""
        assert isinstance(w, ConstantRef)
        problem = product_of(self._program, self._numerics, self._types, out.view, x.view, w)
        product, b = self._products.add(problem, self._constants[w.index]), self._constant(bias)
        wanted, memory = self._numerics.activations.get(w.index), self._codes

        def multiply(f: Frame, to: torch.Tensor) -> None:
            left = f.codes.get(x) or f.tensors[x]
            if wanted is not None and isinstance(left, torch.Tensor):
                codes = memory.of(wanted, *left.shape)
                quantize_rows(codes, left)
                left = codes
            product(to, left, b)

        return problem.n, multiply

    def _rms_norm(self, params: Params, out: Rows, x: Rows, w: Operand) -> Launch:
        weight, eps, offset = self._constant(w), params["eps"], params["weight_offset"]
        return lambda f: norms.rms_norm(f.written(out), f.tensors[x], weight, eps, offset)

    def _layer_norm(self, params: Params, out: Rows, x: Rows, w: Operand, bias: Operand | None = None) -> Launch:
        weight, b, eps = self._constant(w), self._constant(bias), params["eps"]
        return lambda f: norms.layer_norm(f.written(out), f.tensors[x], weight, b, eps)

    def _add_rms_norm(self, params: Params, total: Rows, out: Rows, a: Rows, b: Rows, w: Operand) -> Launch:
        weight, eps, offset = self._constant(w), params["eps"], params["weight_offset"]
        return lambda f: norms.add_rms_norm(
            f.tensors[total], f.written(out), f.tensors[a], f.tensors[b], weight, eps, offset
        )

    def _add_layer_norm(
        self, params: Params, total: Rows, out: Rows, a: Rows, b: Rows, w: Operand, bias: Operand | None = None
    ) -> Launch:
        weight, shift, eps = self._constant(w), self._constant(bias), params["eps"]
        return lambda f: norms.add_layer_norm(
            f.tensors[total], f.written(out), f.tensors[a], f.tensors[b], weight, shift, eps
        )

    def _add(self, params: Params, out: Rows, a: Rows, b: Rows) -> Launch:
        return lambda f: pointwise.add(f.tensors[out], f.tensors[a], f.tensors[b])

    def _mul(self, params: Params, out: Rows, a: Rows, b: Rows) -> Launch:
        return lambda f: pointwise.mul(f.tensors[out], f.tensors[a], f.tensors[b])

    def _scale(self, params: Params, out: Rows, x: Rows) -> Launch:
        factor = params["factor"]
        return lambda f: pointwise.scale(f.tensors[out], f.tensors[x], factor)

    def _softcap(self, params: Params, out: Rows, x: Rows) -> Launch:
        cap = params["cap"]
        return lambda f: pointwise.softcap(f.tensors[out], f.tensors[x], cap)

    def _activation(self, params: Params, out: Rows, x: Rows) -> Launch:
        kind = params["kind"]
        return lambda f: pointwise.activation(f.written(out), f.tensors[x], kind)

    def _gated_activation(self, params: Params, out: Rows, gate: Rows, up: Rows) -> Launch:
        kind = params["kind"]
        return lambda f: pointwise.gated_activation(f.written(out), f.tensors[gate], f.tensors[up], kind)

    def _rope(self, params: Params, out: Rows, x: Rows, positions: Operand, table: Operand) -> Launch:
        spec, name, turns = RopeSpec.of(params), self._input(positions), self._constant(table)
        return lambda f: rope.rope(
            f.tensors[out], f.tensors[x], f.inputs[name], turns, spec.head_dim, spec.rotary_dim, spec.interleaved
        )

    def _kv_write(self, params: Params, cache: CacheRef, k: Rows, v: Rows, slots: Operand) -> Launch:
        name = self._input(slots)
        return lambda f: rope.kv_write(self._caches[cache.index], f.tensors[k], f.tensors[v], f.inputs[name])

    def _rope_kv_write(
        self, params: Params, out: Rows, cache: CacheRef, q: Rows, k: Rows, v: Rows, positions: Operand, slots: Operand,
        table: Operand,
    ) -> Launch:  # fmt: skip
        spec, turns = RopeSpec.of(params), self._constant(table)
        where, to = self._input(positions), self._input(slots)
        return lambda f: rope.rope_kv_write(
            f.tensors[out], self._caches[cache.index], f.tensors[q], f.tensors[k], f.tensors[v], f.inputs[where],
            f.inputs[to], turns, spec.head_dim, spec.rotary_dim, spec.interleaved,
        )  # fmt: skip

    def _attention(
        self, params: Params, out: Rows, q: Rows, cache: CacheRef, table: Operand, lens: Operand, starts: Operand,
        slopes: Operand | None = None,
    ) -> Launch:  # fmt: skip
        alibi = self._constant(slopes)
        named = {name: params[name] for name in ("num_heads", "scale", "window", "softcap")}

        def launch(f: Frame) -> None:
            i = f.inputs
            before = (f.tensors[out], f.tensors[q], self._caches[cache.index])
            step = (i["block_table"], i["table_width"], i["seq_lens"], i["query_start_loc"])
            if f.sizes.tiles:
                attention.prefill_attention(*before, *step, i["tiles"], alibi, **named)
            if f.sizes.decodes:
                attention.decode_attention(
                    *before, *step, i["decodes"], alibi, self._workspace, num_splits=f.num_splits, **named
                )

        return launch

    def _lora(self, params: Params, out: Rows, y: Rows, x: Rows, table: AdapterRef, slots: Operand) -> Launch:
        adapter, name = self._adapters[table.index], self._input(slots)
        return lambda f: lora.lora(
            f.tensors[out], f.tensors[y], f.tensors[x], adapter.a, adapter.b, f.inputs[name], adapter.parts,
            adapter.scratch,
        )  # fmt: skip
