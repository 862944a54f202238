import pytest

from pelton.metrics import (
    RequestMetrics,
    distribution,
    goodput,
    latencies_ms,
    mbu,
    mfu,
    percentile,
    pooled_itl,
    throughput,
)

one = RequestMetrics(arrival_time=10.0, first_scheduled_time=10.5, token_times=(11.0, 12.0, 15.0))
single = RequestMetrics(arrival_time=0.0, token_times=(2.0,))
aborted = RequestMetrics(arrival_time=0.0)


def test_the_latencies_are_what_the_definitions_say():
    assert (one.queue_time, one.ttft, one.e2e, one.tpot) == (0.5, 1.0, 5.0, 2.0)
    assert one.itl == (1.0, 3.0)
    assert one.tpot == (one.e2e - one.ttft) / (one.num_output_tokens - 1)


def test_one_token_has_no_tpot_and_no_token_has_nothing():
    assert (single.ttft, single.e2e, single.tpot, single.itl) == (2.0, 2.0, None, ())
    assert (aborted.ttft, aborted.e2e, aborted.tpot, aborted.queue_time) == (None, None, None, None)


def test_gaps_are_pooled_over_requests():
    assert pooled_itl([one, single, one]) == [1.0, 3.0, 1.0, 3.0]


def test_percentiles_interpolate_between_ranks():
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.5
    assert percentile([1.0, 2.0], 0) == 1.0
    assert percentile([1.0, 2.0], 100) == 2.0
    assert percentile([7.0], 99) == 7.0
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)


def test_goodput_counts_requests_that_meet_every_limit():
    assert goodput([one, single, aborted], 2.0) == 1.0
    assert goodput([one, single, aborted], 2.0, ttft=1.5) == 0.5
    assert goodput([one, single], 2.0, tpot=1.0) == 0.5


def test_utilisation_is_a_fraction_of_the_peak():
    assert mbu(50e9, 2.0, 100e9) == 0.25
    assert mfu(1e12, 1.0, 4e12) == 0.25
    assert throughput(10, 2.0) == 5.0
    assert mbu(1, 0.0, 1) == mfu(1, 1, 0.0) == throughput(1, 0.0) == 0.0


def test_a_distribution_is_mean_and_percentiles():
    assert distribution([3.0, 1.0, 2.0]) == {
        "mean": 2.0,
        "p50": 2.0,
        "p90": pytest.approx(2.8),
        "p99": pytest.approx(2.98),
    }
    assert distribution([]) == {"mean": None, "p50": None, "p90": None, "p99": None}


def test_latencies_are_in_milliseconds_and_over_who_has_them():
    found = latencies_ms(iter([one, single, aborted]))
    assert list(found) == ["ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"]
    assert found["ttft_ms"]["mean"] == 1500.0  # of the two that got a token
    assert found["tpot_ms"] == {"mean": 2000.0, "p50": 2000.0, "p90": 2000.0, "p99": 2000.0}
    assert found["itl_ms"]["mean"] == 2000.0 and found["itl_ms"]["p90"] == pytest.approx(2800.0)
    assert found["e2e_ms"]["p50"] == 3500.0
    assert latencies_ms([aborted])["ttft_ms"]["mean"] is None
