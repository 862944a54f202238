"""A group-quantized tensor in plain form: codes, scales, minima. The truth that every packing keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from .types import GroupQuant

Array: TypeAlias = "npt.NDArray[Any]"


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedArray:
    """Values of a :class:`GroupQuant` type for a matrix of shape [rows, cols].

    codes: uint8 [rows, cols]; scale and minimum: float16 or float32 [rows, cols / group_size],
    ``minimum`` is None when the type has none.
    """

    codes: Array
    scale: Array
    minimum: Array | None
    type: GroupQuant

    def __post_init__(self) -> None:
        rows, cols = self.codes.shape
        want = (rows, cols // self.type.group_size)
        if cols % self.type.group_size or self.scale.shape != want:
            raise ValueError(f"scales {self.scale.shape} do not fit codes {self.codes.shape} of {self.type}")
        if (self.minimum is not None) != self.type.minimum:
            raise ValueError(f"{self.type}: minima given and type disagree")
        if self.minimum is not None and self.minimum.shape != want:
            raise ValueError(f"minima {self.minimum.shape} do not fit codes {self.codes.shape} of {self.type}")

    @property
    def shape(self) -> tuple[int, int]:
        rows, cols = self.codes.shape
        return rows, cols

    def __getitem__(self, rows: Any) -> QuantizedArray:
        """Rows by slice or index array; columns are never cut, because groups run along them."""
        minimum = None if self.minimum is None else self.minimum[rows]
        return QuantizedArray(self.codes[rows], self.scale[rows], minimum, self.type)

    def dequantize(self) -> npt.NDArray[np.float32]:
        """float32 [rows, cols]."""
        rows, cols = self.codes.shape
        codes = self.codes.reshape(rows, -1, self.type.group_size).astype(np.float32)
        scale = self.scale.astype(np.float32)[:, :, None]
        if self.minimum is None:
            values = (codes - np.float32(self.type.offset)) * scale
        else:
            values = codes * scale + self.minimum.astype(np.float32)[:, :, None]
        return values.reshape(rows, cols)


#: What a checkpoint yields for one weight: a NumPy array (bfloat16 through ``ml_dtypes``) or codes.
HostTensor: TypeAlias = "Array | QuantizedArray"


def concat_rows(parts: list[HostTensor]) -> HostTensor:
    """Stack matrices (or vectors) of one type along the first axis."""
    quantized = [p for p in parts if isinstance(p, QuantizedArray)]
    if not quantized:
        return np.concatenate([np.asarray(p) for p in parts], axis=0)
    if len(quantized) != len(parts) or any(p.type != quantized[0].type for p in quantized):
        raise ValueError("cannot stack weights of different types")
    minima = [p.minimum for p in quantized if p.minimum is not None]
    return QuantizedArray(
        np.concatenate([p.codes for p in quantized]),
        np.concatenate([p.scale for p in quantized]),
        np.concatenate(minima) if minima else None,
        quantized[0].type,
    )
