"""Qwen 2 and 2.5 (biases on q, k, v) and Qwen 3 (a norm on every head of q and k; Yang et al. 2024, 2025)."""

from __future__ import annotations

from ..nn import Attention, Linear, Node, RMSNorm, Step
from .config import ModelConfig
from .llama import Llama, LlamaAttention
from .registry import register


def _window(cfg: ModelConfig, layer: int) -> int:
    """Tokens of the sliding window of a layer, 0 for full attention."""
    if not cfg.get("use_sliding_window", False):
        return 0
    types = cfg.get("layer_types")
    slides = types[layer] == "sliding_attention" if types else layer >= cfg.get("max_window_layers", 28)
    return cfg.window(absent=4096) if slides else 0


class Qwen2Attention(LlamaAttention):
    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        hidden = cfg.size("hidden_size")
        heads, kv_heads, head_dim = cfg.heads()
        self.q_proj = Linear(hidden, heads * head_dim, bias=True)
        self.k_proj = Linear(hidden, kv_heads * head_dim, bias=True)
        self.v_proj = Linear(hidden, kv_heads * head_dim, bias=True)
        self.o_proj = Linear(heads * head_dim, hidden)
        self.attention = Attention(
            layer, heads, kv_heads, head_dim, rope=cfg.rope(head_dim), window=_window(cfg, layer)
        )


class Qwen3Attention(LlamaAttention):
    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__(cfg, layer)
        heads, kv_heads, head_dim = cfg.heads()
        eps = cfg.eps("rms_norm_eps", 1e-6)
        self.q_norm = RMSNorm(head_dim, eps)
        self.k_norm = RMSNorm(head_dim, eps)
        self.attention = Attention(
            layer, heads, kv_heads, head_dim, rope=cfg.rope(head_dim), window=_window(cfg, layer)
        )

    def __call__(self, x: Node, step: Step) -> Node:
        q, k = self.q_norm(self.q_proj(x)), self.k_norm(self.k_proj(x))
        return self.o_proj(self.attention(q, k, self.v_proj(x), step))


@register("Qwen2ForCausalLM")
class Qwen2(Llama):
    attention = Qwen2Attention


@register("Qwen3ForCausalLM")
class Qwen3(Llama):
    attention = Qwen3Attention
