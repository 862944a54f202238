"""``/v1/messages``: Anthropic's API over the same conversations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec

from ..errors import RequestError
from .anthropic_schemas import (
    AdaptiveThinking,
    AnthropicErrorBody,
    AnthropicErrorResponse,
    AnthropicTool,
    AnyChoice,
    AutoChoice,
    BlockDelta,
    BlockStart,
    BlockStop,
    CountTokensRequest,
    CountTokensResponse,
    DisabledThinking,
    EnabledThinking,
    Event,
    InputDelta,
    InputTurn,
    MessageDelta,
    MessageEnd,
    MessageResponse,
    MessagesRequest,
    MessageStart,
    MessageStop,
    MessageUsage,
    NoneChoice,
    OutputTokensDetails,
    Ping,
    SignatureDelta,
    StopReason,
    TextBlock,
    TextDelta,
    TextOutput,
    ThinkingBlock,
    ThinkingDelta,
    ThinkingOutput,
    ToolChoice,
    ToolResultBlock,
    ToolUseBlock,
    ToolUseOutput,
)
from .chat import ask_of, open_chat
from .chat_events import ChatEvent, conversation
from .errors import HttpError
from .http import Context, Reply, TokenStream
from .parts import Part, PartEvent, PartReader, flat_names, parts_of
from .schemas import (
    ChatRequest,
    ContentPart,
    FunctionCall,
    FunctionDefinition,
    JsonSchema,
    Message,
    NamedFunction,
    NamedToolChoice,
    ResponseFormat,
    Tool,
    ToolCall,
    encode,
)
from .service import Job, Service
from .streaming import ChatStream, ChatWords, named_sse

_decoder = msgspec.json.Decoder(MessagesRequest)
_count_decoder = msgspec.json.Decoder(CountTokensRequest)

_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def anthropic_error(error: HttpError) -> tuple[bytes, bytes]:
    """An error as this API has it: (the body, the event of a stream)."""
    kind = _ERROR_TYPES.get(error.status, "api_error")
    body = encode(AnthropicErrorResponse(error=AnthropicErrorBody(type=kind, message=flat_names(error.body.message))))
    return body, b"event: error\ndata: " + body + b"\n\n"


class Messages:
    """The handlers."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, body: bytes, context: Context) -> Reply | TokenStream:
        request = _decoder.decode(body)
        chat = await open_chat(self._service, context, _chat_request(request), len(body))
        words = _Words(self._service, request, chat.job, context)
        if request.stream:
            return ChatStream(chat, words)
        (answer,) = await chat.answers()
        content = [_block(part) for part in parts_of(answer, reasoning=words.shows_thinking)]
        end = _end(chat.job, answer.finish_reason, answer.stop_reason)
        return Reply(encode(words.response(content, end)))

    async def count(self, body: bytes, context: Context) -> Reply:
        """The tokens of a prompt."""
        request = _count_decoder.decode(body)
        self._service.adapter(request.model)
        asked = await conversation(self._service, ask_of(_chat_request(request), len(body)))
        return Reply(encode(CountTokensResponse(input_tokens=len(asked.given.token_ids))))


def _chat_request(request: CountTokensRequest) -> ChatRequest:
    """The same in the terms of OpenAI's chat API.

    Raises:
        RequestError: blocks are where they cannot be, or a result answers no call.
    """
    chat = ChatRequest(
        model=request.model, messages=_messages(request), chat_template_kwargs=_template_variables(request)
    )
    if request.messages[-1].role == "assistant":
        chat.continue_final_message = True
    if request.tools:
        chat.tools = [_tool(tool) for tool in request.tools]
    _choose(request, chat)
    config = request.output_config
    if config is not None:
        chat.reasoning_effort = config.effort
        if config.format is not None:
            schema = JsonSchema(name="answer", schema=config.format.schema)
            chat.response_format = ResponseFormat(type="json_schema", json_schema=schema)
    if isinstance(request, MessagesRequest):
        chat.max_tokens, chat.stop, chat.stream = request.max_tokens, request.stop_sequences, request.stream
        chat.temperature, chat.top_p, chat.top_k = request.temperature, request.top_p, request.top_k
    return chat


