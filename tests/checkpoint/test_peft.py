"""PEFT adapters: what the config says of ranks and scales, and what is refused instead of being applied in part."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from pelton.checkpoint.peft import read_adapter
from pelton.errors import CheckpointError
from tests.helpers.adapters import random_weights, write_peft

MODULES = {
    "model.layers.0.self_attn.q_proj": (16, 24),
    "model.layers.0.mlp.down_proj": (40, 16),
    "model.layers.1.self_attn.q_proj": (16, 24),
    "model.layers.11.self_attn.q_proj": (16, 24),
}
Q0, DOWN, Q1, Q11 = MODULES


def weights(rank: int = 4, **ranks: int) -> dict[str, Any]:
    made = random_weights(MODULES, 1, rank)
    return made | {n: random_weights({n: MODULES[n]}, 2, r)[n] for n, r in ranks.items()}


def scales(folder: Path, given: dict[str, Any], max_rank: int = 16) -> dict[str, float]:
    """What each module's B was multiplied with; A comes as it is."""
    got = read_adapter(folder, MODULES, max_rank).weights
    assert list(got) == sorted(given)
    found = {}
    for name, (a, b) in given.items():
        assert np.array_equal(got[name][0], a) and a.dtype == got[name][0].dtype == np.float32
        found[name] = float((got[name][1] / b).mean())
        assert np.allclose(got[name][1], b * found[name], rtol=1e-6)
    return found


def test_the_scale_is_alpha_over_rank(tmp_path: Path) -> None:
    given = weights()
    assert scales(write_peft(tmp_path, given, lora_alpha=12), given) == pytest.approx(dict.fromkeys(MODULES, 3.0))
    assert scales(write_peft(tmp_path, given, lora_alpha=0.5), given) == pytest.approx(dict.fromkeys(MODULES, 0.125))


def test_rslora_divides_by_the_root_of_the_rank(tmp_path: Path) -> None:
    given = weights(rank=3)
    want = dict.fromkeys(MODULES, 6 / math.sqrt(3))
    assert scales(write_peft(tmp_path, given, lora_alpha=6, use_rslora=True), given) == pytest.approx(want)


def test_patterns_fit_the_end_of_a_name_and_the_first_one_counts(tmp_path: Path) -> None:
    given = weights(**{Q1: 2, DOWN: 5})
    folder = write_peft(
        tmp_path, given, r=4, lora_alpha=8, rank_pattern={"1.self_attn.q_proj": 2, "down_proj": 5, "1.q_proj": 9},
        alpha_pattern={r"layers\.\d+\.self_attn\.q_proj": 16, "q_proj": 1},
    )  # fmt: skip
    assert scales(folder, given) == pytest.approx({Q0: 4.0, DOWN: 8 / 5, Q1: 8.0, Q11: 4.0})


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_halves_are_read_exactly(tmp_path: Path, dtype: Any) -> None:
    given = {n: tuple(v.astype(dtype) for v in pair) for n, pair in weights().items()}
    write_peft(tmp_path, given, lora_alpha=4)
    got = read_adapter(tmp_path, MODULES, 4).weights
    assert all(np.array_equal(got[n][i], given[n][i].astype(np.float32)) for n in given for i in (0, 1))


def test_fan_in_fan_out_says_nothing_of_a_and_b(tmp_path: Path) -> None:
    given = weights()
    assert scales(write_peft(tmp_path, given, fan_in_fan_out=True), given) == pytest.approx(dict.fromkeys(MODULES, 2.0))


