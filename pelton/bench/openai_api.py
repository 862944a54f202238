"""Requests and streamed answers of OpenAI's API, as servers in the wild speak it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ..config import SamplingParams
from ..errors import RequestError
from .sse import SSEParser
from .workloads import WorkloadRequest

ENDPOINTS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
#: What not every server takes, in the order in which it is done without. token_ids: prompts as ids instead of text.
OPTIONAL = ("cache_salt", "min_tokens", "token_ids", "max_tokens", "ignore_eos", "stream_options")
#: What is done instead, for the note.
INSTEAD = {
    "cache_salt": "cache_salt is not sent: a prefix cache may know prompts from an earlier run",
    "min_tokens": "min_tokens is not sent",
    "token_ids": "prompts are sent as text: their lengths are as the server counts them",
    "max_tokens": "max_completion_tokens is sent in place of max_tokens",
    "ignore_eos": "ignore_eos is not sent: answers may be shorter than asked for",
    "stream_options": "stream_options is not sent",
}
#: Sent where they are not the default; temperature always is.
_SAMPLING = ("top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty", "repetition_penalty",
             "typical_p", "stop_token_ids", "bad_words", "logit_bias", "allowed_token_ids",
             "skip_special_tokens")  # fmt: skip
_DEFAULTS = SamplingParams()


def check_sendable(requests: Sequence[WorkloadRequest]) -> None:
    """Raises RequestError if a request has a parameter that would be left out of its body."""
    known = {*_SAMPLING, "max_tokens", "min_tokens", "ignore_eos", "temperature"}
    for number, request in enumerate(requests):
        for each in fields(request.params):
            if each.name not in known and getattr(request.params, each.name) != getattr(_DEFAULTS, each.name):
                raise RequestError(
                    f"request {number} has {each.name}, which this client does not send", "remove it, or send the same"
                    " to all requests with --extra-body",
                )  # fmt: skip


@dataclass(frozen=True)
class Api:
    """How requests are written. sent: those of OPTIONAL that the server takes. salt: of this run, for cache_salt."""

    endpoint: str
    model: str
    sent: frozenset[str] = frozenset(OPTIONAL)
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    salt: str = ""

    @property
    def path(self) -> str:
        return ENDPOINTS[self.endpoint]

    @property
    def wants_text(self) -> bool:
        return self.endpoint == "chat" or "token_ids" not in self.sent

    def uses(self, name: str, request: WorkloadRequest) -> bool:
        """Whether the body of ``request`` has this one of OPTIONAL in it."""
        if name not in self.sent:
            return False
        if name == "ignore_eos":
            return request.params.ignore_eos
        if name == "min_tokens":
            return request.params.ignore_eos or request.params.min_tokens > 0
        if name == "token_ids":
            return self.endpoint == "completions" and request.prompt is None
        if name == "cache_salt":
            return bool(self.salt)
        return name == "stream_options" or self.endpoint == "chat"  # max_tokens has another name only there

    def body(self, request: WorkloadRequest) -> bytes:
        body: dict[str, Any] = {"model": self.model}
        if self.endpoint == "chat":
            body["messages"] = request.messages or [{"role": "user", "content": request.prompt}]
        else:
            body["prompt"] = list(request.prompt_token_ids) if request.prompt is None else request.prompt
        legacy = "max_tokens" in self.sent or self.endpoint == "completions"
        body["max_tokens" if legacy else "max_completion_tokens"] = request.max_tokens
        body["stream"] = True
        body["temperature"] = request.params.temperature
        for name in _SAMPLING:
            value = getattr(request.params, name)
            if value != getattr(_DEFAULTS, name):
                body[name] = value if not isinstance(value, tuple) else list(value)
        if self.uses("ignore_eos", request):
            body["ignore_eos"] = True
        if self.uses("min_tokens", request):
            body["min_tokens"] = request.max_tokens if request.params.ignore_eos else request.params.min_tokens
        if self.uses("cache_salt", request):
            body["cache_salt"] = self.salt
        if "stream_options" in self.sent:
            body["stream_options"] = {"include_usage": True}
        return json.dumps({**body, **self.extra_body}, separators=(",", ":")).encode()


class Answer:
    """A streamed answer as it comes in.

    chunk_times: when each chunk came that has tokens. text: what they say. usage: the last that the server sent.
    finish_reason: the server's. is_done: the server said that the stream is over. error: what it said instead.
    """

    __slots__ = ("_chat", "_other", "_parser", "_parts", "chunk_times", "error", "finish_reason", "is_done", "usage")

    def __init__(self, endpoint: str) -> None:
        self._chat = endpoint == "chat"
        self._parser = SSEParser()
        self._parts: list[str] = []
        self._other = b""
        self.chunk_times: list[float] = []
        self.usage: dict[str, Any] | None = None
        self.finish_reason: str | None = None
        self.is_done = False
        self.error: str | None = None

    @property
    def text(self) -> str:
        return "".join(self._parts)

    def feed(self, data: bytes, now: float) -> None:
        for event in self._parser.feed(data):
            self._event(event, now)

    def close(self, now: float) -> None:
        for event in self._parser.close():
            self._event(event, now)

    def _event(self, event: bytes, now: float) -> None:
        if event.strip() == b"[DONE]":
            self.is_done = True
            return
        try:
            chunk = json.loads(event)
        except ValueError:
            self.error = f"an event is no JSON: {event[:80]!r}"
            return
        if not isinstance(chunk, dict):
            self.error = f"an event is no object: {event[:80]!r}"
            return
        if chunk.get("error"):
            self.error = error_text(event)
            return
        if isinstance(chunk.get("usage"), dict):
            self.usage = chunk["usage"]
        choices = chunk.get("choices")
        if not choices or not isinstance(choices, list) or not isinstance(choices[0], dict):
            return
        choice = choices[0]
        text = self._text(choice)
        if text is not None:
            self.chunk_times.append(now)
            self._parts.append(text)
        if choice.get("finish_reason"):
            self.finish_reason = str(choice["finish_reason"])

    def _text(self, choice: dict[str, Any]) -> str | None:
        """What tokens say, maybe nothing: special tokens have no text. None: the chunk brings no token."""
        ending = bool(choice.get("finish_reason"))
        if not self._chat:
            text = choice.get("text")
            if text or choice.get("token_ids") or choice.get("logprobs"):
                return text or ""
            return "" if isinstance(text, str) and not ending else None
        delta = choice.get("delta")
        if not isinstance(delta, dict):
            return None
        said = [delta.get(name) for name in ("reasoning_content", "reasoning", "content")]
        text = "".join(part for part in said if isinstance(part, str))
        if text:
            return text
        if delta.get("tool_calls"):
            calls = [call.get("function") or {} for call in delta["tool_calls"] if isinstance(call, dict)]
            return "".join(f"{call.get('name') or ''}{call.get('arguments') or ''}" for call in calls)
        # The first chunk says only whose turn it is.
        silent = "" in said and not ending and not delta.get("role")
        return "" if silent else None


def error_text(body: bytes) -> str:
    """What a server says in the body of an error, in one line."""
    try:
        found: Any = json.loads(body)
    except ValueError:
        return _line(body.decode("utf-8", "replace"))
    for _ in range(4):
        if isinstance(found, list) and found:
            found = found[0]
        elif isinstance(found, dict):
            found = next((found[k] for k in ("error", "detail", "message", "msg") if found.get(k)), str(found))
        else:
            break
    return _line(str(found))


def _line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 200 else text[:199] + "…"
