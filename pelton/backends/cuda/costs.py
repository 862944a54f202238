"""What a call costs on this backend: weights, activations and KV cache in the types that they have on the device."""

from __future__ import annotations

from ...graph.cost import Cost, total
from ...graph.types import ElementType
from ...program import CacheRef, Call, ConstantRef, Program, View
from ..call_cost import CallCost
from .activations import Activations, Numerics
from .memory import rows_of
from .stored import PRODUCTS, constant_bytes, device_types, product_operands, shape_of


def call_costs(program: Program, numerics: Numerics) -> list[CallCost]:
    """The cost of every call of a program, in order."""
    types = device_types(program, numerics.compute)
    return [_cost(program, types, call, numerics) for call in program.calls]


def step_bytes(program: Program, numerics: Numerics) -> Cost:
    """Bytes that a step moves, all calls together."""
    return total([part for cost in call_costs(program, numerics) for part in (cost.streamed, cost.activations)])


def _cost(program: Program, types: list[ElementType], call: Call, numerics: Numerics) -> CallCost:
    streamed: list[Cost] = [{name: factor for name, factor in call.bytes.items() if name.startswith("read/")}]
    activations: list[Cost] = []
    for operand in (*call.outputs, *call.operands):
        if isinstance(operand, View):
            buffer, dim = program.buffers[operand.buffer], rows_of(program, call, operand).dim
            if call.kernel == "take_rows":  # of what it selects from, too, only the selected rows are read
                dim = program.rows_of(call)
            wanted = numerics.quantized.get(operand.buffer)
            size = buffer.dtype.bits / 8 * operand.cols if wanted is None else _code_bytes(wanted, operand.cols)
            activations.append({dim: size})
        elif isinstance(operand, ConstantRef) and program.constants[operand.index].expr is not None:
            constant = program.constants[operand.index]
            size = constant_bytes(constant, types[operand.index])
            looked_up = call.kernel == "embedding"
            streamed.append({program.rows_of(call): size / shape_of(constant)[0]} if looked_up else {"1": size})
        elif isinstance(operand, CacheRef) and call.kernel in ("kv_write", "rope_kv_write"):
            streamed.append({"T": program.caches[operand.index].token_bytes})
    if call.kernel in PRODUCTS:  # codes that no kernel before has made are written, then read
        x, weight = product_operands(call)
        wanted = numerics.activations.get(weight.index)
        if wanted is not None and x.buffer not in numerics.quantized:
            activations.append({program.rows_of(call): 2 * _code_bytes(wanted, x.cols)})
    return CallCost(call, call.flops, total(streamed), total(activations), _precision(call, numerics))


def _code_bytes(wanted: Activations, cols: int) -> float:
    """Of a row of codes with its scales."""
    return cols + 4 * wanted.groups(cols)


def _precision(call: Call, numerics: Numerics) -> str:
    if call.kernel == "attention":
        return numerics.compute.name
    return numerics.precision(product_operands(call)[1].index) if call.kernel in PRODUCTS else "f32"
