"""Random weights of any type, in the plain form that checkpoints yield."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ..graph import BF16, F16, F32, GroupQuant, TensorType
from ..graph.quantized import HostTensor, QuantizedArray

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
    groups, top, scale = (shape[0], shape[1] // quant.group_size), 1 << quant.bits, _NUMPY[quant.scale]
    largest = 0.1 / top
    minimum = drawn(groups, scale, -0.05, -0.04) if quant.minimum else None
    return QuantizedArray(drawn(shape, np.uint8, 0, top), drawn(groups, scale, largest / 2, largest), minimum, quant)
