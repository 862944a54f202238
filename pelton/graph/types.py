"""Types of graph values: dense tensors, group-quantized weights, the paged KV cache, tuples.

A quantized weight is a tensor with a different *type*, never a different operation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

#: A dimension is a number, or a name that a step binds: "T" tokens of the step, "S" sequences,
#: "N" rows whose logits are wanted, "B" entries of a block table row.
Dim: TypeAlias = "int | str"


@dataclass(frozen=True, slots=True)
class DType:
    """A plain element type. ``bits`` is the storage size of one element."""

    name: str
    bits: int

    def __str__(self) -> str:
        return self.name


F32 = DType("f32", 32)
F16 = DType("f16", 16)
BF16 = DType("bf16", 16)
I8 = DType("i8", 8)  # of KV caches: codes from -127 to 127 with a float32 scale per token and head
I32 = DType("i32", 32)
DTYPES = {d.name: d for d in (F32, F16, BF16, I8, I32)}


@dataclass(frozen=True, slots=True)
class GroupQuant:
    """Integer codes with one scale (and possibly one minimum) per ``group_size`` elements of a row.

    Codes are unsigned, ``0 <= code < 2**bits``. With ``minimum`` the value is
    ``scale * code + minimum``; without it, ``scale * (code - 2**(bits - 1))``.
    ``scale`` is the type that scales and minima are stored in. This one type holds the GGUF blocks
    Q4_0 ... Q6_K, and AWQ and GPTQ weights, without loss.
    """

    bits: int
    group_size: int
    minimum: bool
    scale: DType = F32

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8 or self.group_size < 1 or self.scale not in (F16, F32):
            raise ValueError(f"no such quantized type: {self.bits} bits in groups of {self.group_size}")

    @property
    def bits_per_weight(self) -> float:
        """Information content per element, scales included, before any packing."""
        return self.bits + self.scale.bits * (2 if self.minimum else 1) / self.group_size

    @property
    def offset(self) -> int:
        """The code that stands for zero when there is no minimum."""
        return 0 if self.minimum else 1 << (self.bits - 1)

    def __str__(self) -> str:
        return f"int{self.bits}g{self.group_size}{'m' if self.minimum else ''}:{self.scale}"


ElementType: TypeAlias = "DType | GroupQuant"


@dataclass(frozen=True, slots=True)
class TensorType:
    """Shape and element type. Quantized groups run along the last dimension."""

    shape: tuple[Dim, ...]
    dtype: ElementType

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True)
class CacheType:
    """The paged KV cache of one layer: ``num_kv_heads`` keys and values of ``head_dim`` per slot."""

    num_kv_heads: int
    head_dim: int
    dtype: DType

    @property
    def token_bytes(self) -> float:
        """Bytes of the keys and values of one token, scales included."""
        scale = 4 if self.dtype == I8 else 0
        return 2 * self.num_kv_heads * (self.head_dim * self.dtype.bits / 8 + scale)

    def __str__(self) -> str:
        return f"cache<{self.dtype}>[{self.num_kv_heads}, {self.head_dim}]"


@dataclass(frozen=True, slots=True)
class TupleType:
    """The result of an operation with several outputs; ``item`` takes one of them out."""

    items: tuple[TensorType | CacheType, ...]

    def __str__(self) -> str:
        return f"({', '.join(map(str, self.items))})"


ValueType: TypeAlias = "TensorType | CacheType | TupleType"
