"""A conversation to be answered, and its answer as neutral events, which each API puts into its own words."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..config import SamplingParams
from ..errors import RequestError
from ..outputs import CompletionOutput, Logprob
from ..prompts import EncodedPrompt
from ..text.chat import check_messages
from ..text.reasoning import ReasoningFormat, ReasoningSplitter, reasoning_format
from ..text.tool_calls import CallArguments, CallBroken, CallStart, Text, ToolCallParser, collect
from ..text.tool_formats import Tool, check_tools, checked_choice
from ..text.tool_grammar import thinking_then_json, tool_choice_grammar
from ..text.tool_messages import ToolStyle, prepare
from .service import Job, Service, off_loop

#: What the server itself gives to templates, or to those who render them. A template of the request's own would be
#: a program of the request's own.
_NO_VARIABLES = ("messages", "tools", "add_generation_prompt", "chat_template", "self")


@dataclass
class Ask:
    """What a request wants, in the terms of OpenAI's chat API.

    size: characters of its texts, roughly. tool_choice: None, a word, or a named function. variables: for the template.
    continues: the last message is the beginning of the answer.
    """

    messages: list[dict[str, Any]]
    size: int
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: Any = None
    parallel: bool = True
    variables: dict[str, Any] = field(default_factory=dict)
    continues: bool = False


@dataclass(slots=True)
class CallDelta:
    """A piece of a tool call: the first one has id and name. ``arguments`` is the next piece of a JSON text."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


@dataclass(slots=True)
class ChatEvent:
    """What is new of a choice. ``finish_reason`` is set by its last event, "tool_calls" if it called tools."""

    index: int
    piece: CompletionOutput
    content: str = ""
    reasoning: str = ""
    calls: list[CallDelta] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass(slots=True)
class ChatAnswer:
    """A choice as a whole."""

    content: str
    reasoning: str
    calls: list[CallDelta]
    finish_reason: str
    stop_reason: int | str | None
    token_ids: Sequence[int]
    logprobs: Sequence[dict[int, Logprob]] | None


@dataclass
class Conversation:
    """The prompt of a conversation, and how its answer is to be read.

    style: None if no tools may be called. grammar: that the answer must follow.
    """

    given: EncodedPrompt
    reasoning: ReasoningFormat | None = None
    style: ToolStyle | None = None
    tools: Sequence[Tool] = ()
    parallel: bool = True
    grammar: str | None = None
    keeps_special_tokens: bool = False

    def params(self, service: Service, request: Any, more: dict[str, Any]) -> SamplingParams:
        """The parameters of a request whose answer must be readable here.

        Raises:
            RequestError: a value is out of its range, or tools and another structure are both demanded.
        """
        if self.keeps_special_tokens:
            more["skip_special_tokens"] = False
        structure, grammar = service.structure_of(request), self.grammar
        if structure is not None:
            if grammar is not None:
                raise RequestError("tool_choice and response_format both prescribe the answer", "give one of them")
            if self.reasoning is not None and (structure.json is not None or structure.json_object):
                schema = {"type": "object"} if structure.json is None else _schema(structure.json)
                grammar = thinking_then_json(schema, self.reasoning, service.tokenizer.added_token_id)
            else:
                self.reasoning = None  # the answer begins at once, whatever the prompt has opened
        if grammar is not None:
            more["structured_outputs"] = {"grammar": grammar}
        return service.params(request, **more)

    def reader(self) -> ChoiceReader:
        return ChoiceReader(self)


async def conversation(service: Service, ask: Ask) -> Conversation:
    """The tokens of a conversation, and how the answer will look.

    Raises:
        RequestError: messages, tools or tool_choice are malformed, or the chat template refuses them.
    """
    tokenizer = service.tokenizer
    if tokenizer is None or tokenizer.chat_template is None:
        raise RequestError("the model has no chat template", "use /v1/completions")
    for name in _NO_VARIABLES:
        if name in ask.variables:
            raise RequestError(f"chat_template_kwargs has {name!r}, which is not for requests to set there",
                               "leave it out, or give the field of that name")  # fmt: skip
    tools = check_tools(ask.tools)
    choice, _ = checked_choice(ask.tool_choice, tools)
    wants_tools = choice != "none"
    style = None
    if wants_tools or any(m["role"] == "tool" or m.get("tool_calls") for m in ask.messages):
        style = await service.tool_style()

    def render() -> Conversation:
        messages, told = ask.messages, None
        if style is not None:
            messages, told = prepare(ask.messages, tools if wants_tools else [], style)
        source = tokenizer.template_source(with_tools=bool(told))
        if ask.continues:
            text = _unfinished(tokenizer, messages, told, ask.variables)
        else:
            text = tokenizer.apply_chat_template(messages, tools=told, **ask.variables)
        given = EncodedPrompt(None, tokenizer.encode(text, add_special_tokens=False), not ask.continues)
        found = Conversation(given, reasoning_format(source, text[-256:]))
        if wants_tools and style is not None:
            found.style, found.tools, found.parallel = style, tools, ask.parallel
            found.grammar = tool_choice_grammar(
                style.form, tools, ask.tool_choice, parallel=ask.parallel and style.several,
                token_id=tokenizer.added_token_id, reasoning=found.reasoning,
            )  # fmt: skip
            found.keeps_special_tokens = style.keeps_special_tokens(tokenizer.special_token_id)
        if found.reasoning is not None:
            marked = any(tokenizer.special_token_id(t) is not None for t in found.reasoning.marker_texts)
            found.keeps_special_tokens = found.keeps_special_tokens or marked
        return found

    return await off_loop(ask.size, render) if style is None else await asyncio.to_thread(render)


