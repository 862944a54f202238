"""Replays on a clock that the test sets, and the figures of throughput and latency on known token times."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pelton.backends.base import KVSpec, StepOutput, StepStats
from pelton.bench import latency, throughput
from pelton.bench.neighbours import Neighbours
from pelton.bench.replay import Replay, output_rate, replay
from pelton.bench.roofline import Peaks
from pelton.bench.throughput import Measured, Variant, run_rounds, summary
from pelton.bench.workloads import Workload, WorkloadRequest
from pelton.config import SamplingParams
from pelton.engine.engine import LLMEngine
from pelton.engine.stats import EngineStats, StepRecord
from pelton.errors import RequestError
from pelton.metrics import RequestMetrics
from tests.helpers.fake_executor import FakeExecutor

VOCABULARY = 50


class Clock:
    """Seconds that pass only in sleep and in steps."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


class TimedExecutor(FakeExecutor):
    """A step takes ``seconds`` and counts 10 bytes and 100 FLOPs a token."""

    def __init__(self, clock: Clock, seconds: float = 0.5, **options: Any) -> None:
        super().__init__(vocab_size=VOCABULARY, **options)
        self._clock = clock
        self._step_seconds = seconds

    def collect(self, ticket: int) -> StepOutput:
        batch = self._flying[0][1]
        self._clock.now += self._step_seconds
        self.stats = StepStats(self._step_seconds, 100.0 * batch.num_tokens, 10.0 * batch.num_tokens)
        return super().collect(ticket)


def engine_on(clock: Callable[[], float], executor: FakeExecutor | None = None, **limits: int) -> LLMEngine:
    options = {"max_num_seqs": 4, "max_num_batched_tokens": 64} | limits
    if executor is None:
        assert isinstance(clock, Clock)
        executor = TimedExecutor(clock)
    return LLMEngine(
        executor, **options, eos_token_ids=frozenset(), vocab_size=VOCABULARY, clock=clock
    )  # fmt: skip


def request(prompt_len: int, output_len: int, first: int = 1) -> WorkloadRequest:
    params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
    return WorkloadRequest(tuple((first + i) % VOCABULARY for i in range(prompt_len)), params)


def moment(time: float, num_running: int, num_waiting: int, kv_use: float) -> StepRecord:
    """A step that is over at ``time``, in a pool of 10 blocks."""
    counts = dict.fromkeys(("num_prefills", "num_decodes", "prefill_tokens", "decode_tokens", "output_tokens"), 0)
    return StepRecord(
        time=time, seconds=0.5, cached_tokens=0, num_preempted=0, num_running=num_running, num_waiting=num_waiting,
        num_used_blocks=round(10 * kv_use), num_blocks=10, flops=0.0, bytes=0.0, **counts,
    )  # fmt: skip


def metrics(arrival: float, *times: float, prompt: int = 10) -> RequestMetrics:
    return RequestMetrics(arrival, arrival, times, num_prompt_tokens=prompt)


# Replaying


def test_requests_that_come_at_once_run_together() -> None:
    clock = Clock()
    done = replay(engine_on(clock), [request(5, 3), request(6, 2)], [0.0, 0.0], clock=clock, sleep=clock.sleep)
    assert [r.token_times for r in done.requests] == [(100.5, 101.0, 101.5), (100.5, 101.0)]
    assert (done.start, done.seconds, done.idle_seconds, done.busy_seconds) == (100.0, 1.5, 0.0, 1.5)
    assert (done.prompt_tokens, done.output_tokens) == (11, 5)
    assert [len(ids) for ids in done.token_ids] == [3, 2]
    assert [m.time for m in done.steps] == [100.5, 101.0, 101.5]
    assert [m.num_running for m in done.steps] == [2, 1, 0]
    assert done.steps[0].kv_use > done.steps[1].kv_use > done.steps[2].kv_use == 0.0
    assert [(m.num_prefills, m.num_decodes) for m in done.steps] == [(2, 0), (0, 2), (0, 1)]
    # Of the two prompts, 1 to 5 and 1 to 6, the first block of four is computed once.
    assert [m.cached_tokens for m in done.steps] == [4, 0, 0]
    tokens = [(m.prefill_tokens, m.decode_tokens, m.output_tokens) for m in done.steps]
    assert tokens == [(7, 0, 2), (0, 2, 2), (0, 1, 1)]
    assert done.steps[0].mbu(1000.0) == done.steps[0].mfu(10_000.0) == 0.14
    assert not clock.slept


