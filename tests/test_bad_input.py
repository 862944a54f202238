"""Bad input through the real command line: one line with cause and remedy, exit code 2, never a traceback."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from click.testing import CliRunner

from pelton.cli.main import pelton
from tests.checkpoint.gguf_files import Kind, llama_metadata, random_blocks, write
from tests.helpers.tiny_models import tiny_checkpoint

RUN = ("-p", "x", "--max-tokens", "2", "--threads", "2")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PELTON_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A sound tiny checkpoint that a test may break."""
    return shutil.copytree(tiny_checkpoint("llama")[0], tmp_path / "model")


def refused(*arguments: Any, says: str, input: str = "") -> str:
    """The error line of a command that must be refused."""
    result = CliRunner().invoke(pelton, [str(a) for a in arguments], input=input)
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: "), result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    cause, _, remedy = result.stderr.partition("; ")
    assert says in result.stderr, result.stderr
    assert cause.strip() and remedy.strip(), f"no remedy: {result.stderr}"
    return result.stderr


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_tensors(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    tensors = dict(safetensors.numpy.load_file(path))
    change(tensors)
    safetensors.numpy.save_file(tensors, path)


def tiny_gguf(path: Path, hidden: int = 32, kind: Any = None) -> Path:
    """A llama of one layer; with ``kind`` its matrices are quantized blocks."""

    def matrix(rows: int, cols: int) -> Any:
        if kind is None:
            return np.random.default_rng(rows).normal(0, 0.1, (rows, cols)).astype(np.float32)
        return random_blocks(kind, (rows, cols)), kind

    ones = np.ones(hidden, np.float32)
    tensors = {
        "token_embd.weight": matrix(3, hidden), "output_norm.weight": ones,
        "blk.0.attn_norm.weight": ones, "blk.0.ffn_norm.weight": ones,
        "blk.0.attn_q.weight": matrix(hidden, hidden), "blk.0.attn_k.weight": matrix(hidden // 2, hidden),
        "blk.0.attn_v.weight": matrix(hidden // 2, hidden), "blk.0.attn_output.weight": matrix(hidden, hidden),
        "blk.0.ffn_gate.weight": matrix(64, hidden), "blk.0.ffn_up.weight": matrix(64, hidden),
        "blk.0.ffn_down.weight": matrix(hidden, 64),
    }  # fmt: skip
    return write(path, "llama", llama_metadata(hidden=hidden), tensors)


# Files


@pytest.mark.parametrize("verb", [("run", *RUN), ("inspect",), ("build",), ("dump-graph",)], ids=lambda v: v[0])
def test_a_missing_file(tmp_path, verb):
    refused(verb[0], tmp_path / "absent.gguf", *verb[1:], says="does not exist")


def test_a_folder_without_weights(tmp_path):
    (tmp_path / "empty").mkdir()
    refused("inspect", tmp_path / "empty", says="holds no weights")


def test_a_missing_or_damaged_config(folder):
    (folder / "config.json").write_text("{")
    refused("inspect", folder, says="is not valid JSON")
    (folder / "config.json").unlink()
    refused("inspect", folder, says="config.json is missing")


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_truncated_safetensors(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refused("run", folder, *RUN, says="model.safetensors")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (b'"F32"', b'"F16"', "needs"),
        (b'"F32"', b'"Q99"', "unknown type"),
        (b'"data_offsets":[0,', b'"data_offsets":[9,', "needs"),
        (b'"shape":[', b'"shape":{', "not valid JSON"),
    ],
)
def test_a_safetensors_header_that_lies(folder, old, new, says):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))
    refused("run", folder, *RUN, says=says)


def test_a_safetensors_header_longer_than_the_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**63) + path.read_bytes()[8:])
    refused("run", folder, *RUN, says="header of 9223372036854775808 bytes")


@pytest.mark.parametrize("size", [0, 3, 30, 600, -1])
def test_truncated_gguf(tmp_path, size):
    path = tiny_gguf(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[:size])
    refused("run", path, *RUN, says="m.gguf")


@pytest.mark.parametrize(("offset", "says"), [(2**40, "ends at byte"), (2**64 - 32, "ends at byte"), (33, "multiple")])
def test_gguf_offsets_out_of_range(tmp_path, offset, says):
    path = tiny_gguf(tmp_path / "m.gguf")
    data = bytearray(path.read_bytes())
    name = b"blk.0.attn_q.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8 + 4  # number of dimensions, two of them, the type
    data[at : at + 8] = struct.pack("<Q", offset)
    path.write_bytes(data)
    refused("run", path, *RUN, says=says)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth", "model.ckpt"])
