"""Remove operations that change nothing. What nobody reads is gone already: a graph is what its outputs reach."""

from __future__ import annotations

from collections.abc import Callable

from ..graph import Graph, Node, replace, rewrite
from ..graph.builder import slice_


def simplify(graph: Graph) -> Graph:
    """Whole slices, slices of slices, factors of 1, products that are never read, concats of one."""

    def rule(node: Node, new: Callable[[Node], Node]) -> Node | None:
        if not node.inputs:
            return None
        x = new(node.inputs[0])
        if node.op == "slice":
            start, stop = node.attrs["start"], node.attrs["stop"]
            if (start, stop) == (0, x.tensor.shape[-1]):
                return x
            if x.op == "slice":
                return slice_(x.inputs[0], x.attrs["start"] + start, x.attrs["start"] + stop)
        if node.op == "scale" and node.attrs["factor"] == 1.0:
            return x
        if node.op == "concat" and len(node.inputs) == 1:
            return x
        if node.op == "permute_rows" and node.attrs["order"] == tuple(range(len(node.attrs["order"]))):
            return x
        return replace(node, tuple(map(new, node.inputs)))

    return rewrite(graph, rule)
