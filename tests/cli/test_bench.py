"""pelton bench kernels and pelton profile."""

from __future__ import annotations

import json
import math
import os
import xml.etree.ElementTree as ET

import pytest

from pelton.backends.cpu.executor import CpuExecutor
from pelton.bench import kernels
from pelton.bench.shapes import MODELS, ModelShape
from tests.helpers.tiny_models import tiny_checkpoint

KEYS = [
    "op", "weight_type", "activation_type", "m", "n", "k", "isa", "threads", "seconds", "gb_per_s", "tflop_per_s",
    "peak_fraction",
]  # fmt: skip


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(MODELS, "tiny", ModelShape("tiny", 64, 96, 4, 2, 16, 128, 1e4))
    monkeypatch.setattr(kernels, "_cold_bytes", lambda: 100_000)
    monkeypatch.setenv("COLUMNS", "80")


FAST = ("bench", "kernels", "--model", "tiny", "--seconds", 0.001, "--threads", 1, "--m", "1,70")


def test_kernels_prints_tables_and_writes_rows(pelton, tmp_path):
    file = tmp_path / "rows.json"
    result = pelton(
        *FAST, "--op", "linear,rms_norm,attention_decode", "--context", 32, "--weights", "both", "--json", file
    )
    assert result.exit_code == 0, result.stderr
    rows = json.loads(file.read_text())
    assert all(list(row)[: len(KEYS)] == KEYS for row in rows)
    assert all(math.isfinite(row[key]) and row[key] >= 0 for row in rows for key in KEYS[-4:])
    assert {row["op"] for row in rows} == {"linear", "rms_norm", "attention_decode"}
    for part in ("tiny  linear gate_up  192 × 64", "roof", "int4g32:f16 hot", "tiny  attention_decode", "1 thread"):
        assert part in result.stdout
    assert "skipped tiny qkv int4g128z:f16" in result.stderr  # 64 columns are no group of 128
    lines = [line for line in result.stdout.splitlines() if "%" in line]
    assert len(lines) == len(rows)


def test_tables_fit_80_columns(pelton):
    result = pelton(*FAST, "--op", "all", "--context", "512", "--weights", "both")
    assert result.exit_code == 0, result.stderr
    assert max(map(len, map(str.rstrip, result.stdout.splitlines()))) <= 80


def test_a_name_means_products_only(pelton, tmp_path):
    result = pelton(*FAST, "--name", "down", "--type", "bf16", "--json", tmp_path / "rows.json")
    assert result.exit_code == 0, result.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(r["op"], r["name"], r["weight_type"], r["m"]) for r in rows] == [
        ("linear", "down", "bf16", 1), ("linear", "down", "bf16", 70),
    ]  # fmt: skip


def test_ctrl_c_keeps_what_was_measured(pelton, tmp_path, monkeypatch):
    run, calls = CpuExecutor.run_calls, 0

    def interrupted(self, inputs, first, last):
        nonlocal calls
        calls += 1
        if inputs.dims[0] == 3:
            raise KeyboardInterrupt
        return run(self, inputs, first, last)

    monkeypatch.setattr(CpuExecutor, "run_calls", interrupted)
    file = tmp_path / "rows.json"
    result = pelton(*FAST[:-1], "1,2,3,4", "--op", "rms_norm,add_rms_norm", "--json", file)
    assert result.exit_code == 130
    assert [row["m"] for row in json.loads(file.read_text())] == [1, 2]
    assert "tiny  rms_norm" in result.stdout and "add_rms_norm" not in result.stdout
    assert result.stderr == "stopped: 2 of 8 points are measured\n"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--model", "gpt-5"), "smollm2-135m"),
        (("--op", "linear,conv"), "conv"),
        (("--op", ""), "choose of linear"),
        (("--name", "q_proj"), "gate_up"),
        (("--type", "int9"), "int4g32:f16"),
        (("--m", "0"), "whole numbers from 1"),
        (("--m", "1,x"), "whole numbers from 1"),
        (("--context", "-5"), "--context"),
        (("--isa", "avx1024"), "generic"),
        (("--threads", "0"), "from 1"),
        (("--seconds", "0"), "above 0"),
        (("--seconds", "nan"), "above 0"),
        (("--weights", "disk"), "--help"),
        (("--json", "/no/such/folder/x.json"), "folder that exists"),
        (("--op", "attention_prefill", "--m", "70", "--context", "69"), "nothing"),
    ],
)
def test_bad_options_of_kernels_are_one_line_and_exit_code_2(pelton, options, said):
    result = pelton("bench", "kernels", *options)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert said in result.stderr