def test_pickles_are_refused_with_the_command_that_converts_them(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    line = refused("run", folder, *RUN, says="could run code when loaded")
    assert "python -c" in line and "save_pretrained" in line
    refused("run", folder / name, *RUN, says="could run code when loaded")


# Config and weights


def test_an_unknown_architecture(folder):
    edit_config(folder, architectures=["PaperForCausalLM"])
    line = refused("inspect", folder, says="PaperForCausalLM is not implemented")
    assert "LlamaForCausalLM" in line


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_attention_heads": 7}, "no multiple"),
        ({"num_key_value_heads": 6, "head_dim": 7}, "odd"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000"),
        ({"num_hidden_layers": "three"}, "num_hidden_layers is 'three'"),
        ({"hidden_size": 1.5}, "hidden_size is 1.5"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rope_parameters": {"rope_theta": float("inf")}}, "no rotation"),
        ({"rope_parameters": {"rope_type": "mystery"}}, "'mystery' is not implemented"),
        ({"rope_parameters": 3}, "cannot be read"),
        ({"hidden_act": "tan"}, "activation 'tan'"),
        ({"max_position_embeddings": 10**13}, "max_position_embeddings is"),
        ({"architectures": 3}, "architectures names no model"),
    ],
)
def test_absurd_configs(folder, fields, says):
    edit_config(folder, **fields)
    refused("inspect", folder, says=says)


def test_a_missing_tensor(folder):
    edit_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    refused("run", folder, *RUN, says="no tensor model.layers.1.mlp.up_proj.weight")


def test_a_mis_shaped_tensor(folder):
    edit_tensors(folder, lambda t: t.update({"model.norm.weight": np.ones(49, np.float32)}))
    refused("run", folder, *RUN, says="model.norm.weight has shape [49], the config asks for [48]")


@pytest.mark.parametrize("dtype", [np.int8, ml_dtypes.float8_e4m3fn, np.float64])
@pytest.mark.parametrize("name", ["model.layers.0.self_attn.o_proj.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("option", ["auto", "bf16"])
def test_element_types_that_nothing_computes_with(folder, dtype, name, option):
    edit_tensors(folder, lambda tensors: tensors.update({name: np.ones(tensors[name].shape, dtype)}))
    refused("run", folder, *RUN, "--dtype", option, says=f"tensor {name} is stored as")


def test_group_sizes_that_no_kernel_runs(tmp_path, monkeypatch):
    """All groups of GGUF can be run today; other formats may bring others."""
    from pelton.backends.cpu import packing

    def refuse(*_):
        raise ValueError("int4g12:f16: linear needs a group_size that is a multiple of 8")

    monkeypatch.setattr(packing, "linear_nbytes", refuse)
    refused("run", tiny_gguf(tmp_path / "m.gguf", kind=Kind.Q4_0), *RUN, says="group_size that is a multiple of 8")


def test_rows_that_are_no_whole_groups(tmp_path):
    path = tiny_gguf(tmp_path / "m.gguf", kind=Kind.Q4_0)
    data = bytearray(path.read_bytes())
    name = b"blk.0.attn_q.weight"
    at = data.index(name) + len(name) + 4
    data[at : at + 8] = struct.pack("<Q", 24)
    path.write_bytes(data)
    refused("run", path, *RUN, says="not whole Q4_0 blocks")


# Requests


def test_text_without_a_tokenizer(folder):
    refused("run", folder, *RUN, says="the checkpoint has no tokenizer")


def test_a_damaged_tokenizer(folder):
    (folder / "tokenizer.json").write_text('{"version": "1.0"')
    refused("run", folder, *RUN, says="tokenizer.json is damaged")


def test_a_prompt_longer_than_the_context():
    refused("run", "--max-model-len", "64", "-p", "word " * 100, says="the prompt has")


def test_prompts_that_are_refused_in_a_file_are_counted(folder, tmp_path):
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt_token_ids": [3] * 300}) + "\n")
    arguments = ["generate", str(folder), "-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")]
    result = CliRunner().invoke(pelton, arguments)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("error: 1 of 1 prompts were refused; see 'error' in")
    assert "300 tokens" in json.loads((tmp_path / "out.jsonl").read_text())["error"]


@pytest.mark.parametrize(
    ("option", "value"),
    [("--temperature", "-1"), ("--temperature", "nan"), ("--top-p", "0"), ("--top-p", "2"), ("--top-k", "-5"),
     ("--min-p", "1.5"), ("--max-tokens", "0"), ("--seed", "-1"), ("--repetition-penalty", "0"), ("--stop", "")],
)  # fmt: skip
def test_sampling_values_out_of_range(option, value):
    refused("run", "-p", "x", option, value, says=" is ")


@pytest.mark.parametrize(
    "options",
    [("--threads", "0"), ("--max-model-len", "0"), ("--max-model-len", "1000000"), ("--isa", "mmx")],
)
def test_engine_options_out_of_range(folder, options):
    refused("run", folder, *RUN, *options, says=options[1])


def test_an_unknown_isa_in_the_environment(folder, monkeypatch):
    monkeypatch.setenv("PELTON_CPU_ISA", "sse9")
    refused("run", folder, *RUN, says="cannot run ISA 'sse9'")
    refused("doctor", says="cannot run ISA 'sse9'")


# Memory


def test_too_little_memory_is_found_before_a_weight_is_read(folder, monkeypatch):
    monkeypatch.setattr("pelton.backends.cpu.backend.available_memory", lambda: 1 << 20)
    monkeypatch.setattr("pelton.checkpoint.safetensors._read", lambda *_: pytest.fail("a weight was read"))
    refused("run", folder, *RUN, says="1.0 MiB are free")


def test_a_context_too_long_for_memory_names_what_would_fit(folder):
    edit_config(folder, max_position_embeddings=1 << 30)
    refused("run", folder, *RUN, "--max-model-len", 1 << 30, says="would fit")


# The same in processes of their own, as users start them.


@pytest.mark.parametrize(
    ("arguments", "environment", "says"),
    [
        (["run", "absent/model.gguf", "-p", "x"], {}, "absent/model.gguf"),
        (["inspect", "{folder}"], {}, "num_attention_heads is 0"),
        (["doctor"], {"PELTON_CPU_ISA": "sse9"}, "sse9"),
        (["run", "--temprature", "0"], {}, "pelton run --help"),
    ],
)
def test_a_real_process_prints_one_line(folder, arguments, environment, says):
    edit_config(folder, num_attention_heads=0)
    command = [sys.executable, "-m", "pelton.cli.main", *(a.format(folder=folder) for a in arguments)]
    result = subprocess.run(
        command, env={**os.environ, "HF_HUB_OFFLINE": "1", **environment}, capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert says in result.stderr