@pytest.mark.parametrize(("ahead", "token"), [(False, 101.5), (True, 102.0)])
def test_ttft_counts_from_when_a_request_was_due_not_from_when_the_engine_had_time(ahead: bool, token: float) -> None:
    clock = Clock()
    engine = engine_on(clock, async_scheduling=ahead)
    done = replay(engine, [request(5, 5), request(5, 1)], [0.0, 0.7], clock=clock, sleep=clock.sleep)
    late = done.requests[1]
    # Due during the second step, which ends at 1.0; the third is decided on by then if they are ahead.
    assert (late.arrival_time, late.token_times) == (pytest.approx(100.7), (token,))
    assert late.ttft == pytest.approx(token - 100.7) and late.queue_time == pytest.approx(token - 0.5 - 100.7)


def test_idle_time_is_waited_and_counted() -> None:
    clock = Clock()
    done = replay(engine_on(clock), [request(5, 1), request(5, 2)], [0.0, 3.0], clock=clock, sleep=clock.sleep)
    assert clock.slept == [pytest.approx(2.5)]
    assert (done.seconds, done.idle_seconds, done.busy_seconds) == (4.0, pytest.approx(2.5), pytest.approx(1.5))
    assert done.requests[1].ttft == pytest.approx(0.5)


def test_no_arrival_waits_for_an_earlier_request() -> None:
    """Open loop: 20 requests in a second, of which each takes ten."""
    clock = Clock()
    times = [i / 20 for i in range(20)]
    done = replay(engine_on(clock, max_num_seqs=1), [request(3, 20)] * 20, times, clock=clock, sleep=clock.sleep)
    assert [r.arrival_time - done.start for r in done.requests] == pytest.approx(times)
    assert max(m.num_waiting for m in done.steps) == 19


def test_progress_is_reported_after_each_step() -> None:
    clock, seen = Clock(), list[int]()
    replay(engine_on(clock), [request(5, 3), request(6, 2)], [0.0, 0.0], clock=clock, on_tokens=seen.append)
    assert seen == [2, 4, 5]


def test_preempted_requests_end_and_are_counted() -> None:
    clock = Clock()
    executor = TimedExecutor(clock, num_blocks=8, block_size=4)
    done = replay(engine_on(clock, executor), [request(12, 12), request(12, 12, 9)], [0.0, 0.0], clock=clock)
    row = summary(done, None, None)
    assert row["preemptions"] > 0 and row["output_tokens"] == 24 and row["kv_use_max"] == 1.0


def test_a_request_that_the_engine_refuses_is_an_error() -> None:
    clock = Clock()
    with pytest.raises(RequestError, match="the prompt has 500 tokens"):
        replay(engine_on(clock), [request(500, 1)], [0.0], clock=clock)


def test_the_rate_over_time_counts_every_token_once() -> None:
    done = Replay(10.0, (metrics(10.0, 11.0, 12.0, 14.0), metrics(10.0, 10.5)), ((1, 2, 3), (4,)), EngineStats())
    assert output_rate(done, 4) == [1.0, 1.0, 1.0, 1.0]
    assert output_rate(done, 2) == [1.0, 1.0]
    assert output_rate(done, 8) == [0.0, 2.0, 2.0, 0.0, 2.0, 0.0, 0.0, 2.0]
    for bins in (1, 3, 7, 60):
        assert math.fsum(output_rate(done, bins)) * 4.0 / bins == pytest.approx(4)


# The figures

PEAKS = Peaks({"read_bandwidth": 1000.0, "f32": 2000.0, "int8": 8000.0}, (0, 0, 0), threads=1)
STATS = EngineStats(
    steps=5, seconds=2.0, flops=4000.0, bytes=1200.0, decode_steps=3, decode_tokens=4, decode_seconds=1.0,
    decode_bytes=900.0, decode_flops=1000.0, preemptions=2, num_blocks=10,
)  # fmt: skip
DONE = Replay(
    0.0,
    (metrics(0.0, 1.0, 2.0, 4.0, prompt=30), metrics(1.0, 2.0, 3.0, prompt=10)),
    ((7, 8, 9), (7, 8)),
    STATS,
    (moment(1.0, 1, 1, 0.3), moment(2.0, 2, 0, 0.5), moment(4.0, 0, 0, 0.0)),
    idle_seconds=1.0,
)


