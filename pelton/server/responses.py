"""``/v1/responses``: OpenAI's newer API over the same conversations. Nothing is stored."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import UNSET

from ..errors import RequestError
from .chat import chat_logprobs, open_chat
from .chat_events import ChatAnswer, ChatEvent
from .errors import HttpError
from .http import Context, Reply, TokenStream
from .parts import Part, PartEvent, PartReader, flat_names, parts_of
from .responses_schemas import (
    AnswerReasoning,
    AnswerText,
    AnyOutput,
    ArgumentsDone,
    ArgumentsPiece,
    CallOutput,
    Completed,
    Created,
    Failed,
    FunctionCallItem,
    FunctionCallOutputItem,
    FunctionChoice,
    FunctionTool,
    Incomplete,
    IncompleteDetails,
    InProgress,
    InputItem,
    InputText,
    InputTokensDetails,
    ItemAdded,
    ItemDone,
    JsonSchemaFormat,
    MessageItem,
    MessageOutput,
    OutputText,
    PartAdded,
    PartDone,
    ReasoningDone,
    ReasoningItem,
    ReasoningOutput,
    ReasoningPiece,
    ReasoningTokensDetails,
    Refusal,
    ResponsesError,
    ResponsesRequest,
    ResponsesResponse,
    ResponsesUsage,
    ShownReasoning,
    ShownText,
    Status,
    StreamError,
    StreamEvent,
    TextDone,
    TextFormat,
    TextPiece,
)
from .schemas import (
    ChatRequest,
    ContentPart,
    ErrorBody,
    ErrorResponse,
    FunctionCall,
    FunctionDefinition,
    JsonSchema,
    Message,
    NamedFunction,
    NamedToolChoice,
    ResponseFormat,
    TokenLogprob,
    Tool,
    ToolCall,
    encode,
)
from .service import Job, Service
from .streaming import ChatStream, ChatWords, named_sse

_decoder = msgspec.json.Decoder(ResponsesRequest)


def _word(error: HttpError) -> str | None:
    return None if error.body.code is None else str(error.body.code)


def responses_error(error: HttpError) -> tuple[bytes, bytes]:
    """An error as this API has it: (the body, the event of a stream)."""
    told = error.body
    message = flat_names(told.message)
    event = StreamError(sequence_number=0, code=_word(error), message=message, param=told.param)
    return encode(ErrorResponse(ErrorBody(message, told.type, told.param, told.code))), named_sse(event)


class Responses:
    """The handler."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, body: bytes, context: Context) -> Reply | TokenStream:
        request = _decoder.decode(body)
        chat = await open_chat(self._service, context, _chat_request(request), len(body))
        words = _Words(self._service, request, chat.job, context)
        if request.stream:
            return ChatStream(chat, words)
        (answer,) = await chat.answers()
        return Reply(encode(words.complete(answer)))


def _chat_request(request: ResponsesRequest) -> ChatRequest:
    """The same in the terms of the chat API.

    Raises:
        RequestError: a result answers no call, or fields contradict each other.
        msgspec.ValidationError: an item is malformed.
    """
    chat = ChatRequest(
        model=request.model, messages=_messages(request), stream=request.stream, temperature=request.temperature,
        top_p=request.top_p, max_completion_tokens=request.max_output_tokens, user=request.user,
        parallel_tool_calls=request.parallel_tool_calls,
    )  # fmt: skip
    if request.tools:
        chat.tools = [_tool(tool) for tool in request.tools]
    choice = request.tool_choice
    if isinstance(choice, FunctionChoice):
        chat.tool_choice = NamedToolChoice(type="function", function=NamedFunction(name=choice.name))
    elif choice != "auto" or request.tools:  # "auto" is the default, which clients may say
        chat.tool_choice = choice
    if request.reasoning is not None:
        chat.reasoning_effort = request.reasoning.effort
    if request.text is not None:
        chat.response_format = _format(request.text.format)
    if request.include:
        chat.logprobs, chat.top_logprobs = True, request.top_logprobs
    elif request.top_logprobs:
        raise RequestError("top_logprobs is of no use without logprobs",
                           'add "message.output_text.logprobs" to include')  # fmt: skip
    return chat


def _tool(tool: FunctionTool) -> Tool:
    function = FunctionDefinition(
        name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict
    )
    return Tool(type="function", function=function)


def _format(given: Any) -> ResponseFormat | None:
    if given is None:
        return None
    if not isinstance(given, JsonSchemaFormat):
        return ResponseFormat(type="text" if isinstance(given, TextFormat) else "json_object")
    schema = JsonSchema(name=given.name, schema=given.schema, description=given.description, strict=given.strict)
    return ResponseFormat(type="json_schema", json_schema=schema)


