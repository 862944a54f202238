"""Reading a Hugging Face config: checked numbers, old and new field names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..errors import UnsupportedModelError
from ..graph.rope import RopeSpec
from .rope_rules import rope_spec

#: Names of activation functions in configs -> kinds of the op table.
ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu",
}  # fmt: skip


class ModelConfig:
    """The fields of ``config.json``, read by name with one clear error if one is absent or absurd."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.fields = fields

    def get(self, name: str, default: Any = None) -> Any:
        """The value, or ``default`` where it is absent or null."""
        value = self.fields.get(name)
        return default if value is None else value

    def value(self, name: str, absent: Any) -> Any:
        """The value, ``absent`` where there is no such key, and None where it is null: switched off."""
        return self.fields.get(name, absent)

    def size(self, name: str, default: int | None = None, limit: int = 1 << 24) -> int:
        """A whole number from 1 to ``limit``.

        Raises:
            UnsupportedModelError: absent without a default, or out of range.
        """
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
            raise UnsupportedModelError(
                f"config field {name} is {value!r}", f"a whole number from 1 to {limit} is needed; check config.json"
            )
        return value

    def number(self, name: str, default: float) -> float:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise UnsupportedModelError(f"config field {name} is {value!r}", "a number is needed; check config.json")
        return float(value)

    def eps(self, name: str, default: float) -> float:
        """The small number under a norm's root.

        Raises:
            UnsupportedModelError: not positive, which would make NaN of a row of zeros.
        """
        value = self.number(name, default)
        if value <= 0:
            raise UnsupportedModelError(f"config field {name} is {value:g}", "it must be above 0; check config.json")
        return value

    def window(self, absent: int = 0) -> int:
        """Tokens of ``sliding_window``, 0 where it is switched off.

        Raises:
            UnsupportedModelError: not a whole number of tokens.
        """
        value = self.value("sliding_window", absent)
        return 0 if not value else ModelConfig({"sliding_window": value}).size("sliding_window", limit=1 << 30)

    def activation(self, name: str, default: str = "silu") -> str:
        kind = self.get(name, default)
        if kind not in ACTIVATIONS:
            raise UnsupportedModelError(f"activation {kind!r} is not implemented", f"known: {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[kind]

    def refuse(self, name: str, *harmless: Any) -> None:
        """Stop if an option that would change the result is set: better than wrong numbers."""
        value = self.get(name, harmless[0])
        if value not in harmless:
            raise UnsupportedModelError(f"config field {name} = {value!r} is not implemented", "use another checkpoint")

    def heads(self, absent_head_dim: int | None = None) -> tuple[int, int, int]:
        """(num_attention_heads, num_key_value_heads, head_dim)."""
        heads = self.size("num_attention_heads", limit=4096)
        kv_heads = self.size("num_key_value_heads", heads, limit=4096)
        derived = absent_head_dim if "head_dim" not in self.fields else None
        head_dim = self.size("head_dim", derived or max(1, self.size("hidden_size") // heads), limit=512)
        if heads % kv_heads:
            raise UnsupportedModelError(
                f"{heads} attention heads are no multiple of {kv_heads} key-value heads", "check config.json"
            )
        return heads, kv_heads, _even(head_dim)

    def head_dim(self, hidden: int, heads: int) -> int:
        """``hidden / heads``, for families whose config does not name it."""
        if hidden % heads or hidden // heads > 512:
            raise UnsupportedModelError(f"{hidden} columns are no {heads} heads of up to 512", "check config.json")
        return _even(hidden // heads)

    def rope(self, head_dim: int, layer_type: str | None = None, theta: float = 10000.0) -> RopeSpec:
        """The rope of a layer: ``rope_parameters`` (possibly per layer type) or theta and ``rope_scaling``.

        Raises:
            UnsupportedModelError: a scaling rule that is not implemented.
        """
        rules = self.get("rope_parameters") or {}
        if layer_type is not None:
            rules = rules.get(layer_type) or {}
        rules = {**(self.get("rope_scaling") or {}), **rules}
        theta = float(rules.get("rope_theta") or self.number("rope_theta", theta))
        rotary = int(head_dim * float(rules.get("partial_rotary_factor") or self.number("partial_rotary_factor", 1.0)))
        return rope_spec(rules, head_dim, rotary, theta, self.size("max_position_embeddings", 1 << 20, 1 << 30))


def _even(head_dim: int) -> int:
    if head_dim % 2:
        raise UnsupportedModelError(f"head_dim {head_dim} is odd", "only even head sizes are implemented")
    return head_dim
