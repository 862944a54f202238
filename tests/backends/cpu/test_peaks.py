"""Peaks kept on disk: how long a figure is believed."""

from __future__ import annotations

import pytest

from pelton.backends import kept_peaks
from pelton.backends.cpu import peaks


class Machine:
    """Measures the bandwidths it is given, one after the other, while its clock stands."""

    def __init__(self, *bandwidths: float) -> None:
        self.bandwidths, self.now = list(bandwidths), 1e9

    def measure(self, isa: str, threads: int) -> dict[str, float]:
        return {"read_bandwidth": self.bandwidths.pop(0), "f32": 1.0}

    def bandwidth(self, **options: float) -> float:
        return peaks.measured_peaks("generic", 1, **options)["read_bandwidth"]  # type: ignore[arg-type]


@pytest.fixture
def machine(monkeypatch, tmp_path):  # type: ignore[no-untyped-def]
    machine = Machine(30.0, 20.0, 50.0, 10.0)
    monkeypatch.setenv("PELTON_CACHE", str(tmp_path))
    monkeypatch.setattr(kept_peaks.time, "time", lambda: machine.now)
    monkeypatch.setattr("pelton.backends.cpu._native.measure_peaks", machine.measure)
    return machine


def test_a_figure_is_kept_for_a_week(machine: Machine) -> None:
    assert machine.bandwidth() == machine.bandwidth(achieved=30) == 30
    machine.now += 8 * 24 * 3600
    assert machine.bandwidth() == 20
    assert machine.bandwidth(fresh=True) == 50


def test_a_figure_that_somebody_exceeds_is_measured_again_but_not_at_once(machine: Machine) -> None:
    assert machine.bandwidth(achieved=40) == machine.bandwidth(achieved=40) == 30
    machine.now += 3600
    assert machine.bandwidth(achieved=40) == 30  # of 30 and 20
    assert machine.bandwidth(achieved=40) == 30
    machine.now += 3600
    assert machine.bandwidth(achieved=29) == 30
    assert machine.bandwidth(achieved=40) == 50