def _items(given: str | list[dict[str, Any]]) -> list[InputItem]:
    if isinstance(given, str):
        return [MessageItem(role="user", content=given)]
    items: list[InputItem] = []
    for i, item in enumerate(given):
        try:
            items.append(msgspec.convert({"type": "message"} | item, InputItem))
        except msgspec.ValidationError as error:
            what, at, place = str(error).partition(" - at `$")
            raise msgspec.ValidationError(f"{what} - at `$.input[{i}]{place if at else '`'}") from None
    return items


def _messages(request: ResponsesRequest) -> list[Message]:
    """The items as turns: what the assistant thought, said and called without a break is one of them."""
    messages: list[Message] = []
    if request.instructions:
        messages.append(Message(role="system", content=request.instructions))
    called: set[str] = set()
    turn: Message | None = None

    def assistant(*, fresh: bool) -> Message:
        nonlocal turn
        if turn is None or (fresh and (turn.content is not None or turn.tool_calls)):
            turn = Message(role="assistant")
            messages.append(turn)
        return turn

    for i, item in enumerate(_items(request.input)):
        if isinstance(item, ReasoningItem):
            thinker = assistant(fresh=True)
            texts = [thinker.reasoning_content, *(part.text for part in item.content or item.summary or ())]
            thinker.reasoning_content = "\n".join(text for text in texts if text) or None
        elif isinstance(item, FunctionCallItem):
            called.add(item.call_id)
            caller = assistant(fresh=False)
            call = ToolCall(id=item.call_id, function=FunctionCall(name=item.name, arguments=item.arguments))
            caller.tool_calls = [*(caller.tool_calls or ()), call]
        elif isinstance(item, MessageItem) and item.role == "assistant":
            assistant(fresh=True).content = _content(item.content)
        else:
            turn = None
            if isinstance(item, MessageItem):
                messages.append(Message(role=item.role, content=_content(item.content)))
                continue
            if item.call_id not in called:
                raise RequestError(f"input[{i}].call_id is {item.call_id!r:.80}, which is no function_call before it",
                                   "send that item, too")  # fmt: skip
            messages.append(_result(item))
    return messages


def _result(item: FunctionCallOutputItem) -> Message:
    return Message(role="tool", tool_call_id=item.call_id, content=_content(item.output))


def _content(given: str | Sequence[InputText | OutputText | Refusal]) -> str | list[ContentPart]:
    if isinstance(given, str):
        return given
    texts = [part.refusal if isinstance(part, Refusal) else part.text for part in given]
    return texts[0] if len(texts) == 1 else [ContentPart(type="text", text=text) for text in texts]