def test_the_identity_is_that_of_the_content(tmp_path: Path) -> None:
    def identity(name: str, given: Any, **config: Any) -> str:
        return read_adapter(write_peft(tmp_path / name, given, **config), MODULES, 16).identity

    one = identity("a", weights())
    assert identity("b", weights()) == one
    assert identity("c", weights(), lora_alpha=3) != one
    assert identity("d", random_weights(MODULES, 5)) != one


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA is supported"),
        ({"use_dora": True}, r"has DoRA \(use_dora\), which is not supported"),
        ({"bias": "all"}, r"has biases \(bias = 'all'\)"),
        ({"lora_bias": True}, "biases of its own"),
        ({"modules_to_save": ["lm_head"]}, r"whole modules \(modules_to_save\)"),
        ({"trainable_token_indices": [1, 2]}, "trained tokens"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "replicated layers"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "belong to no linear layer"),
        ({"alora_invocation_tokens": [5]}, "aLoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' has changed the base model's weights"),
        ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
        ({"r": 5}, r"has lora_A \[4, 40\] and lora_B \[16, 4\], its rank 5 .* ask for \[5, 40\] and \[16, 5\]"),
        ({"r": "4"}, "r of model.layers.* is '4'"),
        ({"r": 0}, "is 0; check adapter_config.json"),
        ({"r": True}, "is True"),
        ({"lora_alpha": None}, "lora_alpha of model.layers.* is None"),
        ({"lora_alpha": float("inf")}, "is inf"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern is"),
        ({"alpha_pattern": {"q_proj(": 2}}, "is no pattern"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_not_supported_is_named(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read_adapter(write_peft(tmp_path, weights(), **config), MODULES, 16)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def rewrite(folder: Path, change: Any) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)


A, B = "base_model.model." + Q0 + ".lora_A.weight", "base_model.model." + Q0 + ".lora_B.weight"
EYE = np.eye(4, dtype=np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(B), "q_proj has lora_A alone; the file is incomplete"),
        (lambda t: t.pop(A), "q_proj has lora_B alone"),
        (lambda t: t.update({A: t[A][:, :-1].copy()}), r"lora_A \[4, 15\]"),
        (lambda t: t.update({B: t[B].T.copy()}), r"lora_B \[4, 24\]"),
        (lambda t: t.update({A: t[A].reshape(4, 16, 1)}), r"lora_A \[4, 16, 1\]"),
        (lambda t: t.update({A: t[A] * np.float32("nan")}), "lora_A.weight holds NaN or infinity"),
        (lambda t: t.update({A: t[A].astype(np.int32)}), "is stored as I32"),
        (lambda t: t.update({"base_model.model.model.embed_tokens.weight": EYE}), "is of no use to a linear layer"),
        (lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": EYE}), "adapts an embedding"),
        (lambda t: t.update({A.replace("A.weight", "magnitude_vector"): EYE}), "belongs to DoRA"),
        (lambda t: t.update({"base_model.model.lm_head.lora_A.weight": EYE}), "adapts the output layer"),
        (lambda t: t.update({A.replace(".0.", ".99."): EYE}), "no linear layer model.layers.99.self_attn.q_proj"),
        (lambda t: t.update({A.replace("q_proj", "q_proj.base_layer"): EYE}), "no linear layer"),
        (lambda t: t.clear(), "has no tensors"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, change: Any, message: str) -> None:
    folder = write_peft(tmp_path, weights())
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=message):
        read_adapter(folder, MODULES, 16)


def test_a_rank_above_the_room_names_the_knob(tmp_path: Path) -> None:
    folder = write_peft(tmp_path, weights(rank=9))
    with pytest.raises(CheckpointError, match="rank 9, max_lora_rank is 8; set max_lora_rank=9"):
        read_adapter(folder, MODULES, 8)


def test_files_that_are_missing_damaged_or_pickled(tmp_path: Path) -> None:
    def refused(message: str, folder: Path = tmp_path / "a") -> None:
        with pytest.raises(CheckpointError, match=message):
            read_adapter(folder, MODULES, 16)

    refused("does not exist")
    folder = write_peft(tmp_path / "a", weights())
    refused("is a file; give the folder", folder / "adapter_config.json")
    whole = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(whole[:-1])
    refused("damaged")
    (folder / "adapter_model.safetensors").unlink()
    refused("holds no adapter_model.safetensors")
    (folder / "adapter_model.bin").write_bytes(b"")
    refused("is pickled, which could run code when loaded")
    (folder / "adapter_config.json").write_text("{")
    (folder / "adapter_model.safetensors").write_bytes(whole)
    refused("not valid JSON")
    (folder / "adapter_config.json").write_text(json.dumps([]))
    refused("not a JSON object")
    (folder / "adapter_config.json").unlink()
    refused("holds no adapter_config.json")
