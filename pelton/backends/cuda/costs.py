"""What a call costs on this backend: weights, activations and KV cache in the types that they have on the device."""

from __future__ import annotations

import math

from ...graph import DType
from ...graph.cost import Cost, total
from ...program import Call, ConstantRef, Program, View
from ..call_cost import CallCost
from .memory import rows_of
from .weights import device_types, shape_of


def call_costs(program: Program, compute: DType) -> list[CallCost]:
    """The cost of every call of a program, in order."""
    types = device_types(program, compute)
    return [_cost(program, types, call, compute) for call in program.calls]


def step_bytes(program: Program, compute: DType) -> Cost:
    """Bytes that a step moves, all calls together."""
    return total([part for cost in call_costs(program, compute) for part in (cost.streamed, cost.activations)])


def _cost(program: Program, types: list[DType], call: Call, compute: DType) -> CallCost:
    streamed: list[Cost] = [{name: factor for name, factor in call.bytes.items() if name.startswith("read/")}]
    activations: list[Cost] = []
    for operand in (*call.outputs, *call.operands):
        if isinstance(operand, View):
            buffer, dim = program.buffers[operand.buffer], rows_of(program, call, operand).dim
            if call.kernel == "take_rows":  # of what it selects from, too, only the selected rows are read
                dim = program.rows_of(call)
            activations.append({dim: operand.cols * buffer.dtype.bits / 8})
        elif isinstance(operand, ConstantRef) and program.constants[operand.index].expr is not None:
            shape, size = shape_of(program.constants[operand.index]), types[operand.index].bits / 8
            looked_up = call.kernel == "embedding"
            streamed.append({program.rows_of(call): shape[1] * size} if looked_up else {"1": math.prod(shape) * size})
    multiplies = call.kernel in ("linear", "gated_linear", "attention")
    return CallCost(call, call.flops, total(streamed), total(activations), compute.name if multiplies else "f32")
