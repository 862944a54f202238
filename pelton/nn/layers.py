"""The layers that models are written with."""

from __future__ import annotations

from ..graph import Node
from ..graph import builder as g
from ..graph.rope import RopeSpec
from .module import Module, Parameter, Step


class Linear(Module):
    """y = x Wᵀ + b, weight [out_features, in_features].

    row_groups: (shape, order) if the checkpoint interleaves output rows, see ``permute_rows``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        row_groups: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
    ) -> None:
        self.weight = Parameter(out_features, in_features)
        if bias:
            self.bias = Parameter(out_features)
        self._row_groups = row_groups

    def __call__(self, x: Node) -> Node:
        weights = [self.weight.node] + ([self.bias.node] if hasattr(self, "bias") else [])
        if self._row_groups is not None:
            weights = [g.permute_rows(w, *self._row_groups) for w in weights]
        return g.linear(x, *weights)


class TransposedLinear(Module):
    """A linear layer whose checkpoint keeps the weight as [in_features, out_features] (GPT-2's Conv1D)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        self.weight = Parameter(in_features, out_features)
        self.bias = Parameter(out_features)

    def __call__(self, x: Node) -> Node:
        return g.linear(x, g.transpose(self.weight.node), self.bias.node)


class Embedding(Module):
    """Rows of a table [num_embeddings, dim]."""

    def __init__(self, num_embeddings: int, dim: int) -> None:
        self.weight = Parameter(num_embeddings, dim)

    def __call__(self, ids: Node) -> Node:
        return g.embedding(ids, self.weight.node)

    def as_linear(self) -> Linear:
        """The output layer that shares this table (tied embeddings)."""
        head = Linear(self.weight.shape[1], self.weight.shape[0])
        head.weight = self.weight
        return head


class RMSNorm(Module):
    """Zhang & Sennrich 2019. ``weight_offset`` is 1 in Gemma, which stores weights around zero."""

    def __init__(self, dim: int, eps: float, weight_offset: float = 0.0) -> None:
        self.weight = Parameter(dim)
        self._eps, self._offset = eps, weight_offset

    def __call__(self, x: Node) -> Node:
        return g.rms_norm(x, self.weight.node, self._eps, self._offset)


class LayerNorm(Module):
    """Ba et al. 2016."""

    def __init__(self, dim: int, eps: float) -> None:
        self.weight = Parameter(dim)
        self.bias = Parameter(dim)
        self._eps = eps

    def __call__(self, x: Node) -> Node:
        return g.layer_norm(x, self.weight.node, self.bias.node, self._eps)


class Attention(Module):
    """Causal attention over the paged KV cache of one layer; no parameters of its own.

    scale multiplies q·k. window: tokens a query sees, itself included (0: all). softcap: scores
    become softcap * tanh(score / softcap) (0: off). rope and alibi place positions.
    """

    def __init__(
        self,
        layer: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        scale: float | None = None,
        window: int = 0,
        softcap: float = 0.0,
        alibi: bool = False,
        rope: RopeSpec | None = None,
    ) -> None:
        self._cache = (layer, num_kv_heads, head_dim)
        self._rope = rope
        self._attrs = {
            "num_heads": num_heads,
            "scale": head_dim**-0.5 if scale is None else scale,
            "window": window,
            "softcap": softcap,
            "alibi": alibi,
        }

    def __call__(self, q: Node, k: Node, v: Node, step: Step) -> Node:
        if self._rope is not None:
            q = g.rope(q, step.positions, **self._rope.attrs())
            k = g.rope(k, step.positions, **self._rope.attrs())
        cache = g.kv_write(step.cache(*self._cache), k, v, step.slot_mapping)
        return g.attention(q, cache, step.block_table, step.seq_lens, step.query_start_loc, **self._attrs)
