"""benchmarks/gpu, as small as it goes: on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import (
    budget,
    check_models,
    checks,
    decode,
    inflight,
    kernel_tests,
    kernel_times,
    peaks,
    precisions,
    quality,
    roofline,
    sharegpt_lengths,
)  # fmt: skip
from benchmarks.gpu.model import quantized_types, random_checkpoint
from benchmarks.gpu.part import ROOT, OutOfTimeError, Part
from benchmarks.gpu.precision import Precision, each
from benchmarks.gpu.report import against_transformers, markdown
from benchmarks.gpu.scale import FULL, MODELS, TINY
from pelton import EngineConfig
from pelton.build import build
from pelton.errors import PeltonError
from pelton.metrics import RequestMetrics
from tests.backends.cuda.device import DEVICE

SMALL = replace(
    TINY, prompt_len=5, output_len=3, batch_prompt_len=3, batch_output_len=3, longest=6, prompt_lens=(3, 9),
    check_chunk=8, check_tokens=2, check_dtypes=("bf16",), sampled_steps=1,
)  # fmt: skip


@pytest.fixture
def new_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Part]]:
    if DEVICE.type == "cpu":
        monkeypatch.setenv("PELTON_CUDA_DEVICE", "cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield lambda name, seconds=60.0: Part(name, SMALL, seconds, tmp_path / f"{name}.json", tmp_path)
    torch.set_num_threads(threads)


def test_decode_tells_latencies_and_what_part_of_the_peaks_they_are(new_part: Callable[..., Part]) -> None:
    part = new_part("decode")
    decode.run(part)
    assert [(r["graphs"], r["async_scheduling"]) for r in part.data["rows"]] == [
        (True, True), (True, False), (False, True),
    ]  # fmt: skip
    plain = part.data["rows"][1]  # steps one after another, so device and wall time are of the same ones
    assert 0 < plain["tpot_ms"] < plain["ttft_ms"] and 0.5 < plain["device_to_wall"] <= 1.001
    before, after = part.data["peaks"]
    bandwidth = max(before["bandwidth"], after["bandwidth"])
    config = MODELS["tiny"]
    layer = config["hidden_size"] * (2 * 32 + 2 * 16 + 3 * config["intermediate_size"])
    weights = 2 * (layer + config["hidden_size"] * config["vocab_size"])
    moved = plain["mbu_device"] * bandwidth * plain["device_ms"] / 1e3
    assert weights < moved < 1.5 * weights
    assert json.loads((part.work / "decode.json").read_text()) == json.loads(json.dumps(part.data))


def test_batches_and_batching(new_part: Callable[..., Part]) -> None:
    part = new_part("sweep")
    decode.run_sweep(part)
    assert [r["batch"] for r in part.data["rows"]] == [1, 2]
    for row in part.data["rows"]:
        assert row["output_tokens_per_s"] == pytest.approx(row["batch"] * row["output"] / row["seconds"])
    part = new_part("inflight")
    inflight.run(part)
    one, other = part.data["rows"]
    assert (one["batching"], other["batching"], other["to_static"]) == ("inflight", "static", 1.0)
    assert one["output_sha256"] == other["output_sha256"]


def test_time_by_kernel(new_part: Callable[..., Part], monkeypatch: pytest.MonkeyPatch) -> None:
    def recorded(step: Callable[[], object], count: int, activities: list[Any]) -> tuple[float, list[Any]]:
        step()  # starting torch's profiler takes longer than all other tests of this file
        return 1e-3, [("b", 100.0, 110.0), ("a", 110.0, 140.0), ("a", 150.0, 200.0)]

    monkeypatch.setattr(kernel_times, "_STEPS", 2)
    monkeypatch.setattr(kernel_times, "_recorded", recorded)
    part = new_part("profile")
    kernel_times.run(part)
    assert [r["step"] for r in part.data["rows"]] == ["prefill of 5 tokens", "decode of 1, context 3"]
    row = part.data["rows"][1]
    assert (row["wall_us"], row["kernels_us"], row["busy"]) == (500.0, 45.0, 0.9)
    assert row["kernels"] == [
        {"kernel": "a", "calls": 1.0, "us": 40.0, "share": 80 / 90},
        {"kernel": "b", "calls": 0.5, "us": 5.0, "share": 10 / 90},
    ]


def test_checks_of_a_whole_model(new_part: Callable[..., Part]) -> None:
    part = new_part("checks")
    checks.run(part)
    assert (part.data["passed"], part.data["failed"]) == (5, 0)
    assert "problem" not in part.data


def test_checks_find_a_wrong_token_and_a_wrong_number(
    new_part: Callable[..., Part], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, checked = new_part("checks"), check_models.make("gpt2", small=True)
    prompt = [5, 6, 7]
    right = [int(checked.logits(checked.model, prompt)[-1].argmax())]
    right.append(int(checked.logits(checked.model, prompt + right)[-1].argmax()))
    for answer, ok in ((right, True), ([right[0], right[1] ^ 1], False), (right[:1], False)):
        checks._compare(part, checked, checked.model, [prompt], [answer], "given")
        assert part.data["rows"][-1]["ok"] is ok
    # A model whose output layer is a hundredth off, as rounding to bf16 would make it.
    monkeypatch.setattr(checks, "_rows", lambda built, texts, starts, chunk: [
        1.01 * checked.logits(checked.model, t)[s:] for t, s in zip(texts, starts, strict=True)
    ])  # fmt: skip
    checks._logits(part, checked, tmp_path, "f32")
    assert part.data["rows"][-1]["ok"] is False and part.data["rows"][-1]["max"] == pytest.approx(0.01, rel=1e-3)
    checks._guarded(part, "gpt2", "broken", lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    assert "ZeroDivisionError" in part.data["rows"][-1]["traceback"]


def test_a_part_that_is_out_of_time_keeps_what_it_has(new_part: Callable[..., Part]) -> None:
    part = new_part("decode", seconds=-1.0)
    with pytest.raises(OutOfTimeError):
        decode.run(part)
    assert len(json.loads((part.work / "decode.json").read_text())["peaks"]) == 2


def test_the_command_goes_on_after_a_failure_and_keeps_other_results(tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    output.write_text(json.dumps({"parts": {"sweep": {"status": "ok", "rows": []}}}))
    (tmp_path / "empty").mkdir()
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/gpu/run.py", "--tiny", "--parts", "install,peaks", "--wheels", "empty",
         "--output", output, "--work", tmp_path / "work", "--commit", "abc"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    results = json.loads(output.read_text())
    parts = results["parts"]
    assert done.returncode == 1, done.stderr
    assert list(parts) == ["install", "peaks", "sweep"] and results["commit"] == "abc"
    assert parts["install"]["status"] == "failed" and "FileNotFoundError" in parts["install"]["error"]
    assert parts["peaks"]["status"] == "ok" and parts["peaks"]["rows"][0]["best"] > 0
    assert parts["peaks"]["command"] == "python benchmarks/gpu/run.py --tiny --parts install,peaks --commit abc"
    assert results["environment"]["torch"] and output.with_suffix(".md").read_text() in done.stdout


@pytest.mark.parametrize(
    ("script", "problem"), [("sleep 60", "ended after 1 s"), ("exit 3", "the process ended with 3")]
)
def test_a_process_that_hangs_or_dies_is_told(
    script: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(command.sys, "executable", str(python))
    monkeypatch.setattr(command, "_GRACE", 0.5)
    args = command.parser().parse_args(["--work", str(tmp_path)])
    done = command._in_process("peaks", 0.5, args, [], {}, {"parts": {}}, tmp_path / "out.json")
    assert done["status"] == "crashed" and problem in done["problem"]


def test_unknown_parts_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--parts", "peaks,speed"])
    assert "no part is called 'speed'; there are install, kernels" in capsys.readouterr().err


def test_failures_of_kernel_tests_are_told(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="a" name="b" time="1.5"/>'
        '<testcase classname="a" name="c" time="0.5"><failure message="m">assert 1 == 2</failure></testcase>'
        '<testcase classname="a" name="d"><skipped/></testcase></testsuite></testsuites>'
    )
    part = Part("kernels", TINY, 10.0)
    kernel_tests.summarize(part, [report])
    assert [part.data[k] for k in ("passed", "failed", "skipped")] == [1, 1, 1]
    assert part.data["rows"] == [{"test": "a::c", "outcome": "failed", "message": "assert 1 == 2"}]


def test_the_report_has_aims_and_ratios() -> None:
    decoded = {"graphs": True, "async_scheduling": True, "mbu_device": 0.8, "mfu_prefill": 0.612}
    batch = {"batch": 8, "prompt": 512, "output": 128, "output_tokens_per_s": 600.0}
    theirs = {"what": "batch", **batch, "output_tokens_per_s": 100.0}
    other = {**theirs, "batch": 4}  # Pelton has none of this size
    parts: dict[str, Any] = {
        "decode": {"status": "ok", "rows": [decoded], "peaks": [{"bandwidth": 3e12, "bf16": 7e14}]},
        "sweep": {"status": "out of time", "rows": [batch]},
        "profile": {
            "status": "ok",
            "rows": [
                {
                    "step": "decode of 1",
                    "busy": 0.97,
                    "wall_us": 9.0,
                    "kernels_us": 8.0,
                    "kernels": [],
                }
            ],
        },
        "transformers": {
            "status": "ok",
            "rows": [theirs, other, {"what": "batch", "batch": 16, "failure": "no memory"}],
        },
    }
    assert against_transformers(parts) == {"batch 8": 6.0}
    text = markdown({"environment": {"device": "a GPU", "torch": "2"}, "parts": parts})
    for line in (
        "| ≥ 75 % | 80.0 % |", "| ≥ 60 % | 61.2 % |", "97.0 % (decode of 1) |", "| ≥ 5 × | 6.0 × (batch 8) |",
        "| sweep | out of time |", "Peaks: 3,000 GB/s read and written, 700 TFLOP/s bf16", "no memory",
    ):  # fmt: skip
        assert line in text


def test_lengths_of_conversations() -> None:
    lengths = np.array(sharegpt_lengths.read())
    assert lengths.shape == (500, 2) and lengths.min() >= 4 and lengths.sum(axis=1).max() <= 2048


def test_peaks_of_matrix_products_count_two_operations_for_each_weight(
    new_part: Callable[..., Part], monkeypatch: pytest.MonkeyPatch
) -> None:
    new_part("peaks")
    monkeypatch.setattr(peaks, "seconds_of", lambda run, repeats: run() is None or [2.0, 0.5, 1.0])
    assert peaks.matmul_rate(4, 8, 16, "bf16", 3) == {"best": 2048.0, "median": 1024.0}
    assert peaks.copy_bandwidth(1 << 10, 3) == {"best": 4096.0, "median": 2048.0}


# ------------------------------------------------------------------ low precision


def test_names_of_precisions() -> None:
    both = Precision.parse("int4+kv-fp8")
    assert (both.options, both.product) == ({"quantization": "int4", "kv_cache_dtype": "fp8"}, "bf16")
    assert Precision.parse("bf16").options == {}
    plain = Precision.parse("fp8+float")
    assert (plain.options, plain.product) == ({"quantization": "fp8", "activations": "float"}, "bf16")
    assert [Precision.parse(name).product for name in ("fp8", "w8a8", "nvfp4", "kv-int8")] == [
        "fp8", "int8", "bf16", "bf16",
    ]  # fmt: skip
    for name in ("fp9", "int4+int8", "kv-fp8+kv-int8", ""):
        with pytest.raises(ValueError, match="precision"):
            Precision.parse(name)


def test_a_precision_that_fails_does_not_hold_up_the_others(new_part: Callable[..., Part]) -> None:
    part, shares = new_part("precisions", seconds=30.0), []
    part.scale = replace(part.scale, precisions=("fp8", "bf16", "int4"))

    def measure(precision: Precision, left: Callable[[], float]) -> None:
        shares.append(left())
        if precision.name != "bf16":
            raise PeltonError("it has no kernels", "leave it out") if precision.name == "fp8" else KeyError("x")
        part.row(precision="bf16", figure=2.0)

    each(part, measure)
    assert shares == pytest.approx([10.0, 15.0, 30.0], abs=0.2)
    assert [sorted(row) for row in part.data["rows"]] == [
        ["failure", "precision"], ["figure", "precision"], ["failure", "precision"],
    ]  # fmt: skip
    assert part.data["problem"] == "no figures of fp8, int4"
    assert part.data["error"].startswith("int4: Traceback") and "fp8: " not in part.data["error"]


def test_precisions_that_there_was_no_time_for_are_named(new_part: Callable[..., Part]) -> None:
    part = new_part("precisions", seconds=0.2)
    part.scale = replace(part.scale, precisions=("bf16", "fp8", "int4"))
    with pytest.raises(OutOfTimeError):
        each(part, lambda precision, left: time.sleep(0.15))
    assert part.data["no_time_for"] == ["int4"]
    text = markdown({"environment": {}, "parts": {"precisions": part.data | {"status": "out of time"}}})
    assert "No time for all or some of: int4" in text


def test_precisions_of_earlier_runs_are_kept_and_compared() -> None:
    row = {"what": "one", "batch": 1}
    before = {
        "date": "Monday", "earlier": {"int8": "Sunday"},
        "rows": [{**row, "precision": "int8", "decode_tokens_per_s": 30.0}, {"precision": "fp8", "failure": "no"},
                 {**row, "precision": "bf16", "decode_tokens_per_s": 10.0}],
    }  # fmt: skip
    now = {"precisions": ["fp8"], "rows": [{**row, "precision": "fp8", "decode_tokens_per_s": 25.0}]}
    both = command._whole("precisions", now, before)
    assert [r["precision"] for r in both["rows"]] == ["int8", "bf16", "fp8"]
    assert [r["decode_tokens_per_s_to_bf16"] for r in both["rows"]] == [3.0, 1.0, 2.5]
    assert both["earlier"] == {"int8": "Sunday", "bf16": "Monday"}
    nothing = command._whole("precisions", {"status": "failed", "rows": []}, both)
    assert len(nothing["rows"]) == 3 and nothing["status"] == "failed"
    assert command._whole("peaks", {"rows": []}, {"rows": [{"what": "copy"}]}) == {"rows": []}


def test_one_sequence_and_batches_of_a_precision(new_part: Callable[..., Part]) -> None:
    part = new_part("precisions")
    part.scale = replace(part.scale, precisions=("bf16", "w8a8"), precision_batches=(2,))
    precisions.run(part)
    one = part.data["rows"][0]
    assert [(r["what"], r["batch"], r["precision"], r["product"]) for r in part.data["rows"]] == [
        ("one", 1, "bf16", "bf16"), ("batch", 2, "bf16", "bf16"), ("one", 1, "w8a8", "int8"),
        ("batch", 2, "w8a8", "int8"),
    ]  # fmt: skip
    config = MODELS["tiny"]
    layer = config["hidden_size"] * (2 * 32 + 2 * 16 + 3 * config["intermediate_size"])
    weights = 2 * (layer + config["hidden_size"] * config["vocab_size"])
    assert weights < one["step_bytes"] < 1.5 * weights
    assert part.data["rows"][2]["step_bytes"] < 0.7 * one["step_bytes"]
    assert [r["decode_tokens_per_s_to_bf16"] == 1.0 for r in part.data["rows"]] == [True, True, False, False]
    assert set(part.data["peaks"][0]) == {"bandwidth", "bf16", "int8"}
    assert "problem" not in part.data and "| bf16 | bf16 |" in markdown({"environment": {}, "parts": {
        "precisions": part.data | {"status": "ok"}}})  # fmt: skip


def test_weights_are_random_codes_of_the_types_that_the_engine_would_make() -> None:
    config = MODELS["tiny"]
    plain = random_checkpoint(config)
    types = quantized_types(EngineConfig(quantization="fp8"), plain)
    assert len(types) == 8 and "model.embed_tokens.weight" not in types  # seven products of the layer, and the last
    made = random_checkpoint(config, types)
    value = made.tensors["model.layers.0.mlp.down_proj.weight"].read()
    assert str(value.type) == "fp8g0:f32" and value.shape == (config["hidden_size"], config["intermediate_size"])
    numbers = value.dequantize()
    assert np.isfinite(numbers).all() and 0.3 < (numbers > 0).mean() < 0.7
    build(EngineConfig(quantization="fp8", max_num_seqs=1, packed_cache=False), checkpoint=made).close()


def searched(worst: Callable[[int], float], budgets: tuple[float, ...], most: int) -> dict[int, float]:
    found: dict[int, float] = {}
    while (n := budget.next_size(found, budgets, most)) is not None:
        assert n not in found
        found[n] = worst(n)
    return found


def test_the_search_finds_the_largest_number_for_every_budget() -> None:
    limits = (1.0, 2.0, 4.0, 10.0)
    found = searched(lambda n: 0.5 + 0.1 * n if n < 120 else math.inf, limits, 256)
    for limit, exact in zip(limits, (5, 15, 35, 95), strict=True):
        low, high = budget.bracket(found, limit)
        assert high is not None and low <= exact < high and high - low <= max(1, low // 8)
    assert len(found) <= 20
    assert searched(lambda n: 1.0 * n, (0.5,), 256) == {1: 1.0}
    assert budget.bracket({1: 1.0}, 0.5) == (0, 1)
    full = searched(lambda n: 0.1, limits, 100)  # all that the seats allow
    assert list(full) == [1, 2, 4, 8, 16, 32, 64, 100] and budget.bracket(full, 1.0) == (100, None)


class Slots:
    """An engine whose requests take a second for each in flight, one token at the end."""

    def __init__(self) -> None:
        self.now, self.running = 0.0, dict[str, float]()

    def add_request(self, name: str, ids: Any, params: Any) -> None:
        self.running[name] = self.now

    def step(self) -> list[Any]:
        first, arrival = next(iter(self.running.items()))
        del self.running[first]
        self.now += 1.0
        return [SimpleNamespace(request_id=first, token_ids=[7], metrics=RequestMetrics(arrival, None, (self.now,)))]


def test_a_closed_loop_counts_the_requests_behind_the_first() -> None:
    asked = [SimpleNamespace(prompt_token_ids=(1,), params=None)]

    def loop(n: int, longest: float) -> budget.Loop:
        engine: Any = Slots()
        return budget.closed_loop(engine, asked, n, 2, longest, lambda: None, clock=lambda: engine.now)

    done = loop(4, 10.0)
    # The first of those that count comes when the first of all has ended, a second after the start; the last ends at 8.
    assert (done.times, done.worst, done.seconds, done.tokens) == ([4.0] * 4, 4.0, 7.0, 7)
    assert loop(1, 10.0).times == [1.0, 1.0]
    late = loop(4, 3.5)
    assert late.too_long and late.worst == math.inf
    # One of a hundred may be late, not two.
    times = [1.0] * 199 + [50.0]
    many = budget.Loop(200, [RequestMetrics(0.0, None, (t,)) for t in times], 1.0, 1)
    assert many.worst == pytest.approx(1.0) and budget.Loop(3, many.requests[-3:], 1.0, 1).worst == 50.0


def test_the_table_of_budgets() -> None:
    def row(name: str, n: int, worst: float | None, rate: float) -> dict[str, Any]:
        return {"precision": name, "n": n, "most": 4, "worst": worst, "p50": worst, "output_tokens_per_s": rate,
                "requests_per_s": 1.0, "tpot_ms": 1.0}  # fmt: skip

    data: dict[str, Any] = {"budgets": [1, 2, 4], "rows": [
        row("bf16", 1, 1.5, 100.0), row("bf16", 2, 3.0, 150.0), row("bf16", 3, None, 0.0),
        row("fp8", 1, 0.9, 200.0), row("fp8", 2, 1.5, 300.0), row("fp8", 3, 2.2, 350.0), row("fp8", 4, 2.5, 400.0),
        row("int8", 1, 0.5, 50.0), row("int8", 2, 0.6, 75.0), row("int8", 4, 9.0, 100.0),
        {"precision": "int4", "failure": "refused"},
    ]}  # fmt: skip
    budget.summarize(data)
    found = [(r["n"], r["missed"], r.get("output_tokens_per_s_to_bf16")) for r in data["table"]]
    assert found[:6] == [(0, 1, None), (1, 2, 1.0), (2, 3, 1.0), (1, 2, None), (2, 3, 3.0), (4, None, 400 / 150)]
    text = markdown({"environment": {}, "parts": {"budget": data | {"status": "ok"}}})
    for line in (
        "| bf16 | none | 100 (1, 1.00 ×) | 150 (2, 1.00 ×) |",
        "| fp8 | 200 (1) | 300 (2, 3.00 ×) | 400 (4, full, 2.67 ×) |",
        "| int8 | 75 (2 or more, below 4) |", "int4: refused",
    ):  # fmt: skip
        assert line in text


def test_throughput_within_a_response_time(new_part: Callable[..., Part], tmp_path: Path) -> None:
    part = new_part("budget")
    part.scale = replace(part.scale, precisions=("bf16",), budgets=(60.0,), budget_seats=2)
    part.picture = tmp_path / "budget.svg"
    budget.run(part)
    assert [r["n"] for r in part.data["rows"]] == [1, 2]
    (row,) = part.data["table"]
    assert (row["n"], row["missed"], row["full"]) == (2, None, True) and 0 < row["p50"] <= row["worst"] < 60
    assert row["output_tokens_per_s"] == pytest.approx(part.scale.output_len * row["requests_per_s"])
    assert "bf16" in part.picture.read_text()


def test_roofs_of_a_data_sheet_are_those_of_a_hand_calculation(new_part: Callable[..., Part]) -> None:
    part = new_part("roofline")
    part.scale = replace(FULL, precisions=("bf16",))
    roofline.estimate(part, "h100")
    rows = {(r["step"], r["kernel"]): r for r in part.data["rows"]}
    weights = 2 * 128256 * 4096
    head = rows["decode of 1", "lm_head"]
    assert head["flops"] == weights and weights < head["bytes"] < 1.001 * weights
    assert head["roof_us"] == head["memory_us"] == pytest.approx(1e6 * head["bytes"] / 3.35e12)
    assert head["roof_us"] == pytest.approx(313.6, rel=1e-3) and head["by"] == "memory"
    # Behind the last layer's attention only the last token goes on.
    gates = rows["prefill", "gate_up_proj"]
    assert gates["flops"] == 2 * 28672 * 4096 * (31 * 2048 + 1) and gates["by"] == "compute"
    assert gates["roof_us"] == pytest.approx(1e6 * gates["flops"] / 989e12)
    # Keys and values of 8 heads of 128, in 2 bytes, in 32 layers; beside them queries and results.
    cache = 64 * 2049 * 32 * 2 * 8 * 128 * 2
    assert cache < rows["decode of 64", "attention"]["bytes"] < 1.01 * cache
    total = next(t for t in part.data["steps"] if t["step"] == "decode of 64")
    assert total["roof_us"] == sum(r["roof_us"] for (step, _), r in rows.items() if step == "decode of 64")
    assert total["tokens_per_s"] == pytest.approx(64e6 / total["roof_us"])
    text = markdown({"environment": {}, "parts": {"roofline": part.data | {"status": "ok"}}})
    assert "**An estimate: nothing was measured" in text and "3.35 TB/s, 989 TFLOP/s bf16, 1,979 TFLOP/s fp8" in text


def test_kernels_beside_their_roofs(new_part: Callable[..., Part], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "_SECONDS", 0.0)
    part = new_part("roofline")
    part.scale = replace(part.scale, precisions=("bf16",), roofline_batches=(1,))
    roofline.run(part)
    assert [s["step"] for s in part.data["steps"]] == ["decode of 1", "prefill"]
    for row in part.data["rows"]:
        assert row["share"] == row["roof_us"] / row["us"] and row["roof_us"] > 0
    decode = part.data["steps"][0]
    assert decode["us"] == pytest.approx(sum(r["us"] for r in part.data["rows"] if r["step"] == "decode of 1"))
    assert decode["share"] == decode["roof_us"] / decode["step_us"]


def test_products_that_torch_does_not_have_have_no_peak(
    new_part: Callable[..., Part], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: Any, **named: Any) -> Any:
        raise RuntimeError("compute capability >= 8.9 is needed\nand more")

    monkeypatch.setattr(torch, "_scaled_mm", refused)
    part = new_part("peaks")
    meter = peaks.Meter(part, ["fp8", "int8", "bf16"])
    assert meter.rate("fp8") is None and (meter.rate("int8") or 0) > 0 and meter.rate("bf16") == meter.flops
    assert part.data["no_peaks"] == {"fp8": "compute capability >= 8.9 is needed"}
    none = decode.utilization(decode.Steps(1, 1.0, 1.0, 1.0, 1.0), decode.Steps(1, 1.0, 1.0, 1.0, 1.0), meter, "fp8")
    assert none["mfu_prefill"] is None and none["mbu_device"] > 0


def test_quality_stands_beside_speed() -> None:
    kl = {"mean": 0.0142, "error": 0.001, "p99": 0.08, "same_top": 0.92}
    parts: dict[str, Any] = {
        "quality": {"status": "ok", "rows": [{"precision": "f32", "perplexity": 21.34}, {"precision": "fp8",
            "perplexity": 21.67, "kl": kl, "kl_to_bf16": kl}, {"precision": "w8a8", "failure": "refused"}]},
        "precisions": {"status": "ok", "rows": [{"what": "one", "precision": "fp8", "prompt": 1, "output": 1,
            "decode_tokens_per_s": 10.0, "decode_tokens_per_s_to_bf16": 1.8, "prefill_tokens_per_s_to_bf16": 1.5}]},
    }  # fmt: skip
    text = markdown({"environment": {}, "parts": parts})
    assert "| fp8 | 0.0142 | 0.001 | 0.08 | 92.0 % | 0.0142 | 21.67 | 1.80 × | 1.50 × |" in text
    assert "w8a8: refused" in text


def test_quality_of_precisions(new_part: Callable[..., Part]) -> None:
    part = new_part("quality")
    part.scale = replace(part.scale, precisions=("bf16", "w8a8", "kv-int8"))
    quality.run(part)
    exact, bf16, w8a8, cache = part.data["rows"]
    assert [r["precision"] for r in part.data["rows"]] == ["f32", "bf16", "w8a8", "kv-int8"]
    assert bf16["kl_to_bf16"]["mean"] == 0 < bf16["kl"]["mean"] < w8a8["kl"]["mean"] < 0.1
    assert 0 < cache["kl_to_bf16"]["mean"] < 0.1
    assert all(r["perplexity"] == pytest.approx(exact["perplexity"], rel=0.05) for r in part.data["rows"])


def test_quality_without_its_model_is_skipped(new_part: Callable[..., Part], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "_PACKAGES", {"no_such_module": "no-such-package"})
    part = new_part("quality")
    part.scale = FULL
    quality.run(part)
    assert part.data["skipped"] == "needs no-such-package (offline: --wheels)"