def _unfinished(tokenizer: Any, messages: list[dict[str, Any]], tools: Any, variables: dict[str, Any]) -> str:
    """The prompt up to the last character of the last message, without the end of its turn.

    The template itself shows where that is: it renders the message with a mark behind it.
    """
    messages = check_messages(messages)
    last = messages[-1]
    if last["role"] != "assistant" or last.get("tool_calls") or not isinstance(last.get("content"), str):
        raise RequestError("the last message is no text of the assistant", "give one that the answer can go on with")
    mark = f"<{uuid.uuid4().hex}>"
    marked = [*messages[:-1], {**last, "content": last["content"] + mark}]
    text = str(tokenizer.apply_chat_template(marked, tools=tools, add_generation_prompt=False, **variables))
    if text.count(mark) != 1:
        raise RequestError("the model's chat template does not show the last message as it is",
                           "let the last message be the user's")  # fmt: skip
    return text[: text.index(mark)]


class ChoiceReader:
    """Splits the text of one choice into what it thinks, says and calls."""

    def __init__(self, conversation: Conversation) -> None:
        self._splitter = None if conversation.reasoning is None else ReasoningSplitter(conversation.reasoning)
        self._parser = None
        if conversation.style is not None:
            self._parser = ToolCallParser(conversation.style.form, conversation.tools)
        self._parallel = conversation.parallel
        self._num_calls = 0

    def read(self, piece: CompletionOutput) -> ChatEvent:
        """The next event, of the next piece."""
        final = piece.finished
        reasoning, content = self._split(piece.text, final)
        event = ChatEvent(piece.index, piece, reasoning=reasoning, finish_reason=piece.finish_reason)
        if self._parser is None:
            event.content = content
            return event
        for found in self._parser.push(content, final):
            if isinstance(found, Text):
                event.content += found.text
            elif isinstance(found, CallStart):
                self._num_calls += 1
                if self._is_wanted(found.index):
                    event.calls.append(CallDelta(found.index, "", found.id or new_call_id(), found.name))
            elif isinstance(found, CallArguments):
                if not self._is_wanted(found.index):
                    continue
                if event.calls and event.calls[-1].index == found.index:
                    event.calls[-1].arguments += found.delta
                else:
                    event.calls.append(CallDelta(found.index, found.delta))
            elif isinstance(found, CallBroken):
                self._num_calls -= 1
                event.content += found.text  # what was sent of the call cannot be taken back
        if final and self._num_calls > 0 and piece.finish_reason == "stop":
            event.finish_reason = "tool_calls"
        return event

    def whole(self, piece: CompletionOutput) -> ChatAnswer:
        """The answer, of all its text at once: what looked like a call and is none is text."""
        reasoning, content = self._split(piece.text, True)
        calls: list[CallDelta] = []
        reason = piece.finish_reason or "stop"
        if self._parser is not None:
            content, found = collect(self._parser.push(content, True))
            calls = [
                CallDelta(i, call.arguments, call.id or new_call_id(), call.name)
                for i, call in enumerate(found) if self._is_wanted(i)
            ]  # fmt: skip
            if calls and reason == "stop":
                reason = "tool_calls"
        return ChatAnswer(content, reasoning, calls, reason, piece.stop_reason, piece.token_ids, piece.logprobs)

    def _split(self, text: str, final: bool) -> tuple[str, str]:
        """What is thought, and the rest."""
        if self._splitter is None:
            return "", text
        reasoning = content = ""
        for kind, part in self._splitter.push(text, final):
            if kind == "reasoning":
                reasoning += part
            else:
                content += part
        return reasoning, content

    def _is_wanted(self, index: int) -> bool:
        return self._parallel or index == 0


def _schema(given: Any) -> dict[str, Any]:
    try:
        schema = json.loads(given) if isinstance(given, str) else given
    except json.JSONDecodeError as error:
        raise RequestError(f"structured_outputs.json is no JSON: {error}", "correct it") from None
    if not isinstance(schema, dict):
        raise RequestError("structured_outputs.json is no object", "give a JSON schema")
    return schema


def new_call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


@dataclass
class Chat:
    """A conversation on its way to the engines."""

    job: Job
    conversation: Conversation
    options: dict[str, Any]

    async def answers(self) -> list[ChatAnswer]:
        """All choices, when they are there."""
        output = await self.job.complete(self.options)
        answers = [self.conversation.reader().whole(piece) for piece in output.outputs]
        for answer in answers:
            said = len(answer.content) + sum(len(call.name or "") + len(call.arguments) for call in answer.calls)
            thought = len(answer.reasoning) / max(1, len(answer.reasoning) + said)
            self.job.reasoning_tokens += round(thought * len(answer.token_ids))
        return answers
