"""Evaluating weight expressions, one constant at a time, when a backend packs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ..graph import BF16, F16, F32, OPS, DType, GroupQuant, Node
from ..graph.ops import alibi_slopes, f32
from ..graph.quantized import HostTensor, QuantizedArray
from ..graph.rope import RopeSpec
from ..quantize import quantize
from .program import Constant

_NUMPY: dict[DType, Any] = {F32: np.float32, F16: np.float16, BF16: ml_dtypes.bfloat16}

#: Reads a tensor of the checkpoint by name, in the Hugging Face layout.
Reader = Callable[[str], HostTensor]


def evaluate(expr: Node, read: Reader) -> HostTensor:
    """The value of a weight expression, in the element type its weights are bound to.

    A weight that is stored dense and bound to a quantized type is quantized here.
    """
    if expr.op != "weight":
        return OPS[expr.op].reference(expr.attrs, *(evaluate(i, read) for i in expr.inputs))  # type: ignore[no-any-return]
    value = read(expr.name)
    if isinstance(value, QuantizedArray):
        return value
    if expr.attrs.get("transposed"):
        value = value.T
    dtype = expr.tensor.dtype
    if isinstance(dtype, GroupQuant):
        return quantize(value, dtype, f"tensor {expr.name}")
    return np.asarray(value).astype(_NUMPY[dtype], copy=False)


def vector(constant: Constant, read: Reader) -> npt.NDArray[np.float32]:
    """The float32 data of a "vector", "rope" or "alibi" constant."""
    if constant.expr is not None:
        return np.ascontiguousarray(f32(evaluate(constant.expr, read)))
    attrs = dict(constant.attrs)
    if constant.packing == "rope":
        return RopeSpec.of(attrs).table(np.arange(attrs["positions"]))
    return alibi_slopes(attrs["num_heads"])
