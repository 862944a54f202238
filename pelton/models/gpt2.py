"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm, weights stored as [in, out]."""

from __future__ import annotations

from ..nn import (
    Attention,
    CausalLM,
    Embedding,
    LayerNorm,
    Linear,
    Module,
    Node,
    Step,
    TransposedLinear,
    activation,
    add,
    slice_,
)  # fmt: skip
from .config import ModelConfig
from .registry import register


def _linear(cfg: ModelConfig, inputs: int, outputs: int) -> Linear | TransposedLinear:
    # GGUF files keep the ordinary layout.
    return Linear(inputs, outputs, bias=True) if cfg.get("pelton_transposed") else TransposedLinear(inputs, outputs)


class GPT2Attention(Module):
    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        hidden, heads = cfg.size("n_embd"), cfg.size("n_head", limit=4096)
        self.c_attn = _linear(cfg, hidden, 3 * hidden)
        self.c_proj = _linear(cfg, hidden, hidden)
        head_dim = cfg.head_dim(hidden, heads)
        scale = head_dim**-0.5 if cfg.get("scale_attn_weights", True) else 1.0
        if cfg.get("scale_attn_by_inverse_layer_idx", False):
            scale /= layer + 1
        self.attention = Attention(layer, heads, heads, head_dim, scale=scale)
        self._hidden = hidden

    def __call__(self, x: Node, step: Step) -> Node:
        qkv = self.c_attn(x)
        q, k, v = (slice_(qkv, i * self._hidden, (i + 1) * self._hidden) for i in range(3))
        return self.c_proj(self.attention(q, k, v, step))


class GPT2MLP(Module):
    def __init__(self, cfg: ModelConfig) -> None:
        hidden = cfg.size("n_embd")
        inner = cfg.size("n_inner", 4 * hidden)
        self.c_fc = _linear(cfg, hidden, inner)
        self.c_proj = _linear(cfg, inner, hidden)
        self._kind = cfg.activation("activation_function", default="gelu_new")

    def __call__(self, x: Node) -> Node:
        return self.c_proj(activation(self.c_fc(x), self._kind))


class GPT2Layer(Module):
    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        hidden, eps = cfg.size("n_embd"), cfg.eps("layer_norm_epsilon", 1e-5)
        self.ln_1 = LayerNorm(hidden, eps)
        self.attn = GPT2Attention(cfg, layer)
        self.ln_2 = LayerNorm(hidden, eps)
        self.mlp = GPT2MLP(cfg)

    def __call__(self, x: Node, step: Step) -> Node:
        x = add(x, self.attn(self.ln_1(x), step))
        return add(x, self.mlp(self.ln_2(x)))


class GPT2Model(Module):
    def __init__(self, cfg: ModelConfig) -> None:
        hidden = cfg.size("n_embd")
        self.wte = Embedding(cfg.size("vocab_size"), hidden)
        self.wpe = Embedding(cfg.size("n_positions"), hidden)
        self.h = [GPT2Layer(cfg, i) for i in range(cfg.size("n_layer", limit=1024))]
        self.ln_f = LayerNorm(hidden, cfg.eps("layer_norm_epsilon", 1e-5))

    def __call__(self, step: Step) -> Node:
        x = add(self.wte(step.token_ids), self.wpe(step.positions))
        for layer in self.h:
            x = layer(x, step)
        return self.ln_f(x)


@register("GPT2LMHeadModel")
class GPT2(CausalLM):
    def __init__(self, cfg: ModelConfig) -> None:
        self.transformer = GPT2Model(cfg)
        if cfg.get("tie_word_embeddings", True):
            self.lm_head = self.transformer.wte.as_linear()
        else:
            self.lm_head = Linear(cfg.size("n_embd"), cfg.size("vocab_size"))

    def __call__(self, step: Step) -> Node:
        return self.lm_head(self.transformer(step))
