"""Rope rules as configs write them, in old and new formats, to the graph's :class:`RopeSpec`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import UnsupportedModelError
from ..graph.rope import RopeSpec


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
            raise UnsupportedModelError(
                "rope scaling llama3 has high_freq_factor <= low_freq_factor", "check config.json"
            )
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