def _tool(tool: AnthropicTool) -> Tool:
    function = FunctionDefinition(
        name=tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict
    )
    return Tool(type="function", function=function)


def _choose(request: CountTokensRequest, chat: ChatRequest) -> None:
    choice = request.tool_choice
    if choice is None:
        return
    if isinstance(choice, NoneChoice):
        chat.tool_choice = "none"
        return
    if not request.tools:
        raise RequestError("tool_choice is given, but there are no tools", "give tools, or leave it out")
    if choice.disable_parallel_tool_use:
        chat.parallel_tool_calls = False
    if isinstance(choice, ToolChoice):
        chat.tool_choice = NamedToolChoice(type="function", function=NamedFunction(name=choice.name))
    elif isinstance(choice, AnyChoice):
        chat.tool_choice = "required"
    elif isinstance(choice, AutoChoice):
        chat.tool_choice = "auto"


def _template_variables(request: CountTokensRequest) -> dict[str, Any] | None:
    if request.thinking is None:
        return None
    return {"enable_thinking": not isinstance(request.thinking, DisabledThinking)}


def _messages(request: CountTokensRequest) -> list[Message]:
    messages: list[Message] = []
    if request.system:
        messages.append(Message(role="system", content=_content(request.system)))
    called: set[str] = set()
    for i, turn in enumerate(request.messages):
        if isinstance(turn.content, str):
            messages.append(Message(role=turn.role, content=turn.content))
        elif turn.role == "assistant":
            messages.append(_assistant(turn, called, f"messages[{i}]"))
        else:
            messages += _others(turn, called, f"messages[{i}]")
    return messages


def _assistant(turn: InputTurn, called: set[str], where: str) -> Message:
    texts: list[TextBlock] = []
    thoughts, calls = [], []
    for j, block in enumerate(turn.content):
        if isinstance(block, TextBlock):
            texts.append(block)
        elif isinstance(block, ThinkingBlock):
            thoughts.append(block.thinking)
        elif isinstance(block, ToolUseBlock):
            called.add(block.id)
            arguments = encode(block.input).decode()
            calls.append(ToolCall(id=block.id, function=FunctionCall(name=block.name, arguments=arguments)))
        elif isinstance(block, ToolResultBlock):
            raise RequestError(f"{where}.content[{j}] is a tool_result of the assistant", "let the user send it")
    message = Message(role="assistant", content=_content(texts) if texts else None)
    if thoughts:
        message.reasoning_content = "\n".join(thoughts)
    if calls:
        message.tool_calls = calls
    return message


def _others(turn: InputTurn, called: set[str], where: str) -> list[Message]:
    """Results of tools are messages of their own."""
    messages: list[Message] = []
    texts: list[TextBlock] = []
    for j, block in enumerate(turn.content):
        if isinstance(block, TextBlock):
            texts.append(block)
        elif isinstance(block, ToolResultBlock) and turn.role == "user":
            if block.tool_use_id not in called:
                raise RequestError(
                    f"{where}.content[{j}].tool_use_id is {block.tool_use_id!r:.80}, which is no tool_use before it",
                    "send the assistant's message with it, too",
                )
            if texts:
                messages.append(Message(role=turn.role, content=_content(texts)))
                texts = []
            messages.append(_result(block))
        else:
            kind = block.__struct_config__.tag if isinstance(block, msgspec.Struct) else type(block).__name__
            raise RequestError(f"{where}.content[{j}] is a {kind} of the {turn.role}", "let the assistant have it")
    if texts or not messages:
        messages.append(Message(role=turn.role, content=_content(texts)))
    return messages


def _result(block: ToolResultBlock) -> Message:
    content = _content(block.content or "")
    if block.is_error:  # chat templates have no other way to say so
        parts = content if isinstance(content, list) else [ContentPart(type="text", text=content)]
        content = [ContentPart(type="text", text="Error:"), *parts]
    return Message(role="tool", tool_call_id=block.tool_use_id, content=content)


