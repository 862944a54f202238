"""Compute logits, and all that only they need, for the rows that are sampled from."""

from __future__ import annotations

from collections.abc import Callable

from ..graph import I32, OPS, Graph, Node, make, replace, rewrite
from ..graph.builder import input_, take_rows


def last_token_logits(graph: Graph) -> Graph:
    """Before: outputs [T, ...]. After: outputs [N, ...], rows ``logits_indices``.

    The selection moves up through every op that works row by row and whose result nobody needs in
    full: the output layer, the last norm, and the MLP of the last layer.
    """
    indices = input_("logits_indices", ("N",), I32)
    if indices in graph.nodes:
        return graph  # done before
    partial: set[Node] = set()  # nodes of which only the selected rows are needed
    for node in reversed(graph.nodes):
        if node.is_constant or not OPS[node.op].rowwise:
            continue
        partly = all(user in partial and _row_operand(user, node) for user in graph.users[node])
        if partly and (graph.users[node] or node in graph.outputs):
            partial.add(node)

    def rule(node: Node, new: Callable[[Node], Node]) -> Node | None:
        if node not in partial:
            return None
        rows = OPS[node.op].rowwise
        operands = (
            new(x) if x in partial or i not in rows else take_rows(new(x), indices) for i, x in enumerate(node.inputs)
        )
        return replace(node, tuple(operands))

    selected = rewrite(graph, rule)
    outputs = (o if o in partial else None for o in graph.outputs)
    return Graph(
        graph.name,
        tuple(s if o else make("take_rows", s, indices) for o, s in zip(outputs, selected.outputs, strict=True)),
    ).verify()


def _row_operand(user: Node, node: Node) -> bool:
    """Whether ``user`` reads ``node`` row by row wherever it reads it."""
    return all(i in OPS[user.op].rowwise for i, x in enumerate(user.inputs) if x is node)
