"""BLOOM (Scao et al. 2022): ALiBi instead of positions, a norm after the embedding, q, k, v interleaved by head."""

from __future__ import annotations

from ..nn import Attention, CausalLM, Embedding, LayerNorm, Linear, Module, Node, Step, activation, add, slice_
from .config import ModelConfig
from .registry import register


class BloomAttention(Module):
    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        hidden, heads = _hidden(cfg), _heads(cfg)
        head_dim = cfg.head_dim(hidden, heads)
        # The rows are stored as [heads, 3, head_dim]; here they become all q, all k, all v.
        self.query_key_value = Linear(hidden, 3 * hidden, bias=True, row_groups=((heads, 3, head_dim), (1, 0, 2)))
        self.dense = Linear(hidden, hidden, bias=True)
        self.attention = Attention(layer, heads, heads, head_dim, alibi=True)
        self._hidden = hidden

    def __call__(self, x: Node, step: Step) -> Node:
        qkv = self.query_key_value(x)
        q, k, v = (slice_(qkv, i * self._hidden, (i + 1) * self._hidden) for i in range(3))
        return self.dense(self.attention(q, k, v, step))


class BloomMLP(Module):
    def __init__(self, hidden: int) -> None:
        self.dense_h_to_4h = Linear(hidden, 4 * hidden, bias=True)
        self.dense_4h_to_h = Linear(4 * hidden, hidden, bias=True)

    def __call__(self, x: Node) -> Node:
        return self.dense_4h_to_h(activation(self.dense_h_to_4h(x), "gelu_tanh"))


class BloomLayer(Module):
    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        hidden, eps = _hidden(cfg), cfg.eps("layer_norm_epsilon", 1e-5)
        self.input_layernorm = LayerNorm(hidden, eps)
        self.self_attention = BloomAttention(cfg, layer)
        self.post_attention_layernorm = LayerNorm(hidden, eps)
        self.mlp = BloomMLP(hidden)
        self._residual_after_norm = bool(cfg.get("apply_residual_connection_post_layernorm", False))

    def __call__(self, x: Node, step: Step) -> Node:
        for norm, branch in (
            (self.input_layernorm, lambda y: self.self_attention(y, step)),
            (self.post_attention_layernorm, self.mlp),
        ):
            y = norm(x)
            x = add(y if self._residual_after_norm else x, branch(y))
        return x


class BloomModel(Module):
    def __init__(self, cfg: ModelConfig) -> None:
        hidden, eps = _hidden(cfg), cfg.eps("layer_norm_epsilon", 1e-5)
        self.word_embeddings = Embedding(cfg.size("vocab_size"), hidden)
        self.word_embeddings_layernorm = LayerNorm(hidden, eps)
        layers = cfg.size("n_layer", cfg.get("num_hidden_layers"), limit=1024)
        self.h = [BloomLayer(cfg, i) for i in range(layers)]
        self.ln_f = LayerNorm(hidden, eps)

    def __call__(self, step: Step) -> Node:
        x = self.word_embeddings_layernorm(self.word_embeddings(step.token_ids))
        for layer in self.h:
            x = layer(x, step)
        return self.ln_f(x)


@register("BloomForCausalLM")
class Bloom(CausalLM):
    def __init__(self, cfg: ModelConfig) -> None:
        self.transformer = BloomModel(cfg)
        if cfg.get("tie_word_embeddings", True):
            self.lm_head = self.transformer.word_embeddings.as_linear()
        else:
            self.lm_head = Linear(_hidden(cfg), cfg.size("vocab_size"))

    def __call__(self, step: Step) -> Node:
        return self.lm_head(self.transformer(step))


def _hidden(cfg: ModelConfig) -> int:
    return cfg.size("hidden_size", cfg.get("n_embed"))


def _heads(cfg: ModelConfig) -> int:
    return cfg.size("n_head", cfg.get("num_attention_heads"), limit=4096)
