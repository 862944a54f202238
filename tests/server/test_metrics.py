"""What operators see: Prometheus metrics that add up, energy, and the events of the dashboard."""

from __future__ import annotations

import json
import re
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pelton import EngineConfig
from pelton.metrics import RequestMetrics, meets
from pelton.server.config import SLO
from pelton.server.energy import EnergyMeter
from tests.helpers.fake_engine import PacedExecutor
from tests.helpers.fake_parts import FakeBuilt
from tests.helpers.http_stream import Stream, until
from tests.helpers.serving import Running, serving

DEPLOY = Path(__file__).parents[2] / "deploy"
#: https://docs.vllm.ai/en/latest/usage/metrics.html
VLLM = (
    "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_queries_total",
    "prefix_cache_hits_total", "num_preemptions_total", "prompt_tokens_total", "generation_tokens_total",
    "request_success_total", "time_to_first_token_seconds_bucket", "inter_token_latency_seconds_bucket",
    "request_time_per_output_token_seconds_bucket", "e2e_request_latency_seconds_bucket",
    "request_queue_time_seconds_bucket", "request_prefill_time_seconds_bucket", "request_decode_time_seconds_bucket",
    "request_prompt_tokens_bucket", "request_generation_tokens_bucket", "request_params_max_tokens_bucket",
    "cache_config_info",
)  # fmt: skip


class Built(FakeBuilt):
    """An engine on a machine whose peaks are known; a step of 5 ms moves 1e8 bytes and takes 1e9 FLOPs."""

    def __init__(self) -> None:
        super().__init__(peak_bandwidth=1e11)
        self.executor: Any = PacedExecutor(0.005)

    def peak_flops(self) -> float | None:
        return 1e12


