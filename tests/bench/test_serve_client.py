"""The load client against a server whose delays and faults are known."""

from __future__ import annotations

import asyncio
import itertools
import math
import statistics
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import pytest

from pelton.bench.http_client import ExchangeError, HttpClient
from pelton.bench.load_client import Control, Record, Run, Sender, closed_loop, open_loop
from pelton.bench.openai_api import Api
from pelton.bench.server_metrics import ServerMetrics, parse
from pelton.bench.serving import Load, Measured, Prompts, prepare_requests, run_in_loop
from pelton.bench.serving_summary import in_flight, row, summary
from pelton.bench.slo import Slo
from pelton.bench.workloads import Arrivals, Workload, WorkloadRequest
from pelton.config import SamplingParams
from pelton.errors import PeltonError
from tests.helpers.scripted_server import Script, ScriptedServer

T = TypeVar("T")
#: Delays are never shorter than scripted but for the clock's grain; how much longer depends on a machine that is
#: shared, so that only medians are compared, and with room.
EARLY, LATE = 0.002, 0.030


def requests(count: int, max_tokens: int = 5) -> list[WorkloadRequest]:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return [WorkloadRequest((1, 2, 3), params) for _ in range(count)]


def with_sender(
    server: ScriptedServer, main: Callable[[Sender], Coroutine[Any, Any, T]], *, endpoint: str = "completions",
    timeout: float = 10.0, tokenizer: Any = None, api: Api | None = None,
) -> T:  # fmt: skip
    async def run() -> T:
        client = HttpClient(server.url)
        try:
            return await main(Sender(client, api or Api(endpoint, "scripted"), timeout, tokenizer))
        finally:
            client.close()

    return run_in_loop(run)


def send_one(server: ScriptedServer, max_tokens: int = 5, **options: Any) -> Record:
    return with_sender(server, lambda sender: sender.send(0, requests(1, max_tokens)[0]), **options)


def run_closed(server: ScriptedServer, asked: Sequence[WorkloadRequest], concurrency: int, **options: Any) -> Run:
    sender_options = {name: options.pop(name) for name in ("timeout", "endpoint", "tokenizer") if name in options}

    async def main(sender: Sender) -> Run:
        return await closed_loop(sender.send, asked, concurrency, control=options.pop("control", None) or Control(),
                                 **options)  # fmt: skip

    return with_sender(server, main, **sender_options)


def run_open(server: ScriptedServer, asked: Sequence[WorkloadRequest], times: Sequence[float], **options: Any) -> Run:
    sender_options = {name: options.pop(name) for name in ("timeout", "endpoint", "tokenizer") if name in options}

    async def main(sender: Sender) -> Run:
        return await open_loop(sender.send, asked, times, control=Control(), **options)

    return with_sender(server, main, **sender_options)


def median(values: Sequence[float | None]) -> float:
    return statistics.median(v for v in values if v is not None)


# Stamps


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_ttft_and_itl_are_the_scripted_delays(endpoint: str) -> None:
    with ScriptedServer(Script(ttft=0.080, itl=0.020)) as server:
        run = run_closed(server, requests(8, 6), 2, endpoint=endpoint)
    figures = summary(run, None)
    assert figures["num_ok"] == 8 and figures["output_tokens"] == 48 and figures["chunks"] == 48
    ttft, tpot, itl = (figures[name]["p50"] / 1e3 for name in ("ttft_ms", "tpot_ms", "itl_ms"))
    late = LATE + 4 * figures["client"]["loop_lag_ms"]["p99"] / 1e3  # on a machine that is overloaded
    assert 0.080 - EARLY <= ttft <= 0.080 + late
    assert 0.020 - EARLY <= tpot <= 0.020 + late
    assert 0.020 - EARLY <= itl <= 0.020 + late
    for record in run.records:
        m = record.metrics
        assert m.ttft is not None and m.e2e is not None and m.tpot is not None
        assert m.e2e == pytest.approx(m.ttft + 5 * m.tpot)
        assert m.e2e == pytest.approx(m.ttft + sum(record.chunk_gaps))


