"""SLOs, and the search for the highest rate that meets one."""

from __future__ import annotations

import asyncio
import math

import pytest

from pelton.bench.serving_report import found_text
from pelton.bench.slo import FoundRate, Slo, Trial, find_rate, wilson
from pelton.errors import PeltonError
from pelton.metrics import RequestMetrics


@pytest.mark.parametrize(
    ("text", "slo"),
    [
        ("ttft=500", Slo(ttft=0.5)), ("ttft=500ms,tpot=50", Slo(ttft=0.5, tpot=0.05)),
        ("E2E=2s, tpot:0.5", Slo(e2e=2.0, tpot=0.0005)), ("ttft=1.5S", Slo(ttft=1.5)),
    ],
)  # fmt: skip
def test_limits_are_milliseconds_unless_they_have_a_unit(text: str, slo: Slo) -> None:
    got = Slo.parse(text, 0.9)
    assert (got.ttft, got.tpot, got.e2e) == pytest.approx((slo.ttft, slo.tpot, slo.e2e))


@pytest.mark.parametrize(
    "text", ["", "ttft", "ttft=", "ttft=0", "ttft=-1", "itl=5", "ttft=5,ttft=6", "ttft=5h", "ttft=x"]
)
def test_other_limits_are_refused(text: str) -> None:
    with pytest.raises(PeltonError, match="--slo is"):
        Slo.parse(text, 0.9)


@pytest.mark.parametrize("share", [0.0, -1.0, 1.01, math.nan])
def test_attainment_is_a_share(share: float) -> None:
    with pytest.raises(PeltonError, match="--slo-attainment"):
        Slo.parse("ttft=5", share)


def test_a_request_without_a_token_meets_nothing() -> None:
    assert not Slo().met_by(RequestMetrics(0.0))
    assert Slo(tpot=0.1).met_by(RequestMetrics(0.0, None, (5.0,)))
    assert not Slo(tpot=0.1).met_by(RequestMetrics(0.0, None, (5.0, 5.2)))


def test_intervals_of_shares() -> None:
    # Values of R's binom.wilson.
    assert wilson(90, 100) == pytest.approx((0.8256343, 0.9447708), abs=1e-6)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775328), abs=1e-6)
    assert wilson(10, 10) == pytest.approx((0.7224672, 1.0), abs=1e-6)
    assert wilson(0, 0) == (0.0, 1.0)


def test_a_queue_that_grows_shows_in_the_later_half() -> None:
    growing = Trial.of(8.0, [True] * 90 + [False] * 10)
    assert growing.attainment == 0.9 and growing.late_met == 40 and not growing.passes(0.9)
    assert Trial.of(8.0, ([True] * 9 + [False]) * 10).passes(0.9)
    assert not Trial.of(8.0, []).passes(0.9)


def test_how_sure_a_trial_is() -> None:
    assert Trial.of(1.0, [True] * 100).verdict(0.9) == "sure"
    assert Trial.of(1.0, [True] * 20).verdict(0.9) == "likely"
    assert Trial.of(1.0, [False] * 20).verdict(0.9) == "sure"
    assert Trial.of(1.0, ([True] * 8 + [False] * 2) * 2).verdict(0.9) == "likely"


def search(limit: float, start: float, runs: int = 20, count: int = 100) -> FoundRate:
    async def measure(rate: float) -> Trial:
        return Trial.of(rate, [rate <= limit] * count)

    return asyncio.run(find_rate(measure, start, needed=0.9, max_runs=runs))


@pytest.mark.parametrize("limit", [0.37, 4.0, 123.0])
@pytest.mark.parametrize("start", [0.1, 5.0, 1000.0])
def test_the_search_ends_at_the_limit(limit: float, start: float) -> None:
    found = search(limit, start, runs=30)
    assert found.highest is not None and found.lowest_failed is not None
    assert found.highest <= limit < found.lowest_failed <= 1.05 * found.highest
    assert "differ by less than 5%" in found.reason
    assert "the SLO is met at up to" in found_text(found.row()) and "100 of 100" in found_text(found.row())


def test_the_search_is_bounded_and_says_what_it_does_not_know() -> None:
    high = search(1e9, 1.0, runs=4)
    assert (high.highest, high.lowest_failed, len(high.trials)) == (8.0, None, 4)
    assert "there may be more" in found_text(high.row())
    low = search(1e-9, 1.0, runs=4)
    assert (low.highest, low.lowest_failed, len(low.trials)) == (None, 0.125, 4)
    assert "no rate met the SLO down to 0.125" in found_text(low.row())
    unsure = search(4.0, 4.0, runs=2, count=5)
    assert "more --num-prompts would make it sure" in found_text(unsure.row())


def test_a_search_that_is_stopped_keeps_its_trials() -> None:
    async def measure(rate: float) -> Trial | None:
        return Trial.of(rate, [True] * 10) if rate < 4 else None

    found = asyncio.run(find_rate(measure, 1.0, needed=0.9, max_runs=9))
    assert (found.highest, len(found.trials), found.reason) == (2.0, 2, "it was stopped")
