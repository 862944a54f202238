"""A place for adapters behind the products of a model, when ``enable_lora`` asks for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..graph import BF16, F32, I32, AdapterType, Graph, Node, make, rewrite
from ..graph.builder import input_, linear, lora
from .bind_types import output_layer

#: What names the rows' adapters, by the dimension that counts the rows.
_SLOTS = {"T": "lora_slots", "N": "logits_lora_slots"}


def insert_lora(graph: Graph, max_loras: int, max_lora_rank: int) -> Graph:
    """Before: linear(x, w). After: lora(linear(x, w), x, table, slots), with a table for all parts of a merged w.

    The output layer has none. Adapters are stored as f32 where all matrices are, in bf16 otherwise.
    """
    head = output_layer(graph)
    matrices = {w.tensor.dtype for w in graph.leaves("weight") if len(w.tensor.shape) > 1}
    dtype = F32 if matrices <= {F32} else BF16

    def rule(node: Node, new: Callable[[Node], Node]) -> Node | None:
        if node.op != "linear" or node is head or any(user.op == "lora" for user in graph.users[node]):
            return None
        x, w, *bias = map(new, node.inputs)
        modules, widths, orders = zip(*_parts(w), strict=True)
        type = AdapterType(max_loras, max_lora_rank, int(w.tensor.shape[1]), widths, dtype)
        table = make("input", type=type, name=f"lora.{modules[0]}", modules=modules, row_orders=orders)
        rows = node.tensor.shape[0]
        return lora(linear(x, w, *bias), x, table, input_(_SLOTS[str(rows)], (rows,), I32))

    return rewrite(graph, rule)


def _parts(w: Node, order: Any = None) -> list[tuple[str, int, Any]]:
    """(module, rows, order of the rows) of each weight that a product is made of."""
    if w.op == "concat":
        return [part for x in w.inputs for part in _parts(x)]
    if w.op == "permute_rows":
        return _parts(w.inputs[0], (w.attrs["shape"], w.attrs["order"]))
    rows = int(w.tensor.shape[0])
    leaf = w.inputs[0] if w.op == "transpose" else w
    return [(leaf.name.rpartition(".")[0], rows, order)]
