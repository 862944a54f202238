"""benchmarks/peers: figures, tables, the protocol with real processes, and that failures are told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from benchmarks import serving_peers
from benchmarks.peers import __main__ as command
from benchmarks.peers import measure, statistics, weights
from benchmarks.peers.catalogue import BATCH, MODELS, PEERS, QUICK, SINGLE, Model, Peer, Precision, workloads
from benchmarks.peers.environments import SetupError, cuda_packages, python_of, reason
from benchmarks.peers.process import Worker, WorkerError, last_line
from benchmarks.peers.report import markdown, table

WORKERS = measure.ROOT / "benchmarks" / "peers" / "workers"


def test_a_figure_is_the_median_with_its_range() -> None:
    figure = statistics.figure([3.0, 1.0, 2.0, 10.0])
    assert (figure.median, figure.low, figure.high) == (2.5, 1.0, 10.0)
    assert figure.spread == pytest.approx(1.8)
    assert figure.to_json()["samples"] == [3.0, 1.0, 2.0, 10.0]
    with pytest.raises(ValueError, match="no samples"):
        statistics.figure([])


def test_a_ratio_is_taken_round_by_round() -> None:
    # The machine was half as fast in the second round: the ratio of the medians would hide that nothing changed.
    assert statistics.ratio([100, 50, 100], [50, 25, 50]) == 2.0
    assert statistics.ratio([10, 20, 90], [10, 10, 10]) == 2.0
    assert statistics.ratio([], [1.0]) is None


def test_agreement_counts_leading_tokens_only() -> None:
    assert statistics.agreement([1, 2, 3, 4], [1, 2, 9, 4]) == 2
    assert statistics.agreement([1, 2], [1, 2, 3]) == 2
    assert statistics.agreement([], [1]) == 0


def test_limits_by_hand() -> None:
    # 1,000 weights of 4 bits are 500 bytes; 10 elements of bf16 cache for each of 25 tokens are 500 more.
    assert statistics.decode_limit(1000, 4, 10, 25, 1e6) == 1000.0
    # 2 x (1000 - 200) x 10 for the body, 2 x 200 for one row of the head, no attention: 16,400 operations.
    assert statistics.prefill_limit(1000, 200, 0, 10, 1.64e6) == pytest.approx(1000.0)


def variant(name: str, bits: int, samples: dict[str, list[float]], failure: str = "") -> measure.Variant:
    precisions = {p.name: p for p in PEERS[name].precisions}
    precision = next(p for p in precisions.values() if p.bits == bits)
    return measure.Variant(PEERS[name], precision, samples=samples, failure=failure)


@pytest.fixture
def options(tmp_path: Path) -> measure.Options:
    return measure.Options(tmp_path, 1, 2, 1, 1, QUICK)


def test_the_table_shows_figures_ratios_and_failures(options: measure.Options) -> None:
    variants = [
        variant("pelton", 16, {"prefill 128": [300.0, 330.0], "decode 128": [20.0, 20.0], "first_token": [0.5]}),
        variant("llama_cpp", 16, {"prefill 128": [100.0, 110.0], "decode 128": [10.0, 10.0]}, "batch: no memory"),
        variant("vllm_cpu", 16, {}, "pip: no | such package"),
    ]
    model = measure._result(MODELS["smollm2"], variants, options, [])
    model["variants"][1]["version"] = "1.2"
    model["peaks"] = [
        {"peaks": {"read_bandwidth": 2e10, "f32": 1e12}},
        {"peaks": {"read_bandwidth": 3e10, "f32": 9e11}},
    ]
    text = markdown({"machine": {"cpu": "X"}, "commit": "abc", "rounds": {"starts": 3}, "models": {"smollm2": model}})
    assert "commit abc" in text and "3 rounds of starts" in text and "llama.cpp 1.2." in text
    assert "20 to 30 GB/s read, 1.00 bf16" in text
    rows = {tuple(c.strip() for c in line.split(" | ")[:2]): line for line in text.splitlines() if line.startswith("|")}
    assert "315 ± 5%" in rows["| Pelton", "bf16"] and "20 ± 0%" in rows["| Pelton", "bf16"]
    assert "105 ± 5%" in text and "failed: batch: no memory" in text  # what was measured stays
    assert "not measured: pip: no \\| such package" in rows["| vLLM (CPU)", "bf16"]
    assert "3.00×" in text and "2.00×" in text
    widths = {line.replace("\\|", "").count("|") for line in text.split("How many")[0].splitlines() if "|" in line}
    assert len(widths) == 1


def test_a_noisy_run_says_so(options: measure.Options) -> None:
    neighbours = measure.Neighbours()
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:  # not ours until it is waited for
        time.sleep(1.0)
        share = neighbours.share()
        busy.kill()
    assert 0.3 / (os.cpu_count() or 1) < share <= 1.0
    model = measure._result(MODELS["smollm2"], [], options, [])
    assert "not to be quoted" in markdown({"models": {"smollm2": model | {"cpu_used_by_others": 0.2}}})
    assert "not to be quoted" not in markdown({"models": {"smollm2": model | {"cpu_used_by_others": 0.01}}})


def test_table_escapes_what_would_break_a_row() -> None:
    assert table([["a", "b"], ["1|2", "3"]]) == "| a | b |\n|---|---|\n| 1\\|2 | 3 |\n"


def test_peers_are_compared_with_the_same_format_or_the_same_bits() -> None:
    ours = [measure.Variant(PEERS["pelton"], p) for p in PEERS["pelton"].precisions]
    q4_1 = next(p for p in PEERS["llama_cpp"].precisions if p.name == "Q4_1")
    assert measure.compared_with(measure.Variant(PEERS["llama_cpp"], q4_1), ours).precision.name == "Q4_1"  # type: ignore[union-attr]
    int4 = variant("openvino_genai", 4, {})
    assert measure.compared_with(int4, ours).precision.name == "Q4_0"  # type: ignore[union-attr]
    assert measure.compared_with(ours[0], ours) is None


def test_workloads_can_be_chosen() -> None:
    assert workloads(None, False) == SINGLE + BATCH
    assert [w.name for w in workloads(["2048", "32"], False)] == ["2048", "32 sequences"]
    assert workloads(None, True) == QUICK


def test_results_hold_no_path_of_this_machine(tmp_path: Path) -> None:
    results = {"a": [f"cannot open {tmp_path}/models/x", {"b": f"{Path.home()}/y"}], "c": 1}
    assert command.private(results, tmp_path) == {"a": ["cannot open WORK/models/x", {"b": "~/y"}], "c": 1}
    shown = command.shown_arguments(["--quick", "--work", "/here", "--output=/there", "--rounds", "3"])
    assert shown == ["--quick", "--rounds", "3"]


def test_prompts_are_the_same_for_all_engines_and_other_ones_in_each_round() -> None:
    load = SINGLE[0]
    assert measure._prompts(load, 1000, 0) == measure._prompts(load, 1000, 0) != measure._prompts(load, 1000, 1)
    assert all(10 <= t < 1000 for t in measure._prompts(load, 1000, 0)[0]) and load.prompt == 512


# The protocol, with real processes.

ENGINE = """
    import os, sys, time
    from serve import serve
    class Engine:
        version, settings = "1", {}
        def __init__(self, **load):
            print("loading", flush=True)  # a library that writes to stdout
            os.system("echo from a child")
        def generate(self, tokens, count):
            if count == 99: raise ValueError("no room\\nfor more")
            if count == 98: os._exit(3)
            if count == 97: time.sleep(60)
            if count == 96: os.abort()
            return 1.0, 2.0, [7] * (count + 1 if count != 95 else 1)
        def batch(self, prompts, count):
            return 1.0, len(prompts) * count
    serve(Engine)
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    script = tmp_path / "fake_worker.py"
    script.write_text(textwrap.dedent(ENGINE))
    workers = []

    def make() -> Worker:
        workers.append(Worker([sys.executable, script], {"PYTHONPATH": str(WORKERS)}, tmp_path / "log"))
        return workers[-1]

    yield make
    for worker in workers:
        worker.kill()


