"""Tiny random checkpoints of every family, made by transformers, and its logits and tokens as the oracle."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

COMMON: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "vocab_size": 101,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32, "rope_theta": 10000.0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}

#: name -> (transformers config class, model class, config fields)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**COMMON, "tie_word_embeddings": True}),
    "llama3-rope": ("LlamaConfig", "LlamaForCausalLM", {**COMMON, "rope_parameters": LLAMA3, "attention_bias": True}),
    "llama-linear-rope": (
        "LlamaConfig", "LlamaForCausalLM",
        {**COMMON, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}},
    ),
    "llama-yarn": ("LlamaConfig", "LlamaForCausalLM", {**COMMON, "rope_parameters": YARN, "head_dim": 16}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**COMMON, "sliding_window": 7, "head_dim": 12}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", COMMON),
    "qwen2-window": (
        "Qwen2Config", "Qwen2ForCausalLM",
        {**COMMON, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**COMMON, "head_dim": 16, "tie_word_embeddings": True}),
    "gemma2": (
        "Gemma2Config", "Gemma2ForCausalLM",
        {**COMMON, "head_dim": 16, "sliding_window": 7, "query_pre_attn_scalar": 24},
    ),
    "gemma3": (
        "Gemma3TextConfig", "Gemma3ForCausalLM",
        {**COMMON, "head_dim": 16, "sliding_window": 7, "sliding_window_pattern": 3, "num_hidden_layers": 4},
    ),
    "gpt2": (
        "GPT2Config", "GPT2LMHeadModel",
        {"n_embd": 48, "n_head": 4, "n_layer": 3, "n_positions": 256, "vocab_size": 101,
         "bos_token_id": 1, "eos_token_id": 2},
    ),
    "bloom": (
        "BloomConfig", "BloomForCausalLM",
        {"hidden_size": 48, "n_head": 6, "n_layer": 3, "vocab_size": 101, "bos_token_id": 1, "eos_token_id": 2},
    ),
}  # fmt: skip


def temporary_folder(prefix: str) -> Path:
    """A folder that lives as long as the test process."""
    folder = tempfile.mkdtemp(prefix=prefix)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@functools.cache
def tiny_checkpoint(family: str, dtype: str = "float32", layers: int | None = None) -> tuple[Path, Any]:
    """(folder with config.json and safetensors, the transformers model in eval mode). layers: None: the family's."""
    import torch
    import transformers

    config_class, model_class, fields = FAMILIES[family]
    if layers is not None:
        fields = fields | {"num_hidden_layers": layers}
    config = getattr(transformers, config_class)(**fields)
    config._attn_implementation = "eager"  # soft-caps and windows exactly as written
    torch.manual_seed(len(family))
    model = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():  # the default initialisation hides mistakes: norms of one, biases of zero
        for parameter in model.parameters():
            spread = 0.3 if parameter.ndim == 1 else 0.15
            parameter.add_(torch.randn_like(parameter) * spread)
    model = model.to(getattr(torch, dtype))
    folder = temporary_folder(f"tiny-{family}-")
    model.save_pretrained(folder, safe_serialization=True)
    return folder, model


def oracle_logits(model: Any, token_ids: list[int]) -> Any:
    """float32 [len(token_ids), vocab] of one full forward pass."""
    import torch

    with torch.no_grad():
        return model(torch.tensor([token_ids]), use_cache=False).logits[0].float().numpy()