class _Words(ChatWords):
    """What the API says of an answer."""

    def __init__(self, service: Service, request: ResponsesRequest, job: Job, context: Context) -> None:
        self._request = request
        self._job = job
        self._request_id = context.request_id
        self._created = int(time.time())
        self._model = request.model or service.config.model_names[0]
        self._number = 0
        self._reader = PartReader()
        self._begun = False
        self._waiting: list[TokenLogprob] = []  # of tokens whose text has not come yet
        self._logprobs: dict[int, list[TokenLogprob]] = {}  # by part

    def complete(self, answer: ChatAnswer) -> ResponsesResponse:
        """A whole answer."""
        parts = parts_of(answer)
        if answer.logprobs is not None:
            found = chat_logprobs(answer.token_ids, answer.logprobs, self._request.top_logprobs or 0).content
            self._logprobs = {
                part.index: _within(found or [], part.text) for part in parts if part.kind == "text"
            }  # fmt: skip
        return self._finished(parts, answer.finish_reason)

    def event(self, event: ChatEvent) -> bytes:
        sent = bytearray()
        if not self._begun:
            self._begun = True
            started = self._response("in_progress", [])
            sent += self._numbered(Created(response=started)) + self._numbered(InProgress(response=started))
        self._take_logprobs(event)
        for found in self._reader.push(event):
            for message in self._events(found, event.finish_reason == "length"):
                sent += self._numbered(message)
        if event.finish_reason is not None:
            response = self._finished(self._reader.parts, event.finish_reason)
            kind = Incomplete if event.finish_reason == "length" else Completed
            sent += self._numbered(kind(response=response))
        return bytes(sent)

    def failure(self, error: HttpError) -> bytes | None:
        response = self._response("failed", self._output(self._reader.parts, "incomplete"))
        response.error = ResponsesError(code="server_error", message=error.body.message)
        failed = self._numbered(Failed(response=response))
        told = error.body
        return failed + self._numbered(StreamError(code=_word(error), message=told.message, param=told.param))

    def _numbered(self, event: StreamEvent) -> bytes:
        event.sequence_number = self._number
        self._number += 1
        return named_sse(event)

    def _take_logprobs(self, event: ChatEvent) -> None:
        piece = event.piece
        if piece.logprobs is not None:
            found = chat_logprobs(piece.token_ids, piece.logprobs, self._request.top_logprobs or 0)
            self._waiting += found.content or ()

    def _events(self, found: PartEvent, cut_off: bool) -> list[StreamEvent]:
        part = found.part
        index, item_id = part.index, self._id_of(part)
        if found.what == "start":
            item = self._item(part, "in_progress")
            if isinstance(item, CallOutput):
                return [ItemAdded(output_index=index, item=item)]
            item.content = []  # comes with the next event
            added = PartAdded(output_index=index, item_id=item_id, part=self._piece(part))
            return [ItemAdded(output_index=index, item=item), added]
        if found.what == "end":
            item = self._item(part, "incomplete" if cut_off and found.last else "completed")
            return [*self._closing(part), ItemDone(output_index=index, item=item)]
        waiting, self._waiting = self._waiting, []
        if part.kind == "call":
            return [ArgumentsPiece(output_index=index, item_id=item_id, delta=found.delta)]
        if part.kind == "reasoning":
            return [ReasoningPiece(output_index=index, item_id=item_id, delta=found.delta)]
        waiting = _within(waiting, found.delta)
        self._logprobs.setdefault(index, []).extend(waiting)
        return [TextPiece(output_index=index, item_id=item_id, delta=found.delta, logprobs=waiting)]

    def _closing(self, part: Part) -> list[StreamEvent]:
        index, item_id = part.index, self._id_of(part)
        if part.kind == "call":
            return [ArgumentsDone(output_index=index, item_id=item_id, name=part.name, arguments=part.text)]
        piece = self._piece(part)
        done: StreamEvent
        if isinstance(piece, AnswerText):
            done = TextDone(output_index=index, item_id=item_id, text=part.text, logprobs=piece.logprobs)
        else:
            done = ReasoningDone(output_index=index, item_id=item_id, text=part.text)
        return [done, PartDone(output_index=index, item_id=item_id, part=piece)]

    def _id_of(self, part: Part) -> str:
        prefix = {"reasoning": "rs", "text": "msg", "call": "fc"}[part.kind]
        return f"{prefix}_{self._request_id}_{part.index}"

    def _piece(self, part: Part) -> AnswerText | AnswerReasoning:
        if part.kind == "reasoning":
            return AnswerReasoning(text=part.text)
        return AnswerText(text=part.text, logprobs=list(self._logprobs.get(part.index, ())))

    def _item(self, part: Part, status: Status) -> AnyOutput:
        item_id = self._id_of(part)
        if part.kind == "call":
            return CallOutput(id=item_id, status=status, call_id=part.call_id, name=part.name, arguments=part.text)
        piece = self._piece(part)
        if isinstance(piece, AnswerText):
            return MessageOutput(id=item_id, status=status, content=[piece])
        return ReasoningOutput(id=item_id, status=status, content=[piece])

    def _output(self, parts: Sequence[Part], last: Status) -> list[AnyOutput]:
        return [self._item(part, last if part is parts[-1] else "completed") for part in parts]

    def _finished(self, parts: Sequence[Part], finish_reason: str) -> ResponsesResponse:
        if finish_reason == "length":
            response = self._response("incomplete", self._output(parts, "incomplete"))
            response.incomplete_details = IncompleteDetails(reason="max_output_tokens")
        else:
            response = self._response("completed", self._output(parts, "completed"))
            response.completed_at = int(time.time())
        job = self._job
        prompt = len(job.given.token_ids)
        response.usage = ResponsesUsage(
            input_tokens=prompt,
            input_tokens_details=InputTokensDetails(cached_tokens=job.cached_tokens),
            output_tokens=job.completion_tokens,
            output_tokens_details=ReasoningTokensDetails(reasoning_tokens=job.reasoning_tokens),
            total_tokens=prompt + job.completion_tokens,
        )
        return response

    def _response(self, status: Any, output: list[AnyOutput]) -> ResponsesResponse:
        request = self._request
        params = self._job.params
        given = None if request.text is None else request.text.format
        return ResponsesResponse(
            id=f"resp_{self._request_id}", created_at=self._created, status=status, model=self._model, output=output,
            instructions=request.instructions, max_output_tokens=request.max_output_tokens,
            temperature=params.temperature, top_p=params.top_p, tools=request.tools or [],
            tool_choice=request.tool_choice or "auto", parallel_tool_calls=request.parallel_tool_calls is not False,
            text=ShownText(format=given or TextFormat()),
            reasoning=ShownReasoning(effort=None if request.reasoning is None else request.reasoning.effort),
            top_logprobs=request.top_logprobs or 0, metadata=request.metadata or {}, user=request.user or UNSET,
            safety_identifier=request.safety_identifier or UNSET, prompt_cache_key=request.prompt_cache_key or UNSET,
        )  # fmt: skip


def _within(tokens: list[TokenLogprob], text: str) -> list[TokenLogprob]:
    """Those of an answer's tokens that make this text: neither its thoughts, nor calls, nor the token that ends it."""
    start = "".join(token.token for token in tokens).rfind(text)
    if start < 0:  # a letter is spread over several tokens
        return tokens
    found, at = [], 0
    for token in tokens:
        end = at + len(token.token)
        if at < start + len(text) and end > start:
            found.append(token)
        at = end
    return found
