"""What int8 activations cost on the real small model: the bound that docs/quantization.md states for "auto"."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.quality import TEXT, divergence, pelton_logits, write_base
from pelton.backends.cpu import _native
from pelton.backends.cpu.packing import int8_activations
from pelton.build import build
from pelton.checkpoint import resolve_model
from pelton.config import EngineConfig
from pelton.graph.types import F16, ROW, GroupQuant
from tests.helpers.families import backends

TOKENS = 192
#: Mean KL(float activations || auto) in nats.
BOUND = 0.005

pytestmark = pytest.mark.skipif(not _native.has_int8_products(backends()[-1]), reason="no int8 products")


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    built = build(EngineConfig(max_num_seqs=1, max_model_len=64))
    tokens: list[int] = built.tokenizer.encode(TEXT.read_text(encoding="utf-8"))[:TOKENS]
    built.close()
    return tokens


@pytest.fixture(scope="module")
def dense() -> Iterator[Path]:
    """The model in f32, its grid of 4 bits scattered."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "f32.gguf"
        write_base(path, shuffle=True, pad=False)
        yield path


def test_q4_1_as_shipped_keeps_the_bound(tokens: list[int]) -> None:
    shipped = resolve_model("")
    cost = divergence(pelton_logits(shipped, tokens, activations="float"), pelton_logits(shipped, tokens))
    assert 0 < cost.mean <= BOUND  # 0: auto would not use int8, which is fastest


def test_int4_on_load_keeps_the_bound(tokens: list[int], dense: Path) -> None:
    floats = pelton_logits(dense, tokens, quantization="int4", activations="float")
    assert 0 < divergence(floats, pelton_logits(dense, tokens, quantization="int4")).mean <= BOUND


def test_int8_on_load_keeps_the_bound(tokens: list[int], dense: Path) -> None:
    floats = pelton_logits(dense, tokens, quantization="int8", activations="float")
    assert 0 < divergence(floats, pelton_logits(dense, tokens, quantization="int8")).mean <= BOUND


def test_auto_means_floats_where_many_activations_would_share_a_scale() -> None:
    """One scale per row costs seven times the bound (docs/quantization.md)."""
    assert int8_activations(GroupQuant(8, 32, scale=F16), "auto")
    for type in (GroupQuant(8, ROW), GroupQuant(4, ROW), GroupQuant(8, 128)):
        assert not int8_activations(type, "auto") and int8_activations(type, "int8")
