"""A group-quantized tensor in plain form: codes, scales, minima. The truth that every packing keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

from .types import BF16, E4M3, E8M0, F16, F32, I8, U8, DType, GroupQuant

Array: TypeAlias = "npt.NDArray[Any]"

#: How scales and minima are kept in memory.
SCALE_ARRAYS: dict[DType, Any] = {
    F32: np.float32, F16: np.float16, BF16: ml_dtypes.bfloat16, U8: np.uint8, I8: np.int8,
    E4M3: ml_dtypes.float8_e4m3fn, E8M0: ml_dtypes.float8_e8m0fnu,
}  # fmt: skip


#: float32 [2**bits] by bits: the value of every FP8 E4M3 (8 bits) or FP4 E2M1 (4 bits) code.
CODE_VALUES: dict[int, npt.NDArray[np.float32]] = {
    bits: np.arange(1 << bits, dtype=np.uint8).view(kind).astype(np.float32)
    for bits, kind in ((8, ml_dtypes.float8_e4m3fn), (4, ml_dtypes.float4_e2m1fn))
}


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedArray:
    """Values of a :class:`GroupQuant` type for a matrix of shape [rows, cols].

    codes: uint8 [rows, cols]. scale: ``SCALE_ARRAYS[type.scale]`` [rows, type.groups(cols)]. minimum: the same for
    types with minima, uint8 zero points for types with those, else None. outer_scale, outer_minimum: float16
    [rows, cols / outer], or float32 [rows, 1] where the row shares them; None unless the type has an outer factor
    (and minima).
    """

    codes: Array
    scale: Array
    minimum: Array | None
    type: GroupQuant
    outer_scale: Array | None = None
    outer_minimum: Array | None = None

    def __post_init__(self) -> None:
        rows, cols = self.codes.shape
        type = self.type
        groups = (rows, type.groups(cols))
        outer = None if type.outer is None else (rows, cols // (type.outer or cols))
        wants = [groups, groups if type.minimum or type.zero_point else None, outer, outer if type.minimum else None]
        names = ("scales", "minima", "outer scales", "outer minima")
        for name, values, want in zip(names, self.parts()[1:], wants, strict=True):
            if (None if values is None else values.shape) != want:
                raise ValueError(f"{name} of {type} do not have the shape that codes {self.codes.shape} need: {want}")

    @property
    def shape(self) -> tuple[int, int]:
        rows, cols = self.codes.shape
        return rows, cols

    def parts(self) -> list[Array | None]:
        """Codes, scales, minima, outer scales, outer minima."""
        return [self.codes, self.scale, self.minimum, self.outer_scale, self.outer_minimum]

    @classmethod
    def of(cls, parts: list[Array | None], type: GroupQuant) -> QuantizedArray:
        """The inverse of :meth:`parts`."""
        codes, scale, minimum, outer_scale, outer_minimum = parts
        assert codes is not None and scale is not None
        return cls(codes, scale, minimum, type, outer_scale, outer_minimum)

    def __getitem__(self, rows: Any) -> QuantizedArray:
        """Rows by slice or index array; columns are never cut, because groups run along them."""
        return QuantizedArray.of([None if p is None else p[rows] for p in self.parts()], self.type)

    def scales(self) -> npt.NDArray[np.float32]:
        """float32 [rows, groups], outer factors included."""
        return _times(self.scale.astype(np.float32), self.outer_scale)

    def minima(self) -> npt.NDArray[np.float32] | None:
        """float32 [rows, groups]: what a group adds to ``scale * code``; None if that is nothing."""
        if self.type.zero_point:
            assert self.minimum is not None
            return -self.scales() * self.minimum.astype(np.float32)
        return None if self.minimum is None else _times(self.minimum.astype(np.float32), self.outer_minimum)

    def dequantize(self) -> npt.NDArray[np.float32]:
        """float32 [rows, cols]."""
        rows, cols = self.codes.shape
        scale = self.scales()[:, :, None]
        codes = self.codes.reshape(rows, scale.shape[1], -1)
        if self.type.floating:
            return (CODE_VALUES[self.type.bits][codes] * scale).reshape(rows, cols)
        minima = self.minima() if self.type.minimum else None
        if minima is not None:
            return (codes.astype(np.float32) * scale + minima[:, :, None]).reshape(rows, cols)
        zero = self.type.offset if self.minimum is None else self.minimum[:, :, None].astype(np.float32)
        return ((codes.astype(np.float32) - np.float32(zero)) * scale).reshape(rows, cols)


def _times(values: Array, outer: Array | None) -> npt.NDArray[np.float32]:
    if outer is None:
        return values
    with np.errstate(invalid="ignore", over="ignore"):  # factors of damaged files may be NaN or infinite
        return values * np.repeat(outer.astype(np.float32), values.shape[1] // outer.shape[1], axis=1)


#: What a checkpoint yields for one weight: a NumPy array (bfloat16 through ``ml_dtypes``) or codes.
HostTensor: TypeAlias = "Array | QuantizedArray"


def concat_rows(parts: list[HostTensor]) -> HostTensor:
    """Stack matrices (or vectors) of one type along the first axis."""
    quantized = [p for p in parts if isinstance(p, QuantizedArray)]
    if not quantized:
        return np.concatenate([np.asarray(p) for p in parts], axis=0)
    if len(quantized) != len(parts) or any(p.type != quantized[0].type for p in quantized):
        raise ValueError("cannot stack weights of different types")
    columns = zip(*(p.parts() for p in quantized), strict=True)
    return QuantizedArray.of([None if c[0] is None else np.concatenate(c) for c in columns], quantized[0].type)
