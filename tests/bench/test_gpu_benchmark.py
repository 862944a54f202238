"""benchmarks/gpu, as small as it goes: on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import check_models, checks, decode, inflight, kernel_tests, kernel_times, peaks, sharegpt_lengths
from benchmarks.gpu.part import ROOT, OutOfTimeError, Part
from benchmarks.gpu.report import against_transformers, markdown
from benchmarks.gpu.scale import MODELS, TINY
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