def _content(given: str | Sequence[TextBlock]) -> str | list[ContentPart]:
    if isinstance(given, str):
        return given
    if len(given) == 1:
        return given[0].text
    return [ContentPart(type="text", text=block.text) for block in given]


class _Words(ChatWords):
    """What the API says of an answer."""

    def __init__(self, service: Service, request: MessagesRequest, job: Job, context: Context) -> None:
        self._job = job
        self._id = f"msg_{context.request_id}"
        self._model = request.model or service.config.model_names[0]
        thinking = request.thinking
        omitted = isinstance(thinking, EnabledThinking | AdaptiveThinking) and thinking.display == "omitted"
        self.shows_thinking = not omitted
        self._reader = PartReader(reasoning=self.shows_thinking)
        self._begun = False

    def response(
        self, content: list[TextOutput | ThinkingOutput | ToolUseOutput], end: MessageEnd | None
    ) -> MessageResponse:
        message = MessageResponse(id=self._id, model=self._model, content=content, usage=_usage(self._job))
        if end is not None:
            message.stop_reason, message.stop_sequence = end.stop_reason, end.stop_sequence
        return message

    def event(self, event: ChatEvent) -> bytes:
        messages: list[Event] = []
        if not self._begun:
            self._begun = True
            messages += [MessageStart(message=self.response([], None)), Ping()]
        for found in self._reader.push(event):
            messages += _events(found)
        if event.finish_reason is not None:
            end = _end(self._job, event.finish_reason, event.piece.stop_reason)
            messages += [MessageDelta(delta=end, usage=_usage(self._job)), MessageStop()]
        return b"".join(map(named_sse, messages))


def _events(found: PartEvent) -> list[Event]:
    part = found.part
    if found.what == "start":
        return [BlockStart(index=part.index, content_block=_block(part))]
    if found.what == "end":
        # Some clients take a thinking block for complete when its signature has come.
        signed: list[Event] = [BlockDelta(index=part.index, delta=SignatureDelta())] if part.kind == "reasoning" else []
        return [*signed, BlockStop(index=part.index)]
    delta: TextDelta | ThinkingDelta | InputDelta
    if part.kind == "reasoning":
        delta = ThinkingDelta(thinking=found.delta)
    elif part.kind == "text":
        delta = TextDelta(text=found.delta)
    else:
        delta = InputDelta(partial_json=found.delta)
    return [BlockDelta(index=part.index, delta=delta)]


def _block(part: Part) -> TextOutput | ThinkingOutput | ToolUseOutput:
    """A part as far as it is there. One that starts is empty."""
    if part.kind == "reasoning":
        return ThinkingOutput(thinking=part.text)
    if part.kind == "text":
        return TextOutput(text=part.text)
    return ToolUseOutput(id=part.call_id, name=part.name, input=json.loads(part.text or "{}"))


def _end(job: Job, finish_reason: str, stop: int | str | None) -> MessageEnd:
    reason: StopReason = "end_turn"
    if finish_reason == "tool_calls":
        reason = "tool_use"
    elif finish_reason == "length":
        limit = job.params.max_tokens
        full = limit is not None and job.completion_tokens < limit
        reason = "model_context_window_exceeded" if full else "max_tokens"
    elif isinstance(stop, str):
        return MessageEnd(stop_reason="stop_sequence", stop_sequence=stop)
    return MessageEnd(stop_reason=reason, stop_sequence=None)


def _usage(job: Job) -> MessageUsage:
    usage = MessageUsage(
        input_tokens=len(job.given.token_ids) - job.cached_tokens,
        cache_read_input_tokens=job.cached_tokens,
        output_tokens=job.completion_tokens,
    )
    if job.reasoning_tokens:
        usage.output_tokens_details = OutputTokensDetails(thinking_tokens=job.reasoning_tokens)
    return usage
