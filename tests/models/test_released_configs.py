"""Configs as they lie on the hub, old formats and absent keys included, shrunk: read as transformers reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pelton.build import trained_context
from pelton.errors import UnsupportedModelError
from pelton.models import create
from tests.helpers.families import Sequences, load
from tests.helpers.tiny_models import oracle_logits

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 101,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
LLAMA3 = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
    "rope_type": "llama3",
}  # fmt: skip


def config(architecture: str, model_type: str, **fields: Any) -> dict[str, Any]:
    return {"architectures": [architecture], "model_type": model_type, **SIZES, **fields}


def llama(**fields: Any) -> dict[str, Any]:
    kind = fields.pop("model_type", "llama")
    return config("LlamaForCausalLM", kind, **{"hidden_act": "silu", "max_position_embeddings": 4096} | fields)


def gemma2(**fields: Any) -> dict[str, Any]:
    return config("Gemma2ForCausalLM", "gemma2", head_dim=16, max_position_embeddings=8192, **fields)


def gemma3(**fields: Any) -> dict[str, Any]:
    fields = {"head_dim": 16, "sliding_window": 8, "num_hidden_layers": 6, "max_position_embeddings": 4096} | fields
    return config("Gemma3ForCausalLM", "gemma3_text", **fields)


CONFIGS: dict[str, dict[str, Any]] = {
    "llama-1": {k: v for k, v in llama().items() if k != "num_key_value_heads"},
    "llama-2": llama(rms_norm_eps=1e-5, rope_scaling=None, pretraining_tp=1, tie_word_embeddings=False),
    "llama-3.1": llama(rope_scaling=LLAMA3, rope_theta=500000.0, attention_bias=False, mlp_bias=False),
    "llama-3.2": llama(rope_scaling={**LLAMA3, "factor": 32.0}, head_dim=16, tie_word_embeddings=True),
    "llama biases": llama(mlp_bias=True, attention_bias=True),
    "llama dynamic": llama(rope_scaling={"type": "dynamic", "factor": 2.0}),
    "llama linear": llama(rope_scaling={"type": "linear", "factor": 2.0}),
    "smollm2": llama(rope_interleaved=False, rope_theta=130000, tie_word_embeddings=True),
    "mistral-v0.1": config("MistralForCausalLM", "mistral", sliding_window=8, max_position_embeddings=4096),
    "mistral-v0.3": config("MistralForCausalLM", "mistral", sliding_window=None, head_dim=None, rope_theta=1e6),
    "qwen2.5": config(
        "Qwen2ForCausalLM", "qwen2", sliding_window=8, max_window_layers=0, use_sliding_window=False, rope_theta=1e6
    ),
    "qwen2.5 yarn": config(
        "Qwen2ForCausalLM", "qwen2", max_position_embeddings=32, rope_theta=1e6,
        rope_scaling={"factor": 4.0, "original_max_position_embeddings": 32, "type": "yarn"},
    ),
    "qwen3": config("Qwen3ForCausalLM", "qwen3", head_dim=32, rope_scaling=None, use_sliding_window=False),
    "qwen3 bias": config("Qwen3ForCausalLM", "qwen3", head_dim=32, attention_bias=True),
    "gemma-2-2b": gemma2(
        hidden_act="gelu_pytorch_tanh", attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
        query_pre_attn_scalar=256, sliding_window=8, rope_theta=10000.0,
    ),
    "gemma-2 absent keys": gemma2(sliding_window=8, hidden_act="silu"),
    "gemma-2 caps off": gemma2(attn_logit_softcapping=None, final_logit_softcapping=None),
    "gemma-3-1b": gemma3(
        query_pre_attn_scalar=256, rope_local_base_freq=10000, rope_theta=1000000, sliding_window_pattern=3,
        rope_scaling=None,
    ),
    "gemma-3 linear": gemma3(rope_scaling={"factor": 8.0, "rope_type": "linear"}, rope_theta=1000000),
    "gemma-3 absent keys": gemma3(),
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 64, "n_head": 4, "n_layer": 3,
        "n_positions": 1024, "vocab_size": 101, "reorder_and_upcast_attn": True,
        "scale_attn_by_inverse_layer_idx": True, "n_inner": None,
    },
    "bloom-560m": {
        "architectures": ["BloomForCausalLM"], "model_type": "bloom", "n_embed": 64, "n_layer": 3,
        "num_attention_heads": 4, "seq_length": 2048, "vocab_size": 101, "slow_but_exact": False,
    },
    "bloom post-norm residual": {
        "architectures": ["BloomForCausalLM"], "model_type": "bloom", "hidden_size": 64, "n_layer": 3, "n_head": 4,
        "vocab_size": 101, "apply_residual_connection_post_layernorm": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_config_means_what_transformers_makes_of_it(name: str, tmp_path: Path) -> None:
    import torch
    import transformers

    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
    parsed = transformers.AutoConfig.from_pretrained(tmp_path)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(parsed, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.15))
    model.eval().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))  # not as the library writes it today
    tokens = [int(t) for t in np.random.default_rng(1).integers(3, 101, 60)]
    built = load(tmp_path, "reference", max_model_len=64)
    got = Sequences(built.executor).step(a=tokens)[0]
    want = oracle_logits(model, tokens)[-1]
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize(
    "fields",
    [
        {"sliding_window": -5, "model_type": "mistral"},
        {"rms_norm_eps": -1.0},
        {"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}},
        {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}},
        {"partial_rotary_factor": 0.5},
        {"hidden_act": "mystery"},
        {"num_attention_heads": 3},
    ],
    ids=str,
)
def test_options_that_would_give_wrong_numbers_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError):
        create(llama(**fields))


def test_rope_scaling_stretches_the_context() -> None:
    assert trained_context({"max_position_embeddings": 4096}) == 4096
    assert trained_context({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4}}) == 16384
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    assert trained_context({"max_position_embeddings": 32768, "rope_scaling": yarn}) == 131072
    assert trained_context({"max_position_embeddings": 131072, "rope_parameters": yarn}) == 131072
    assert trained_context({"max_position_embeddings": 131072, "rope_scaling": LLAMA3}) == 131072
    assert trained_context({"n_positions": 1024}) == 1024
