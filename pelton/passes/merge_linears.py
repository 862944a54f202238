"""One product instead of several with the same operand: q, k, v and gate, up. The input is read once."""

from __future__ import annotations

from collections.abc import Callable

from ..graph import Graph, Node, rewrite
from ..graph.builder import concat, linear, slice_


def merge_linears(graph: Graph) -> Graph:
    """Before: linear(x, w1), linear(x, w2). After: columns of linear(x, concat(w1, w2)).

    Only weights of one element type are merged (a mixed checkpoint keeps v apart, say), and only
    layers that all have a bias of one type or all have none.
    """
    groups: dict[tuple[object, ...], list[Node]] = {}
    for node in graph.nodes:
        if node.op == "linear":
            x, w, *bias = node.inputs
            groups.setdefault((x, w.tensor.dtype, *(b.tensor.dtype for b in bias)), []).append(node)
    group_of = {n: members for members in groups.values() if len(members) > 1 for n in members}

    def rule(node: Node, new: Callable[[Node], Node]) -> Node | None:
        members = group_of.get(node)
        if members is None:
            return None
        weights = [concat(*(m.inputs[i] for m in members)) for i in range(1, len(node.inputs))]
        merged = linear(new(node.inputs[0]), *weights)
        widths = [int(m.tensor.shape[-1]) for m in members]
        start = sum(widths[: members.index(node)])
        return slice_(merged, start, start + int(node.tensor.shape[-1]))

    return rewrite(graph, rule)
