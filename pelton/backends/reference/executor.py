"""The oracle: interprets the graph with the op table's NumPy references. Slow, and the truth."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from ...graph import BF16, OPS, CacheType, Graph, Node
from ...graph.cost import total
from ...graph.ops import f32
from ...graph.quantized import HostTensor
from ...program.weights import evaluate
from ..base import Batch, KVSpec, Sampler, StepOutput, StepStats
from ..step_inputs import sample_rows, step_inputs


class ReferenceExecutor:
    """Runs any verified graph, before or after any pass.

    read: yields a checkpoint tensor by name. Weights are kept in float32.
    """

    def __init__(self, graph: Graph, read: Callable[[str], HostTensor], kv_spec: KVSpec, sampler: Sampler) -> None:
        self._graph = graph
        self._kv_spec = kv_spec
        self._sampler = sampler
        self._tickets: dict[int, StepOutput] = {}
        self._next_ticket = 0
        self._constants: dict[Node, Any] = {}
        self._caches: dict[Node, Any] = {}
        for node in graph.nodes:
            if node.is_constant and any(not u.is_constant for u in graph.users[node]):
                self._constants[node] = f32(evaluate(node, read))
            elif isinstance(node.type, CacheType) and node.op == "input":
                shape = (2, kv_spec.num_blocks, kv_spec.block_size, node.type.num_kv_heads, node.type.head_dim)
                self._caches[node] = np.zeros(shape, ml_dtypes.bfloat16 if node.type.dtype == BF16 else np.float32)
        rows = [(OPS[n.op], n, [i.type for i in n.inputs]) for n in graph.nodes if n.inputs and not n.is_constant]
        self._flops = total([row.flops(n.attrs, n.type, *types) for row, n, types in rows])
        self._bytes = total([row.bytes(n.attrs, n.type, *types) for row, n, types in rows])

    @property
    def kv_spec(self) -> KVSpec:
        return self._kv_spec

    def logits(self, batch: Batch, *, every: bool = False) -> Any:
        """float32 [N, vocab] for the sequences that are sampled, in order; or for every token."""
        inputs = step_inputs(batch, self._kv_spec.block_size, every=every).arrays
        values: dict[Node, Any] = {**self._constants, **self._caches}
        for node in self._graph.nodes:
            if node.op == "input" and node not in values:
                values[node] = inputs[node.name]
            elif node not in values and not node.is_constant:
                values[node] = OPS[node.op].reference(node.attrs, *(values[i] for i in node.inputs))
        out = values[self._graph.outputs[0]]
        if self._graph.outputs[0].tensor.shape[0] == "T":  # before last_token_logits
            out = out[inputs["logits_indices"]]
        return out

    def submit(self, batch: Batch) -> int:
        start = time.perf_counter()
        logits = self.logits(batch)
        shape = step_inputs(batch, self._kv_spec.block_size).shape
        stats = StepStats(time.perf_counter() - start, shape.evaluate(self._flops), shape.evaluate(self._bytes))
        self._next_ticket += 1
        self._tickets[self._next_ticket] = StepOutput(sample_rows(batch, logits, self._sampler), stats)
        return self._next_ticket

    def collect(self, ticket: int) -> StepOutput:
        return self._tickets.pop(ticket)

    def close(self) -> None:
        self._constants.clear()
        self._caches.clear()
