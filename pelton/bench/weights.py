"""Random weights of any type, in the plain form that checkpoints yield."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ..graph import BF16, F16, F32, GroupQuant, TensorType
from ..graph.quantized import SCALE_ARRAYS, HostTensor, QuantizedArray

_NUMPY: dict[Any, Any] = {F32: np.float32, F16: np.float16, BF16: ml_dtypes.bfloat16}
_DRAWN = 1 << 20  # values; they repeat: speed does not depend on them, drawing them takes longer than measuring


def random_weight(type: TensorType, seed: int = 0) -> HostTensor:
    """Values around 0 as trained weights have them, of the size that keeps sums small."""
    shape = tuple(int(d) for d in type.shape)
    rng = np.random.default_rng(seed)

    def drawn(shape: tuple[int, ...], dtype: Any, low: float, high: float) -> npt.NDArray[Any]:
        count = min(_DRAWN, int(np.prod(shape)))
        return np.resize(rng.uniform(low, high, count).astype(dtype), shape)

    if not isinstance(type.dtype, GroupQuant):
        return drawn(shape, _NUMPY[type.dtype], -0.05, 0.05)
    quant = type.dtype
    rows, cols = shape
    groups, top = (rows, quant.groups(cols)), 1 << quant.bits
    codes = drawn(shape, np.uint8, 0, 127 if quant.floating and quant.bits == 8 else top)  # 127 is NaN in FP8
    largest = 0.1 / top
    if quant.outer is None:
        scale = drawn(groups, SCALE_ARRAYS[quant.scale], largest / 2, largest)
        minimum = drawn(groups, SCALE_ARRAYS[quant.scale], -0.05, -0.04) if quant.minimum else None
        return QuantizedArray(codes, scale, drawn(groups, np.uint8, 0, top) if quant.zero_point else minimum, quant)
    scale = drawn(groups, SCALE_ARRAYS[quant.scale], 32, 64)
    minimum = drawn(groups, SCALE_ARRAYS[quant.scale], 32, 64) if quant.minimum else None
    outer, kind = (rows, cols // (quant.outer or cols)), SCALE_ARRAYS[quant.outer_dtype]
    outer_minimum = drawn(outer, kind, -0.001, -0.0008) if quant.minimum else None
    return QuantizedArray(codes, scale, minimum, quant, drawn(outer, kind, largest / 64, largest / 48), outer_minimum)
