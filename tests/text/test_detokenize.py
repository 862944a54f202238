"""The incremental detokenizer against decoding at once, and stop strings against a search of the whole text."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Inner
from tokenizers import decoders, models, pre_tokenizers

from pelton.text import StopStrings, Tokenizer, load_tokenizer, tokenizer_from_gguf
from pelton.text.detokenize import byte_alphabet

from .corpus import TEXTS

MARK = "\ufffd"
quiet = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def bytes_and_specials() -> Tokenizer:
    """Every byte is a token, and a few pairs, so that random ids are mostly broken UTF-8."""
    tokens = [*byte_alphabet(), "<s>", "<|im_end|>"]
    return tokenizer_from_gguf(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": [*tokens, "ab", "Ã©"],
            "tokenizer.ggml.token_type": [1] * 256 + [3, 3, 1, 1],
            "tokenizer.ggml.merges": ["a b", "Ã ©"],
        }
    )


BYTES = bytes_and_specials()


def pieces_of(tokenizer: Tokenizer, ids: Sequence[int], cuts: Sequence[int], skip: bool) -> list[str]:
    detokenizer = tokenizer.detokenizer(skip)
    out, at = [], 0
    for cut in cuts:
        out.append(detokenizer.add(ids[at : at + cut]))
        at += cut
    out.append(detokenizer.add(ids[at:]))
    out.append(detokenizer.finish())
    return out


ids_of = st.lists(st.integers(0, 263), max_size=40)
cuts_of = st.lists(st.integers(0, 3), max_size=40)
lead = st.sampled_from([*range(128, 256)])  # non-ASCII bytes, most of them at ids above 187


@quiet
@given(ids_of | st.lists(st.integers(94, 262), max_size=12), cuts_of, st.booleans())
def test_byte_level_pieces_add_up(ids: list[int], cuts: list[int], skip: bool) -> None:
    whole = BYTES.decode(ids, skip)
    assert whole == BYTES.inner.decode(ids, skip_special_tokens=skip)
    pieces = pieces_of(BYTES, ids, cuts, skip)
    assert "".join(pieces) == whole
    assert sum(piece.count(MARK) for piece in pieces) == whole.count(MARK)


@quiet
@given(st.binary(max_size=24))
def test_any_bytes_decode_as_python_decodes_them(data: bytes) -> None:
    order = {byte: index for index, byte in enumerate(byte_alphabet().values())}
    ids = [order[byte] for byte in data]
    assert "".join(pieces_of(BYTES, ids, [1] * len(ids), True)) == data.decode("utf-8", "replace")


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_byte_fallback_pieces_add_up(train_sentencepiece: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    import sentencepiece as spm

    path = train_sentencepiece(kind)
    (tmp_path / "tokenizer.model").write_bytes(path.read_bytes())
    tokenizer, reference = load_tokenizer(tmp_path), spm.SentencePieceProcessor(model_file=str(path))
    size = reference.vocab_size()

    @quiet
    @given(st.lists(st.integers(3, size - 1) | st.integers(3, 258), max_size=30), cuts_of, st.booleans())
    def check(ids: list[int], cuts: list[int], skip: bool) -> None:
        whole = tokenizer.decode(ids, skip)
        assert "".join(pieces_of(tokenizer, ids, cuts, skip)) == whole
        if ids[:1] != [3 + ord(" ")]:  # a space in the form of a byte: dropped at the start, as fast tokenizers do
            assert whole == reference.decode(ids)  # that library is the truth about broken byte sequences, too

    check()


def test_a_character_waits_for_all_its_bytes_and_no_longer(smollm: Tokenizer) -> None:
    for text in TEXTS:
        ids = smollm.encode(text)
        detokenizer = smollm.detokenizer()
        shown = ""
        for i, token_id in enumerate(ids):
            piece = detokenizer.add([token_id])
            assert MARK not in piece
            shown += piece
            complete = b"".join(smollm.token_bytes(t) for t in ids[: i + 1]).decode("utf-8", "ignore")
            assert shown == complete
        assert detokenizer.finish() == ""
        assert shown == text


def test_bytes_that_never_become_a_character_come_out_at_the_end(smollm: Tokenizer) -> None:
    half = smollm.encode("🙃", add_special_tokens=False)
    assert len(half) > 1
    detokenizer = smollm.detokenizer()
    assert detokenizer.add(half[:-1]) == ""
    assert detokenizer.finish() == MARK == smollm.decode(half[:-1])


def test_the_first_space_of_sentencepiece_is_dropped_only_at_the_start_of_a_text(
    train_sentencepiece: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece("bpe").read_bytes())
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("and so", add_special_tokens=False)
    assert tokenizer.detokenizer().add(ids) == "and so"
    assert tokenizer.detokenizer(at_start=False).add(ids) == " and so"


OTHERS = {
    "metaspace": decoders.Metaspace(),
    "metaspace never": decoders.Metaspace(prepend_scheme="never"),
    "wordpiece": decoders.WordPiece(),
    "none": None,
    "sequence": decoders.Sequence([decoders.ByteLevel(), decoders.Replace("x", "y")]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_decoders_add_up_too(name: str) -> None:
    texts = ["a", "\u2581b", "##c", "\u2581", "x", "\u2581\u2581d", "<0x41>", "é"]
    inner = Inner(models.BPE({text: i for i, text in enumerate(texts)}, []))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    if OTHERS[name] is not None:
        inner.decoder = OTHERS[name]
    inner.add_special_tokens(["<s>"])
    tokenizer = Tokenizer(inner)

    @quiet
    @given(st.lists(st.integers(0, 8), max_size=20), cuts_of, st.booleans())
    def check(ids: list[int], cuts: list[int], skip: bool) -> None:
        whole = inner.decode(ids, skip_special_tokens=skip)
        assert tokenizer.decode(ids, skip) == whole
        assert "".join(pieces_of(tokenizer, ids, cuts, skip)) == whole

    check()


def test_ids_outside_the_vocabulary_add_nothing(smollm: Tokenizer) -> None:
    assert smollm.decode([28, 10**6, -1, 28]) == smollm.decode([28, 28])


def test_the_cost_of_a_token_does_not_grow_with_the_text(smollm: Tokenizer) -> None:
    ids = smollm.encode("it is what it is, and 你好 that is that; ") * 2000
    detokenizer = smollm.detokenizer()
    start = time.perf_counter()
    for token_id in ids:
        detokenizer.add((token_id,))
    # Measured: 1 microsecond. Decoding everything each time would take an hour.
    assert (time.perf_counter() - start) / len(ids) < 50e-6


# Stop strings --------------------------------------------------------------------------------------------------------


def oracle(text: str, stops: Sequence[str], include: bool) -> tuple[str, str | None]:
    """The first prefix that ends with a stop string; of several, the longest one."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            best = max(found, key=len)
            return text[: end if include else end - len(best)], best
    return text, None