def test_throughput_on_known_token_times() -> None:
    row = summary(DONE, PEAKS, "int8")
    assert row["seconds"] == 4.0 and row["output_tokens"] == 5 and row["prompt_tokens"] == 40
    assert row["output_tokens_per_s"] == 1.25
    assert row["prompt_tokens_per_s"] == 10.0
    assert row["total_tokens_per_s"] == 11.25
    assert row["requests_per_s"] == 0.5
    assert row["ttft_ms"] == {"mean": 1000.0, "p50": 1000.0, "p90": 1000.0, "p99": 1000.0}
    assert row["tpot_ms"]["mean"] == pytest.approx((1500 + 1000) / 2)
    assert row["itl_ms"]["mean"] == pytest.approx((1000 + 2000 + 1000) / 3)
    assert row["itl_ms"]["p50"] == 1000.0 and row["itl_ms"]["p90"] == pytest.approx(1800.0)
    assert row["e2e_ms"]["mean"] == 3000.0 and row["e2e_ms"]["p99"] == pytest.approx(3980.0)
    assert (row["preemptions"], row["kv_use_max"], row["running_mean"], row["running_max"]) == (2, 0.5, 1.0, 2)


def test_utilisation_is_of_busy_time_and_of_the_steps_that_decode() -> None:
    row = summary(DONE, PEAKS, "int8")
    assert row["mbu"] == pytest.approx(1200 / 3.0 / 1000)  # 4 s less 1 s of idling
    assert row["mfu"] == pytest.approx(4000 / 3.0 / 8000)
    assert row["mbu_decode"] == pytest.approx(900 / 1.0 / 1000)
    assert row["mfu_precision"] == "int8"
    assert summary(DONE, PEAKS, "bf16")["mfu"] == pytest.approx(4000 / 3.0 / 2000)  # no such instruction: f32
    unknown = summary(DONE, None, None)
    assert unknown["mbu"] is unknown["mfu"] is unknown["mbu_decode"] is None


def test_single_tokens_have_no_tpot() -> None:
    done = Replay(0.0, (metrics(0.0, 1.0),), ((1,),), EngineStats())
    row = summary(done, PEAKS, "f32")
    assert row["tpot_ms"] == row["itl_ms"] == {"mean": None, "p50": None, "p90": None, "p99": None}
    assert row["ttft_ms"] == row["e2e_ms"] == {"mean": 1e3, "p50": 1e3, "p90": 1e3, "p99": 1e3}
    assert row["mbu_decode"] is None


def test_the_digest_tells_other_tokens() -> None:
    same = Replay(5.0, DONE.requests, ((7, 8, 9), (7, 8)), EngineStats())
    other = Replay(0.0, DONE.requests, ((7, 8), (9, 7, 8)), STATS)
    assert throughput.output_digest(DONE) == throughput.output_digest(same) != throughput.output_digest(other)


def test_ratios_are_paired_by_round() -> None:
    # The machine gets slower from round to round; the ratio does not.
    assert throughput.paired_ratio([200.0, 100.0, 55.0], [100.0, 50.0, 25.0]) == 2.0
    assert throughput.paired_ratio([30.0], [10.0, 99.0]) == 3.0  # interrupted in the second round


def test_the_median_round_stands_for_all() -> None:
    def lasting(seconds: float) -> Replay:
        return Replay(0.0, (metrics(0.0, seconds),), ((1,),), STATS)

    one = Measured(Variant(1), [lasting(4.0), lasting(1.0), lasting(2.0)], [None, PEAKS, None], [0.1, 0.2, 0.3])
    assert one.rates == [0.25, 1.0, 0.5] and one.middle == 2
    base = Measured(Variant(1), [lasting(1.0), lasting(1.0), lasting(1.0)], [None] * 3, [None] * 3)
    row = throughput.row(one, base, "f32")
    assert row["output_tokens_per_s"] == 0.5 and row["ratio_to_first"] == 0.5 and row["peaks"] is None
    assert row["others_cores"] == 0.3
    assert row["rounds_output_tokens_per_s"] == [0.25, 1.0, 0.5]


class Engines:
    """Makes engines and a meter, and writes down the order of everything."""

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.made: list[LLMEngine] = []

    def new(self, variant: Variant) -> LLMEngine:
        self.log.append(variant.max_num_seqs)
        executor = FakeExecutor(vocab_size=VOCABULARY)
        self.made.append(engine_on(time.monotonic, executor, max_num_seqs=variant.max_num_seqs))
        return self.made[-1]

    def measure(self) -> None:
        self.log.append("peaks")

    def peaks(self) -> Peaks:
        return PEAKS


def workload(count: int = 6) -> Workload:
    return Workload(tuple(request(5, 4, i) for i in range(count)), {"dataset": "random"})


