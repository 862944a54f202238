"""The roofline: what a call could take at best on this machine, from peaks measured in the same run.

A call moves bytes and computes. Weights, KV cache and looked-up rows stream from memory; activations lie in
the smallest cache that holds them, as the call before has just written them. The bound is the longest of

    streamed bytes / memory bandwidth,  activation bytes / that cache's bandwidth,  FLOPs / peak of the precision

and the fraction of the roofline is that bound over the measured time (Williams et al. 2009; the cache-aware
form of Ilic et al. 2014).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..backends.base import CallStats

#: Spent on the memory bandwidth, which others share, and on each limit of the cores, each time: hundreds of tries.
_MEMORY_SECONDS, _CORE_SECONDS = 0.2, 0.03
_CORE = ["l1_bandwidth", "l2_bandwidth", "l3_bandwidth", "f32", "bf16", "int8"]
_LEVELS = ("l1", "l2", "l3")


@dataclass(frozen=True)
class Bound:
    """seconds: the least a call can take. by: "memory", "L1" ... "L3", or "compute"."""

    seconds: float
    by: str


@dataclass(frozen=True)
class Peaks:
    """rates: bytes/s of ``read_bandwidth`` and ``l1_bandwidth`` ..., FLOP/s per precision. cache_bytes: L1, L2 of a
    core and the L3 they share; 0 where there is none or nobody knows. threads: cores that the rates are of."""

    rates: Mapping[str, float]
    cache_bytes: tuple[int, int, int]
    threads: int

    def compute(self, precision: str) -> float:
        """FLOP/s of a precision, of f32 where the tier has no instruction of its own for it."""
        return self.rates.get(precision, self.rates["f32"])

    def level(self, size: float) -> str:
        """The smallest cache that holds ``size`` bytes, spread over the threads, or "memory"."""
        l1, l2, l3 = self.cache_bytes
        for level, capacity in zip(_LEVELS, (l1 * self.threads, l2 * self.threads, l3), strict=True):
            if size <= capacity:
                return level
        return "memory"

    def bandwidth(self, level: str) -> float:
        return self.rates["read_bandwidth" if level == "memory" else f"{level}_bandwidth"]

    def bound(self, call: CallStats, *, streamed_from: str = "memory") -> Bound:
        """The roofline of a call. streamed_from: where its weights and KV cache come from."""
        level = self.level(call.activation_bytes)
        moved = {streamed_from: call.streamed_bytes}
        moved[level] = moved.get(level, 0.0) + call.activation_bytes
        bounds = [
            Bound(size / self.bandwidth(level), level if level == "memory" else level.upper())
            for level, size in moved.items()
        ]
        return max([*bounds, Bound(call.flops / self.compute(call.precision), "compute")], key=lambda b: b.seconds)


class PeakMeter:
    """Measures peaks again and again during a run, because they drift while neighbours come and go."""

    def __init__(self, isa: str, threads: int) -> None:
        from ..backends.cpu import _native

        features = _native.cpu_features()
        self._machine = (isa, threads)
        self._caches = (int(features["l1_bytes"]), int(features["l2_bytes"]), int(features["l3_bytes"]))
        self._core: dict[str, float] = {}
        self._memory: list[float] = []

    def measure(self) -> None:
        """Measure now: before the first and after each batch of measurements."""
        from ..backends.cpu import _native

        for name, value in _native.measure_peaks(*self._machine, _CORE_SECONDS, _CORE).items():
            self._core[name] = max(value, self._core.get(name, 0.0))
        memory = _native.measure_peaks(*self._machine, _MEMORY_SECONDS, ["read_bandwidth"])
        self._memory.append(memory["read_bandwidth"])

    def peaks(self) -> Peaks:
        """What counts for all that was measured between the last two calls of ``measure``.

        Memory is shared with others, so its bandwidth is the better one of the two; what a core can do is
        the best of the whole run.
        """
        return Peaks({"read_bandwidth": max(self._memory[-2:]), **self._core}, self._caches, self._machine[1])


class DeviceMeter:
    """Measures a GPU, which nobody else uses: the best of all readings counts. Its caches count as memory."""

    def __init__(self, measure: Callable[[], Mapping[str, float]]) -> None:
        self._measure = measure
        self._rates: dict[str, float] = {}

    def measure(self) -> None:
        for name, rate in self._measure().items():
            self._rates[name] = max(rate, self._rates.get(name, 0.0))

    def peaks(self) -> Peaks:
        return Peaks(dict(self._rates), (0, 0, 0), 1)