def test_replies_are_not_disturbed_by_what_libraries_print(start: Callable[..., Worker], tmp_path: Path) -> None:
    worker = start()
    assert worker.call("load", 30, model="m") == {"version": "1", "settings": {}}
    assert worker.call("generate", 30, tokens=[1], count=2) == {"first": 1.0, "rest": 2.0, "tokens": [7, 7, 7]}
    assert worker.call("batch", 30, prompts=[[1], [2]], count=3) == {"seconds": 1.0, "tokens": 6}
    assert worker.peak_rss() > 1 << 20
    worker.close()
    assert (tmp_path / "log").read_text() == "loading\nfrom a child\n"


@pytest.mark.parametrize(
    ("count", "timeout", "message"),
    [
        (99, 30, "generate: ValueError: no room"),
        (98, 30, "generate: the worker ended with exit code 3; from a child"),
        (97, 0.3, "generate: no reply within 0 s"),
        (96, 30, "generate: the worker ended with SIGABRT"),
    ],
)
def test_a_worker_that_fails_says_how_and_is_gone(
    start: Callable[..., Worker], count: int, timeout: float, message: str
) -> None:
    worker = start()
    worker.call("load", 30, model="m")
    with pytest.raises(WorkerError) as error:
        worker.call("generate", timeout, tokens=[1], count=count)
    assert str(error.value).startswith(message)
    assert worker._process.poll() is not None


