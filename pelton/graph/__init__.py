"""The graph: what a model means. Imports nothing of Pelton but itself."""

from .node import Graph, Node, make, replace
from .ops import OPS, Op
from .rewrite import rewrite
from .text import parse_graph, print_graph
from .types import BF16, E4M3, F16, F32, I8, I32, AdapterType, CacheType, DType, GroupQuant, TensorType, TupleType

__all__ = [
    "BF16", "E4M3", "F16", "F32", "I8", "I32", "OPS", "AdapterType", "CacheType", "DType", "Graph", "GroupQuant",
    "Node", "Op",
    "TensorType", "TupleType", "make", "parse_graph", "print_graph", "replace", "rewrite",
]  # fmt: skip