def test_bench_alone_shows_its_help_and_kernels_has_one_that_fits(pelton):
    assert "kernels" in pelton("bench").stdout
    text = pelton("bench", "kernels", "--help").stdout
    assert "Examples:\n" in text and "pelton bench kernels --op linear" in text
    assert max(map(len, text.splitlines())) <= 80
    assert pelton("bench", "nonsense").exit_code == 2


# profile


def test_profile_prints_and_writes_everything(pelton, tmp_path):
    folder = tiny_checkpoint("llama")[0]
    files = {kind: tmp_path / f"p.{kind}" for kind in ("json", "svg", "html")}
    result = pelton(
        "profile", folder, "--prompt-len", 40, "--context", "30,60", "--batch-size", 2, "--seconds", 0.01,
        "--threads", 1, *(part for kind, file in files.items() for part in (f"--{kind}", file)),
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    for part in (
        "prefill × 2, 40 tokens", "decode × 2, 30 tokens of context", "decode × 2, 60 tokens of context",
        "gate_up_proj", "lm_head", "outside calls", "layers.2", "Without profiling", "of the roofline",
    ):  # fmt: skip
        assert part in result.stdout
    phases = json.loads(files["json"].read_text())
    assert [(p["phase"], p["context"], p["tokens"]) for p in phases] == [
        ("prefill", 40, 80), ("decode", 30, 2), ("decode", 60, 2),
    ]  # fmt: skip
    for phase in phases:
        assert sum(call["seconds"] for call in phase["calls"]) == pytest.approx(phase["call_seconds"])
        assert phase["call_seconds"] <= phase["profiled_seconds"]
        assert all(call["peak_fraction"] >= 0 for call in phase["calls"])
    ET.parse(files["svg"])
    assert files["html"].read_text().count("<section>") == 3


def test_profile_of_one_phase_without_layers(pelton):
    folder = tiny_checkpoint("llama")[0]
    result = pelton("profile", folder, "--phase", "decode", "--context", 16, "--seconds", 0.01, "--no-layers")
    assert result.exit_code == 0, result.stderr
    assert "prefill" not in result.stdout and "layers.0" not in result.stdout and "decode, 16 tokens" in result.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--context", "4096"), "trained for"),
        (("--context", "many"), "whole numbers"),
        (("--batch-size", "0"), "--batch-size"),
        (("--prompt-len", "-1"), "--prompt-len"),
        (("--seconds", "-1"), "--seconds"),
        (("--isa", "sse9"), "generic"),
        (("--threads", "0"), "threads"),
        (("--phase", "sleep"), "--help"),
        (("--svg", "/no/such/folder/x.svg"), "folder that exists"),
    ],
)
def test_bad_options_of_profile_are_one_line_and_exit_code_2(pelton, options, said):
    result = pelton("profile", tiny_checkpoint("llama")[0], "--prompt-len", 8, "--context", 8, *options)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert said in result.stderr


def test_a_file_is_not_left_behind_by_a_model_that_does_not_load(pelton, tmp_path):
    file = tmp_path / "p.json"
    assert pelton("profile", tmp_path / "nothing", "--json", file).exit_code == 2
    assert not file.exists()


def test_bars_have_eighths_and_stop_at_their_width():
    from pelton.cli.roofs import bar

    assert bar(0.5, 4).plain == "██  " and bar(0.53125, 4).plain == "██▏ "
    assert bar(-1, 3).plain == "   " and bar(9, 3).plain == "███"


def test_numbers_have_three_digits():
    from pelton.bench.units import duration, number

    assert [number(x) for x in (0.1234, 1.234, 12.34, 123.4, 1234.5, 99.96)] == [
        "0.123", "1.23", "12.3", "123", "1,234", "100",
    ]  # fmt: skip
    assert [duration(x) for x in (1.5, 0.0123, 45e-6, 7e-8, 0.9999)] == [
        "1.50 s",
        "12.3 ms",
        "45.0 µs",
        "70.0 ns",
        "1,000 ms",
    ]


def test_files_that_cannot_be_written_are_found_first(tmp_path):
    from pelton.cli.options import writable
    from pelton.errors import PeltonError

    writable(str(tmp_path / "new.json"))("x")
    assert (tmp_path / "new.json").read_text() == "x"
    if os.getuid() != 0:
        (tmp_path / "new.json").chmod(0o400)
        with pytest.raises(PeltonError):
            writable(str(tmp_path / "new.json"))
