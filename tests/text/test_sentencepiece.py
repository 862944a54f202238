"""sentencepiece vocabularies against the sentencepiece library."""

from __future__ import annotations

import random
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pelton.errors import TokenizerError
from pelton.text import Tokenizer, load_tokenizer, tokenizer_from_gguf
from pelton.text.sentencepiece_model import read_sentencepiece_model
from pelton.text.vocabulary import merges_from_scores

from .corpus import TEXTS

spm = pytest.importorskip("sentencepiece")
Train = Callable[..., Path]
OPTIONS: dict[str, dict[str, Any]] = {
    "bpe": {},
    "unigram": {},
    "bpe without prefix": {"add_dummy_prefix": False},
    "unigram nfkc": {
        "normalization_rule_name": "nmt_nfkc",
        "remove_extra_whitespaces": True,
        "byte_fallback": False,
        "allow_whitespace_only_pieces": False,
    },
}


def both(train: Train, name: str) -> tuple[Tokenizer, Any]:
    path = train(name.split()[0], **OPTIONS[name])
    metadata = read_sentencepiece_model(path)
    metadata["tokenizer.ggml.add_bos_token"] = metadata["tokenizer.ggml.add_eos_token"] = False
    return tokenizer_from_gguf(metadata), spm.SentencePieceProcessor(model_file=str(path))


@pytest.mark.parametrize("name", OPTIONS)
def test_ids_equal_those_of_the_library(train_sentencepiece: Train, name: str) -> None:
    ours, reference = both(train_sentencepiece, name)
    generator = random.Random(0)
    alphabet = "".join(sorted(set("".join(TEXTS)))) + " ééßΩ語🙃"
    if "nfkc" in name:
        # The `tokenizers` library normalizes a character together with its marks and joiners, and loses
        # those that follow a character which the table maps; sentencepiece maps character by character.
        alphabet = "".join(char for char in alphabet if unicodedata.category(char)[0] not in "MC")
    words = " ".join(TEXTS).split()
    texts = list(TEXTS)
    for _ in range(300):
        texts.append("".join(generator.choices(alphabet, k=generator.randrange(1, 30))))
        texts.append("".join(w + " " * generator.randrange(0, 3) for w in generator.choices(words, k=6)))
    for text in texts:
        if "\N{LOWER ONE EIGHTH BLOCK}" not in text:
            ids, expected = ours.encode(text), reference.encode(text)
            if name.startswith("unigram") and ids != expected:
                # Of two segmentations with one score (". .." and ".. .") the two libraries may take different ones.
                score = [sum(reference.get_score(i) for i in x) for x in (ids, expected)]
                assert sorted(ids) == sorted(expected) and score[0] == pytest.approx(score[1], abs=1e-4), text
            else:
                assert ids == expected, text


@pytest.mark.parametrize("name", ["bpe", "unigram", "bpe without prefix"])
def test_decoding_undoes_encoding(train_sentencepiece: Train, name: str) -> None:
    ours, _ = both(train_sentencepiece, name)
    for text in TEXTS:
        assert ours.decode(ours.encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab", max_size=24))
def test_bpe_by_scores_on_two_letters(text: str) -> None:
    # All pieces over two letters up to length 3, with unequal scores: every boundary between merges is crossed.
    pieces = ["a", "b", "ab", "ba", "aa", "bb", "aab", "abb", "bab", "aba"]
    tokens = ["<unk>", *pieces]
    scores = [0.0, *(-float(i) for i in range(len(pieces)))]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": np.array(tokens, dtype=object),
        "tokenizer.ggml.scores": np.array(scores, dtype=np.float32),
        "tokenizer.ggml.token_type": np.array([2] + [1] * len(pieces), dtype=np.int32),
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert tokenizer_from_gguf(metadata).encode(text) == best_pair_first(
        text, dict(zip(pieces, scores[1:], strict=True)), tokens
    )


def best_pair_first(text: str, scores: dict[str, float], tokens: list[str]) -> list[int]:
    """The definition of sentencepiece BPE: join the two neighbours whose piece has the best score, leftmost first."""
    symbols = list(text)
    while True:
        candidates = [
            (-scores[symbols[i] + symbols[i + 1]], i)
            for i in range(len(symbols) - 1)
            if symbols[i] + symbols[i + 1] in scores
        ]
        if not candidates:
            return [tokens.index(symbol) for symbol in symbols]
        at = min(candidates)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]


def test_the_model_file_is_read_like_the_library_reads_it(train_sentencepiece: Train) -> None:
    path = train_sentencepiece("bpe")
    metadata, reference = read_sentencepiece_model(path), spm.SentencePieceProcessor(model_file=str(path))
    size = reference.vocab_size()
    assert metadata["tokenizer.ggml.tokens"] == [reference.id_to_piece(i) for i in range(size)]
    assert metadata["tokenizer.ggml.scores"] == [reference.get_score(i) for i in range(size)]
    types = metadata["tokenizer.ggml.token_type"]
    assert [kind == 6 for kind in types] == [reference.is_byte(i) for i in range(size)]
    assert [kind == 3 for kind in types] == [reference.is_control(i) for i in range(size)]
    assert metadata["tokenizer.ggml.bos_token_id"] == reference.bos_id()
    assert metadata["tokenizer.ggml.padding_token_id"] is None and reference.pad_id() == -1


def test_a_folder_with_only_a_model_file_loads_and_adds_bos(train_sentencepiece: Train, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece("bpe").read_bytes())
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("it is")[0] == tokenizer.bos_token_id == 1
    assert tokenizer.encode("it is", add_special_tokens=False)[0] != 1
    assert tokenizer.decode(tokenizer.encode("it is")) == "it is"
    assert tokenizer.stop_token_ids == {2}


@pytest.mark.parametrize("damage", [b"", b"\xff" * 40, b"not a model at all", b"\x0a\x7f"])
def test_a_damaged_model_file_is_one_line(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(damage)
    with pytest.raises(TokenizerError, match="no sentencepiece model"):
        load_tokenizer(tmp_path)


def test_merges_of_a_large_vocabulary_take_seconds_at_most() -> None:
    generator = random.Random(1)
    tokens = list(
        dict.fromkeys("".join(generator.choices("etaoinshr", k=generator.randrange(1, 9))) for _ in range(150_000))
    )
    scores = [-float(i) for i in range(len(tokens))]
    start = time.perf_counter()
    assert merges_from_scores(tokens, scores, [1] * len(tokens))
    assert time.perf_counter() - start < 5


def test_user_defined_symbols_win_over_merges_and_control_tokens_are_special() -> None:
    tokens = ["<unk>", "<s>", "</s>", "\u2581", "a", "b", "ab", "\u2581ab", "  ", "aXb", "X"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -5.0, -6.0, -7.0, -1.0, -2.0, 0.0, 0.0, -9.0],
        "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1, 1, 4, 4, 1],
        "tokenizer.ggml.add_space_prefix": False,
    }
    tokenizer = tokenizer_from_gguf(metadata)
    assert tokenizer.encode("aXb  ab") == [1, 9, 8, 6]
    assert tokenizer.encode("ab</s>", add_special_tokens=False) == [6, 2]
    assert tokenizer.decode([1, 9, 8, 6, 2]) == "aXb  ab"
    assert tokenizer.decode([1, 6, 2], skip_special_tokens=False) == "<s>ab</s>"
