"""Rotary position embeddings: frequencies of every scaling rule in use, and the cos/sin table.

Sources: Su et al. 2021 (RoFormer); Peng et al. 2023 (YaRN); the Llama 3.1 frequency rule as
published with its checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """The attributes of ``rope``: plain numbers, so that the graph's text says all.

    head_dim: columns per head; the first rotary_dim of them turn. interleaved: pairs (2i, 2i+1)
    instead of (i, i + rotary_dim/2). scaling: "none", "linear", "llama3", "yarn" or "factors".
    """

    head_dim: int
    rotary_dim: int
    theta: float = 10000.0
    interleaved: bool = False
    scaling: str = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    original_max_position: int = 0  # llama3, yarn: context of pre-training
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: round the ramp's ends to whole dimensions
    amplitude: float = 1.0  # yarn: cos and sin are multiplied by it
    factors: tuple[float, ...] = ()  # "factors": one divisor per frequency

    def attrs(self) -> dict[str, Any]:
        """Attributes that differ from the defaults, and the two sizes."""
        plain = RopeSpec(self.head_dim, self.rotary_dim)
        return {
            k: v for k, v in asdict(self).items() if k in ("head_dim", "rotary_dim", "theta") or v != getattr(plain, k)
        }

    @classmethod
    def of(cls, attrs: Mapping[str, Any]) -> RopeSpec:
        return cls(**{k: v for k, v in attrs.items() if k in cls.__dataclass_fields__})

    def frequencies(self) -> npt.NDArray[np.float64]:
        """Angle per position of each of the rotary_dim/2 pairs, in radians."""
        exponent = np.arange(0, self.rotary_dim, 2) / self.rotary_dim
        plain: npt.NDArray[np.float64] = self.theta**-exponent
        if self.scaling == "none":
            return plain
        if self.scaling == "linear":
            return plain / self.factor
        if self.scaling == "factors":
            return plain / np.asarray(self.factors, dtype=np.float64)
        if self.scaling == "llama3":
            turns = self.original_max_position * plain / (2 * math.pi)
            span = self.high_freq_factor - self.low_freq_factor
            blend = np.clip((turns - self.low_freq_factor) / span, 0, 1)
            return plain * (blend + (1 - blend) / self.factor)
        if self.scaling == "yarn":
            low, high = (self._dimension_of(turns) for turns in (self.beta_fast, self.beta_slow))
            if self.truncate:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, self.rotary_dim - 1)
            ramp: npt.NDArray[np.float64] = np.clip(
                (np.arange(self.rotary_dim // 2) - low) / max(high - low, 0.001), 0, 1
            )
            return plain * (1 - ramp) + plain / self.factor * ramp
        raise ValueError(f"no such rope scaling: {self.scaling}")

    def _dimension_of(self, turns: float) -> float:
        """The (fractional) pair that makes ``turns`` full turns over the original context."""
        return (
            self.rotary_dim * math.log(self.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(self.theta))
        )

    def table(self, positions: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """float32 [len(positions), rotary_dim]: the cosines of all pairs, then the sines."""
        # Angles as float32 products, as the checkpoints were trained and are evaluated elsewhere.
        angle = positions.astype(np.float32)[:, None] * self.frequencies().astype(np.float32)[None, :]
        table = np.concatenate([np.cos(angle), np.sin(angle)], axis=1) * np.float32(self.amplitude)
        return table.astype(np.float32)