@pytest.mark.parametrize(
    "script",
    [
        Script(pieces=1), Script(pieces=7, newline="\r\n"), Script(newline="\r"), Script(comments=True),
        Script(done=False), Script(pieces=3, comments=True, done=False, newline="\r\n"),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_streams_in_any_shape_are_understood(script: Script, endpoint: str) -> None:
    with ScriptedServer(script) as server:
        record = send_one(server, endpoint=endpoint)
    assert (record.status, record.message) == ("ok", "")
    assert (record.output_tokens, len(record.chunk_times), record.counted_by) == (5, 5, "usage")
    assert (record.prompt_tokens, record.finish_reason) == (7, "length")


def test_a_chunk_of_several_tokens_is_one_gap() -> None:
    with ScriptedServer(Script(ttft=0.02, itl=0.030, per_chunk=3)) as server:
        record = send_one(server, 9)
    assert (record.output_tokens, len(record.chunk_times)) == (9, 3)
    assert len(record.chunk_gaps) == 2 and record.chunk_gaps[0] >= 0.030 - EARLY
    m = record.metrics
    assert m.num_output_tokens == 9 and m.tpot == pytest.approx(sum(record.chunk_gaps) / 8)


class Words:
    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(range(len(text.split())))


def test_without_usage_the_local_tokenizer_counts() -> None:
    with ScriptedServer(Script(usage="never", per_chunk=2)) as server:
        counted = send_one(server, 6, tokenizer=Words())
        guessed = send_one(server, 6)
    assert (counted.output_tokens, counted.counted_by, counted.prompt_tokens) == (6, "tokenizer", 3)
    assert (guessed.output_tokens, guessed.counted_by) == (3, "chunks")


def test_cached_tokens_are_the_servers() -> None:
    with ScriptedServer(Script(cached_tokens=4)) as server:
        assert send_one(server).cached_tokens == 4
    with ScriptedServer() as server:
        assert send_one(server).cached_tokens is None


# Every request is accounted for


@pytest.mark.parametrize(
    ("fault", "status", "said"),
    [
        ("http:429", "http", "429: as the script says"), ("http:500", "http", "500: as the script says"),
        ("cut", "cut", "closed the connection"), ("error", "error", "the engine died"),
        ("empty", "empty", "without a token (finish_reason length)"), ("hang", "timeout", "no end within"),
        ("json", "error", "no event stream but 'application/json'"),
    ],
)  # fmt: skip
def test_each_fault_has_its_name(fault: str, status: str, said: str) -> None:
    with ScriptedServer(lambda number, _: Script(fault=fault if number == 1 else "")) as server:
        run = run_closed(server, requests(3), 1, timeout=0.5)
    assert [r.status for r in run.records] == ["ok", status, "ok"]
    assert said in run.records[1].message
    figures = summary(run, Slo(ttft=100.0))
    assert figures["failed"] == {status: 1} and figures["num_ok"] == 2 and figures["output_tokens"] == 10
    assert figures["goodput"]["met"] == 2 and figures["goodput"]["judged"] == 3
    assert figures["errors"] == [{"message": f"{status}: {run.records[1].message}", "count": 1}]


def test_a_cut_stream_keeps_what_came_and_is_no_answer() -> None:
    with ScriptedServer(Script(fault="cut", ttft=0.01)) as server:
        record = send_one(server, 10)
    assert record.status == "cut" and len(record.chunk_times) == 5


def test_nothing_listens() -> None:
    with ScriptedServer() as server:
        pass
    record = send_one(server)
    assert record.status == "connect" and record.message and record.end >= record.sent > 0


def test_a_server_that_dies_ends_the_run_and_keeps_the_results() -> None:
    with ScriptedServer(Script(itl=0.01)) as server:

        def die(record: Record) -> None:
            done.append(record)
            if len(done) == 10:
                asyncio.get_running_loop().run_in_executor(None, server.stop)

        done: list[Record] = []
        run = run_closed(server, requests(300), 2, on_record=die)
    assert run.stopped is not None and "the server is gone" in run.stopped
    assert len(run.ok) >= 10 and len(run.records) < 60
    assert sum(summary(run, None)["failed"].values()) == len(run.records) - len(run.ok) >= 10


def test_a_stop_keeps_what_is_done_and_marks_what_is_not() -> None:
    async def main(sender: Sender) -> Run:
        control = Control()
        asyncio.get_running_loop().call_later(0.3, control.stop, "Ctrl-C")
        return await open_loop(sender.send, requests(40), [i * 0.02 for i in range(40)], control=control)

    with ScriptedServer(lambda number, _: Script(fault="hang" if number % 2 else "")) as server:
        run = with_sender(server, main)
        time.sleep(0.05)
    statuses = {r.status for r in run.records}
    assert statuses == {"ok", "cancelled"} and run.stopped == "Ctrl-C" and len(run.records) < 40
    figures = summary(run, Slo(ttft=100.0))
    assert not figures["complete"] and figures["goodput"]["judged"] == figures["num_ok"]


def test_connections_are_used_again_and_a_closed_one_is_no_failure() -> None:
    with ScriptedServer() as server:
        run_closed(server, requests(12), 3)
        assert server.connections == 3
    with ScriptedServer(keep_alive=False) as server:
        run = run_closed(server, requests(12), 3)
        assert len(run.ok) == 12 and server.connections >= 12


def test_a_body_without_length_ends_with_the_connection() -> None:
    async def main() -> tuple[int, bytes]:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\nold")
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        client = HttpClient(f"http://localhost:{server.sockets[0].getsockname()[1]}/v1")
        try:
            return await client.get("/x")
        finally:
            client.close()
            server.close()

    assert run_in_loop(main) == (200, b"old")


def test_a_server_of_another_protocol_is_an_error() -> None:
    async def main() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"SSH-2.0-OpenSSH_9.9\r\n")
            await writer.drain()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        client = HttpClient(f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
        try:
            await client.get("/x", timeout=2.0)
        finally:
            client.close()
            server.close()

    with pytest.raises(ExchangeError) as raised:
        run_in_loop(main)
    assert raised.value.kind == "cut"


@pytest.mark.parametrize(
    "url", ["", "ftp://x", "http://", "http://h:port", "http://a b", "http://h:99999", "http://[::1"]
)
def test_urls_are_checked(url: str) -> None:
    with pytest.raises(PeltonError, match="--base-url is"):
        HttpClient(url)


# Loops


def test_arrivals_are_a_poisson_process_and_requests_are_sent_when_due() -> None:
    times = Arrivals(rate=200.0, seed=3).times(400)
    with ScriptedServer() as server:
        run = run_open(server, requests(400, 1), times)
    sent = [r.sent for r in run.records]
    gaps = [b - a for a, b in itertools.pairwise(sent)]
    # Of 399 gaps of an exponential distribution with mean 1 / 200: standard error of the mean is 5 %, that of the
    # coefficient of variation about 5 %, too.
    assert statistics.fmean(gaps) == pytest.approx(1 / 200, rel=0.2)
    assert statistics.stdev(gaps) / statistics.fmean(gaps) == pytest.approx(1.0, abs=0.25)
    assert [r.due - run.start for r in run.records if r.due is not None] == pytest.approx(times)
    assert all(r.due is not None and r.sent >= r.due for r in run.records)
    lag = summary(run, None)["client"]["lag_ms"]
    assert 0 <= lag["p50"] < 20 and lag["max"] == pytest.approx(1e3 * max(run.lags))
    assert len(server.seen) == 400


@pytest.mark.parametrize("concurrency", [1, 3, 8])
def test_a_closed_loop_never_has_more_on_their_way(concurrency: int) -> None:
    with ScriptedServer(lambda number, _: Script(ttft=0.002 * (number % 5))) as server:
        run = run_closed(server, requests(40, 2), concurrency)
    assert server.max_in_flight == concurrency == summary(run, None)["in_flight"]["max"]
    assert len(run.ok) == 40 and sorted(r.index for r in run.records) == list(range(40))
    assert all(r.due is None for r in run.records)


def test_an_open_loop_does_not_wait_for_a_server_that_stalls() -> None:
    times = [0.01 * i for i in range(50)]
    with ScriptedServer(Script(ttft=1.0)) as server:
        run = run_open(server, requests(50, 1), times)
    # All were sent within the first half second, long before the first was answered.
    assert server.max_in_flight == 50 and max(r.sent for r in run.records) < min(r.chunk_times[0] for r in run.records)
    assert median(run.lags) < 0.02
    assert len(run.ok) == 50


def test_nothing_is_sent_after_the_duration() -> None:
    with ScriptedServer(Script(ttft=0.05)) as server:
        limited = run_open(server, requests(50, 1), [0.02 * i for i in range(50)], duration=0.3)
        repeated = run_closed(server, requests(3, 1), 2, duration=0.4)
    assert len(limited.records) == 16 and all(r.is_ok for r in limited.records)
    assert max(r.sent for r in repeated.records) - repeated.start < 0.45
    assert len(repeated.records) > 3 and {r.index for r in repeated.records} == {0, 1, 2}


def test_a_mistake_of_the_client_is_not_swallowed() -> None:
    def broken(record: Record) -> None:
        raise ZeroDivisionError

    with ScriptedServer() as server:
        for run in (lambda: run_closed(server, requests(3), 1, on_record=broken),
                    lambda: run_open(server, requests(3), [0.0] * 3, on_record=broken)):  # fmt: skip
            with pytest.raises(ZeroDivisionError):
                run()


# Figures of known stamps


def record(sent: float, *chunks: float, tokens: int | None = None, **more: Any) -> Record:
    count = len(chunks) if tokens is None else tokens
    fields = {"status": "ok", "prompt_tokens": 10, "counted_by": "usage", "max_tokens": count, "due": None, **more}
    return Record(index=0, sent=sent, end=chunks[-1] if chunks else sent + 1, chunk_times=list(chunks),
                  output_tokens=count, connected=sent, **fields)  # fmt: skip


KNOWN = Run(
    10.0, [record(10.0, 11.0, 12.0, 14.0), record(11.0, 11.5, 12.5, tokens=5)], wall_seconds=4.0, cpu_seconds=1.0
)


def test_throughput_and_latencies_of_known_stamps() -> None:
    figures = summary(KNOWN, None)
    assert figures["seconds"] == 4.0 and figures["output_tokens"] == 8 and figures["prompt_tokens"] == 20
    assert (figures["requests_per_s"], figures["output_tokens_per_s"], figures["total_tokens_per_s"]) == (0.5, 2.0, 7.0)
    assert figures["ttft_ms"]["mean"] == 750.0 and set(figures["ttft_ms"]) == {"mean", "p50", "p90", "p95", "p99"}
    assert figures["tpot_ms"]["mean"] == pytest.approx((1500 + 1000 / 4) / 2)
    assert figures["itl_ms"]["mean"] == pytest.approx((1000 + 2000 + 1000) / 3)
    assert figures["e2e_ms"]["p99"] == pytest.approx(1500 + 0.99 * 2500)
    assert figures["in_flight"] == {"max": 2, "mean": 5.5 / 4}
    assert figures["client"]["cpu_share"] == 0.25 and not figures["client"]["is_bottleneck"]
    assert figures["goodput"] is None


@pytest.mark.parametrize(
    ("slo", "met"),
    [
        (Slo(ttft=1.0), 2), (Slo(ttft=0.75), 1), (Slo(tpot=0.3), 1), (Slo(tpot=1.5, ttft=0.6), 1),
        (Slo(e2e=3.9, tpot=0.2), 0), (Slo(e2e=4.0), 2),
    ],
)  # fmt: skip
def test_goodput_counts_requests_that_meet_every_limit(slo: Slo, met: int) -> None:
    failed = record(11.0, status="timeout", message="late")
    run = replace(KNOWN, records=[*KNOWN.records, failed])
    good = summary(run, slo)["goodput"]
    assert (good["met"], good["judged"], good["attainment"]) == (met, 3, met / 3)
    assert good["requests_per_s"] == met / 4.0 and good["passes"] == (met >= 2.7)


def test_the_client_says_when_it_was_the_bottleneck() -> None:
    late = replace(KNOWN, records=[record(10.2, 11.0, due=10.0)], loop_lags=[0.0, 0.5], cpu_seconds=3.9)
    client = summary(late, None)["client"]
    assert client["is_bottleneck"] and len(client["bottleneck"]) == 3
    assert client["lag_ms"]["max"] == pytest.approx(200.0)


def test_requests_are_written_with_times_after_the_start() -> None:
    done = row(Measured(Load(Arrivals(4.0)), KNOWN, None), None)
    assert done["load"] == {"kind": "open", "request_rate": 4.0, "burstiness": 1.0, "duration": None}
    assert done["requests"][1]["chunk_times"] == [1.5, 2.5] and done["requests"][1]["sent"] == 1.0
    assert Load(Arrivals()).row()["request_rate"] is None and Load(concurrency=3).label == "3 at a time"


def test_the_digest_of_a_workload_is_of_what_is_asked() -> None:
    def digest(ids: tuple[int, ...], dataset: str = "prompts", ignore_eos: bool | None = None, **params: Any) -> str:
        request = WorkloadRequest(ids, SamplingParams(**{"max_tokens": 4, **params}))
        prepared = prepare_requests(Workload((request,), {"dataset": dataset}), ignore_eos)
        return str(prepared.settings["sha256"])

    assert digest((1, 2)) == digest((1, 2)) == digest((1, 2), ignore_eos=False)
    others = [digest((1, 3)), digest((1, 2), max_tokens=5), digest((1, 2), ignore_eos=True)]
    assert len({digest((1, 2)), *others}) == 4
    assert digest((1, 2), "random") == digest((3, 4), "random") != digest((1, 2, 3), "random")


def test_only_the_prompts_that_are_asked_for_are_made() -> None:
    made: list[Any] = []

    class Letters(Words):
        vocab_size, special_token_ids = 9, frozenset[int]()

        def encode_chat(self, messages: Any, *, tools: Any = None) -> list[int]:
            raise NotImplementedError

        def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
            made.append(ids)
            return "a " * len(ids)

    prompts = Prompts(Workload(tuple(requests(5)), {"dataset": "random"}), Letters(), range(9))
    assert len(prompts.of_run(1, Api("chat", "m"), 1)) == len(made) == 1
    assert len(prompts.of_run(1, Api("chat", "m"))) == 5


def test_in_flight_of_nothing() -> None:
    assert in_flight(Run(0.0)) == {"max": 0, "mean": 0.0}
    assert math.isfinite(summary(Run(0.0), Slo(ttft=1.0))["seconds"])


# The server's own figures

METRICS = """# HELP vllm:x text with {{braces}}
# TYPE vllm:prefix_cache_hits_total counter
vllm:prefix_cache_queries_total{{engine="0",model_name="a b\\"}}"}} {queries}
vllm:prefix_cache_hits_total{{engine="0"}} {hits}
vllm:num_preemptions_total{{engine="0"}} 1.0
vllm:num_preemptions_total{{engine="1"}} 2.0
vllm:kv_cache_usage_perc{{engine="0"}} {use} 1395066363000
vllm:energy_joules_total{{engine="0"}} {queries}
vllm:energy_joules_total{{engine="1"}} {queries}
vllm:time_to_first_token_seconds_sum 1.5
vllm:time_to_first_token_seconds_count {hits}
python_gc_objects_collected_total 9
vllm:num_requests_running NaN
"""


@pytest.mark.parametrize(("uses", "most", "mean"), [((0.5, 0.25), 0.5, 0.375), ((0.9, 0.5, 0.25, 0.0), 0.5, 0.375)])
def test_metrics_are_differences_and_extremes(uses: tuple[float, ...], most: float, mean: float) -> None:
    """Gauges are those during the run, if there was a look then. Energy is of the machine, whoever exports it."""
    last = len(uses) - 1
    pages = iter([METRICS.format(queries=100 + 200 * (i == last), hits=10 + 100 * (i == last), use=use)
                  for i, use in enumerate(uses)])  # fmt: skip

    async def main() -> dict[str, Any] | None:
        async with ServerMetrics(HttpClient(server.url)) as metrics:
            for _ in uses[1:-1]:
                await metrics._look()
        return metrics.row()

    with ScriptedServer(metrics=lambda: next(pages)) as server:
        got = run_in_loop(main)
    assert got == {
        "prefix_cache_queries": 200.0, "prefix_cache_hits": 100.0, "preemptions": 0.0, "joules": 200.0,
        "kv_use_max": most, "kv_use_mean": mean, "ttft_ms_mean": 0.0, "prefix_hit_rate": 0.5,
    }  # fmt: skip


def test_no_metrics_are_no_failure() -> None:
    async def main() -> dict[str, Any] | None:
        async with ServerMetrics(HttpClient(server.url)) as metrics:
            pass
        return metrics.row()

    with ScriptedServer() as server:
        assert run_in_loop(main) is None
    assert run_in_loop(main) is None  # nothing listens
    assert parse("pelton_kv_cache_usage_perc 0.5\nother:x 3\nnonsense") == {"kv_cache_usage_perc": [0.5]}
