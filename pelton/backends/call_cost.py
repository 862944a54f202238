"""What a call costs on a backend, for its roofline."""

from __future__ import annotations

from dataclasses import dataclass

from ..graph.cost import Cost, StepShape
from ..program import Call
from .base import CallStats


@dataclass(frozen=True, slots=True)
class CallCost:
    """Polynomials in the sizes of a step; see :class:`~pelton.backends.base.CallStats`."""

    call: Call
    flops: Cost
    streamed: Cost
    activations: Cost
    precision: str

    def stats(self, shape: StepShape, seconds: float) -> CallStats:
        flops, streamed, activations = (shape.evaluate(c) for c in (self.flops, self.streamed, self.activations))
        return CallStats(self.call.name, self.call.kernel, seconds, flops, streamed, activations, self.precision)
