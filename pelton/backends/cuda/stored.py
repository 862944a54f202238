"""What constants are stored in on the device, and how large they are; known before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ...graph import BF16, F16, F32, DType, Graph, GroupQuant
from ...graph.types import ElementType
from ...program import Call, Constant, ConstantRef, Program, View
from . import packing

#: Kernels of matrix products with weights.
PRODUCTS = ("linear", "gated_linear")


def product_operands(call: Call) -> tuple[View, ConstantRef]:
    """The left side and the weight of a call of ``PRODUCTS``."""
    x, weight = call.operands[:2]
    assert isinstance(x, View) and isinstance(weight, ConstantRef)
    return x, weight


def compute_type(graph: Graph, dtype: str = "auto") -> DType:
    """The type that products run in: float32 where all matrices are, else the 16-bit type of most of them.

    Beside quantized matrices it is bfloat16. dtype: ``EngineConfig.dtype``; "f32" means float32 there, too.
    """
    matrices = [n.tensor for n in graph.leaves("weight") if len(n.tensor.shape) > 1]
    sizes = dict.fromkeys((F32, F16, BF16), 0)
    for tensor in matrices:
        plain = tensor.dtype if isinstance(tensor.dtype, DType) else BF16
        sizes[plain] += int(tensor.shape[0]) * int(tensor.shape[1])
    narrow = max((F16, BF16), key=lambda d: sizes[d])
    return narrow if sizes[narrow] and dtype != "f32" else F32


def device_types(program: Program, compute: DType) -> list[ElementType]:
    """What each constant is stored in: matrices, and what products add, as products need them; all else float32.

    Quantized matrices keep their type, if kernels read it.
    """
    added = {
        operand.index
        for call in program.calls
        for operand in call.operands[2:]
        if call.kernel in PRODUCTS and isinstance(operand, ConstantRef)
    }

    def type_of(index: int, constant: Constant) -> ElementType:
        if constant.expr is None or (constant.packing == "vector" and index not in added):
            return F32
        if constant.packing == "vector":
            return compute
        stored = constant.expr.tensor.dtype
        if isinstance(stored, GroupQuant):
            return stored if packing.has_kernel(stored, int(constant.expr.tensor.shape[1])) else compute
        return F32 if stored == F32 else compute

    return [type_of(i, c) for i, c in enumerate(program.constants)]


def shape_of(constant: Constant) -> tuple[int, ...]:
    attrs = dict(constant.attrs)
    if constant.expr is not None:
        return tuple(int(d) for d in constant.expr.tensor.shape)
    return (attrs["positions"], attrs["rotary_dim"]) if constant.packing == "rope" else (attrs["num_heads"],)


def distinct(program: Program, types: Sequence[ElementType]) -> dict[tuple[Any, ...], list[int]]:
    """Constants that are the same data, such as an output layer tied to the table of embeddings: kept once."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, constant in enumerate(program.constants):
        key = (constant.expr or (constant.packing, constant.attrs), types[index])
        groups.setdefault(key, []).append(index)
    return groups


def device_bytes(program: Program, compute: DType) -> int:
    """Of all constants."""
    types = device_types(program, compute)
    first = [indices[0] for indices in distinct(program, types).values()]
    return sum(constant_bytes(program.constants[i], types[i]) for i in first)


def constant_bytes(constant: Constant, type: ElementType) -> int:
    """Of a constant in a type of :func:`device_types`."""
    shape = shape_of(constant)
    if isinstance(type, GroupQuant):
        return packing.packed_bytes(type, *shape)
    return math.prod(shape) * type.bits // 8
