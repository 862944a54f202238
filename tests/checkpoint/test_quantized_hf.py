"""Quantized checkpoints as they lie on the hub, against transformers running the same values unquantized."""

from __future__ import annotations

import functools
import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from pelton.build import plan
from pelton.checkpoint import open_checkpoint
from pelton.checkpoint.quantized_hf import METHODS, convert_quantized, unpack_bits
from pelton.config import EngineConfig
from pelton.errors import CheckpointError, PeltonError
from pelton.graph.quantized import QuantizedArray
from tests.helpers.families import Sequences, load, tolerance
from tests.helpers.tiny_models import COMMON, oracle_logits, temporary_folder

from .quantized_files import FORMATS, fp8, int_quantized, words

SIZES = {**COMMON, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = [int(t) for t in np.random.default_rng(5).integers(3, 101, 24)]


@functools.cache
def model(family: str, format: str) -> tuple[Path, np.ndarray]:
    """(folder of the quantized checkpoint, logits of transformers on the values that its codes mean)."""
    import torch
    import transformers

    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(**SIZES)
    config._attn_implementation = "eager"
    net = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    scheme, write, _ = FORMATS[format]
    stored: dict[str, Any] = {}
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
            if not name.endswith("_proj.weight"):
                stored[name] = parameter.numpy().copy()
                continue
            parts, values = write(parameter.numpy())
            parameter.copy_(torch.from_numpy(values))
            base = name.removesuffix(".weight")
            stored |= {f"{base}.{suffix}": np.ascontiguousarray(part) for suffix, part in parts.items()}
    folder = temporary_folder(f"tiny-{format}-")
    safetensors.numpy.save_file(stored, folder / "model.safetensors")
    fields = {**config.to_dict(), "architectures": [f"{family}ForCausalLM"], "quantization_config": scheme}
    (folder / "config.json").write_text(json.dumps(fields))
    return folder, oracle_logits(net, TOKENS)[-1]


@pytest.mark.parametrize("device", ["reference", "cpu"])
@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_logits_are_those_of_the_values(format: str, family: str, device: str) -> None:
    folder, want = model(family, format)
    checkpoint = open_checkpoint(folder)
    types = {t.type.dtype for n, t in checkpoint.tensors.items() if n.endswith("_proj.weight")}
    assert {str(t) for t in types} == {FORMATS[format][2]}
    assert not [n for n in checkpoint.tensors if n.rpartition(".")[2] not in ("weight", "bias")]
    isa = device if device == "reference" else "generic"
    built = load(folder, isa, kv_cache_dtype="f32")
    got = Sequences(built.executor).step(a=TOKENS)[0]
    built.close()
    assert np.abs(got - want).max() <= tolerance(2 * 4 * 64) * np.abs(want).max()  # both compute in f32


def test_what_is_done_differently_is_said() -> None:
    assert plan(EngineConfig(str(model("Llama", "fp8-static")[0]), device="reference")).notes == (
        "stored scales of activations are not used: they are found as the model runs",
    )
    (note,) = open_checkpoint(model("Llama", "gptq-reordered")[0]).notes
    assert "desc_act" in note and "bf16" in note


def test_no_weight_is_read_when_a_checkpoint_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pelton.checkpoint.quantized_hf.unpack_bits", lambda *_: pytest.fail("read"))
    open_checkpoint(model("Llama", "gptq-4")[0])


# ------------------------------------------------------------------ single layers


def lazy(name: str, values: Any) -> Any:
    from pelton.checkpoint.base import LazyTensor
    from pelton.checkpoint.safetensors import _DTYPES
    from pelton.graph.types import TensorType

    values = np.asarray(values)
    dtype = next(kind for kind, array in _DTYPES.values() if array == values.dtype)
    return LazyTensor(name, TensorType(values.shape, dtype), lambda: values, values.nbytes)


def convert(scheme: Any, **parts: Any) -> dict[str, Any]:
    return convert_quantized({"quantization_config": scheme}, {f"a.{k}": lazy(f"a.{k}", v) for k, v in parts.items()})[
        0
    ]


def weight(rows: int, cols: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, cols)).astype(np.float32)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("rows", "cols"), [(32, 64), (64, 192), (96, 32)])
def test_every_layout_comes_back_bit_for_bit(format: str, rows: int, cols: int) -> None:
    scheme, write, _ = FORMATS[format]
    parts, values = write(weight(rows, cols))
    value = convert(scheme, **parts)["a.weight"].read()
    if isinstance(value, QuantizedArray):
        value = value.dequantize()
    if format == "nvfp4":  # one factor is kept, the oracle divides by its inverse
        np.testing.assert_allclose(value, values, rtol=3e-7)
    elif format == "gptq-reordered":  # of one group only, there is nothing to reorder
        np.testing.assert_array_equal(value.astype(ml_dtypes.bfloat16), values.astype(ml_dtypes.bfloat16))
    else:
        np.testing.assert_array_equal(value, values)


