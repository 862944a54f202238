"""Builds a ``tokenizers.Tokenizer`` from the vocabulary that a GGUF file (or a sentencepiece model) stores.

Three models: "gpt2" is byte-level BPE with merges, "llama" is sentencepiece BPE, known by the scores of its pieces
alone, "t5" is sentencepiece unigram.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import TYPE_CHECKING, Any

from ..errors import TokenizerError
from .pretokenizers import SENTENCEPIECE_LIKE, build_pre_tokenizer, pre_tokenizer_kind

if TYPE_CHECKING:
    import tokenizers
    from tokenizers import normalizers

_META = "\u2581"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # tokenizer.ggml.token_type

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Vocabulary:
    """A built tokenizer and what its file says about special tokens.

    tokens: text by id. ``special`` are the ids of control and unknown tokens. An id is None where there is no such
    token.
    """

    tokenizer: tokenizers.Tokenizer
    tokens: Sequence[str]
    special: frozenset[int]
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    stop_token_ids: frozenset[int] = field(default_factory=frozenset)


def _list(metadata: Mapping[str, Any], name: str) -> list[Any]:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if value is None:
        return []
    return list(value.tolist() if hasattr(value, "tolist") else value)


def _texts(metadata: Mapping[str, Any], name: str) -> list[str]:
    values = _list(metadata, name)
    if values and not isinstance(values[0], str):
        try:
            return [bytes(value).decode("utf-8") for value in values]
        except (TypeError, ValueError):
            raise TokenizerError(f"tokenizer.ggml.{name} holds no strings", "convert the model to GGUF again") from None
    return values


def build_vocabulary(metadata: Mapping[str, Any]) -> Vocabulary:
    """The tokenizer of GGUF metadata (keys ``tokenizer.ggml.*``; arrays are lists or NumPy arrays).

    Raises:
        TokenizerError: there is no vocabulary, its arrays do not fit together, or its model or pre-tokenizer kind is
            not known.
    """
    from tokenizers import Tokenizer

    remedy = "convert the model to GGUF again"
    model = metadata.get("tokenizer.ggml.model")
    tokens = _texts(metadata, "tokens")
    if not isinstance(model, str) or not tokens:
        raise TokenizerError("the file holds no vocabulary (tokenizer.ggml.tokens)", remedy)
    types = _list(metadata, "token_type") or [_NORMAL] * len(tokens)
    scores = _list(metadata, "scores")
    if len(types) != len(tokens) or (scores and len(scores) != len(tokens)):
        raise TokenizerError("the vocabulary's tokens, types and scores differ in number", remedy)
    pre = metadata.get("tokenizer.ggml.pre")
    if model == "gemma4":
        model, pre = "gpt2", "gemma4"

    # An extension library's errors are its own, and many: a bad vocabulary is the user's file, not a bug.
    try:
        if model == "gpt2" and pre in SENTENCEPIECE_LIKE:
            tokenizer = Tokenizer(_visible_space_bpe(tokens, types, _merges(metadata)))
            _sentencepiece_text_rules(tokenizer, metadata, default_prefix=False)
            add_bos, add_eos = True, False
        elif model == "gpt2":
            tokenizer, add_bos = _byte_level(tokens, _merges(metadata), pre)
            add_eos = False
        elif model == "llama":
            if not scores:
                raise TokenizerError("the vocabulary has no scores (tokenizer.ggml.scores)", remedy)
            tokenizer = Tokenizer(_visible_space_bpe(tokens, types, merges_from_scores(tokens, scores, types)))
            _sentencepiece_text_rules(tokenizer, metadata, default_prefix=True)
            add_bos, add_eos = True, False
        elif model == "t5":
            tokenizer = Tokenizer(_unigram(tokens, scores, types, metadata))
            _sentencepiece_text_rules(tokenizer, metadata, default_prefix=True)
            add_bos, add_eos = False, True
        else:
            raise TokenizerError(
                f"the tokenizer model {model!r} is not supported", "use a model with a BPE or unigram vocabulary"
            )
    except TokenizerError:
        raise
    except Exception as error:
        raise TokenizerError(f"the vocabulary is damaged: {error}", remedy) from None
    return _with_special_tokens(tokenizer, metadata, tokens, types, model, add_bos, add_eos)


def _merges(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    merges = _texts(metadata, "merges")
    if not merges:
        raise TokenizerError("the BPE vocabulary has no merges (tokenizer.ggml.merges)", "convert the model again")
    # One pass in C for the 10^5 merges of ordinary files; a loop in Python only for the odd ones among them.
    pairs = list(map(tuple, map(str.split, merges, repeat(" "))))
    return [pair if len(pair) == 2 and pair[0] else _odd_merge(merges[i]) for i, pair in enumerate(pairs)]


def _odd_merge(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    if not left:  # the left half starts with a space itself
        left, _, right = merge[1:].partition(" ")
        left = " " + left
    return left, right


def _ids(tokens: Sequence[str]) -> dict[str, int]:
    """Ids by text. Where a text occurs twice, the first id is the one that encoding gives."""
    ids = dict(zip(tokens, range(len(tokens)), strict=True))
    if len(ids) != len(tokens):
        ids = dict(zip(reversed(tokens), range(len(tokens) - 1, -1, -1), strict=True))
    ids.pop("", None)
    return ids


def _byte_level(tokens: Sequence[str], merges: list[tuple[str, str]], pre: object) -> tuple[tokenizers.Tokenizer, bool]:
    from tokenizers import Tokenizer, decoders, models, normalizers

    if pre is None:
        _log.warning("the GGUF file names no pre-tokenizer kind: using 'default', which may not be the model's own")
        pre = "default"
    kind = pre_tokenizer_kind(str(pre))
    tokenizer = Tokenizer(models.BPE(vocab=_ids(tokens), merges=merges, ignore_merges=kind.ignore_merges))
    if kind.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = build_pre_tokenizer(kind)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, kind.add_bos


def merges_from_scores(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> list[tuple[str, str]]:
    """The merges that a sentencepiece BPE vocabulary implies, best first.

    sentencepiece joins whichever two neighbours form the piece of the highest score. As pairs with ranks: all splits
    of every piece into two pieces, in the order of the score of the whole. Of one whole, the split with the shorter
    left half comes first.
    """
    # Control, user-defined, unused and byte tokens are never joined or made by joining.
    pieces = {token for token, kind in zip(tokens, types, strict=True) if kind == _NORMAL and token}
    order = sorted((-score, i) for i, score in enumerate(scores) if types[i] == _NORMAL)
    merges = []
    for _, i in order:
        token = tokens[i]
        for cut in range(1, len(token)):
            # The left half is the rarer find for most cuts of long pieces, so it is asked for first.
            left = token[:cut]
            if left in pieces:
                right = token[cut:]
                if right in pieces:
                    merges.append((left, right))
    return merges


def _visible_space_bpe(
    tokens: Sequence[str], types: Sequence[int], merges: list[tuple[str, str]]
) -> tokenizers.models.BPE:
    from tokenizers import models

    unknown = next((tokens[i] for i, kind in enumerate(types) if kind == _UNKNOWN), None)
    ids = _ids(tokens)
    return models.BPE(
        vocab=ids, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=_has_all_bytes(ids), dropout=None
    )


def _has_all_bytes(ids: Mapping[str, int]) -> bool:
    return all(f"<0x{byte:02X}>" in ids for byte in range(256))


def _unigram(
    tokens: Sequence[str], scores: Sequence[float], types: Sequence[int], metadata: Mapping[str, Any]
) -> tokenizers.models.Unigram:
    from tokenizers import models

    if not scores:
        raise TokenizerError("the vocabulary has no scores (tokenizer.ggml.scores)", "convert the model to GGUF again")
    normal = [score for score, kind in zip(scores, types, strict=True) if kind == _NORMAL]
    # Byte tokens stand in for unknown characters and must not win where a text spells "<0x41>" out.
    floor = 8 * min(0.0, *normal) - 100
    vocab = [
        (token, floor if kind in (_BYTE, _UNUSED) else float(score))
        for token, score, kind in zip(tokens, scores, types, strict=True)
    ]
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    if unknown is None:
        unknown = next((i for i, kind in enumerate(types) if kind == _UNKNOWN), None)
    return models.Unigram(
        vocab=vocab, unk_id=None if unknown is None else int(unknown), byte_fallback=_has_all_bytes(_ids(tokens))
    )


def _sentencepiece_text_rules(
    tokenizer: tokenizers.Tokenizer, metadata: Mapping[str, Any], *, default_prefix: bool
) -> None:
    """Spaces as visible characters, one before the first word, and the way back.

    The library applies a table of characters to graphemes, so a combining mark after a mapped character (a no-break
    space, say) is lost. T5's own fast tokenizer does the same.
    """
    from tokenizers import Regex, decoders, normalizers

    steps: list[normalizers.Normalizer] = []
    charsmap = metadata.get("tokenizer.ggml.precompiled_charsmap")
    if charsmap is not None and len(charsmap) > 0:
        raw = charsmap if isinstance(charsmap, bytes) else bytes(int(byte) & 0xFF for byte in charsmap)
        steps.append(normalizers.Precompiled(raw))
    if metadata.get("tokenizer.ggml.remove_extra_whitespaces", False):
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", default_prefix))
    if prefix:
        steps.append(normalizers.Prepend(_META))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _META)])
    back: list[decoders.Decoder] = [decoders.Replace(_META, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        back.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(back)


def _with_special_tokens(
    tokenizer: tokenizers.Tokenizer,
    metadata: Mapping[str, Any],
    tokens: list[str],
    types: list[int],
    model: str,
    add_bos: bool,
    add_eos: bool,
) -> Vocabulary:
    from tokenizers import AddedToken

    # Phi-3's turn markers swallow the white space after them; its GGUF has no place to say so.
    strips = model == "llama" and metadata.get("general.architecture") == "phi3"
    keep = ("<unk>", "<s>", "<|endoftext|>")
    special = [i for i, kind in enumerate(types) if kind in (_CONTROL, _UNKNOWN) and tokens[i]]
    tokenizer.add_special_tokens(
        [
            AddedToken(tokens[i], normalized=False, special=True, rstrip=strips and tokens[i] not in keep)
            for i in special
        ]
    )
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind == _USER_DEFINED and token
        ]
    )

    def token_id(name: str, default: int | None = None) -> int | None:
        value = metadata.get(f"tokenizer.ggml.{name}_token_id", default)
        return int(value) if value is not None and 0 <= int(value) < len(tokens) else None

    sentencepiece = model == "llama"
    bos = token_id("bos", 1 if sentencepiece else None)
    eos = token_id("eos", 2 if sentencepiece else 1 if model == "t5" else None)
    add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", add_bos))
    add_eos = bool(metadata.get("tokenizer.ggml.add_eos_token", add_eos))
    add_sequence_tokens(
        tokenizer, (tokens[bos], bos) if add_bos and bos is not None else None,
        (tokens[eos], eos) if add_eos and eos is not None else None,
    )  # fmt: skip
    stops = {i for i in (eos, token_id("eot"), token_id("eom")) if i is not None}
    return Vocabulary(tokenizer, tokens, frozenset(special), bos, eos, frozenset(stops))


def add_sequence_tokens(
    tokenizer: tokenizers.Tokenizer, bos: tuple[str, int] | None, eos: tuple[str, int] | None
) -> None:
    """Makes ``encode`` put these tokens (text and id) before and after every text; None for neither."""
    from tokenizers import processors

    if bos is None and eos is None:
        return
    single, entries = ["$A"], []
    for name, token, at in (("BOS", bos, 0), ("EOS", eos, len(single) + (bos is not None))):
        if token is not None:
            single.insert(at, name)
            entries.append({"id": name, "ids": [token[1]], "tokens": [token[0]]})
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=None, special_tokens=entries)
