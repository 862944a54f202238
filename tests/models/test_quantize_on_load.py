"""Every family quantized as it is loaded, against transformers on the same rounded weights."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from pelton.build import bound_graph, build, plan
from pelton.checkpoint import open_checkpoint
from pelton.config import EngineConfig
from pelton.errors import CheckpointError, PeltonError
from pelton.graph import BF16, F32, GroupQuant, parse_graph, print_graph
from pelton.passes import run_passes
from pelton.program import lower, parse_program, print_program
from pelton.quantize import QUANTIZATIONS, quantize
from tests.helpers.families import Sequences, load, tolerance
from tests.helpers.tiny_models import FAMILIES, oracle_logits, tiny_checkpoint

TOKENS = [int(t) for t in np.random.default_rng(5).integers(3, 101, 24)]


def rounded(model: Any, graph: Any) -> Any:
    """A copy of transformers' model with the weights of linear layers rounded as ``graph`` says."""
    import torch

    model = copy.deepcopy(model)
    stored = dict(model.named_parameters())
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())  # the table of a tied one stays as it is
    for leaf in graph.leaves("weight"):
        if isinstance(leaf.tensor.dtype, GroupQuant):
            turn = leaf.attrs.get("transposed", False)
            values = stored[leaf.name].detach().numpy()
            values = quantize(values.T if turn else values, leaf.tensor.dtype).dequantize()
            target = head.weight if leaf.tensor.shape[0] == model.config.vocab_size else stored[leaf.name]
            target.data = torch.from_numpy(np.ascontiguousarray(values.T if turn else values))
    return model


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("device", ["reference", "cpu"])
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2", "bloom"])
def test_logits_are_those_of_the_rounded_weights(family: str, quantization: str, device: str) -> None:
    folder, model = tiny_checkpoint(family)
    config = EngineConfig(str(folder), device="reference", quantization=quantization)
    graph = bound_graph(config, open_checkpoint(folder))
    isa = device if device == "reference" else "generic"
    built = load(folder, isa, quantization=quantization, kv_cache_dtype="f32")
    got = Sequences(built.executor).step(a=TOKENS)[0]
    built.close()
    want = oracle_logits(rounded(model, graph), TOKENS)[-1]
    assert np.abs(got - want).max() <= tolerance(3 * 4 * 80) * np.abs(want).max()  # both compute in f32
    assert np.abs(want - oracle_logits(model, TOKENS)[-1]).max() > 10 * tolerance(1000) * np.abs(want).max()


@pytest.mark.parametrize("family", FAMILIES)
def test_all_products_are_quantized_and_nothing_else(family: str) -> None:
    folder, _ = tiny_checkpoint(family)
    graph = bound_graph(EngineConfig(str(folder), quantization="int8"), open_checkpoint(folder))
    for node in (n for n in graph.nodes if not n.is_constant):
        for i, operand in enumerate(node.inputs):
            if operand.is_constant:
                assert isinstance(operand.tensor.dtype, GroupQuant) == (node.op == "linear" and i == 1)


@pytest.mark.parametrize("family", ["gpt2", "bloom", "gemma2"])
def test_graph_and_program_parse_back(family: str) -> None:
    folder, _ = tiny_checkpoint(family)
    graph = bound_graph(EngineConfig(str(folder), quantization="nvfp4"), open_checkpoint(folder))
    assert parse_graph(print_graph(graph)).outputs == graph.outputs
    text = print_program(lower(run_passes(graph), {"T": 8, "S": 2, "N": 2}, 64))
    assert print_program(parse_program(text)) == text


def test_a_tied_table_keeps_its_type_and_only_the_product_is_quantized() -> None:
    folder, _ = tiny_checkpoint("llama", "bfloat16")
    graph = bound_graph(EngineConfig(str(folder), quantization="int4"), open_checkpoint(folder))
    types = [str(w.tensor.dtype) for w in graph.leaves("weight") if w.name == "model.embed_tokens.weight"]
    assert sorted(types) == ["bf16", "int8g16:f16"]


