"""The one way to change a graph: build another one, node by node."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from .node import Graph, Node, replace

#: ``rule(node, new)`` returns what stands for ``node`` in the new graph, or None to keep it as it is
#: (on rewritten operands). ``new(other)`` is what stands for another node of the old graph.
Rule: TypeAlias = "Callable[[Node, Callable[[Node], Node]], Node | None]"


def rewrite(graph: Graph, rule: Rule) -> Graph:
    """Apply ``rule`` to every node, operands before users, and verify the result."""
    done: dict[Node, Node] = {}

    def new(node: Node) -> Node:
        if node not in done:
            made = rule(node, new)
            done[node] = replace(node, tuple(map(new, node.inputs))) if made is None else made
        return done[node]

    for node in graph.nodes:  # in this order, recursion stays shallow in deep models
        new(node)
    return Graph(graph.name, tuple(map(new, graph.outputs))).verify()
