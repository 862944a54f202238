"""Every native GGUF type end to end: a file of random blocks on every ISA tier against the oracle."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from tests.checkpoint.gguf_files import SCALES_AT, llama_metadata, random_blocks, write
from tests.helpers.families import Sequences, backends, load
from tests.helpers.tiny_models import temporary_folder

Kind = gguf.GGMLQuantizationType
KINDS = [Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0, Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K]
HIDDEN, INNER, HEADS, KV_HEADS, VOCAB = 256, 512, 4, 2, 99


def blocks(kind: Any, shape: tuple[int, int], seed: int) -> tuple[np.ndarray, Any]:
    """Raw blocks of ``kind``. Values are of the size that trained weights have, so that layers do not explode."""
    size = gguf.GGML_QUANT_SIZES[kind][1]
    raw = random_blocks(kind, shape, seed).reshape(-1, size).copy()
    values = gguf.quants.dequantize(raw, kind)
    spread = float(np.sqrt(np.mean(np.square(values.astype(np.float64)))))
    # All scales of a block are products with its float16 ones: shrinking those shrinks the values.
    for at in SCALES_AT[kind]:
        scale = raw[:, at : at + 2].copy().view(np.float16) * np.float16(0.05 / spread)
        raw[:, at : at + 2] = scale.astype(np.float16).view(np.uint8)
    return raw.reshape(*shape[:-1], -1), kind


@functools.cache
def quantized_file(kind: Any) -> Path:
    rng = np.random.default_rng(2)
    kv = HIDDEN // HEADS * KV_HEADS
    shapes = {
        "attn_q": (HIDDEN, HIDDEN), "attn_k": (kv, HIDDEN), "attn_v": (kv, HIDDEN), "attn_output": (HIDDEN, HIDDEN),
        "ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN), "ffn_down": (HIDDEN, INNER),
    }  # fmt: skip
    tensors: dict[str, Any] = {
        "token_embd.weight": blocks(kind, (VOCAB, HIDDEN), 1),
        "output_norm.weight": rng.normal(1, 0.1, HIDDEN).astype(np.float32),
    }
    for layer in range(2):
        for i, (name, shape) in enumerate(shapes.items()):
            tensors[f"blk.{layer}.{name}.weight"] = blocks(kind, shape, 10 * layer + i)
        for name in ("attn_norm", "ffn_norm"):
            tensors[f"blk.{layer}.{name}.weight"] = rng.normal(1, 0.1, HIDDEN).astype(np.float32)
    metadata = llama_metadata(layers=2, heads=HEADS, kv_heads=KV_HEADS, hidden=HIDDEN)
    metadata |= {"llama.feed_forward_length": INNER, "llama.vocab_size": VOCAB}
    path = temporary_folder("tiny-gguf-") / f"{kind.name}.gguf"
    return write(path, "llama", metadata, tensors)


@functools.cache
def oracle(kind: Any, tokens: tuple[int, ...]) -> np.ndarray:
    built = load(quantized_file(kind), "reference", kv_cache_dtype="f32")
    return Sequences(built.executor).step(a=list(tokens))[0]


@pytest.mark.parametrize("activations", ["float", "auto"])
@pytest.mark.parametrize("backend", [b for b in backends() if b != "reference"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_quantized_weights_run_natively_and_mean_the_same(kind: Any, backend: str, activations: str) -> None:
    tokens = tuple(int(t) for t in np.random.default_rng(3).integers(0, VOCAB, 40))
    built = load(quantized_file(kind), backend, kv_cache_dtype="f32", activations=activations)
    as_floats = 4 * sum(np.prod(n.tensor.shape) for n in built.plan.graph.leaves("weight"))
    assert built.plan.ledger.weights < 0.4 * as_floats  # codes stay codes, scales included
    sequences = Sequences(built.executor)
    sequences.step(a=list(tokens[:30]))
    got = sequences.step(a=list(tokens[30:]))[0]
    want = oracle(kind, tokens)
    error = np.abs(got - want).max() / np.abs(want).max()
    # Rounding activations to bf16 (2**-9 relative each) or int8 (half a step of 127 of the largest of a group)
    # averages out over a sum; exact arithmetic otherwise.
    rounding = 2**-8 if backend in ("avx512_bf16", "amx") else 0.0
    if activations == "auto" and backend != "generic":
        rounding = 1 / 127
    assert error <= max(1e-4, rounding * (2 * 4) ** 0.5)
    built.close()
