"""Models that think aloud: what an answer says before it answers, apart from the answer.

Formats are rows of a table. Which one a model has is read off its chat template; whether this answer thinks, and
whether its thinking has begun in the prompt already, is read off the end of the rendered prompt, since templates open
or close the thinking there on behalf of the model (Qwen3 closes it at once with ``enable_thinking=False``).

In some vocabularies the markers are special tokens ([THINK] of Mistral's, <|channel> of Gemma's), which vanish when
special tokens are skipped in detokenization. Whoever detokenizes must look ``marker_texts`` up in
``Tokenizer.special_token_id`` and keep special tokens (``skip_special_tokens=False``) if one is among them.

Newlines around the markers are no part of either text, as the templates themselves hold when they render an earlier
turn: those behind the opening and before the closing marker, and those between the closing marker and the answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from .detokenize import possible_start

Piece: TypeAlias = tuple[Literal["reasoning", "content"], str]


@dataclass(frozen=True)
class ReasoningFormat:
    """How a model marks its thinking.

    name: of the row, for messages and options. opening, closing: the markers. inside: the prompt ends within the
    thinking, so the answer begins with it.
    """

    name: str
    opening: str
    closing: str
    inside: bool = False

    @property
    def marker_texts(self) -> tuple[str, ...]:
        """What must survive detokenization. Of an opening that has a text behind its token, the token."""
        return (self.opening.removesuffix("thought\n"), self.closing)


#: Qwen3, DeepSeek-R1 and its distills, Nemotron, GLM, SmolLM3 ...; Magistral; Seed-OSS; Gemma 4; Kimi-VL.
REASONING_FORMATS = (
    ReasoningFormat("think", "<think>", "</think>"),
    ReasoningFormat("mistral", "[THINK]", "[/THINK]"),
    ReasoningFormat("seed_oss", "<seed:think>", "</seed:think>"),
    ReasoningFormat("gemma4", "<|channel>thought\n", "<channel|>"),
    ReasoningFormat("kimi_vl", "◁think▷", "◁/think▷"),
)


def reasoning_format(chat_template: str | None, prompt: str) -> ReasoningFormat | None:
    """The format of an answer's thinking; None if the model does not think aloud, or not in this answer.

    Args:
        chat_template: source of the template that rendered the prompt.
        prompt: the rendered prompt, or its last few hundred characters.
    """
    if not chat_template:
        return None
    end = prompt[-256:].rstrip()
    for row in REASONING_FORMATS:
        opening = row.opening.rstrip()
        if row.closing not in chat_template and opening not in chat_template:
            continue
        if end.endswith(row.closing):
            return None
        return ReasoningFormat(row.name, row.opening, row.closing, inside=end.endswith(opening))
    return None


class ReasoningSplitter:
    """Splits an answer that comes in pieces into what was thought and what is said.

    How the text is cut makes no difference to the joined pieces. Thinking is only what begins the answer, after
    nothing but white space: a marker later on is quoted, and content. Thinking without an end is reasoning to the
    last character.

    Args:
        form: what :func:`reasoning_format` found.
    """

    __slots__ = ("_closing", "_form", "_held", "_spaces", "_state")

    def __init__(self, form: ReasoningFormat) -> None:
        self._form = form
        self._closing = (form.closing,)
        # start: an opening may come. opened, closed: behind that marker, where newlines are dropped.
        self._state: Literal["start", "opened", "reasoning", "closed", "content"] = "opened" if form.inside else "start"
        self._held = ""  # may become a marker
        self._spaces: list[str] = []  # newlines that are dropped if the closing marker follows

    def push(self, text: str, final: bool = False) -> list[Piece]:
        """What can be told apart so far; pieces are never empty.

        Args:
            text: the next piece of the answer.
            final: no more follows, so nothing is held back.
        """
        pieces: list[Piece] = []
        text, self._held = self._held + text, ""
        if self._state == "start":
            text = self._start(text, final, pieces)
        if self._state == "opened":
            text = text.lstrip("\n")
            if text:
                self._state = "reasoning"
        if self._state == "reasoning":
            text = self._reasoning(text, final, pieces)
        if self._state == "closed":
            text = text.lstrip("\n")
            if text:
                self._state = "content"
        if self._state == "content" and text:
            pieces.append(("content", text))
        return pieces

    def _start(self, text: str, final: bool, pieces: list[Piece]) -> str:
        """Whether the answer begins with thinking; gives the text behind that decision."""
        rest = text.lstrip()
        self._spaces.append(text[: len(text) - len(rest)])
        if rest.startswith(self._form.opening):
            self._spaces.clear()
            self._state = "opened"
            return rest[len(self._form.opening) :]
        if not final and self._form.opening.startswith(rest):
            self._held = rest
            return ""
        self._state = "content"
        rest = "".join(self._spaces) + rest
        self._spaces.clear()
        return rest

    def _reasoning(self, text: str, final: bool, pieces: list[Piece]) -> str:
        at = text.find(self._form.closing)
        if at >= 0:
            thought, rest = text[:at], text[at + len(self._form.closing) :]
            self._state = "closed"
        else:
            keep = 0 if final else possible_start(text, self._closing)
            thought, rest = text[: len(text) - keep], ""
            self._held = text[len(text) - keep :]
        shown = thought.rstrip("\n")
        if shown:
            pieces.append(("reasoning", "".join(self._spaces) + shown))
            self._spaces.clear()
        self._spaces.append(thought[len(shown) :])
        if final or self._state == "closed":
            self._spaces.clear()  # those before the closing marker, or the end
        return rest
