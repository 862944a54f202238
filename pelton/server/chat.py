"""``/v1/chat/completions``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import UNSET

from ..errors import RequestError
from ..outputs import Logprob
from .chat_events import Ask, CallDelta, Chat, ChatAnswer, ChatEvent, conversation
from .completions import plain_prompt_logprobs
from .http import Context, Reply, TokenStream
from .schemas import (
    AnswerFunction,
    AnswerMessage,
    AnswerToolCall,
    ChatChoice,
    ChatChunk,
    ChatLogprobs,
    ChatRequest,
    ChatResponse,
    ChunkChoice,
    Delta,
    FunctionDelta,
    Message,
    NamedToolChoice,
    TokenLogprob,
    Tool,
    ToolCallDelta,
    TopLogprob,
    encode,
)
from .service import Job, Service, check_stream, off_loop
from .streaming import DONE, ChatStream, ChatWords, sse

_decoder = msgspec.json.Decoder(ChatRequest)


class ChatCompletions:
    """The handler."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, body: bytes, context: Context) -> Reply | TokenStream:
        request = _decoder.decode(body)
        chat = await open_chat(self._service, context, request, len(body))
        words = _Words(self._service, request, context, chat.job)
        if request.stream:
            return ChatStream(chat, words)
        answers = await chat.answers()
        return Reply(encode(words.response(answers)))


async def open_chat(service: Service, context: Context, request: ChatRequest, size: int) -> Chat:
    """Check a request, and turn it into tokens and parameters. size: of its texts, roughly.

    Raises:
        HttpError: there is no such model, or no room in the queue.
        RequestError: the request is invalid.
    """
    adapter = service.adapter(request.model)
    service.check_room()
    check_stream(request)
    ask = ask_of(request, size)
    asked = await conversation(service, ask)
    if ask.continues and (asked.grammar is not None or service.structure_of(request) is not None):
        raise RequestError("the last message is the beginning of an answer whose form is prescribed",
                           "leave out that message, or the form")  # fmt: skip
    asked.given.cache_salt = request.cache_salt or ""
    own = _own_params(request)
    params = await off_loop(size, lambda: asked.params(service, request, own))  # which looks through schemas
    if service.config.log_prompts:
        context.log["messages"] = ask.messages
    return Chat(
        Job(service, context, asked.given, params), asked, service.options(request.priority, request.timeout, adapter)
    )


def ask_of(request: ChatRequest, size: int) -> Ask:
    """What a request says of its prompt. size: of its texts, roughly."""
    choice: Any = request.tool_choice
    if isinstance(choice, NamedToolChoice):
        choice = msgspec.to_builtins(choice)
    continues = bool(request.continue_final_message)
    if request.add_generation_prompt is continues:
        raise RequestError(
            f"add_generation_prompt is {continues} with continue_final_message {continues}".lower(),
            "an answer either starts or goes on: leave out add_generation_prompt",
        )
    return Ask(
        plain_messages(request.messages), size, [plain_tool(tool) for tool in request.tools or ()], choice,
        request.parallel_tool_calls is not False, _template_variables(request), continues,
    )  # fmt: skip


def plain_tool(tool: Tool) -> dict[str, Any]:
    """Only the fields that are there."""
    function = {name: value for name, value in msgspec.structs.asdict(tool.function).items() if value is not None}
    return {"type": "function", "function": function}


def _own_params(request: ChatRequest) -> dict[str, Any]:
    more: dict[str, Any] = {}
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise RequestError("max_tokens and max_completion_tokens are two names of one limit", "give one of them")
    given = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
    more["max_tokens"] = given  # None: until the context is full
    if request.top_logprobs is not None and not request.logprobs:
        raise RequestError("top_logprobs is of no use without logprobs", "set logprobs, or leave it out")
    if request.logprobs:
        more["logprobs"] = request.top_logprobs or 0
    return more


def _template_variables(request: ChatRequest) -> dict[str, Any]:
    """What the model's chat template gets besides the messages."""
    variables = dict(request.chat_template_kwargs or {})
    if request.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", request.reasoning_effort)
        if request.reasoning_effort == "none":
            variables.setdefault("enable_thinking", False)
    return variables


def plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """As templates want them: only the fields that are there."""
    plain: list[dict[str, Any]] = []
    for message in messages:
        values: dict[str, Any] = {name: value for name, value in msgspec.structs.asdict(message).items()
                                  if value is not None and name not in ("refusal", "annotations")}  # fmt: skip
        if isinstance(message.content, list):
            values["content"] = [
                {"type": part.type} | ({} if part.text is UNSET else {"text": part.text}) for part in message.content
            ]
        if message.role == "developer":
            values["role"] = "system"
        if message.tool_calls is not None:
            values["tool_calls"] = [msgspec.to_builtins(call) for call in message.tool_calls]
        if message.role == "assistant" and message.content is None:
            values.setdefault("content", None)
        plain.append(values)
    return plain


