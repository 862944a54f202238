"""Gate, up and the activation between them as one product: what the activation reads never leaves the caches."""

from __future__ import annotations

from collections.abc import Callable

from ..graph import Graph, Node, rewrite
from ..graph.builder import concat, gated_linear, permute_rows
from ..graph.ops import GATE_BLOCK


def fuse_gated_linear(graph: Graph) -> Graph:
    """Before: gated_activation(linear(x, gate), linear(x, up)). After: gated_linear(x, rows of both in turns).

    Layers whose weights differ in type, or whose rows are no whole blocks, stay as they are.
    """

    def rule(node: Node, new: Callable[[Node], Node]) -> Node | None:
        if node.op != "gated_activation" or any(p.op != "linear" for p in node.inputs):
            return None
        gate, up = (p.inputs for p in node.inputs)
        rows = int(node.tensor.shape[-1])
        same = gate[0] is up[0] and [w.type for w in gate[1:]] == [w.type for w in up[1:]]
        if not same or rows % GATE_BLOCK:
            return None

        def alternate(g: Node, u: Node) -> Node:
            return permute_rows(concat(g, u), (2, rows // GATE_BLOCK, GATE_BLOCK), (1, 0, 2))

        weights = [alternate(g, u) for g, u in zip(gate[1:], up[1:], strict=True)]
        return gated_linear(new(gate[0]), weights[0], weights[1] if len(weights) > 1 else None, node.attrs["kind"])

    return rewrite(graph, rule)
