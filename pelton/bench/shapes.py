"""The sizes that well-known models give their kernels."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What of a model's config decides the shapes of its kernels; the activation is SiLU in all of them."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    rope_theta: float

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(n, k) of each product, as the passes merge them."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "qkv": (q + 2 * kv, self.hidden),
            "o": (self.hidden, q),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
            "lm_head": (self.vocab, self.hidden),
        }


MODELS = {
    shape.name: shape
    for shape in (
        ModelShape("smollm2-135m", 576, 1536, 9, 3, 64, 49152, 1e5),
        ModelShape("qwen2.5-0.5b", 896, 4864, 14, 2, 64, 151936, 1e6),
        ModelShape("llama-3.2-1b", 2048, 8192, 32, 8, 64, 128256, 5e5),
        ModelShape("llama-3.1-8b", 4096, 14336, 32, 8, 128, 128256, 5e5),
    )
}
