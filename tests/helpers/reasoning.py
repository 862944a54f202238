"""Answers that think, put together again."""

from __future__ import annotations

from collections.abc import Iterable

from pelton.text.reasoning import Piece


def join_pieces(pieces: Iterable[Piece]) -> tuple[str | None, str]:
    """(reasoning or None, content) of all pieces of an answer."""
    thought: list[str] = []
    said: list[str] = []
    for kind, text in pieces:
        (thought if kind == "reasoning" else said).append(text)
    return "".join(thought) if thought else None, "".join(said)
