"""Gemma 2 (soft-capped scores, alternating windows) and Gemma 3 text (two ropes, head norms; 2024, 2025)."""

from __future__ import annotations

from ..errors import UnsupportedModelError
from ..nn import Attention, CausalLM, Embedding, Linear, Module, Node, RMSNorm, RopeSpec, Step, add, scale, softcap
from .config import ModelConfig
from .llama import GatedMLP
from .registry import register


def _norm(cfg: ModelConfig, dim: int) -> RMSNorm:
    return RMSNorm(dim, cfg.eps("rms_norm_eps", 1e-6), weight_offset=1.0)


class GemmaAttention(Module):
    def __init__(self, cfg: ModelConfig, layer: int, layer_type: str, third: bool) -> None:
        hidden = cfg.size("hidden_size")
        heads, kv_heads, head_dim = cfg.heads(absent_head_dim=256)
        bias = bool(cfg.get("attention_bias", False))
        self.q_proj = Linear(hidden, heads * head_dim, bias)
        self.k_proj = Linear(hidden, kv_heads * head_dim, bias)
        self.v_proj = Linear(hidden, kv_heads * head_dim, bias)
        self.o_proj = Linear(heads * head_dim, hidden, bias)
        if third:
            self.q_norm = _norm(cfg, head_dim)
            self.k_norm = _norm(cfg, head_dim)
        slides = layer_type == "sliding_attention"
        self.attention = Attention(
            layer, heads, kv_heads, head_dim,
            scale=cfg.number("query_pre_attn_scalar", 256.0) ** -0.5,
            window=cfg.window(absent=4096) if slides else 0,
            softcap=0.0 if third else _cap(cfg, "attn_logit_softcapping", 50.0),
            rope=_rope(cfg, head_dim, layer_type) if third else cfg.rope(head_dim),
        )  # fmt: skip

    def __call__(self, x: Node, step: Step) -> Node:
        q, k = self.q_proj(x), self.k_proj(x)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        return self.o_proj(self.attention(q, k, self.v_proj(x), step))


def _cap(cfg: ModelConfig, name: str, absent: float) -> float:
    """A soft-cap: configs leave out what is Gemma 2's default, and say null to switch it off."""
    return 0.0 if cfg.value(name, absent) is None else cfg.number(name, absent)


def _rope(cfg: ModelConfig, head_dim: int, layer_type: str) -> RopeSpec:
    """Gemma 3's layers with a window keep the short rope; only the others are scaled."""
    rules = cfg.get("rope_parameters") or {}
    if layer_type in rules:
        return cfg.rope(head_dim, layer_type)
    if rules:
        raise UnsupportedModelError(f"rope_parameters has no entry {layer_type}", "Gemma 3 needs one per layer type")
    if layer_type == "sliding_attention":
        plain = {"rope_theta": cfg.number("rope_local_base_freq", 10000.0)}
        return ModelConfig({**cfg.fields, **plain, "rope_scaling": None}).rope(head_dim)
    return cfg.rope(head_dim, theta=1e6)


class GemmaLayer(Module):
    """Norms before and after each of attention and MLP."""

    def __init__(self, cfg: ModelConfig, layer: int, layer_type: str, third: bool) -> None:
        hidden = cfg.size("hidden_size")
        self.input_layernorm = _norm(cfg, hidden)
        self.self_attn = GemmaAttention(cfg, layer, layer_type, third)
        self.post_attention_layernorm = _norm(cfg, hidden)
        self.pre_feedforward_layernorm = _norm(cfg, hidden)
        self.mlp = GatedMLP(cfg, cfg.activation("hidden_activation", "gelu_pytorch_tanh"))
        self.post_feedforward_layernorm = _norm(cfg, hidden)

    def __call__(self, x: Node, step: Step) -> Node:
        x = add(x, self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), step)))
        return add(x, self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x))))


class GemmaModel(Module):
    def __init__(self, cfg: ModelConfig, third: bool) -> None:
        hidden = cfg.size("hidden_size")
        self.embed_tokens = Embedding(cfg.size("vocab_size"), hidden)
        count = cfg.size("num_hidden_layers", limit=1024)
        period = int(cfg.get("sliding_window_pattern", cfg.get("_sliding_window_pattern", 6 if third else 2)))
        types = cfg.get("layer_types") or [
            "sliding_attention" if (i + 1) % period else "full_attention" for i in range(count)
        ]
        self.layers = [GemmaLayer(cfg, i, types[i], third) for i in range(count)]
        self.norm = _norm(cfg, hidden)
        self._scale = hidden**0.5

    def __call__(self, step: Step) -> Node:
        x = scale(self.embed_tokens(step.token_ids), self._scale)
        for layer in self.layers:
            x = layer(x, step)
        return self.norm(x)


@register("Gemma2ForCausalLM")
class Gemma2(CausalLM):
    third = False

    def __init__(self, cfg: ModelConfig) -> None:
        cfg.refuse("use_bidirectional_attention", False)
        self.model = GemmaModel(cfg, self.third)
        if cfg.get("tie_word_embeddings", True):
            self.lm_head = self.model.embed_tokens.as_linear()
        else:
            self.lm_head = Linear(cfg.size("hidden_size"), cfg.size("vocab_size"))
        self._cap = _cap(cfg, "final_logit_softcapping", 0.0 if self.third else 30.0)

    def __call__(self, step: Step) -> Node:
        logits = self.lm_head(self.model(step))
        return softcap(logits, self._cap) if self._cap else logits


@register("Gemma3ForCausalLM")
class Gemma3(Gemma2):
    third = True