@pytest.mark.parametrize(("cols", "group"), [(576, 64), (896, 128), (4864, 128), (128, 0), (100, 0), (200, 8)])
def test_blocks_of_128_with_a_ragged_end_are_smaller_groups_and_exact(cols: int, group: int) -> None:
    scheme = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}
    parts, values = fp8((128, 128), "weight_scale_inv")(weight(200, cols))
    value = convert(scheme, **parts)["a.weight"].read()
    assert value.type.group_size == group
    np.testing.assert_array_equal(value.dequantize(), values)


def test_compressed_layers_take_the_group_that_names_them() -> None:
    scheme = json.loads(json.dumps(FORMATS["w4a16"][0]))
    scheme["config_groups"]["named"] = {
        "targets": [r"re:.*down_proj"],
        "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
    }  # fmt: skip
    scheme["format"] = "mixed-precision"
    four, eight = FORMATS["w4a16"][1](weight(32, 64))[0], int_quantized(True)(weight(32, 64))[0]
    tensors = {f"m.up_proj.{k}": v for k, v in four.items()} | {f"m.down_proj.{k}": v for k, v in eight.items()}
    result, _ = convert_quantized({"quantization_config": scheme}, {n: lazy(n, v) for n, v in tensors.items()})
    assert {n: str(t.type.dtype) for n, t in result.items()} == {
        "m.up_proj.weight": "int4g32:bf16", "m.down_proj.weight": "int8g0:f32"
    }  # fmt: skip


def test_gptq_layers_that_differ_are_told_apart_by_their_shapes() -> None:
    scheme = {**FORMATS["gptq-4"][0], "dynamic": {"+:.*": {"bits": 8, "group_size": 16}}}
    from .quantized_files import gptq

    parts, values = gptq(8, 16, True)(weight(32, 64))
    value = convert(scheme, **parts)["a.weight"].read()
    assert str(value.type) == "int8g16:f16"
    np.testing.assert_array_equal(value.dequantize(), values)