def test_rounds_are_interleaved_turned_around_and_each_has_a_new_engine() -> None:
    engines, measured = Engines(), [Measured(Variant(n)) for n in (1, 2, 4)]
    seen: list[tuple[int, int, int]] = []
    order = [
        m.variant.max_num_seqs
        for m in run_rounds(
            measured, engines.new, workload(), [0.0] * 6, rounds=2, meter=engines,
            on_tokens=lambda m, number, total: seen.append((m.variant.max_num_seqs, number, total)),
        )
    ]  # fmt: skip
    assert order == [1, 2, 4, 4, 2, 1]
    # Peaks are measured before and after every replay.
    assert engines.log == ["peaks", *(x for n in order for x in (n, "peaks"))]
    assert len({id(e) for e in engines.made}) == 6
    assert all(len(m.replays) == len(m.peaks) == len(m.others) == 2 for m in measured)
    assert all(replay.stats.output_tokens == 24 for m in measured for replay in m.replays)
    # Whatever runs together, the same requests get the same tokens.
    assert len({throughput.output_digest(r) for m in measured for r in m.replays}) == 1
    assert [total for n, number, total in seen if (n, number) == (1, 0)] == list(range(1, 25))


def test_complete_rounds_survive_an_interruption() -> None:
    engines, measured = Engines(), [Measured(Variant(1)), Measured(Variant(2))]
    rounds = run_rounds(measured, engines.new, workload(), [0.0] * 6, rounds=2, meter=None)
    for _ in range(3):
        next(rounds)
    rounds.close()  # type: ignore[attr-defined]
    assert [len(m.replays) for m in measured] == [1, 2]
    rows = [throughput.row(m, measured[0], None) for m in measured]
    assert rows[0]["ratio_to_first"] == 1.0
    first, second = (row["rounds_output_tokens_per_s"] for row in rows)
    assert rows[1]["ratio_to_first"] == second[0] / first[0]  # of the round that both have


def test_a_warm_up_is_short() -> None:
    executor = FakeExecutor(vocab_size=VOCABULARY)
    engine = engine_on(time.monotonic, executor)
    long = Workload(tuple(request(5, 40, i) for i in range(6)), {})
    throughput.warm_up(engine, long, 2)
    assert engine.stats().output_tokens == 16
    throughput.warm_up(engine, workload(1), 4)  # fewer requests than asked for, shorter than a warm-up
    assert engine.stats().output_tokens == 20


# Neighbours


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="only Linux tells")
def test_what_others_do_counts_and_what_this_process_does_not() -> None:
    def burn() -> float:
        end = time.monotonic() + 0.6
        while time.monotonic() < end:
            pass
        cores = neighbours.cores()
        assert cores is not None
        return cores

    neighbours = Neighbours()
    alone = burn()
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        neighbours = Neighbours()
        beside = burn()
        other.kill()
    # Whatever else runs here, a second process adds to it: at least half a core, as there may be one core only.
    assert beside > 0.4 and (alone < beside or alone > 0.5)


def test_systems_that_tell_nothing(tmp_path: Path) -> None:
    from pelton.bench.neighbours import _others_seconds, noticeable

    assert _others_seconds(tmp_path / "no such file") is None
    (tmp_path / "stat").write_text("cpu words\n")
    assert _others_seconds(tmp_path / "stat") is None
    assert not noticeable(None) and not noticeable(0.0) and noticeable(1000.0)


# Latency of a batch


def batch() -> Replay:
    """Two requests; the second one's prefill ends last, while the first already decodes."""
    requests = (metrics(10.0, 11.0, 12.0, 13.0, 14.0, prompt=50), metrics(10.0, 12.0, 13.0, 14.0, 15.0, prompt=50))
    return Replay(10.0, requests, ((1, 2, 3, 4), (1, 2, 3, 4)), STATS)


def test_prefill_ends_with_the_last_first_token() -> None:
    found = latency.phases(batch())
    assert (found.prefill_seconds, found.prompt_tokens) == (2.0, 100)
    assert (found.decode_seconds, found.decode_tokens) == (3.0, 5)  # 13, 14 of one and 13, 14, 15 of the other


def test_latency_on_known_token_times() -> None:
    row = latency.summary([batch(), batch()], PEAKS, "int8")
    assert row["ttft_ms"]["mean"] == 1500.0 and row["e2e_ms"]["p50"] == 4500.0
    assert row["tpot_ms"] == row["itl_ms"] == {"mean": 1e3, "p50": 1e3, "p90": 1e3, "p99": 1e3}
    assert row["output_tokens_per_s"] == pytest.approx(8 / 5)
    assert row["prefill_tokens_per_s"] == 50.0
    assert row["decode_tokens_per_s"] == pytest.approx(5 / 3)
    assert row["mbu_decode"] == pytest.approx(0.9)
    assert row["mfu_prefill"] == pytest.approx((4000 - 1000) / (2.0 - 1.0) / 8000)
    unknown = latency.summary([batch()], None, None)
    assert unknown["mbu_decode"] is unknown["mfu_prefill"] is unknown["peaks"] is None


