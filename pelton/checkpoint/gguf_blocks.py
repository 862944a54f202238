"""GGML tensor types: one row per type with its block size, its element type and its decoder.

Source: the block layouts of ggml (``ggml-common.h``), as documented by the ``gguf`` package. Natively
decoded types lose nothing: scales and minima stay in the type of the file, and ``scale * code + minimum`` is
the same float32 arithmetic that ggml does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

from ..errors import CheckpointError
from ..graph.quantized import SCALE_ARRAYS, Array, HostTensor, QuantizedArray
from ..graph.types import BF16, E4M3, E8M0, F16, F32, I8, I32, ROW, U8, DType, ElementType, GroupQuant, TensorType

#: uint8 [n, block_bytes] -> the parts of a QuantizedArray: codes uint8 [n, block_size], scales and minima
#: [n, block_size / group_size], outer scales and outer minima [n, block_size / outer]; None for what the type lacks.
Decoder: TypeAlias = "Callable[[Array], tuple[Array | None, ...]]"

#: Codes decoded at a time: the temporaries of one chunk stay in the second-level cache.
_CHUNK_CODES = 1 << 18


@dataclass(frozen=True, slots=True)
class BlockType:
    """One GGML type. ``dense`` is the NumPy type of plain elements; ``decode`` unpacks group-quantized blocks.

    With neither, the values come as float32 from ``gguf.quants`` if that library can decode them.
    """

    name: str
    block_size: int  # elements
    block_bytes: int
    element: ElementType = F32
    dense: Any = None
    decode: Decoder | None = None

    def nbytes(self, elements: int) -> int:
        """Bytes of ``elements`` values; the caller has checked that rows are whole blocks."""
        return elements // self.block_size * self.block_bytes

    def tensor_type(self, shape: tuple[int, ...]) -> TensorType:
        """The type that :func:`decode_tensor` yields. Only matrices stay quantized: groups run along rows."""
        return TensorType(shape, F32 if self.decode is not None and len(shape) != 2 else self.element)


def decode_tensor(kind: BlockType, raw: Array, shape: tuple[int, ...]) -> HostTensor:
    """Values of one tensor.

    raw: uint8 [kind.nbytes(prod(shape))], a view of the file. shape: NumPy order, rows of whole blocks.
    Returns a view for plain types (a copy if the file does not align them), a :class:`QuantizedArray`
    for group-quantized matrices, float32 otherwise.

    Raises:
        CheckpointError: no decoder for the type.
    """
    if kind.dense is not None:
        dtype = np.dtype(kind.dense)
        if raw.__array_interface__["data"][0] % dtype.itemsize:
            raw = raw.copy()  # kernels may use aligned loads
        plain: Array = raw.view(dtype).reshape(shape)
        return plain
    if kind.decode is None:
        return _decode_with_library(kind, raw, shape)
    rows = math.prod(shape[:-1])
    quantized = _decode_blocks(kind, kind.decode, raw, rows, shape[-1])
    return quantized if len(shape) == 2 else quantized.dequantize().reshape(shape)


def _decode_blocks(kind: BlockType, decode: Decoder, raw: Array, rows: int, cols: int) -> QuantizedArray:
    quant = kind.element
    assert isinstance(quant, GroupQuant)
    blocks = raw.reshape(-1, kind.block_bytes)
    size, groups, outer = kind.block_size, kind.block_size // quant.group_size, quant.outer
    real: Any = SCALE_ARRAYS[quant.scale]
    parts: list[Array | None] = [
        np.empty((len(blocks), size), np.uint8),
        np.empty((len(blocks), groups), real),
        np.empty((len(blocks), groups), real) if quant.minimum else None,
        np.empty((len(blocks), size // outer), np.float16) if outer else None,
        np.empty((len(blocks), size // outer), np.float16) if outer and quant.minimum else None,
    ]
    step = max(1, _CHUNK_CODES // size)
    for start in range(0, len(blocks), step):
        part = slice(start, start + step)
        for whole, piece in zip(parts, decode(blocks[part]), strict=False):
            if whole is not None:
                whole[part] = piece
    shaped = [None if p is None else p.reshape(rows, cols // size * p.shape[1]) for p in parts]
    if outer == ROW:
        shaped[3] = np.ones((rows, 1), np.float32)  # no type of ggml has a factor per row
    return QuantizedArray.of(shaped, quant)


def _decode_with_library(kind: BlockType, raw: Array, shape: tuple[int, ...]) -> Array:
    import gguf  # slow to import and rarely needed

    try:
        number = gguf.GGMLQuantizationType[kind.name]
        with np.errstate(all="ignore"):
            rows = raw.reshape(math.prod(shape[:-1]), -1)
            values = gguf.quants.dequantize(np.ascontiguousarray(rows), number)
    except (KeyError, NotImplementedError):
        raise CheckpointError(
            f"no decoder for the GGUF tensor type {kind.name}",
            "use a file quantized as Q4_K_M or Q8_0, or try pip install -U gguf",
        ) from None
    return np.asarray(values, np.float32).reshape(shape)


def _half(blocks: Array, at: int) -> Array:
    """The float16 at byte ``at`` of every block: [n, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2")


def _planes(data: Array, run: int, bits: int) -> Array:
    """Unpack uint8 [n, k] where each run of ``run`` bytes holds ``8 / bits`` planes, lowest bits first.

    All elements of plane 0 come before those of plane 1: uint8 [n, k * 8 / bits].
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    runs = data.reshape(len(data), -1, 1, run)
    planes: Array = (runs >> shifts) & np.uint8((1 << bits) - 1)
    return planes.reshape(len(data), -1)


def _q4_0(b: Array) -> tuple[Array | None, ...]:
    return _planes(b[:, 2:], 16, 4), _half(b, 0)


def _q4_1(b: Array) -> tuple[Array | None, ...]:
    return _planes(b[:, 4:], 16, 4), _half(b, 0), _half(b, 2)


def _fifth_bits(b: Array) -> Array:
    return np.unpackbits(np.ascontiguousarray(b), axis=1, bitorder="little") << np.uint8(4)


def _q5_0(b: Array) -> tuple[Array | None, ...]:
    return _planes(b[:, 6:], 16, 4) | _fifth_bits(b[:, 2:6]), _half(b, 0)


def _q5_1(b: Array) -> tuple[Array | None, ...]:
    return _planes(b[:, 8:], 16, 4) | _fifth_bits(b[:, 4:8]), _half(b, 0), _half(b, 2)


def _q8_0(b: Array) -> tuple[Array | None, ...]:
    return b[:, 2:] ^ np.uint8(0x80), _half(b, 0)  # int8 x -> code x + 128


# The types with super-blocks subtract their minima: the factor of those is negated, which is exact.


def _q2_k(b: Array) -> tuple[Array | None, ...]:
    packed = b[:, :16]
    return _planes(b[:, 16:80], 32, 2), packed & np.uint8(15), packed >> np.uint8(4), _half(b, 80), -_half(b, 82)


def _q3_k(b: Array) -> tuple[Array | None, ...]:
    low = _planes(b[:, 96:104], 8, 4)
    high = _planes(b[:, 104:108], 4, 2)
    factors = (low | (high << np.uint8(4))).astype(np.int8) - np.int8(32)
    # A clear bit in the mask means "minus 4", so the set bit is the third bit of an unsigned code.
    codes = _planes(b[:, 32:96], 32, 2) | (_planes(b[:, :32], 32, 1) << np.uint8(2))
    return codes, factors, None, _half(b, 108)


def _six_bit_pairs(b: Array) -> tuple[Array, Array]:
    """The 12 bytes of Q4_K and Q5_K that hold eight 6-bit scales and eight 6-bit minima."""
    first, second, mixed = b[:, :4], b[:, 4:8], b[:, 8:12]
    scale_tail = (mixed & np.uint8(15)) | ((first >> np.uint8(2)) & np.uint8(0x30))
    minimum_tail = (mixed >> np.uint8(4)) | ((second >> np.uint8(2)) & np.uint8(0x30))
    six = np.uint8(63)
    return np.concatenate([first & six, scale_tail], 1), np.concatenate([second & six, minimum_tail], 1)


def _q4_k(b: Array) -> tuple[Array | None, ...]:
    return _planes(b[:, 16:], 32, 4), *_six_bit_pairs(b[:, 4:16]), _half(b, 0), -_half(b, 2)


def _q5_k(b: Array) -> tuple[Array | None, ...]:
    codes = _planes(b[:, 48:], 32, 4) | (_planes(b[:, 16:48], 32, 1) << np.uint8(4))
    return codes, *_six_bit_pairs(b[:, 4:16]), _half(b, 0), -_half(b, 2)


def _q6_k(b: Array) -> tuple[Array | None, ...]:
    codes = _planes(b[:, :128], 64, 4) | (_planes(b[:, 128:192], 32, 2) << np.uint8(4))
    return codes, np.ascontiguousarray(b[:, 192:208]).view(np.int8), None, _half(b, 208)


def _mxfp4(b: Array) -> tuple[Array | None, ...]:
    # ggml's table has doubled values and its exponent halves them: the product is that of the OCP specification.
    return _planes(b[:, 1:], 16, 4), b[:, :1].view(SCALE_ARRAYS[E8M0])


def _nvfp4(b: Array) -> tuple[Array | None, ...]:
    scale = b[:, :4] & np.uint8(0x7F)  # unsigned; 0x7F, NaN in E4M3, is 0 to ggml
    scale[scale == 0x7F] = 0
    return _planes(b[:, 4:], 8, 4), scale.view(SCALE_ARRAYS[E4M3])


#: By the type number in the file. A type that is absent here cannot be sized, so its file is refused.
GGML_TYPES: dict[int, BlockType] = {
    0: BlockType("F32", 1, 4, F32, np.dtype("<f4")),
    1: BlockType("F16", 1, 2, F16, np.dtype("<f2")),
    2: BlockType("Q4_0", 32, 18, GroupQuant(4, 32, False, F16), decode=_q4_0),
    3: BlockType("Q4_1", 32, 20, GroupQuant(4, 32, True, F16), decode=_q4_1),
    6: BlockType("Q5_0", 32, 22, GroupQuant(5, 32, False, F16), decode=_q5_0),
    7: BlockType("Q5_1", 32, 24, GroupQuant(5, 32, True, F16), decode=_q5_1),
    8: BlockType("Q8_0", 32, 34, GroupQuant(8, 32, False, F16), decode=_q8_0),
    9: BlockType("Q8_1", 32, 40),
    10: BlockType("Q2_K", 256, 84, GroupQuant(2, 16, True, U8, outer=256), decode=_q2_k),
    11: BlockType("Q3_K", 256, 110, GroupQuant(3, 16, False, I8, outer=256), decode=_q3_k),
    12: BlockType("Q4_K", 256, 144, GroupQuant(4, 32, True, U8, outer=256), decode=_q4_k),
    13: BlockType("Q5_K", 256, 176, GroupQuant(5, 32, True, U8, outer=256), decode=_q5_k),
    14: BlockType("Q6_K", 256, 210, GroupQuant(6, 16, False, I8, outer=256), decode=_q6_k),
    15: BlockType("Q8_K", 256, 292),
    16: BlockType("IQ2_XXS", 256, 66),
    17: BlockType("IQ2_XS", 256, 74),
    18: BlockType("IQ3_XXS", 256, 98),
    19: BlockType("IQ1_S", 256, 50),
    20: BlockType("IQ4_NL", 32, 18),
    21: BlockType("IQ3_S", 256, 110),
    22: BlockType("IQ2_S", 256, 82),
    23: BlockType("IQ4_XS", 256, 136),
    24: BlockType("I8", 1, 1, DType("i8", 8), np.dtype("i1")),
    25: BlockType("I16", 1, 2, DType("i16", 16), np.dtype("<i2")),
    26: BlockType("I32", 1, 4, I32, np.dtype("<i4")),
    27: BlockType("I64", 1, 8, DType("i64", 64), np.dtype("<i8")),
    28: BlockType("F64", 1, 8, DType("f64", 64), np.dtype("<f8")),
    29: BlockType("IQ1_M", 256, 56),
    30: BlockType("BF16", 1, 2, BF16, np.dtype(ml_dtypes.bfloat16)),
    34: BlockType("TQ1_0", 256, 54),
    35: BlockType("TQ2_0", 256, 66),
    39: BlockType("MXFP4", 32, 17, GroupQuant(4, 32, scale=E8M0, floating=True), decode=_mxfp4),
    40: BlockType("NVFP4", 64, 36, GroupQuant(4, 16, scale=E4M3, floating=True, outer=ROW), decode=_nvfp4),
    41: BlockType("Q1_0", 128, 18),
}
