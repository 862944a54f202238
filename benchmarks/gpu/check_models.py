"""Random models of the families' real shapes, with few layers, made and saved by transformers."""

from __future__ import annotations

import shutil
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
#: In place of these fields, where a config has them: for the interpreter.
_SMALL = {
    "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 3,
    "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 128, "sliding_window": 5, "n_embd": 48, "n_head": 3,
    "n_layer": 1,
}  # fmt: skip


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


def make(family: str, *, small: bool = False) -> Checked:
    """The weights that transformers draws hide mistakes, as norms of one and biases of zero do: noise is added."""
    import torch
    import transformers

    config_class, model_class, given = FAMILIES[family]
    fields = {k: _SMALL.get(k, v) if small else v for k, v in given.items()}
    transformers.utils.logging.disable_progress_bar()
    config = getattr(transformers, config_class)(**fields)
    config._attn_implementation = "eager"  # windows and soft-caps exactly as written
    torch.manual_seed(len(family))
    model = getattr(transformers, model_class)(config).eval()
    hidden = int(config.hidden_size)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if parameter.ndim == 1 else 2 * hidden**-0.5
            if parameter.ndim > 1 and ("embed" in name or "wte" in name):
                # Where it is the output layer, too, a token would be followed by itself, whatever the layers say.
                spread /= 8
                parameter.mul_(0.1)
            parameter.add_(torch.randn_like(parameter) * spread)
    inner = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    terms = int(config.num_hidden_layers) * (2 * hidden + inner + hidden) + hidden
    return Checked(family, model.to(torch_device()), int(config.vocab_size), terms)
