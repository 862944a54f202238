"""Prompts as callers give them, and as token ids."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias

from .errors import RequestError, TokenizerError

#: A text, token ids, or a dict with "prompt" (text), "prompt_token_ids" or "messages" (a conversation), and perhaps
#: "cache_salt": prompts of different salts share nothing in the prefix cache; and "lora": the adapter to use.
Prompt: TypeAlias = "str | Sequence[int] | Mapping[str, Any]"
#: [{"role": "user", "content": "..."}, ...]
Conversation: TypeAlias = "Sequence[Mapping[str, Any]]"


class EncodedPrompt:
    """A prompt as token ids; ``is_chat`` if the answer starts a text instead of going on with one.

    Prompts of different ``cache_salt`` share nothing in the prefix cache. ``lora`` names the adapter to use.
    """

    __slots__ = ("cache_salt", "is_chat", "lora", "text", "token_ids")

    def __init__(self, text: str | None, token_ids: list[int], is_chat: bool) -> None:
        self.text = text
        self.token_ids = token_ids
        self.is_chat = is_chat
        self.cache_salt = ""
        self.lora: str | None = None


class Detokenizer(Protocol):
    """Text of a growing sequence of tokens."""

    def add(self, token_ids: Sequence[int], /) -> str: ...

    def finish(self) -> str: ...


class Tokenizer(Protocol):
    """What this module needs of :class:`pelton.text.tokenizer.Tokenizer`."""

    @property
    def chat_template(self) -> str | None: ...

    def to_json(self) -> str: ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...

    def encode_chat(self, messages: Any, *, tools: Any = None) -> list[int]: ...

    def detokenizer(self, skip_special_tokens: bool = True, *, at_start: bool = True) -> Detokenizer: ...


def conversation(tokenizer: Tokenizer | None, messages: Conversation, tools: Any = None) -> EncodedPrompt:
    """The tokens of a conversation, the start of the answer included.

    Raises:
        TokenizerError: no tokenizer or no chat template.
    """
    return EncodedPrompt(None, _needed(tokenizer).encode_chat(messages, tools=tools), True)


def encode(tokenizer: Tokenizer | None, prompt: Prompt) -> EncodedPrompt:
    """The tokens of any prompt.

    Raises:
        RequestError: it is none of what :data:`Prompt` says.
        TokenizerError: no tokenizer or chat template for what is to be encoded.
    """
    salt, is_chat, lora = "", False, None
    if isinstance(prompt, Mapping):
        keys = set(prompt) & {"prompt", "prompt_token_ids", "messages"}
        if len(keys) != 1:
            raise RequestError(
                "a prompt dict needs one of 'prompt', 'prompt_token_ids' and 'messages'",
                f"it has {', '.join(map(repr, prompt)) or 'nothing'}",
            )
        salt = prompt.get("cache_salt", "")
        if not isinstance(salt, str):
            raise RequestError(f"cache_salt is {salt!r}", "give a text")
        lora = prompt.get("lora")
        if not isinstance(lora, str | None):
            raise RequestError(f"lora is {lora!r}", "give the name of an adapter")
        key = keys.pop()
        is_chat = key == "messages"
        prompt = prompt[key]
    if is_chat:
        encoded = conversation(tokenizer, prompt)  # type: ignore[arg-type]
    elif isinstance(prompt, str):
        encoded = EncodedPrompt(prompt, _needed(tokenizer).encode(prompt), False)
    else:
        encoded = EncodedPrompt(None, _token_ids(prompt), False)
    encoded.cache_salt, encoded.lora = salt, lora
    return encoded


def with_lora(given: EncodedPrompt, lora: str | None) -> EncodedPrompt:
    """The prompt, answered by an adapter unless it names one itself."""
    if not isinstance(lora, str | None):
        raise RequestError(f"lora is {lora!r}", "give the name of an adapter")
    if lora is None or given.lora is not None:
        return given
    given = copy.copy(given)  # the caller's may be asked again, without
    given.lora = lora
    return given


def _needed(tokenizer: Tokenizer | None) -> Tokenizer:
    if tokenizer is None:
        raise TokenizerError("the checkpoint has no tokenizer", "give prompts as token ids")
    return tokenizer


def as_list(prompts: Any) -> list[Any]:
    """One prompt or many: a list of integers is one prompt."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    try:
        listed = list(prompts)
    except TypeError:
        raise RequestError(
            f"a prompt is of type {type(prompts).__name__}", "give a text, token ids, or a list of them"
        ) from None
    return [listed] if listed and hasattr(listed[0], "__index__") else listed


def _token_ids(prompt: Any) -> list[int]:
    try:
        return [token.__index__() for token in prompt]
    except (TypeError, AttributeError):
        raise RequestError(
            f"a prompt is of type {type(prompt).__name__} and holds no token ids", "give a text or integers"
        ) from None
