"""The roofline against values computed by hand."""

from __future__ import annotations

import pytest

from pelton.backends.base import CallStats
from pelton.bench.roofline import Bound, PeakMeter, Peaks
from tests.backends.cpu.native import ISAS

RATES = {
    "read_bandwidth": 50e9, "l3_bandwidth": 100e9, "l2_bandwidth": 200e9, "l1_bandwidth": 400e9,
    "f32": 1e12, "bf16": 2e12,
}  # fmt: skip
PEAKS = Peaks(RATES, (32 << 10, 1 << 20, 16 << 20), threads=2)


def call(flops: float = 0.0, streamed: float = 0.0, activations: float = 0.0, precision: str = "f32") -> CallStats:
    return CallStats("x", "linear", 1.0, flops, streamed, activations, precision)


def test_weights_stream_from_memory() -> None:
    assert PEAKS.bound(call(streamed=100e6, activations=1e3)) == Bound(2e-3, "memory")


@pytest.mark.parametrize(
    ("size", "by", "rate"),
    [(64 << 10, "L1", 400e9), ((64 << 10) + 1, "L2", 200e9), (2 << 20, "L2", 200e9), (3 << 20, "L3", 100e9),
     ((16 << 20) + 1, "memory", 50e9)],
)  # fmt: skip
def test_activations_come_from_the_smallest_cache_that_holds_them(size: int, by: str, rate: float) -> None:
    bound = PEAKS.bound(call(activations=size))
    assert (bound.by, bound.seconds) == (by, pytest.approx(size / rate))


def test_the_longest_of_the_bounds_counts() -> None:
    assert PEAKS.bound(call(flops=1e9, streamed=25e6)) == Bound(1e-3, "compute")
    assert PEAKS.bound(call(flops=1e9, streamed=25e6, precision="bf16")) == Bound(0.5e-3, "memory")
    assert PEAKS.bound(call(flops=1e9, streamed=100e6)) == Bound(2e-3, "memory")
    assert PEAKS.bound(call(flops=1e9, precision="int8")).seconds == 1e-3  # no such instruction: done in f32


def test_activations_too_large_for_the_caches_add_to_what_streams() -> None:
    bound = PEAKS.bound(call(streamed=100e6, activations=50e6))
    assert bound == Bound(pytest.approx(150e6 / 50e9), "memory")  # type: ignore[arg-type]


def test_weights_that_lie_in_a_cache() -> None:
    assert PEAKS.bound(call(streamed=1e6), streamed_from="l2") == Bound(5e-6, "L2")
    both = PEAKS.bound(call(streamed=1e6, activations=1e6), streamed_from="l2")
    assert both == Bound(pytest.approx(1e-5), "L2")  # type: ignore[arg-type]


def test_a_meter_takes_the_better_one_of_two_bandwidths_and_the_best_of_each_core_figure(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    values = iter([10.0, 30.0, 20.0])
    at = 0.0

    def measure(isa: str, threads: int, seconds: float, names: list[str]) -> dict[str, float]:
        nonlocal at
        at = next(values) if "read_bandwidth" not in names else at
        return dict.fromkeys(names, at)

    monkeypatch.setattr("pelton.backends.cpu._native.measure_peaks", measure)
    meter = PeakMeter(ISAS[0], 1)
    meter.measure()
    assert meter.peaks().rates["read_bandwidth"] == 10
    meter.measure()
    meter.measure()
    assert meter.peaks().rates["read_bandwidth"] == meter.peaks().rates["f32"] == 30
    values = iter([1.0])
    meter.measure()
    assert meter.peaks().rates["read_bandwidth"] == 20 and meter.peaks().rates["f32"] == 30


@pytest.mark.parametrize("isa", ISAS)
def test_measured_peaks_have_the_order_of_a_memory_hierarchy(isa: str) -> None:
    meter = PeakMeter(isa, 1)
    meter.measure()
    rates = meter.peaks().rates
    # With the narrow registers of the lowest tier the core is the limit of both.
    assert rates["l1_bandwidth"] > rates["l3_bandwidth"] * (0.8 if isa == "generic" else 1)
    assert rates["l2_bandwidth"] > rates["read_bandwidth"] * 0.8  # neighbours come and go between the two
    assert rates["l1_bandwidth"] < 2e12  # a core loads no more than 2 x 64 bytes a cycle: loads are not optimised away
    assert rates["f32"] < 1e12
