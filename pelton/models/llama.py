"""Llama 1-3.x, Mistral, SmolLM2 (Touvron et al. 2023; Jiang et al. 2023; Dubey et al. 2024)."""

from __future__ import annotations

from ..nn import Attention, CausalLM, Embedding, Linear, Module, Node, RMSNorm, Step, add, gated_activation
from .config import ModelConfig
from .registry import register


class LlamaAttention(Module):
    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        cfg.refuse("partial_rotary_factor", None, 1.0)
        hidden = cfg.size("hidden_size")
        heads, kv_heads, head_dim = cfg.heads()
        bias = bool(cfg.get("attention_bias", False))
        self.q_proj = Linear(hidden, heads * head_dim, bias)
        self.k_proj = Linear(hidden, kv_heads * head_dim, bias)
        self.v_proj = Linear(hidden, kv_heads * head_dim, bias)
        self.o_proj = Linear(heads * head_dim, hidden, bias)
        window = cfg.window(absent=4096) if cfg.get("model_type") == "mistral" else 0
        self.attention = Attention(layer, heads, kv_heads, head_dim, rope=cfg.rope(head_dim), window=window)

    def __call__(self, x: Node, step: Step) -> Node:
        return self.o_proj(self.attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), step))


class GatedMLP(Module):
    """down(activation(gate(x)) * up(x))."""

    def __init__(self, cfg: ModelConfig, kind: str, bias: bool = False) -> None:
        hidden, inner = cfg.size("hidden_size"), cfg.size("intermediate_size")
        self.gate_proj = Linear(hidden, inner, bias)
        self.up_proj = Linear(hidden, inner, bias)
        self.down_proj = Linear(inner, hidden, bias)
        self._kind = kind

    def __call__(self, x: Node) -> Node:
        return self.down_proj(gated_activation(self.gate_proj(x), self.up_proj(x), self._kind))


class LlamaLayer(Module):
    def __init__(self, cfg: ModelConfig, attention: Module) -> None:
        hidden, eps = cfg.size("hidden_size"), cfg.eps("rms_norm_eps", 1e-6)
        self.input_layernorm = RMSNorm(hidden, eps)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.mlp = GatedMLP(cfg, cfg.activation("hidden_act"), bool(cfg.get("mlp_bias", False)))

    def __call__(self, x: Node, step: Step) -> Node:
        x = add(x, self.self_attn(self.input_layernorm(x), step))  # type: ignore[operator]
        return add(x, self.mlp(self.post_attention_layernorm(x)))


class LlamaModel(Module):
    def __init__(self, cfg: ModelConfig, attention: type[LlamaAttention]) -> None:
        self.embed_tokens = Embedding(cfg.size("vocab_size"), cfg.size("hidden_size"))
        layers = cfg.size("num_hidden_layers", limit=1024)
        self.layers = [LlamaLayer(cfg, attention(cfg, i)) for i in range(layers)]
        self.norm = RMSNorm(cfg.size("hidden_size"), cfg.eps("rms_norm_eps", 1e-6))

    def __call__(self, step: Step) -> Node:
        x = self.embed_tokens(step.token_ids)
        for layer in self.layers:
            x = layer(x, step)
        return self.norm(x)


@register("LlamaForCausalLM", "MistralForCausalLM")
class Llama(CausalLM):
    attention: type[LlamaAttention] = LlamaAttention

    def __init__(self, cfg: ModelConfig) -> None:
        self.model = LlamaModel(cfg, self.attention)
        if cfg.get("tie_word_embeddings", False):
            self.lm_head = self.model.embed_tokens.as_linear()
        else:
            self.lm_head = Linear(cfg.size("hidden_size"), cfg.size("vocab_size"))

    def __call__(self, step: Step) -> Node:
        return self.lm_head(self.model(step))
