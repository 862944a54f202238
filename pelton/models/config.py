"""Reading a Hugging Face config: checked numbers, and the rope rules of old and new formats."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import UnsupportedModelError
from ..graph.rope import RopeSpec

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


def rope_spec(rules: Mapping[str, Any], head_dim: int, rotary_dim: int, theta: float, max_position: int) -> RopeSpec:
    """A :class:`RopeSpec` from a config's rope rules.

    Raises:
        UnsupportedModelError: a rule that is not implemented, or numbers that give no finite angles.
    """
    spec = _rope_spec(rules, head_dim, rotary_dim, theta, max_position)
    sound = 2 <= rotary_dim <= head_dim and rotary_dim % 2 == 0 and 0 < theta < math.inf and spec.factor > 0
    with np.errstate(all="ignore"):
        if not sound or not np.isfinite(spec.frequencies() * spec.amplitude).all():
            raise UnsupportedModelError(
                f"rope of {rotary_dim} of {head_dim} dimensions with theta {theta:g} and {dict(rules)} is no rotation",
                "check rope_theta, rope_scaling and partial_rotary_factor in config.json",
            )
    return spec


def _rope_spec(rules: Mapping[str, Any], head_dim: int, rotary_dim: int, theta: float, max_position: int) -> RopeSpec:
    kind = rules.get("rope_type") or rules.get("type") or "default"
    factor = float(rules.get("factor") or 1.0)
    original = int(rules.get("original_max_position_embeddings") or max_position)
    if kind in ("default", "dynamic"):
        # "dynamic" changes the base only beyond the trained context, which max_model_len never exceeds.
        return RopeSpec(head_dim, rotary_dim, theta)
    if kind == "linear":
        return RopeSpec(head_dim, rotary_dim, theta, scaling="linear", factor=factor)
    if kind == "llama3":
        if float(rules["high_freq_factor"]) <= float(rules["low_freq_factor"]):
            raise UnsupportedModelError("rope scaling llama3 has high_freq_factor <= low_freq_factor", "check config.json")
        return RopeSpec(
            head_dim, rotary_dim, theta, scaling="llama3", factor=factor, original_max_position=original,
            low_freq_factor=float(rules["low_freq_factor"]), high_freq_factor=float(rules["high_freq_factor"]),
        )  # fmt: skip
    if kind == "llama3_factors":  # GGUF files carry the rule's result
        factors = tuple(float(f) for f in rules["factors"])
        return RopeSpec(head_dim, rotary_dim, theta, scaling="factors", factors=factors)
    if kind == "yarn":
        amplitude = rules.get("attention_factor")
        if amplitude is None:
            scales = [rules.get("mscale"), rules.get("mscale_all_dim")]
            if all(scales):
                amplitude = _yarn_amplitude(factor, scales[0]) / _yarn_amplitude(factor, scales[1])
            else:
                amplitude = _yarn_amplitude(factor, 1.0)
        return RopeSpec(
            head_dim, rotary_dim, theta, scaling="yarn", factor=factor, original_max_position=original,
            beta_fast=float(rules.get("beta_fast") or 32), beta_slow=float(rules.get("beta_slow") or 1),
            truncate=bool(rules.get("truncate", True)), amplitude=float(amplitude),
        )  # fmt: skip
    raise UnsupportedModelError(
        f"rope scaling {kind!r} is not implemented", "known: default, dynamic, linear, llama3, yarn"
    )


def _yarn_amplitude(factor: float, scale: float | None) -> float:
    """Peng et al. 2023, eq. 22, in the form that checkpoints are configured for."""
    return 0.1 * float(scale or 1.0) * math.log(factor) + 1.0 if factor > 1 else 1.0