class Zones:
    """A powercap tree: two packages, a part of one, and the platform that all of them are in."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for zone, name in (("intel-rapl:0", "package-0"), ("intel-rapl:1", "package-1"), ("intel-rapl:0:0", "core"),
                           ("intel-rapl:2", "psys")):  # fmt: skip
            (root / zone).mkdir()
            (root / zone / "name").write_text(name + "\n")
            (root / zone / "max_energy_range_uj").write_text("10000000\n")
            self.set(zone, 9_000_000)

    def set(self, zone: str, microjoules: int) -> None:
        (self.root / zone / "energy_uj").write_text(f"{microjoules}\n")


@pytest.fixture(scope="module")
def zones(tmp_path_factory: pytest.TempPathFactory) -> Zones:
    return Zones(tmp_path_factory.mktemp("powercap"))


@pytest.fixture(scope="module")
def server(zones: Zones) -> Iterator[Running]:
    config = EngineConfig(max_num_seqs=4)
    slo = SLO(ttft=5.0, e2e=0.2)
    with serving(Built(), engine=config, max_queue=0, max_unfinished=4, slo=slo, max_body_bytes=2048) as running:
        running.engine._energy = EnergyMeter(zones.root)
        yield running


def samples(server: Running) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """By name, then by labels."""
    reply = server.ask("/metrics")
    assert reply.status == 200 and reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(reply.body.decode()):
        assert family.documentation, family.name
        for sample in family.samples:
            key = tuple(sorted(sample.labels.items()))
            assert key not in found.setdefault(sample.name, {}), "twice"
            found[sample.name][key] = sample.value
    return found


def total(found: dict[str, Any], name: str, **labels: str) -> float:
    wanted = set(labels.items())
    return sum(value for key, value in found.get(f"pelton:{name}", {}).items() if wanted <= set(key))


def quiet(server: Running) -> dict[str, Any]:
    """The metrics once nothing runs and the engine has said so."""
    until(lambda: not server.engine.engine.num_unfinished and not server.gate.num_active)
    steps = server.engine.engine.stats().steps
    return until(
        lambda: (f := samples(server)) and total(f, "engine_steps_total") == steps
        and not total(f, "num_requests_running") and f
    )  # fmt: skip


def test_metrics_add_up(server: Running, zones: Zones) -> None:
    before = quiet(server)
    # What is asked: (prompt tokens, output tokens, streamed).
    asked = [(3, 1, True), (5, 10, False), (7, 20, True), (70, 60, False)]
    for prompt, output, stream in asked:
        body = {"prompt": "a" * prompt, "max_tokens": output, "stream": stream}
        assert server.ask("/v1/completions", body).status == 200
    chat = {"messages": [{"role": "user", "content": "abcd"}], "max_tokens": 4}
    assert server.ask("/v1/chat/completions", chat).status == 200
    asked.append((6, 4, False))
    full = [Stream(server, {"prompt": "bc", "max_tokens": 4000, "stream": True}) for _ in range(4)]
    until(lambda: server.engine.engine.num_unfinished == 4)
    until(lambda: total(samples(server), "num_requests_running") == 4)
    busy = samples(server)
    assert total(busy, "kv_cache_usage_perc") > 0 and total(busy, "api_active_requests") == 4
    assert server.ask("/v1/completions", {"prompt": "d"}).status == 429
    zones.set("intel-rapl:0", 9_500_000)
    until(lambda: total(samples(server), "energy_joules_total") == 0.5)
    until(lambda: total(samples(server), "joules_per_token") > 0)
    for stream in full:
        stream.leave()
    assert server.ask("/v1/completions", {"prompt": "d", "timeout": 0.02, "max_tokens": 400}).status == 504
    assert server.ask("/v1/completions", {"prompt": "d" * 3000}).status == 413
    for stream in (True, False):
        assert server.ask("/v1/completions", {"prompt": [10**6], "stream": stream}).status == 400
    after = quiet(server)

    def gained(name: str, **labels: str) -> float:
        return total(after, name, **labels) - total(before, name, **labels)

    assert gained("request_success_total", finished_reason="length") == gained("request_success_total") == len(asked)
    assert gained("request_failures_total", reason="abort") == 4
    assert gained("request_failures_total", reason="error") == 1  # the deadline
    assert gained("requests_rejected_total", reason="queue_full") == 1
    assert gained("requests_rejected_total", reason="invalid") == 2, "streamed or not"
    once = ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds",
            "request_prefill_time_seconds", "request_decode_time_seconds", "request_generation_tokens")  # fmt: skip
    for name in once:
        assert gained(f"{name}_count") == len(asked), name
    assert gained("request_time_per_output_token_seconds_count") == sum(output > 1 for _, output, _ in asked)
    assert gained("inter_token_latency_seconds_count") == sum(output - 1 for _, output, _ in asked)
    assert gained("request_generation_tokens_sum") == sum(output for _, output, _ in asked)
    begun = len(asked) + 5 + 2
    assert gained("request_prompt_tokens_count") == gained("request_params_max_tokens_count") == begun
    assert gained("request_prompt_tokens_sum") == sum(prompt for prompt, _, _ in asked) + 4 * 2 + 1 + 2
    # Of the engine: what was asked, and what those had got who left.
    assert gained("generation_tokens_total") >= sum(output for _, output, _ in asked) + 4
    assert gained("prompt_tokens_total") >= sum(prompt for prompt, _, _ in asked) + 4 * 2
    # A gap is a step of 5 ms or more; the answer of 60 tokens was no good one.
    gaps = total(after, "inter_token_latency_seconds_sum") / total(after, "inter_token_latency_seconds_count")
    assert 0.004 < gaps < 0.1
    ttft, itl, e2e = (gained(f"{name}_seconds_sum") for name in (
        "time_to_first_token", "inter_token_latency", "e2e_request_latency"))  # fmt: skip
    assert abs(ttft + itl - e2e) < 1e-6
    assert gained("slo_requests_total", met="false") >= 1
    assert gained("slo_requests_total", met="true") + gained("slo_requests_total", met="false") == len(asked)
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "api_active_requests",
                 "engine_stalled_seconds"):  # fmt: skip
        assert total(after, name) == 0, name
    for name in after:
        if name.endswith("_bucket"):
            whole = total(after, name.removeprefix("pelton:"), le="+Inf")
            assert whole == sum(after[name.replace("_bucket", "_count")].values()), name


def test_utilisation_is_of_the_measured_peaks(server: Running) -> None:
    server.ask("/v1/completions", {"prompt": "ab", "max_tokens": 50})
    found = quiet(server)
    assert total(found, "peak_bandwidth_bytes_per_second") == 1e11
    assert total(found, "peak_flops_per_second") == 1e12
    assert total(found, "mbu_perc") == pytest.approx(1e8 / 0.005 / 1e11)
    assert total(found, "mfu_perc") == pytest.approx(1e9 / 0.005 / 1e12)
    assert 0 < total(found, "engine_busy_perc") <= 1


def test_names_are_those_of_vllm_and_those_that_are_deployed(server: Running) -> None:
    """After the test above there is something of every kind."""
    found = quiet(server)
    for name in VLLM:
        assert f"pelton:{name}" in found, name
    for file in ("grafana/pelton.json", "prometheus/alerts.yaml", "kubernetes/autoscaler.yaml"):
        text = (DEPLOY / file).read_text()
        names = set(re.findall(r"pelton:[a-z0-9_]+", text))
        assert names and names <= set(found), (file, names - set(found))
    json.loads((DEPLOY / "grafana/pelton.json").read_text())


def test_there_is_no_utilisation_without_peaks() -> None:
    with serving() as server:
        server.ask("/v1/completions", {"prompt": "ab"})
        found = quiet(server)
        for name in ("mbu_perc", "mfu_perc", "peak_bandwidth_bytes_per_second", "peak_flops_per_second"):
            assert not found.get(f"pelton:{name}"), name
        assert not found.get("pelton:slo_requests_total"), "there are no objectives"


def test_what_counts_as_good() -> None:
    metrics = RequestMetrics(10.0, 10.1, (10.2, 10.3, 10.4))
    assert meets(metrics) and meets(metrics, **SLO(ttft=0.21, tpot=0.11, e2e=0.41).limits)
    assert (
        not meets(metrics, **SLO(ttft=0.19).limits)
        and not meets(metrics, **SLO(tpot=0.09).limits)
        and not meets(metrics, **SLO(e2e=0.3).limits)
    )
    one = RequestMetrics(10.0, 10.1, (10.2,))
    assert meets(one, **SLO(tpot=0.001).limits) and not meets(one, **SLO(ttft=0.1).limits)


# Energy.


def test_energy_is_that_of_the_packages_and_counters_start_again(tmp_path: Path) -> None:
    zones = Zones(tmp_path)
    meter = EnergyMeter(tmp_path)
    assert meter.joules() == 0.0
    zones.set("intel-rapl:0", 9_250_000)
    zones.set("intel-rapl:0:0", 9_900_000)  # in package 0
    zones.set("intel-rapl:2", 9_900_000)  # all of it
    assert meter.joules() == pytest.approx(0.25)
    zones.set("intel-rapl:1", 500_000)  # past its end
    assert meter.joules() == pytest.approx(0.25 + 1.5)
    assert meter.joules() == pytest.approx(1.75)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("?")
    assert meter.joules() is None


def test_a_machine_that_does_not_tell(tmp_path: Path) -> None:
    assert EnergyMeter(tmp_path).joules() is None
    assert EnergyMeter(tmp_path / "nowhere").joules() is None


# The dashboard. Its contract: what each message has, and of which type.

NUMBER = (int, float)
CONTRACT: dict[str, Any] = {
    "time": NUMBER, "model": str, "version": str, "uptime_s": NUMBER, "replicas": list,
    "prompt_tokens_per_s": NUMBER, "output_tokens_per_s": NUMBER, "requests_per_s": NUMBER, "running": int,
    "waiting": int, "max_num_seqs": int, "kv_use": NUMBER, "prefix_hit_rate": (*NUMBER, type(None)),
    "preemptions": int, "mbu": (*NUMBER, type(None)), "mfu": (*NUMBER, type(None)),
    "peak_bandwidth": (*NUMBER, type(None)), "peak_flops": (*NUMBER, type(None)), "busy": NUMBER,
    "joules_per_token": (*NUMBER, type(None)), "latency": dict, "finished": dict, "rejected": int,
    "goodput": (dict, type(None)), "steps": list, "requests": list, "kv_map": list, "ops": (list, type(None)),
}  # fmt: skip
STEP = {"t", "s", "prefill", "decode"}
REQUEST = {"id", "replica", "arrived", "scheduled", "first_token", "finished", "reason", "prompt_tokens",
           "cached_tokens", "output_tokens"}  # fmt: skip
KV_MAP = {"replica", "num_blocks", "block_size", "blocks_per_cell", "cells"}


def check(message: dict[str, Any]) -> None:
    assert set(message) == set(CONTRACT)
    for name, kind in CONTRACT.items():
        assert isinstance(message[name], kind), (name, message[name])
    assert abs(message["time"] - time.time()) < 30
    for name in ("kv_use", "prefix_hit_rate", "busy"):
        assert message[name] is None or 0 <= message[name] <= 1
    assert set(message["latency"]) == {"ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"}
    for part in message["latency"].values():
        assert part is None or part["p50"] <= part["p90"] <= part["p99"]
    for step in message["steps"]:
        assert set(step) == STEP and abs(step["t"] - message["time"]) < 30
    for request in message["requests"]:
        assert set(request) == REQUEST
        stamps = [request[k] for k in ("arrived", "scheduled", "first_token", "finished") if request[k] is not None]
        assert stamps == sorted(stamps) and all(abs(s - message["time"]) < 60 for s in stamps)
        assert (request["finished"] is None) == (request["reason"] is None)
    for kv in message["kv_map"]:
        assert set(kv) == KV_MAP and set(kv["cells"]) <= set("0123")
        assert (len(kv["cells"]) - 1) * kv["blocks_per_cell"] < kv["num_blocks"]
        assert len(kv["cells"]) * kv["blocks_per_cell"] >= kv["num_blocks"]


class Viewer:
    """Somebody who looks at the dashboard."""

    def __init__(self, server: Running) -> None:
        self.stream = Stream(server, b"", method="GET", path="/dashboard/events", headers={"Content-Length": ""})
        self.events = self.stream.events()
        self.messages = [self.next()]

    def next(self) -> Any:
        message = next(self.events)
        check(message)
        return message

    def until(self, condition: Any) -> Any:
        """The first message that is as wanted."""
        for _ in range(20):
            self.messages.append(self.next())
            if condition(self.messages[-1]):
                return self.messages[-1]
        raise AssertionError(self.messages[-1])

    def told(self, name: str) -> list[Any]:
        return [item for message in self.messages for item in message[name]]


def open_ids(message: dict[str, Any]) -> set[str]:
    return {request["id"] for request in message["requests"] if request["finished"] is None}


def watched(server: Running) -> bool:
    return any(connection.watching for connection in server.engine._connections.values())


def test_the_dashboard(monkeypatch: pytest.MonkeyPatch) -> None:
    built = Built()
    # Two run and one waits.
    with serving(built, engine=EngineConfig(max_num_seqs=2), slo=SLO(ttft=60.0)) as server:
        engine = server.engine.engine
        server.engine._finished = deque(maxlen=1)  # more may finish while nobody looks than is kept
        for _ in range(3):
            assert server.ask("/v1/completions", {"prompt": "ab", "max_tokens": 1}).status == 200
        until(lambda: not engine.num_unfinished)
        server.engine._finished = deque(server.engine._finished, maxlen=100)
        assert not watched(server)
        first = Viewer(server)
        until(lambda: watched(server))
        assert first.until(lambda m: len(first.told("requests")) == 1)["requests_per_s"] == 0, "it was before"
        first.messages.clear()
        seen, start = engine.stats().steps, time.time()
        streams = [Stream(server, {"prompt": "abcd" * 20, "max_tokens": 4000, "stream": True}) for _ in range(3)]
        busy = first.until(lambda m: len(open_ids(m)) == 3 and m["running"] == 2)
        assert busy["waiting"] == 1 and busy["max_num_seqs"] == 2 and busy["kv_use"] > 0
        waiting = [r for r in busy["requests"] if r["scheduled"] is None]
        assert len(waiting) == 1 and waiting[0]["output_tokens"] == 0 and waiting[0]["prompt_tokens"] == 80
        assert set(busy["kv_map"][0]["cells"]) - {"0"}
        again = first.until(lambda m: True)
        assert open_ids(again) == open_ids(busy), "all that are unfinished, each time"
        assert again["output_tokens_per_s"] > 0 and 0 < again["busy"] <= 1 and again["mbu"] > 0
        assert again["latency"]["itl_ms"]["p50"] >= 4
        assert again["output_tokens_per_s"] == pytest.approx(2 / 0.005, rel=0.5), "two tokens a step of 5 ms"
        second = Viewer(server)
        assert open_ids(second.until(lambda m: m["requests"])) == open_ids(busy)
        for stream in streams:
            stream.leave()
        assert server.ask("/v1/completions", {"prompt": "ab", "max_tokens": 3}).status == 200
        ended = first.until(lambda m: not open_ids(m) and m["finished"].get("length") == 4)
        assert ended["finished"] == {"abort": 3, "length": 4} and ended["running"] == ended["waiting"] == 0
        assert ended["goodput"] == {"slo": {"ttft_ms": 60_000.0, "tpot_ms": None, "e2e_ms": None}, "fraction": 1.0}
        first.until(lambda m: True)
        finished = [r for r in first.told("requests") if r["finished"] is not None]
        assert sorted(r["reason"] for r in finished) == ["abort", "abort", "abort", "length"], "each of them once"
        second.until(lambda m: not open_ids(m) and m["finished"].get("length") == 4)
        assert sorted(r["id"] for r in second.told("requests") if r["finished"] is not None) == sorted(
            r["id"] for r in finished
        )
        for message in (ended, first.until(lambda m: True)):
            assert message["latency"]["itl_ms"]["p99"] < 100, "that nothing ran is no gap between tokens"
        # Every step once, in their order.
        times = [step["t"] for step in first.told("steps")]
        assert times == sorted(times)
        assert sum(t > start for t in times) == engine.stats().steps - seen
        # What is being computed no longer waits, although it has no token yet.
        built.executor.seconds = 1.5
        slow = Stream(server, {"prompt": "ab", "max_tokens": 1, "stream": True})
        first.until(lambda m: any(r["scheduled"] and not r["first_token"] for r in m["requests"]))
        slow.leave()
        second.stream.leave()
        time.sleep(0.6)
        assert watched(server), "one still looks"
        first.until(lambda m: True)
        first.stream.leave()
        until(lambda: not watched(server), 3)
        until(lambda: not server.gate.num_active)
