"""Samples to figures. No I/O."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Figure:
    """Medians, as drift of a shared machine has tails on one side only."""

    median: float
    low: float
    high: float
    samples: tuple[float, ...]

    @property
    def spread(self) -> float:
        """Half the range, relative to the median."""
        return (self.high - self.low) / 2 / self.median if self.median else 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "median": _digits(self.median),
            "min": _digits(self.low),
            "max": _digits(self.high),
            "samples": [_digits(s) for s in self.samples],
        }


def figure(samples: Sequence[float]) -> Figure:
    """Raises ValueError if there is no sample."""
    if not samples:
        raise ValueError("no samples")
    return Figure(statistics.median(samples), min(samples), max(samples), tuple(samples))


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """Median of ours/theirs, round by round: what both met in a round cancels. None without a common round."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=False) if b > 0]
    return statistics.median(ratios) if ratios else None


def agreement(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """How many leading tokens are the same."""
    same = 0
    for a, b in zip(ours, theirs, strict=False):
        if a != b:
            break
        same += 1
    return same


def decode_limit(weights: int, bits: int, kv_elements: int, context: int, bandwidth: float) -> float:
    """Tokens/s at which one sequence moves its weights, at `bits` each, and a bf16 KV cache at `bandwidth`."""
    return bandwidth / (weights * bits / 8 + 2 * kv_elements * context)


def prefill_limit(weights: int, head: int, attention: int, tokens: int, flops: float) -> float:
    """Tokens/s at which a prompt keeps `flops` busy.

    weights: elements multiplied per token, the head among them, which only the last token meets.
    attention: query elements of all layers; each meets half the prompt's keys and values on average.
    """
    work = 2 * (weights - head) * tokens + 2 * head + 4 * attention * tokens * tokens / 2
    return tokens / (work / flops)


def _digits(value: float) -> float:
    return float(f"{value:.5g}")