@pytest.mark.parametrize("zero", [True, False])
def test_biases_of_zeros_that_the_model_does_not_have(zero: bool, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(model("Llama", "gptq-4")[0], folder)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.bias"] = np.full(96, 0 if zero else 1, np.float16)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    if zero:
        plan(EngineConfig(str(folder), device="reference"))
    else:
        with pytest.raises(CheckpointError, match=r"does not use, such as model.layers.0.mlp.up_proj.bias"):
            plan(EngineConfig(str(folder), device="reference"))


@pytest.mark.parametrize("bits", range(1, 9))
def test_bits_unpack_across_borders_and_chunks(bits: int) -> None:
    values = np.random.default_rng(bits).integers(0, 1 << bits, (600, 45))
    np.testing.assert_array_equal(unpack_bits(words(values, bits), bits, 45), values)


# ------------------------------------------------------------------ what is refused

GPTQ, AWQ, W4 = (FORMATS[name][0] for name in ("gptq-4-asymmetric", "awq", "w4a16-asymmetric"))


@pytest.mark.parametrize(
    ("scheme", "says"),
    [
        ({"quant_method": "bitsandbytes"}, "method 'bitsandbytes' is not supported; use a model in gptq, awq, "),
        ({}, "method 'None' is not supported"),
        ({"quant_method": ["gptq"]}, "is not supported"),
        ([], "is no object"),
        ({**GPTQ, "bits": 5}, "bits is 5"),
        ({**GPTQ, "bits": "4"}, "bits is 4; this value is not supported"),
        ({**GPTQ, "group_size": 0}, "group_size is 0"),
        ({**GPTQ, "group_size": 10**30}, "group_size is 1000"),
        ({**GPTQ, "group_size": 7}, r"scales has shape [2, 32], expected [10, 32]"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "GPTQ in the format 'marlin'"),
    ],
)  # fmt: skip
def test_gptq_configs_that_are_refused(scheme: Any, says: str) -> None:
    refused(scheme, FORMATS["gptq-4-asymmetric"][1](weight(32, 64))[0], says)


def refused(scheme: Any, parts: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        convert(scheme, **parts)["a.weight"].read()
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_symmetric_codes_with_other_zero_points() -> None:
    scheme, write, _ = FORMATS["gptq-4-asymmetric"]
    refused({**scheme, "sym": True}, write(weight(32, 64))[0], 'not symmetric, as the config says; set "sym": false')


@pytest.mark.parametrize(
    ("change", "says"),
    [({"version": "gemv"}, "layout 'gemv'"), ({"backend": "llm-awq"}, "not supported"), ({"bits": 8}, "bits is 8")],
)
def test_awq_configs_that_are_refused(change: Any, says: str) -> None:
    refused({**AWQ, **change}, FORMATS["awq"][1](weight(32, 64))[0], says)


def edited(change: Any, weights: Any = None) -> Any:
    scheme = json.loads(json.dumps(W4)) | change
    if weights:
        scheme["config_groups"]["group_0"]["weights"] |= weights
    return scheme


@pytest.mark.parametrize(
    ("scheme", "says"),
    [
        (edited({"format": "marlin-24"}), "compressed-tensors in the format 'marlin-24' is not supported"),
        (edited({"sparsity_config": {"format": "sparse-24-bitmask"}}), "format 'sparse-24-bitmask'"),
        (edited({"config_groups": None}), "no config_groups"),
        (edited({"config_groups": {"g": {"targets": ["re:b"], "weights": {}}}}), "no config group targets it"),
        (edited({"config_groups": {"g": {"targets": ["re:("], "weights": {}}}}), "is no regular expression"),
        (edited({}, {"group_size": 1 << 40}), "group_size is 10995"),
        (edited({}, {"strategy": "attn_head"}), "strategy 'attn_head' is not supported"),
        (edited({}, {"num_bits": 9}), "num_bits is 9"),
        (edited({}, {"num_bits": 8}), "weight_packed has shape"),
    ],
)
def test_compressed_configs_that_are_refused(scheme: Any, says: str) -> None:
    refused(scheme, FORMATS["w4a16-asymmetric"][1](weight(32, 64))[0], says)


@pytest.mark.parametrize("format", ["fp8-blocks", "fp8-dynamic"])
def test_nan_codes_and_scales_that_are_not_finite(format: str) -> None:
    scheme, write, _ = FORMATS[format]
    for code in (0x7F, 0xFF):
        parts, _ = write(weight(48, 80))
        parts["weight"].view(np.uint8)[3, 5] = code
        refused(scheme, parts, "layer a: the FP8 weight holds NaN; the model was damaged")
    parts, _ = write(weight(48, 80))
    next(v for k, v in parts.items() if "scale" in k).reshape(-1)[0] = np.inf
    refused(scheme, parts, "scales are not finite")


def test_codes_without_a_config_or_without_scales() -> None:
    parts = FORMATS["gptq-4"][1](weight(32, 64))[0]
    with pytest.raises(CheckpointError, match=r"a.qweight is quantized, but config.json has no quantization_config"):
        convert_quantized({}, {"a.qweight": lazy("a.qweight", parts["qweight"])})
    codes = weight(32, 64).astype(ml_dtypes.float8_e4m3fn)
    with pytest.raises(CheckpointError, match="layer a: its scales are missing; download the whole"):
        convert(FORMATS["fp8-blocks"][0], weight=codes)


@pytest.mark.parametrize("format", FORMATS)
def test_a_missing_part_is_named(format: str) -> None:
    scheme, write, _ = FORMATS[format]
    parts, _ = write(weight(32, 64))
    for name in parts:
        if name in ("g_idx", "input_scale", "input_global_scale"):
            continue  # of no use here, or a default
        with pytest.raises(CheckpointError) as caught:
            convert(scheme, **{k: v for k, v in parts.items() if k != name})
        assert "missing" in str(caught.value) and "\n" not in str(caught.value)


ABSURD = [
    None,
    0,
    -1,
    3,
    7,
    1 << 40,
    1.5,
    math.nan,
    "",
    "int",
    [],
    {},
    True,
    [0, 0],
    [-1, 128],
    [128, 128],
    "tensor",
    "block",
]


@pytest.mark.parametrize("format", FORMATS)
def test_damage_of_any_kind_ends_in_one_line_or_a_value(format: str) -> None:
    """Parts cut, stretched, of other types or gone, and configs with absurd values. Seeded, so failures repeat."""
    rng = random.Random(format)
    scheme, write, _ = FORMATS[format]
    parts, _ = write(weight(32, 64))
    outcomes = set()
    for case in range(150):
        broken, config = dict(parts), json.loads(json.dumps(scheme))
        for _ in range(rng.choice((1, 1, 2))):
            if rng.random() < 0.5:
                name = rng.choice(list(parts))
                broken[name] = damaged(broken.get(name, parts[name]), rng)
            else:
                target = config
                while rng.random() < 0.7 and (inner := [v for v in target.values() if isinstance(v, dict)]):
                    target = rng.choice(inner)
                target[rng.choice([*target, "group_size", "weight_block_size", "sym"])] = rng.choice(ABSURD)
        try:
            result = convert(config, **{k: v for k, v in broken.items() if v is not None})
            for tensor in result.values():
                value = tensor.read()
                shape = value.shape
                assert shape == tensor.type.shape
                if isinstance(value, QuantizedArray):
                    assert value.type == tensor.type.dtype and np.isfinite(value.dequantize()).all()
            outcomes.add("value")
        except PeltonError as error:
            assert "\n" not in str(error)
            outcomes.add("error")
        except Exception as error:
            shapes = {k: None if v is None else (v.dtype, v.shape) for k, v in broken.items()}
            raise AssertionError(f"case {case}: {error!r} for {config} and {shapes}") from error
    assert outcomes == {"value", "error"}


def damaged(values: Any, rng: random.Random) -> Any:
    if values is None or not values.size or rng.random() < 0.1:
        return None
    kind = rng.randrange(6)
    if kind == 0 and values.ndim:
        return values[: rng.randrange(values.shape[0])]
    if kind == 1 and values.ndim > 1:
        return values[:, : rng.randrange(values.shape[1])]
    if kind == 2:
        return values.reshape(-1)
    if kind == 3:
        return values[None]
    if kind == 4:
        with np.errstate(all="ignore"):
            return values.astype(rng.choice([np.float32, np.int32, np.uint8, np.float16]))
    raw = bytearray(values.tobytes())
    for _ in range(5):
        raw[rng.randrange(len(raw))] = rng.randrange(256)
    return np.frombuffer(bytes(raw), values.dtype).reshape(values.shape)


def test_every_method_is_tested() -> None:
    assert {scheme["quant_method"] for scheme, _, _ in FORMATS.values()} == set(METHODS)


@pytest.mark.parametrize("verb", ["inspect", "dump-graph", "build"])
def test_the_command_line_says_it_in_one_line(verb: str, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from pelton.cli.main import pelton

    folder = tmp_path / "m"
    shutil.copytree(model("Llama", "gptq-4")[0], folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "hqq"
    (folder / "config.json").write_text(json.dumps(config))
    result = CliRunner().invoke(pelton, [verb, str(folder)])
    assert result.exit_code == 2
    assert result.stderr == (
        "error: quantization method 'hqq' is not supported; use a model in gptq, awq, compressed-tensors, fp8, mxfp4, "
        "or a GGUF file\n"
    )
