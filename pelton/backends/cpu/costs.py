"""What a call costs on this backend: the op table's count, with weights in the size they are packed in."""

from __future__ import annotations

from collections.abc import Sequence

from ...graph import F16, F32
from ...graph.cost import element_bytes, total
from ...program import CacheRef, Call, ConstantRef, Program
from ..call_cost import CallCost
from .packing import int8_activations

#: Tiers that multiply in bf16 next to bf16 weights, a bf16 KV cache and codes that do not meet int8 activations;
#: the others do in f32.
_BF16_TIERS = frozenset({"avx512_bf16", "amx"})


def call_costs(program: Program, packed_bytes: Sequence[int], isa: str, activations: str) -> list[CallCost]:
    """The cost of every call of a program, in order.

    packed_bytes: the size of each constant. activations: as for ``native_calls``.
    """
    return [_cost(program, packed_bytes, call, isa, activations) for call in program.calls]


def _cost(program: Program, packed_bytes: Sequence[int], call: Call, isa: str, choice: str) -> CallCost:
    streamed = [{name: factor for name, factor in call.bytes.items() if name.startswith("read/")}]
    activations = [{name: factor for name, factor in call.bytes.items() if name in ("T", "S", "N", "L")}]
    for operand in call.operands:
        if not isinstance(operand, ConstantRef):
            continue
        constant = program.constants[operand.index]
        if constant.packing == "rows":  # the table's rows are counted in the op's bytes, in their stored size
            assert constant.expr is not None
            table, rows = constant.expr.tensor, program.rows_of(call)
            streamed.append({rows: packed_bytes[operand.index] / int(table.shape[0])})
            activations.append({rows: -element_bytes(table) * int(table.shape[1])})
        elif constant.expr is not None:
            streamed.append({"1": float(packed_bytes[operand.index])})
    return CallCost(call, call.flops, total(streamed), total(activations), _precision(program, call, isa, choice))


def _precision(program: Program, call: Call, isa: str, choice: str) -> str:
    """The precision that the call's products are made in: which peak it is measured against."""
    bf16 = "bf16" if isa in _BF16_TIERS else "f32"
    if call.kernel in ("linear", "gated_linear"):
        weight = call.operands[1]
        assert isinstance(weight, ConstantRef)
        expr = program.constants[weight.index].expr
        assert expr is not None
        if int8_activations(expr.tensor.dtype, choice):
            return "int8"
        return "f32" if expr.tensor.dtype in (F32, F16) else bf16
    if call.kernel == "attention":
        cache = next(o for o in call.operands if isinstance(o, CacheRef))
        return "f32" if program.caches[cache.index].dtype == F32 else bf16
    return "f32"
