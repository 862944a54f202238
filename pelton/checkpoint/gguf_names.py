"""GGUF names, metadata and layouts -> those of Hugging Face, so that one model file serves both formats.

Sources: the constants and tensor maps of the ``gguf`` package; what llama.cpp's ``convert_hf_to_gguf`` does
to each family; the configuration classes of ``transformers``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from ..errors import CheckpointError
from ..graph.quantized import Array, HostTensor, QuantizedArray
from ..graph.types import F32, TensorType
from .base import LazyTensor

Config = dict[str, Any]
Tensors = Mapping[str, LazyTensor]

_MAX_LAYERS = 1 << 12  # no model comes near; bounds the per-layer lists of a damaged file
_BLOCK_TENSOR = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.([a-z_0-9]+)\.(weight|bias)")
_OUTER_TENSOR = re.compile(r"([a-z_0-9]+)\.(weight|bias)")
_ROPE_FACTORS = "rope_freqs.weight"


def translate(
    path: Path, metadata: Mapping[str, Any], tensors: Tensors
) -> tuple[Config, dict[str, Any], dict[str, LazyTensor]]:
    """Config, generation config, and tensors under Hugging Face names and in the Hugging Face layout.

    An architecture or a tensor that is not in the tables keeps its GGUF name: building the model decides.
    GPT-2 alone keeps its matrices as stored, [out, in], and says so by ``config["pelton_transposed"]``.

    Raises:
        CheckpointError: metadata that the architecture needs is missing, of a wrong type, or contradicts shapes.
    """
    fields = _Fields(path, metadata)
    fields.arch = fields.text("general.architecture")
    generation = _generation(fields)
    family = _FAMILIES.get(fields.arch)
    if family is None:
        return {"architectures": [fields.arch], "model_type": fields.arch}, generation, dict(tensors)
    config: Config = {"architectures": [family.architecture], "model_type": family.model_type}
    config |= family.config(fields, tensors)
    config["vocab_size"] = _vocab_size(fields, tensors)
    config["tie_word_embeddings"] = "output.weight" not in tensors
    mapped: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        if name == _ROPE_FACTORS:
            continue  # part of the config by now
        moved = _restore_layout(fields, family, name, replace(tensor, name=_hf_name(family, name)))
        if moved.name in mapped:
            fields.fail(f"two tensors are named {moved.name!r}")
        mapped[moved.name] = moved
    return config, generation, mapped


class _Fields:
    """Typed access to the metadata of one file; ``{}`` in a key stands for the architecture."""

    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        self.path, self.metadata, self.arch = path, metadata, ""

    def fail(self, what: str, remedy: str = "the file is damaged or incomplete: convert the model again") -> NoReturn:
        raise CheckpointError(f"{self.path}: {what}", remedy)

    def get(self, key: str) -> Any:
        return self.metadata.get(key.format(self.arch))

    def text(self, key: str, default: str | None = None) -> str:
        value = self.get(key)
        if isinstance(value, str):
            return value
        return str(self._absent(key, value, default, "text"))

    def count(self, key: str, default: int | None = None) -> int:
        """A positive integer. A per-layer array counts as its single value."""
        value = self.get(key)
        if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and value.size and (value == value[0]).all():
            value = int(value[0])
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31:
            return value
        return int(self._absent(key, value, default, "one positive integer"))

    def number(self, key: str, default: float | None = None) -> float:
        """A finite float, as the shortest decimal of its float32: 1e-05, not 9.99999974e-06."""
        value = self.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e38:  # also no NaN
            return float(str(np.float32(value)))
        return float(self._absent(key, value, default, "a finite number"))

    def _absent(self, key: str, value: Any, default: Any, kind: str) -> Any:
        key = key.format(self.arch)
        if value is not None:
            self.fail(f"metadata {key!r} is {str(value)[:40]!r}, not {kind}")
        if default is None:
            self.fail(f"metadata {key!r} is missing")
        return default


def _vocab_size(fields: _Fields, tensors: Tensors) -> int:
    embedding = tensors.get("token_embd.weight")
    if embedding is not None:  # the table itself: some converters pad it, some metadata lacks the size
        return int(embedding.type.shape[0])
    return fields.count("{}.vocab_size")


def _generation(fields: _Fields) -> dict[str, Any]:
    """The fields of generation_config.json that GGUF knows. Several end tokens make a list."""
    ids: dict[str, int] = {}
    for name in ("bos", "eos", "eot", "eom", "padding"):
        value = fields.get(f"tokenizer.ggml.{name}_token_id")
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31:
            ids[name] = value
    generation: dict[str, Any] = {}
    if "bos" in ids:
        generation["bos_token_id"] = ids["bos"]
    ends = list(dict.fromkeys(ids[n] for n in ("eos", "eot", "eom") if n in ids))
    if ends:
        generation["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    if "padding" in ids:
        generation["pad_token_id"] = ids["padding"]
    for key, name in (("temp", "temperature"), ("top_k", "top_k"), ("top_p", "top_p"), ("min_p", "min_p")):
        value = fields.get(f"general.sampling.{key}")
        if isinstance(value, int) and not isinstance(value, bool):
            generation[name] = value
        elif isinstance(value, float) and math.isfinite(value):
            generation[name] = float(str(np.float32(value)))
    return generation


# --- configs ---------------------------------------------------------------------------------------------


def _decoder_config(fields: _Fields, tensors: Tensors) -> Config:
    """What Llama, Mistral, Qwen and Gemma configs have in common."""
    hidden, heads = fields.count("{}.embedding_length"), fields.count("{}.attention.head_count")
    head_dim = fields.count("{}.attention.key_length", hidden // heads)
    config: Config = {
        "hidden_size": hidden,
        "intermediate_size": fields.count("{}.feed_forward_length"),
        "num_hidden_layers": _layers(fields),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.count("{}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": fields.count("{}.context_length"),
        "rms_norm_eps": fields.number("{}.attention.layer_norm_rms_epsilon"),
        "rope_theta": fields.number("{}.rope.freq_base", 10000.0),
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in tensors,
    }
    rotary = fields.count("{}.rope.dimension_count", head_dim)
    if rotary != head_dim:
        config["partial_rotary_factor"] = rotary / head_dim
    scaling = _rope_scaling(fields, tensors)
    if scaling is not None:
        config["rope_scaling"] = scaling
    return config


def _layers(fields: _Fields) -> int:
    layers = fields.count("{}.block_count")
    if layers > _MAX_LAYERS:
        fields.fail(f"{layers} layers")
    return layers


def _rope_scaling(fields: _Fields, tensors: Tensors) -> dict[str, Any] | None:
    factors = tensors.get(_ROPE_FACTORS)
    if factors is not None:  # Llama 3: the converter has evaluated the scaling rule, per frequency
        dims = factors.type.shape
        if len(dims) != 1 or int(dims[0]) > 1 << 16 or factors.type.dtype != F32:
            fields.fail(f"{_ROPE_FACTORS!r} is {factors.type}, not a short float32 vector")
        values = np.asarray(factors.read(), np.float32)
        if not (np.isfinite(values) & (values > 0)).all():
            fields.fail(f"{_ROPE_FACTORS!r} holds factors that are not positive")
        return {"rope_type": "llama3_factors", "factors": values.tolist()}
    legacy = fields.get("{}.rope.scale_linear")
    kind = fields.text("{}.rope.scaling.type", "none" if legacy is None else "linear")
    if kind == "none":
        return None
    factor = fields.number("{}.rope.scaling.factor" if legacy is None else "{}.rope.scale_linear", 1.0)
    if factor <= 0:
        fields.fail(f"the rope scaling factor is {factor}")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    original = fields.get("{}.rope.scaling.original_context_length")
    if original is not None:
        scaling["original_max_position_embeddings"] = fields.count("{}.rope.scaling.original_context_length")
    if kind == "yarn":
        for name in ("beta_fast", "beta_slow"):
            if fields.get("{}.rope.scaling.yarn_" + name) is not None:
                scaling[name] = fields.number("{}.rope.scaling.yarn_" + name)
        extra = fields.number("{}.rope.scaling.attn_factor", 1.0)
        if extra != 1.0:  # ggml multiplies YaRN's own factor, Hugging Face replaces it
            scaling["attention_factor"] = extra * (0.1 * math.log(factor) + 1.0)
    return scaling


def _llama_config(fields: _Fields, tensors: Tensors) -> Config:
    config = _decoder_config(fields, tensors)
    config["mlp_bias"] = "blk.0.ffn_gate.bias" in tensors
    if fields.get("{}.attention.sliding_window") is not None:
        config |= {"model_type": "mistral", "sliding_window": fields.count("{}.attention.sliding_window")}
    if isinstance(experts := fields.get("{}.expert_count"), int) and experts > 0:  # Mixtral files say "llama", too
        config |= {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
        config["num_local_experts"] = experts
        config["num_experts_per_tok"] = fields.count("{}.expert_used_count")
    return config


def _gemma_config(fields: _Fields, tensors: Tensors) -> Config:
    config = _decoder_config(fields, tensors)
    hidden, heads, layers = (config[k] for k in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    config["head_dim"] = head_dim = fields.count("{}.attention.key_length", 256)
    config["hidden_activation"] = config.pop("hidden_act").replace("silu", "gelu_pytorch_tanh")
    # GGUF has no field for it: the two 27B models alone scale by the width per head instead of head_dim.
    largest = {"gemma2": 46, "gemma3": 62}[fields.arch]
    config["query_pre_attn_scalar"] = hidden // heads if layers == largest else head_dim
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        config[name] = fields.number("{}." + name) if fields.get("{}." + name) is not None else None
    if fields.arch == "gemma2":
        pattern, window = 2, fields.count("{}.attention.sliding_window", 4096)
        config["attn_logit_softcapping"] = config["attn_logit_softcapping"] or 50.0
        config["final_logit_softcapping"] = config["final_logit_softcapping"] or 30.0
    else:
        pattern = 6 if fields.get("{}.attention.sliding_window") is not None else 1  # 1: every layer is global
        window = fields.count("{}.attention.sliding_window", config["max_position_embeddings"])
        config["rope_theta"] = fields.number("{}.rope.freq_base", 1e6)
        config["rope_local_base_freq"] = fields.number("{}.rope.freq_base_swa", 10000.0)
    config["sliding_window"], config["sliding_window_pattern"] = window, pattern
    config["layer_types"] = ["full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(layers)]
    return config


def _gpt2_config(fields: _Fields, tensors: Tensors) -> Config:
    context = fields.count("{}.context_length")
    return {
        "n_embd": fields.count("{}.embedding_length"),
        "n_layer": _layers(fields),
        "n_head": fields.count("{}.attention.head_count"),
        "n_inner": fields.count("{}.feed_forward_length"),
        "n_positions": context,
        "n_ctx": context,
        "layer_norm_epsilon": fields.number("{}.attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
        "pelton_transposed": True,  # matrices are [out, in]; safetensors of GPT-2 hold [in, out]
    }


def _bloom_config(fields: _Fields, tensors: Tensors) -> Config:
    return {
        "hidden_size": fields.count("{}.embedding_length"),
        "n_layer": _layers(fields),
        "n_head": fields.count("{}.attention.head_count"),
        "seq_length": fields.count("{}.context_length"),
        "layer_norm_epsilon": fields.number("{}.attention.layer_norm_epsilon"),
        "apply_residual_connection_post_layernorm": False,
    }


# --- layouts ---------------------------------------------------------------------------------------------


def _restore_layout(fields: _Fields, family: _Family, gguf_name: str, tensor: LazyTensor) -> LazyTensor:
    """Undo what the converter did to this tensor, when it is read."""
    match = _BLOCK_TENSOR.fullmatch(gguf_name)
    base = match.group(2) if match else gguf_name.rpartition(".")[0]
    if family.norms_hold_one and base.endswith("norm") and gguf_name.endswith(".weight"):
        kind = TensorType(tensor.type.shape, F32)
        return replace(tensor, type=kind, read=lambda: _minus_one(tensor.read()))
    rule = family.row_orders.get(base) if match else None
    if rule is None:
        return tensor
    heads_key, parts, inner_first = rule
    heads = fields.count(heads_key, fields.count("{}.attention.head_count"))
    rows = tensor.type.shape[0]
    if not isinstance(rows, int) or rows % (heads * parts):
        fields.fail(f"tensor {gguf_name!r} has {rows} rows, which {heads} heads do not divide")
    return replace(tensor, read=lambda: _take_rows(tensor.read(), row_order(rows, heads, parts, inner_first)))


def row_order(rows: int, heads: int, parts: int, inner_first: bool) -> Array:
    """For each row of the Hugging Face layout, its row in the GGUF layout: int64 [rows].

    Hugging Face orders rows as [heads, parts, width]. Rope-permuted projections (``inner_first``) are stored
    as [heads, width, parts] with parts = 2, which brings the halves that rope pairs next to each other;
    BLOOM's fused query_key_value is stored as [parts, heads, width] with parts = 3.
    """
    index = np.arange(rows)
    if inner_first:
        return index.reshape(heads, -1, parts).swapaxes(1, 2).ravel()
    return index.reshape(parts, heads, -1).swapaxes(0, 1).ravel()


def _take_rows(value: HostTensor, order: Array) -> HostTensor:
    return value[order]


def _minus_one(value: HostTensor) -> HostTensor:
    """Gemma norms multiply by ``1 + weight``; the converter has added the 1 (in float32)."""
    dense = value.dequantize() if isinstance(value, QuantizedArray) else value
    return np.asarray(dense, np.float32) - np.float32(1.0)


# --- names -----------------------------------------------------------------------------------------------

#: metadata key of the head count, parts, inner_first: the arguments of :func:`row_order`.
_RowRule = tuple[str, int, bool]


@dataclass(frozen=True, slots=True)
class _Family:
    """One row of the table: names inside a block (under ``layers``.N) and outside, config, layout rules."""

    architecture: str
    model_type: str
    layers: str
    block: Mapping[str, str]
    outer: Mapping[str, str]
    config: Callable[[_Fields, Tensors], Config]
    row_orders: Mapping[str, _RowRule] = field(default_factory=dict)
    norms_hold_one: bool = False


def _hf_name(family: _Family, name: str) -> str:
    """The Hugging Face name, or the GGUF name when the family has no such tensor."""
    match = _BLOCK_TENSOR.fullmatch(name)
    if match:
        inner = family.block.get(match.group(2))
        return f"{family.layers}.{match.group(1)}.{inner}.{match.group(3)}" if inner else name
    match = _OUTER_TENSOR.fullmatch(name)
    outer = family.outer.get(match.group(1)) if match else None
    return f"{outer}.{match.group(2)}" if match and outer else name


_LLAMA_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LLAMA_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_GEMMA_BLOCK = _LLAMA_BLOCK | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GPT2_BLOCK = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_GPT2_OUTER = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
_BLOOM_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attention.query_key_value",
    "attn_output": "self_attention.dense",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
_BLOOM_OUTER = {
    "token_embd": "transformer.word_embeddings",
    "token_embd_norm": "transformer.word_embeddings_layernorm",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
_HEADS, _KV_HEADS = "{}.attention.head_count", "{}.attention.head_count_kv"
_LLAMA_ROWS: dict[str, _RowRule] = {"attn_q": (_HEADS, 2, True), "attn_k": (_KV_HEADS, 2, True)}
_BLOOM_ROWS: dict[str, _RowRule] = {"attn_qkv": (_HEADS, 3, False)}


def _model(name: str, model_type: str, config: Callable[[_Fields, Tensors], Config], **kwargs: Any) -> _Family:
    block = kwargs.pop("block", _LLAMA_BLOCK)
    return _Family(name, model_type, "model.layers", block, _LLAMA_OUTER, config, **kwargs)


#: By ``general.architecture``. Mistral and SmolLM files say "llama" and differ only in numbers.
_FAMILIES: dict[str, _Family] = {
    "llama": _model("LlamaForCausalLM", "llama", _llama_config, row_orders=_LLAMA_ROWS),
    "qwen2": _model("Qwen2ForCausalLM", "qwen2", _decoder_config),
    "qwen3": _model("Qwen3ForCausalLM", "qwen3", _decoder_config),
    "gemma2": _model("Gemma2ForCausalLM", "gemma2", _gemma_config, block=_GEMMA_BLOCK, norms_hold_one=True),
    "gemma3": _model("Gemma3ForCausalLM", "gemma3_text", _gemma_config, block=_GEMMA_BLOCK, norms_hold_one=True),
    "gpt2": _Family("GPT2LMHeadModel", "gpt2", "transformer.h", _GPT2_BLOCK, _GPT2_OUTER, _gpt2_config),
    "bloom": _Family(
        "BloomForCausalLM", "bloom", "transformer.h", _BLOOM_BLOCK, _BLOOM_OUTER, _bloom_config, _BLOOM_ROWS
    ),
}