@settings(max_examples=1500, deadline=None)
@given(
    st.text("ab", max_size=24),
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
    st.booleans(),
    st.lists(st.integers(0, 4), max_size=24),
)
def test_stop_strings_equal_a_search_of_the_whole_text(
    text: str, stops: list[str], include: bool, cuts: list[int]
) -> None:
    finder = StopStrings(stops, include)
    shown, at, matched = "", 0, None
    for cut in cuts:
        piece, matched = finder.push(text[at : at + cut])
        shown += piece
        at = min(len(text), at + cut)
        # What is held back is exactly what could still become a stop string.
        if matched is None:
            held = text[len(shown) : at]
            longest = max((k for s in stops for k in range(len(s)) if text[:at].endswith(s[:k])), default=0)
            assert len(held) == longest
    piece, matched = finder.push(text[at:], final=True)
    assert (shown + piece, matched) == oracle(text, stops, include)


def test_nothing_follows_a_match() -> None:
    finder = StopStrings(["END"])
    assert finder.push("one EN") == ("one ", None)
    assert finder.push("D two") == ("", "END")
    assert finder.push("three", final=True) == ("", "END")


def test_many_long_stop_strings_stay_cheap() -> None:
    finder = StopStrings(["a" * 4000 + str(i) for i in range(16)])
    start = time.perf_counter()
    for _ in range(500):
        finder.push("b" * 8)
    assert time.perf_counter() - start < 2
