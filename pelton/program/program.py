"""The second and last IR: a flat list of kernel calls over one arena. Views, slots, packings; no meaning left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from ..graph import F32, AdapterType, CacheType, DType, Node
from ..graph.cost import Cost


@dataclass(frozen=True, slots=True)
class Buffer:
    """[rows, cols] in the arena; ``rows`` names a step dimension. offset: bytes, -1 before planning."""

    rows: str
    cols: int
    offset: int = -1
    dtype: DType = F32


@dataclass(frozen=True, slots=True)
class View:
    """Columns [start, start + cols) of a buffer: what a kernel reads or writes, rows ``ld`` apart."""

    buffer: int
    start: int
    cols: int


@dataclass(frozen=True, slots=True)
class ConstantRef:
    index: int


@dataclass(frozen=True, slots=True)
class CacheRef:
    index: int


@dataclass(frozen=True, slots=True)
class InputRef:
    index: int


@dataclass(frozen=True, slots=True)
class AdapterRef:
    index: int


Operand: TypeAlias = "View | ConstantRef | CacheRef | AdapterRef | InputRef"


@dataclass(frozen=True, slots=True)
class AdapterTable:
    """The adapters of one product. Per part of its columns: the Hugging Face name of the module that it is, and how
    its rows are reordered, as ``permute_rows`` has it: (shape, order) or None."""

    type: AdapterType
    modules: tuple[str, ...]
    row_orders: tuple[tuple[tuple[int, ...], tuple[int, ...]] | None, ...]


@dataclass(frozen=True, slots=True)
class Constant:
    """Data that is made once, at build.

    packing: how a backend lays it out. "panels": a matrix for products; "rows": a matrix whose rows
    are looked up; "vector": float32; of these ``expr`` is the weight expression. "rope": cos and sin
    of every position; "alibi": a slope per head; these follow from ``attrs``.
    """

    packing: str
    expr: Node | None = None
    attrs: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Call:
    """One kernel call: outputs first, then inputs in the order of the op, with the op's attributes.

    name: for people, after the module it belongs to, e.g. ``model.layers.3.mlp.down_proj``. flops, bytes: its cost
    by the op table, weights in the type they are bound to.
    """

    kernel: str
    outputs: tuple[View, ...]
    operands: tuple[Operand | None, ...]
    params: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    flops: Cost = field(default_factory=dict, compare=False)
    bytes: Cost = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Program:
    """A step of any size up to ``limits`` (most rows per step dimension).

    output: the logits. hidden: the states that they are made of, for all rows that somebody asks for; the output itself
    where there is no output layer.
    """

    name: str
    limits: Mapping[str, int]
    inputs: tuple[str, ...]
    caches: tuple[CacheType, ...]
    constants: tuple[Constant, ...]
    buffers: tuple[Buffer, ...]
    calls: tuple[Call, ...]
    output: View
    hidden: View
    flops: Cost = field(default_factory=dict, compare=False)
    bytes: Cost = field(default_factory=dict, compare=False)
    arena_bytes: int = 0
    adapters: tuple[AdapterTable, ...] = ()

    def rows_of(self, call: Call) -> str:
        """The step dimension that the rows of a call's first output count."""
        return self.buffers[call.outputs[0].buffer].rows if call.outputs else "T"