def test_a_paused_worker_does_nothing_and_goes_on_later(start: Callable[..., Worker]) -> None:
    worker = start()
    worker.call("load", 30, model="m")
    worker.pause()
    stat = Path(f"/proc/{worker._process.pid}/stat")
    deadline = time.monotonic() + 10
    while stat.read_text().rsplit(")", 1)[1].split()[0] != "T" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert stat.read_text().rsplit(")", 1)[1].split()[0] == "T"
    assert worker.call("generate", 30, tokens=[1], count=0)["tokens"] == [7]


def fake_peer(monkeypatch: pytest.MonkeyPatch, script: Path) -> Peer:
    peer = Peer("fake", "Fake", (Precision("bf16", 16, "hf"),), "none", own_environment=False)
    monkeypatch.setattr(Peer, "worker", property(lambda self: script))
    monkeypatch.setattr(measure, "measure_peaks", lambda options: {"peaks": {"read_bandwidth": 1e9, "f32": 1e9}})
    monkeypatch.setattr(weights, "write_folder", lambda model, folder: None)
    return peer


def test_a_run_measures_what_works_and_reports_what_does_not(
    options: measure.Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "fake_worker.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(WORKERS)!r})\n" + textwrap.dedent(ENGINE))
    peer = fake_peer(monkeypatch, script)
    options.workloads = QUICK
    said: list[str] = []
    result = measure.measure_model(MODELS["smollm2"], [peer], options, said.append)
    (row,) = result["variants"]
    assert "failure" not in row
    assert row["figures"]["prefill 128"]["median"] == 128.0 and row["figures"]["decode 128"]["median"] == 4.0
    assert row["figures"]["4 sequences"]["median"] == 32.0 and row["figures"]["peak_rss"]["median"] > 0
    assert len(row["figures"]["prefill 128"]["samples"]) == options.rounds

    script.write_text(script.read_text().replace("count != 95", "count != 8"))  # stops early: no figure may come of it
    (row,) = measure.measure_model(MODELS["smollm2"], [peer], options, said.append)["variants"]
    assert row["failure"] == "made 1 tokens, 9 were asked for"
    assert "4 sequences" not in row["figures"] and "prefill 128" not in row["figures"]
    assert any("FAILED: made 1 tokens" in line for line in said)

    script.write_text("raise SystemExit('no such library')")
    (row,) = measure.measure_model(MODELS["smollm2"], [peer], options, said.append)["variants"]
    assert row["failure"] == "load: the worker ended with exit code 1; no such library"
    assert row["figures"] == {}


def test_a_model_that_is_too_large_to_convert_is_told(options: measure.Options) -> None:
    variant = measure.Variant(PEERS["openvino_genai"], PEERS["openvino_genai"].precisions[2])
    with pytest.raises(SetupError, match="bf16 folder"):
        measure._prepare(variant, MODELS["llama-8b"], options.work, options, print)


def test_half_made_artefacts_are_made_again(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        measure._made(tmp_path / "x", fail)
    assert not (tmp_path / "x").exists()
    assert measure._made(tmp_path / "x", lambda path: path.write_text("whole") and None).read_text() == "whole"
    measure._made(tmp_path / "x", fail)  # is there: nothing to do


def test_environments_refuse_cuda_and_name_the_first_error(tmp_path: Path) -> None:
    assert cuda_packages(["torch", "nvidia-cublas", "numpy", "cuda-toolkit"]) == ["nvidia-cublas", "cuda-toolkit"]
    text = "WARNING: x\nERROR: No matching distribution found for y\nhint: upgrade pip"
    assert reason(text) == "ERROR: No matching distribution found for y"
    assert reason("") == "no message"
    assert python_of(PEERS["pelton"], tmp_path) == Path(sys.executable)
    assert last_line(tmp_path / "none") == "it wrote nothing"


def test_every_peer_has_its_files() -> None:
    for peer in PEERS.values():
        assert peer.worker.is_file()
        assert not peer.own_environment or peer.requirements.is_file()
        lines = peer.requirements.read_text().splitlines() if peer.own_environment else []
        assert all(line.startswith("# without:") or not line.startswith("#") for line in lines)


# The models.

TINY: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 49160, "max_position_embeddings": 256,
}  # fmt: skip


