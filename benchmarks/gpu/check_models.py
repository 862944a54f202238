"""Random models of the families' real shapes, with few layers, made and saved by transformers."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .device import torch_device
from .peaks import torch_type

_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 2048}
_LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128, "rope_theta": 500000.0,
}  # fmt: skip

#: name -> (config class, model class, config fields). Windows and soft-caps are reached by the prompts.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    # SmolLM2-135M: three query heads to a key head, tied embeddings.
    "llama": ("LlamaConfig", "LlamaForCausalLM", {
        **_IDS, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 32000, "tie_word_embeddings": True}),
    # Llama 3: heads of 128, four to a key head, its own rope.
    "llama3": ("LlamaConfig", "LlamaForCausalLM", {
        **_IDS, "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 3, "num_attention_heads": 8,
        "num_key_value_heads": 2, "vocab_size": 16000, "rope_parameters": _LLAMA3}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {
        **_IDS, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 16000, "sliding_window": 64,
        "query_pre_attn_scalar": 64}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {
        "n_embd": 768, "n_head": 12, "n_layer": 3, "n_positions": 1024, "vocab_size": 8000, "bos_token_id": 1,
        "eos_token_id": 2}),
    "bloom": ("BloomConfig", "BloomForCausalLM", {
        "hidden_size": 512, "n_head": 8, "n_layer": 3, "vocab_size": 8000, "bos_token_id": 1, "eos_token_id": 2}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {
        **_IDS, "hidden_size": 896, "intermediate_size": 2432, "num_hidden_layers": 3, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 16000, "tie_word_embeddings": True}),
    # Heads wider than hidden_size / heads, norms of queries and keys.
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {
        **_IDS, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 3, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 8000}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {
        **_IDS, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 16000, "sliding_window": 64,
        "sliding_window_pattern": 3}),
    # Heads of 80, which is no power of two.
    "mistral": ("MistralConfig", "MistralForCausalLM", {
        **_IDS, "hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 3, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 80, "vocab_size": 8000, "sliding_window": 48}),
}  # fmt: skip
_WIDTHS = ("hidden_size", "intermediate_size", "vocab_size", "n_embd")


@dataclass(frozen=True)
class Checked:
    """A model under check. model: transformers', float32, on the device. terms: of the sums on its longest path."""

    family: str
    model: Any
    vocab_size: int
    terms: int

    def saved(self, folder: Path, dtype: str) -> tuple[Path, Any, Any]:
        """(folder of a checkpoint in ``dtype``, transformers' model of it, one with the same weights in float32)."""
        import copy

        narrow = copy.deepcopy(self.model).to(torch_type(dtype))
        shutil.rmtree(folder, ignore_errors=True)
        narrow.save_pretrained(folder, safe_serialization=True)
        return folder, narrow, copy.deepcopy(narrow).float()

    def logits(self, model: Any, token_ids: list[int]) -> Any:
        """float32 [tokens, vocab] of one pass, on the host."""
        import torch

        with torch.inference_mode():
            ids = torch.tensor([token_ids], device=torch_device())
            return model(ids, use_cache=False).logits[0].float().cpu().numpy()


def make(family: str, narrower: int = 1) -> Checked:
    """The weights that transformers draws hide mistakes, as norms of one and biases of zero do: noise is added.

    narrower: widths are divided by this.
    """
    import torch
    import transformers

    config_class, model_class, given = FAMILIES[family]
    fields: Mapping[str, Any] = {k: v // narrower if k in _WIDTHS else v for k, v in given.items()}
    config = getattr(transformers, config_class)(**fields)
    config._attn_implementation = "eager"  # windows and soft-caps exactly as written
    torch.manual_seed(len(family))
    model = getattr(transformers, model_class)(config).eval()
    hidden = int(config.hidden_size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else hidden**-0.5))
    inner = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    terms = int(config.num_hidden_layers) * (2 * hidden + inner + hidden) + hidden
    return Checked(family, model.to(torch_device()), int(config.vocab_size), terms)
