"""Reads a sentencepiece ``.model`` file, without the sentencepiece package.

The file is one protobuf message, of which a handful of fields matters; fifty lines read them, so nobody has to install
a C++ library and protobuf for it. Field numbers are those of sentencepiece's public ``sentencepiece_model.proto``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import TokenizerError

_UNIGRAM, _BPE = 1, 2
_NORMAL, _USER_DEFINED = 1, 4


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number is longer than 64 bits")


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field number and value: an int for varints, the raw bytes for everything else."""
    at, end = 0, len(data)
    while at < end:
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + size > end:
            raise ValueError("it ends inside a field")
        yield key >> 3, data[at : at + size]
        at += size


def _numbers(data: bytes) -> dict[int, Any]:
    return dict(_fields(data))


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value  # an id of -1 means: there is no such token


def read_sentencepiece_model(path: Path) -> dict[str, Any]:
    """The model as the key-value pairs in which GGUF would store it (``tokenizer.ggml.*``).

    Raises:
        TokenizerError: the file cannot be read, is no sentencepiece model, or of a kind other than BPE and unigram.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"cannot read {path}: {error.strerror}", "download the file again") from None
    tokens: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    try:
        for number, value in _fields(data):
            if not isinstance(value, bytes):
                continue
            if number == 1:
                piece = _numbers(value)
                kind = piece.get(3, _NORMAL)
                text = piece.get(1, b"").decode()
                # User-defined symbols are found in the text before spaces become visible.
                tokens.append(text.replace("\u2581", " ") if kind == _USER_DEFINED else text)
                scores.append(struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0)
                types.append(kind)
            elif number == 2:
                trainer = _numbers(value)
            elif number == 3:
                normalizer = _numbers(value)
    except (ValueError, IndexError, KeyError, struct.error, AttributeError, TypeError):
        tokens = []
    if not tokens:
        raise TokenizerError(f"{path} is no sentencepiece model", "download the file again")
    model = trainer.get(3, _UNIGRAM)
    if model not in (_UNIGRAM, _BPE):
        raise TokenizerError(f"{path} is a sentencepiece model of kind {model}", "use one of kind BPE or unigram")
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "llama" if model == _BPE else "t5",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_space_prefix": bool(normalizer.get(3, 1)),
        "tokenizer.ggml.remove_extra_whitespaces": bool(normalizer.get(4, 1)),
        "tokenizer.ggml.precompiled_charsmap": normalizer.get(2, b""),
    }
    for field, default, name in ((40, 0, "unknown"), (41, 1, "bos"), (42, 2, "eos"), (43, -1, "padding")):
        token_id = _signed(trainer.get(field, default))
        metadata[f"tokenizer.ggml.{name}_token_id"] = token_id if 0 <= token_id < len(tokens) else None
    return metadata
