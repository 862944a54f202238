"""Turn q and k and store k and v in one pass, instead of writing the turned k and reading it again."""

from __future__ import annotations

from collections.abc import Callable

from ..graph import Graph, Node, make, rewrite
from ..graph.builder import item


def fuse_rope_kv_write(graph: Graph) -> Graph:
    """Before: attention(rope(q), kv_write(cache, rope(k), v)). After: both from one rope_kv_write.

    Needs q and k turned by the same rule, and q, k and the written cache used nowhere else (layers that
    share a cache keep their separate ops).
    """
    parts: dict[Node, tuple[Node, Node]] = {}  # rope of q, and kv_write -> that pair
    for node in graph.nodes:
        if node.op != "attention" or node.inputs[1].op != "kv_write":
            continue
        q, write = node.inputs[:2]
        k = write.inputs[1]
        if (
            q.op == k.op == "rope"
            and q.attrs == k.attrs
            and q.inputs[1] is k.inputs[1]
            and graph.users[q] == (node,)
            and graph.users[k] == (write,)
            and graph.users[write] == (node,)
        ):
            parts[q] = parts[write] = (q, write)

    def rule(node: Node, new: Callable[[Node], Node]) -> Node | None:
        if node not in parts:
            return None
        q, write = parts[node]
        cache, k, v, slots = write.inputs
        operands = (cache, q.inputs[0], k.inputs[0], v, q.inputs[1], slots)
        fused = make("rope_kv_write", *map(new, operands), **q.attrs)
        return item(fused, 0 if node is q else 1)

    return rewrite(graph, rule)