def test_the_cache_is_bf16_and_dtype_is_that_of_the_rest() -> None:
    folder, _ = tiny_checkpoint("llama")
    for dtype, rest in (("auto", F32), ("bf16", BF16)):
        graph = bound_graph(EngineConfig(str(folder), quantization="int4", dtype=dtype), open_checkpoint(folder))  # type: ignore[arg-type]
        dense = {w.tensor.dtype for w in graph.leaves("weight")} - {
            w.tensor.dtype for w in graph.leaves("weight") if isinstance(w.tensor.dtype, GroupQuant)
        }
        assert dense == {rest}
        assert {n.type.dtype for n in graph.leaves("input") if n.name.startswith("kv.")} == {BF16}


def test_rows_that_are_no_whole_groups_are_named() -> None:
    folder, _ = tiny_checkpoint("llama")
    notes = plan(EngineConfig(str(folder), device="reference", quantization="int4")).notes
    assert notes == (
        "rows of 48 are no whole groups of 32: layers with such inputs run as int4g16m:f16",
        "rows of 80 are no whole groups of 32: layers with such inputs run as int4g16m:f16",
    )
    assert not plan(EngineConfig(str(folder), device="reference", quantization="fp8")).notes


def test_a_quantized_checkpoint_is_not_quantized_again() -> None:
    with pytest.raises(CheckpointError, match=r"quantized already \(int4g32m:f16\); leave out quantization='int8'"):
        plan(EngineConfig(quantization="int8", device="reference"))


def test_an_unknown_choice() -> None:
    with pytest.raises(PeltonError, match=r"is 'int3'; choose one of int8, int4, fp8, nvfp4, w8a8, or leave"):
        plan(EngineConfig(str(tiny_checkpoint("llama")[0]), quantization="int3"))  # type: ignore[arg-type]


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny_checkpoint("qwen2")[0], folder)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor model.layers.1.mlp.up_proj.weight holds NaN"):
        build(EngineConfig(str(folder), device="reference", quantization="int8", max_model_len=32))


def test_inspect_shows_what_weights_run_as(pelton: Any) -> None:
    folder, _ = tiny_checkpoint("llama")
    result = json.loads(pelton("inspect", folder, "--quantization", "int8", "--json").stdout)
    assert set(result["runs_as"]) == {"f32", "int8g16:f16"}
    assert sum(result["parameters"].values()) < sum(result["runs_as"].values())  # the tied weight runs twice
    text = pelton("inspect", folder, "--quantization", "int8").stdout
    assert "they run as" in text and "int8g16:f16" in text


def test_dump_graph_and_run_take_the_option(pelton: Any) -> None:
    folder, _ = tiny_checkpoint("qwen3")
    result = pelton("dump-graph", folder, "--quantization", "int4", "--after", "trace")
    assert result.exit_code == 0 and "int4g16m:f16[" in result.stdout
    for verb in ("run", "generate", "build", "inspect", "dump-graph"):
        text = " ".join(pelton(verb, "--help").stdout.split())
        assert "--quantization [int8|int4|fp8|nvfp4|w8a8]" in text and "better at 4 bits" in text


def test_generate_runs_quantized(pelton: Any, tmp_path: Path) -> None:
    folder, _ = tiny_checkpoint("qwen3")
    prompts, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt_token_ids": [5, 6, 7], "max_tokens": 3, "ignore_eos": true}\n')
    options = ("--device", "reference", "--quantization", "nvfp4", "--max-model-len", 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = pelton("generate", folder, "-i", prompts, "-o", answers, *options)
    assert result.exit_code == 0, result.output
    assert len(json.loads(answers.read_text())["token_ids"]) == 3
    assert json.loads((tmp_path / "out.jsonl.meta.json").read_text())["quantization"] == "nvfp4"
    again = pelton("generate", folder, "-i", prompts, "-o", answers, "--device", "reference", "--max-model-len", 32)
    assert again.exit_code == 2 and "was made from another quantization" in again.stderr


@pytest.fixture
def pelton() -> Any:
    from click.testing import CliRunner

    from pelton.cli.main import pelton as command_line

    return lambda *arguments: CliRunner().invoke(command_line, [str(a) for a in arguments])
