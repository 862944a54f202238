"""Residual add and the norm that follows it in one pass over memory."""

from __future__ import annotations

from collections.abc import Callable

from ..graph import Graph, Node, make, rewrite
from ..graph.builder import item


def fuse_add_norm(graph: Graph) -> Graph:
    """Before: s = add(a, b); n = norm(s, w). After: (s, n) = add_norm(a, b, w).

    A norm over heads (its weight shorter than a row) stays as it is.
    """
    norm_of: dict[Node, Node] = {}
    for node in graph.nodes:
        if node.op in ("rms_norm", "layer_norm") and node.inputs[0].op == "add":
            whole_row = node.inputs[1].tensor.shape == node.inputs[0].tensor.shape[-1:]
            if whole_row:
                norm_of.setdefault(node.inputs[0], node)

    def rule(node: Node, new: Callable[[Node], Node]) -> Node | None:
        sum_ = node if node in norm_of else node.inputs[0] if node in norm_of.values() else None
        if sum_ is None:
            return None
        norm = norm_of[sum_]
        operands = (*map(new, sum_.inputs), *norm.inputs[1:])
        return item(make(f"add_{norm.op}", *operands, **norm.attrs), 0 if node is sum_ else 1)

    return rewrite(graph, rule)
