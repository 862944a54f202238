"""The models in the formats that peers start from: a bf16 safetensors folder, and GGUF files of the same values.

Nothing is downloaded: the demo model comes with a Python package, the others have random weights.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from .catalogue import Model

SHARD = 2 << 30  # bytes
#: HF name -> GGUF name; the number of the layer goes in between.
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class Source:
    """A model's config and its values, tensor by tensor; the same values whatever they are written to."""

    def __init__(self, model: Model) -> None:
        from pelton.checkpoint import open_checkpoint, resolve_model
        from pelton.text import tokenizer_from_gguf

        demo = open_checkpoint(resolve_model(""))
        assert demo.gguf_metadata is not None
        self.tokenizer_metadata = {k: v for k, v in demo.gguf_metadata.items() if k.startswith("tokenizer.")}
        self.tokenizer = tokenizer_from_gguf(demo.gguf_metadata, demo.generation)
        self.demo_file = demo.path
        self._tensors = None if model.config else demo.tensors
        self.config = dict(model.config) or {**demo.config, "torch_dtype": "bfloat16"}
        # None of these ends a benchmark, and all of them are valid ids of every model.
        self.config |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by HF name, in the order of the layers."""
        if self._tensors is not None:
            return {name: tuple(map(int, tensor.type.shape)) for name, tensor in self._tensors.items()}
        return random_shapes(self.config)

    def read(self, name: str) -> np.ndarray:
        """A tensor as f32, rounded to bf16."""
        from pelton.graph.ops import f32

        if self._tensors is not None:
            values = np.array(f32(self._tensors[name].read()), np.float32)
        else:
            values = random_tensor(name, self.shapes()[name])
        return values.astype(ml_dtypes.bfloat16).astype(np.float32)


def random_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Llama or Qwen2 model, by HF name."""
    width, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head = config.get("head_dim", width // heads)
    queries, keys = heads * head, config["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], width)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes[layer + "input_layernorm.weight"] = (width,)
        for name, rows in (("q", queries), ("k", keys), ("v", keys)):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (rows, width)
            if config["model_type"] == "qwen2":
                shapes[f"{layer}self_attn.{name}_proj.bias"] = (rows,)
        shapes[layer + "self_attn.o_proj.weight"] = (width, queries)
        shapes[layer + "post_attention_layernorm.weight"] = (width,)
        for name in ("gate", "up"):
            shapes[f"{layer}mlp.{name}_proj.weight"] = (inner, width)
        shapes[layer + "mlp.down_proj.weight"] = (width, inner)
    shapes["model.norm.weight"] = (width,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], width)
    return shapes


def random_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """f32; seeded by the name, so that every format holds the same values. Norms are ones."""
    if name.endswith("norm.weight"):
        return np.ones(shape, np.float32)
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)
    values *= 0.02
    return values


def gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(.*)", stem):
        return f"blk.{match[1]}.{_NAMES[match[2]]}.{kind}"
    return f"{_NAMES[stem]}.{kind}"


def gguf_rows(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q and k as GGUF's llama has them: the two halves of a head, which rope pairs, alternate."""
    return values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def write_folder(model: Model, folder: Path) -> None:
    """config, tokenizer and bf16 safetensors in shards."""
    source = Source(model)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in source.shapes().items():
        nbytes = 2 * math.prod(shape)
        if size and size + nbytes > SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += nbytes
    index: dict[str, str] = {}
    for number, shapes in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / file, shapes, source.read)
        index |= dict.fromkeys(shapes, file)
    texts = {
        "config.json": source.config,
        "generation_config.json": {k: source.config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")},
        "model.safetensors.index.json": {"metadata": {}, "weight_map": index},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "unk_token": "<|endoftext|>",
            "pad_token": "<|im_end|>",
            "model_max_length": source.config["max_position_embeddings"],
        },
    }
    for name, content in texts.items():
        (folder / name).write_text(json.dumps(content, indent=1))
    source.tokenizer.inner.save(str(folder / "tokenizer.json"))


def write_safetensors(file: Path, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], np.ndarray]) -> None:
    """bf16, one tensor in memory at a time: the length of a JSON header, the header, the data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(raw)) + raw)
        for name in shapes:
            out.write(read(name).astype(ml_dtypes.bfloat16).view(np.uint8).data)


def write_gguf(model: Model, file: Path, kind: str) -> None:
    """kind: BF16, Q8_0, Q4_0 (embedding and head Q8_0), or Q4_1, which is the demo model's own file."""
    import gguf

    source = Source(model)
    if kind == "Q4_1":
        shutil.copyfile(source.demo_file, file)
        return
    config = source.config
    arch = config["model_type"]
    writer = gguf.GGUFWriter(file, arch)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config.get("head_dim", config["hidden_size"] // config["num_attention_heads"]))
    writer.add_vocab_size(config["vocab_size"])
    _add_tokenizer(writer, source.tokenizer_metadata, config["vocab_size"])
    body = gguf.GGMLQuantizationType[kind]
    kinds = {}
    for name, shape in source.shapes().items():
        ggml = gguf.GGMLQuantizationType.F32 if len(shape) == 1 else body
        if kind == "Q4_0" and name in ("model.embed_tokens.weight", "lm_head.weight"):
            ggml = gguf.GGMLQuantizationType.Q8_0
        kinds[name] = ggml
        stored = gguf.quant_shape_to_byte_shape(shape, ggml) if len(shape) > 1 else shape
        nbytes = int(np.prod(stored)) * (4 if len(shape) == 1 else 1)
        dtype = np.dtype(np.float32 if len(shape) == 1 else np.uint8)
        writer.add_tensor_info(gguf_name(name), stored, dtype, nbytes, raw_dtype=ggml)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, ggml in kinds.items():
        values = source.read(name)
        if arch == "llama" and re.search(r"\.[qk]_proj\.", name):
            heads = config["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]
            values = gguf_rows(values, heads)
        writer.write_tensor_data(gguf.quants.quantize(np.ascontiguousarray(values), ggml))
    writer.close()


def _add_tokenizer(writer: Any, metadata: Mapping[str, Any], vocab: int) -> None:
    """The demo model's tokenizer, with unused entries up to `vocab`."""
    import gguf

    tokens = list(metadata["tokenizer.ggml.tokens"])
    types = [int(t) for t in metadata["tokenizer.ggml.token_type"]]
    padding = vocab - len(tokens)
    writer.add_tokenizer_model(metadata["tokenizer.ggml.model"])
    writer.add_tokenizer_pre(metadata["tokenizer.ggml.pre"])
    writer.add_token_list(tokens + [f"<|unused_{i}|>" for i in range(padding)])
    writer.add_token_types(types + [int(gguf.TokenType.UNUSED)] * padding)
    writer.add_token_merges(metadata["tokenizer.ggml.merges"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)


@dataclass(frozen=True)
class Counts:
    """Elements: weights multiplied per token, those of the head among them, K and V kept per token, queries."""

    matrices: int
    head: int
    kv: int
    queries: int


def shape_counts(model: Model) -> Counts:
    source = Source(model)
    config, shapes = source.config, source.shapes()
    head = math.prod(shapes["model.embed_tokens.weight"])
    body = sum(math.prod(s) for n, s in shapes.items() if len(s) == 2 and n.startswith("model.layers."))
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    layers = config["num_hidden_layers"] * width
    return Counts(body + head, head, 2 * layers * config["num_key_value_heads"], layers * config["num_attention_heads"])