@pytest.mark.parametrize("base", ["llama-1b", "qwen-0.5b"])
def test_folder_and_gguf_hold_the_same_model(base: str, tmp_path: Path) -> None:
    from pelton.checkpoint import open_checkpoint
    from pelton.graph.ops import f32

    config = {**MODELS[base].config, **TINY} | ({"head_dim": 32} if base == "llama-1b" else {})
    model = Model("tiny", "tiny", config)
    (tmp_path / "hf").mkdir()
    weights.write_folder(model, tmp_path / "hf")
    folder = open_checkpoint(tmp_path / "hf")
    for kind, tolerance in (("BF16", 0.0), ("Q8_0", 1e-3), ("Q4_0", 2e-2)):
        weights.write_gguf(model, tmp_path / f"{kind}.gguf", kind)
        file = open_checkpoint(tmp_path / f"{kind}.gguf")
        assert set(file.tensors) == set(folder.tensors)
        for name, tensor in folder.tensors.items():
            ours, theirs = f32(file.tensors[name].read()), f32(tensor.read())
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance, err_msg=f"{kind} {name}")
        for field in ("hidden_size", "num_key_value_heads", "rope_theta", "vocab_size"):
            assert file.config[field] == folder.config[field]


def test_safetensors_are_read_by_their_own_library(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    values = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, np.float32)}
    weights.write_safetensors(tmp_path / "x", {k: v.shape for k, v in values.items()}, values.__getitem__)
    with safetensors.safe_open(tmp_path / "x", "pt") as file:
        assert set(file.keys()) == {"a", "b"}
        assert file.get_tensor("a").float().numpy().tolist() == values["a"].tolist()
    assert (tmp_path / "x").stat().st_size < 300 and ml_dtypes.bfloat16(1) == 1


def test_shapes_are_those_of_the_models() -> None:
    counts = {name: sum(int(np.prod(s)) for s in weights.random_shapes(m.config).values())
              for name, m in MODELS.items() if m.config}  # fmt: skip
    assert counts == {"llama-1b": 1_235_814_400, "qwen-0.5b": 494_032_768, "llama-8b": 8_030_261_248}
    assert weights.shape_counts(MODELS["smollm2"]).matrices == 134_479_872


def test_the_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        command.main(["--help"])
    assert exit_.value.code == 0 and "--quick" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_:
        command.main(["--rounds", "0"])
    assert exit_.value.code == 2
    assert json.dumps(measure.machine()) and os.cpu_count()


def test_a_served_load_that_fails_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(server: serving_peers.Server, load: tuple[str, str], *_: Any) -> dict[str, Any]:
        if server.name == "worse" and load[1] == "1":
            raise subprocess.CalledProcessError(2, [], stderr=b"error: the server is gone")
        nothing = {"p50": None, "p99": None}
        figures = {"ttft_ms": nothing, "tpot_ms": nothing, "itl_ms": nothing, "output_tokens_per_s": 0.0}
        return {"runs": [{**figures, "num_requests": 3, "num_ok": 0, "requests": []}]}

    both = [serving_peers.Server(name, ["true"], 1) for name in ("--a 1/2", "worse")]
    monkeypatch.setattr(serving_peers, "servers", lambda args: both)
    monkeypatch.setattr(serving_peers, "ask", ask)
    monkeypatch.setattr(serving_peers.Server, "wait_ready", lambda *_: None)
    monkeypatch.setattr(serving_peers.subprocess, "run", lambda *_, **__: None)
    monkeypatch.setattr(serving_peers, "commit", dict)
    monkeypatch.setattr(serving_peers, "machine", dict)
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["", "--models", str(tmp_path), "--concurrency", "1,2", "--rates", "", "--out",
                                      str(out)])  # fmt: skip
    serving_peers.main()
    lines = out.with_suffix(".md").read_text().splitlines()[2:]
    assert [line.split("|")[2].strip() for line in lines] == ["--a 1/2", "--a 1/2", "worse"]
    assert lines[0] == "| 1 at a time | --a 1/2 | 0 | – | – | – | – | – | – | 3 |"