def test_a_single_token_has_no_decode() -> None:
    done = Replay(0.0, (metrics(0.0, 1.0, prompt=8),), ((1,),), EngineStats(steps=1, seconds=1.0, flops=800.0))
    row = latency.summary([done], PEAKS, "int8")
    assert row["prefill_tokens_per_s"] == 8.0 and row["mfu_prefill"] == pytest.approx(0.1)
    assert row["decode_tokens_per_s"] is row["mbu_decode"] is None


def test_gaps_belong_to_positions() -> None:
    short = Replay(0.0, (metrics(0.0, 1.0, 5.0),), ((1, 2),), STATS)
    assert latency.gaps_by_position([batch(), short]) == [[1.0, 1.0, 4.0], [1.0, 1.0], [1.0, 1.0]]


def test_every_iteration_has_a_new_engine_and_the_same_answers() -> None:
    engines = Engines()
    runs = list(latency.run_iterations(lambda: engines.new(Variant(4)), workload(4), 3))
    assert len(runs) == len({id(e) for e in engines.made}) == 3
    assert all(run.stats.output_tokens == 16 for run in runs)
    assert len({throughput.output_digest(run) for run in runs}) == 1


@pytest.mark.parametrize(("blocks", "fits"), [(8, True), (7, False)])
def test_a_batch_must_fit_into_the_kv_cache(blocks: int, fits: bool) -> None:
    spec = KVSpec(blocks, 16, 1, 1000)
    if fits:
        latency.check_capacity(spec, 3, 32)
    else:
        with pytest.raises(RequestError, match="holds 112 tokens, 128 are needed; lower --batch-size"):
            latency.check_capacity(spec, 3, 32)


# Pictures


@pytest.fixture
def picture(tmp_path: Any) -> Iterator[Any]:
    pytest.importorskip("matplotlib")
    yield tmp_path / "picture.svg"


def test_pictures_name_what_they_show(picture: Any) -> None:
    from pelton.bench import plots

    def text() -> str:
        return str(picture.read_text())

    runs = [(Variant(4, "static"), DONE), (Variant(4, "inflight"), batch())]
    plots.over_time(runs, "a title", "a subtitle", str(picture))
    for part in ("a title", "a subtitle", "static", "inflight", "sequences running", "KV cache in use"):
        assert part in text()
        assert "MBU" not in text()
    plots.over_time(runs, "a title", "a subtitle", str(picture), [(1e3, 1e6), None])
    assert "MBU, static" in text() and "MFU, static" in text() and "MBU, inflight" not in text()
    rows = [(Variant(n, kind), summary(DONE, None, None)) for kind in ("static", "inflight") for n in (1, 64)]
    plots.curve(rows, "a curve", "", str(picture))
    for part in ("a curve", "static, p50", "inflight, p99", ">64<", "TPOT", "TTFT"):
        assert part in text()
    plots.latency([batch(), batch()], "of a batch", "", str(picture))
    for part in ("of a batch", "p10 to p90", "p99 1000.0 ms"):
        assert part in text()


def test_utilization_over_time_counts_every_step_once() -> None:
    from pelton.bench.plots import utilization_over_time

    clock = Clock()
    done = replay(engine_on(clock), [request(5, 3), request(6, 2)], [0.0, 0.0], clock=clock, sleep=clock.sleep)
    # Steps of 7, 2 and 1 tokens, half a second each, of 10 bytes and 100 FLOPs a token.
    assert utilization_over_time(done, 3, 1000.0, 10_000.0) == (
        pytest.approx([14.0, 4.0, 2.0]), pytest.approx([14.0, 4.0, 2.0])
    )  # fmt: skip
    assert utilization_over_time(done, 1, 1000.0, 5_000.0) == (
        pytest.approx([100 / 15]), pytest.approx([200 / 15])
    )  # fmt: skip


def test_pictures_of_single_tokens_and_of_engines_without_a_name(picture: Any) -> None:
    from pelton.bench import plots

    single = Replay(0.0, (metrics(0.0, 1.0),), ((1,),), STATS, (moment(1.0, 0, 0, 0.0),))
    plots.latency([single], "x", "", str(picture))
    plots.over_time([(Variant(4), single)], "x", "", str(picture))
    plots.curve(
        [(Variant(1), summary(single, None, None)), (Variant(2), summary(DONE, None, None))], "x", "", str(picture)
    )
    assert picture.stat().st_size > 1000