class _Words(ChatWords):
    """What the API says of an answer."""

    def __init__(self, service: Service, request: ChatRequest, context: Context, job: Job) -> None:
        self._request = request
        self._job = job
        self._id = f"chatcmpl-{context.request_id}"
        self._created = int(time.time())
        self._model = request.model or service.config.model_names[0]
        options = request.stream_options
        self._wants_usage = options is not None and bool(options.include_usage)
        self._runs_usage = self._wants_usage and options is not None and bool(options.continuous_usage_stats)
        self._begun: set[int] = set()

    def _chunk(self, choices: list[ChunkChoice], usage: Any = UNSET, prompt_token_ids: Any = UNSET) -> bytes:
        return sse(
            ChatChunk(
                id=self._id, created=self._created, model=self._model, choices=choices, usage=usage,
                prompt_token_ids=prompt_token_ids,
            )
        )  # fmt: skip

    def event(self, event: ChatEvent) -> bytes:
        usage = UNSET if not self._wants_usage else self._job.usage if self._runs_usage else None
        new = b""
        if event.index not in self._begun:
            wants_ids = self._request.return_token_ids and not self._begun
            self._begun.add(event.index)
            ids = list(self._job.given.token_ids) if wants_ids else UNSET
            new = self._chunk([ChunkChoice(event.index, Delta(role="assistant", content=""))], usage, ids)
        for choice in self._choices(event):
            new += self._chunk([choice], usage)
        return new

    def end(self) -> bytes:
        return (self._chunk([], self._job.usage) if self._wants_usage else b"") + DONE

    def _choices(self, event: ChatEvent) -> list[ChunkChoice]:
        """An event as chunks: usually one, with the finish reason in the last."""
        deltas = []
        if event.reasoning and self._request.include_reasoning is not False:
            deltas.append(Delta(reasoning_content=event.reasoning))
        if event.content:
            deltas.append(Delta(content=event.content))
        deltas += [Delta(tool_calls=[_call_delta(call)]) for call in event.calls]
        piece = event.piece
        wanted = piece.logprobs is not None or self._request.return_token_ids
        if not deltas and (event.finish_reason is not None or wanted):
            deltas.append(Delta())
        choices = [ChunkChoice(event.index, delta) for delta in deltas]
        if choices and piece.logprobs is not None:
            choices[0].logprobs = chat_logprobs(piece.token_ids, piece.logprobs, self._request.top_logprobs or 0)
        if choices and self._request.return_token_ids:
            choices[0].token_ids = list(piece.token_ids)
        if event.finish_reason is not None:
            choices[-1].finish_reason = event.finish_reason
            choices[-1].stop_reason = piece.stop_reason
        return choices

    def response(self, answers: list[ChatAnswer]) -> ChatResponse:
        response = ChatResponse(
            id=self._id, created=self._created, model=self._model, usage=self._job.usage,
            choices=[self._choice(index, answer) for index, answer in enumerate(answers)],
        )  # fmt: skip
        if self._request.return_token_ids:
            response.prompt_token_ids = list(self._job.given.token_ids)
        if self._job.prompt_logprobs is not None:
            response.prompt_logprobs = plain_prompt_logprobs(self._job.prompt_logprobs)
        return response

    def _choice(self, index: int, answer: ChatAnswer) -> ChatChoice:
        message = AnswerMessage(content=answer.content or None if answer.calls else answer.content)
        if answer.reasoning and self._request.include_reasoning is not False:
            message.reasoning_content = answer.reasoning
        if answer.calls:
            message.tool_calls = [
                AnswerToolCall(call.id or "", AnswerFunction(call.name or "", call.arguments)) for call in answer.calls
            ]
        choice = ChatChoice(
            index=index, message=message, finish_reason=answer.finish_reason, stop_reason=answer.stop_reason
        )
        if answer.logprobs is not None:
            choice.logprobs = chat_logprobs(answer.token_ids, answer.logprobs, self._request.top_logprobs or 0)
        if self._request.return_token_ids:
            choice.token_ids = list(answer.token_ids)
        return choice


def _call_delta(call: CallDelta) -> ToolCallDelta:
    if call.name is None:
        return ToolCallDelta(call.index, function=FunctionDelta(arguments=call.arguments))
    return ToolCallDelta(call.index, call.id or UNSET, "function", FunctionDelta(call.name, call.arguments))


def chat_logprobs(token_ids: Sequence[int], entries: Sequence[dict[int, Logprob]], count: int) -> ChatLogprobs:
    """The log probabilities of tokens, each with the ``count`` likeliest ones in its place."""
    content = []
    for token_id, entry in zip(token_ids, entries, strict=True):
        top = [_top(logprob) for logprob in entry.values() if logprob.rank <= count]
        own = _top(entry[token_id])
        content.append(TokenLogprob(own.token, own.logprob, own.bytes, top))
    return ChatLogprobs(content)


def _top(logprob: Logprob) -> TopLogprob:
    text = logprob.decoded_token or ""
    return TopLogprob(text, max(float(logprob), -9999.0), list(text.encode("utf-8", "replace")))
