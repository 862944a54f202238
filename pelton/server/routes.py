"""Which path is answered by what, and the small ones themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from ..errors import RequestError
from ..version import installed_version
from .anthropic_schemas import (
    AnthropicErrorResponse,
    CountTokensRequest,
    CountTokensResponse,
    MessageResponse,
    MessagesRequest,
)
from .chat import ChatCompletions, plain_messages, plain_tool
from .chat_events import Ask, conversation
from .completions import Completions
from .dashboard import Dashboard
from .embeddings import Embeddings
from .errors import HttpError
from .http import Context, ErrorForm, Handler, Reply, openai_error
from .messages import Messages, anthropic_error
from .responses import Responses, responses_error
from .responses_schemas import ResponsesRequest, ResponsesResponse
from .schemas import (
    ChatRequest,
    ChatResponse,
    CompletionRequest,
    CompletionResponse,
    DetokenizeRequest,
    DetokenizeResponse,
    EmbeddingRequest,
    EmbeddingResponse,
    ErrorResponse,
    Health,
    LoadAdapterRequest,
    ModelCard,
    ModelList,
    TokenizeRequest,
    TokenizeResponse,
    TokenizerInfo,
    UnloadAdapterRequest,
    VersionInfo,
    encode,
)
from .service import Service, off_loop


@dataclass(frozen=True)
class Operation:
    """A row of the table below. free: needs no API key, and is there while the server drains."""

    method: str
    path: str
    summary: str
    handler: Handler
    request: type | None = None
    response: type | None = None
    free: bool = False
    streams: bool = False
    media_type: str = "application/json"
    form: ErrorForm = openai_error
    error: type = ErrorResponse


def operations(service: Service) -> list[Operation]:
    """Everything that the server answers but its pages."""
    small, messages = _Small(service), Messages(service)
    table = [
        Operation("POST", "/v1/chat/completions", "Answer a conversation.", ChatCompletions(service), ChatRequest,
                  ChatResponse, streams=True),
        Operation("POST", "/v1/completions", "Continue texts.", Completions(service), CompletionRequest,
                  CompletionResponse, streams=True),
        Operation("POST", "/v1/embeddings", "Embed texts.", Embeddings(service), EmbeddingRequest, EmbeddingResponse),
        Operation("POST", "/v1/responses", "Answer a conversation, as items.", Responses(service), ResponsesRequest,
                  ResponsesResponse, streams=True, form=responses_error),
        Operation("POST", "/v1/messages", "Answer a conversation, with Anthropic's API.", messages, MessagesRequest,
                  MessageResponse, streams=True, form=anthropic_error, error=AnthropicErrorResponse),
        Operation("POST", "/v1/messages/count_tokens", "The length of its prompt.", messages.count, CountTokensRequest,
                  CountTokensResponse, form=anthropic_error, error=AnthropicErrorResponse),
        Operation("GET", "/v1/models", "The model and its adapters.", small.models, None, ModelList),
        Operation("GET", "/v1/models/{model:path}", "One of them.", small.model, None, ModelCard),
        Operation("POST", "/tokenize", "The tokens of a text or conversation.", small.tokenize, TokenizeRequest,
                  TokenizeResponse),
        Operation("POST", "/detokenize", "The text of tokens.", small.detokenize, DetokenizeRequest,
                  DetokenizeResponse),
        Operation("GET", "/tokenizer_info", "Special tokens and the chat template.", small.tokenizer_info, None,
                  TokenizerInfo),
        Operation("GET", "/health", "200 while the server is alive and its engines make progress.", small.health, None,
                  Health, free=True),
        Operation("GET", "/ready", "200 while new requests are taken.", small.ready, None, Health, free=True),
        Operation("GET", "/metrics", "Prometheus metrics.", small.metrics, free=True,
                  media_type="text/plain"),
        Operation("GET", "/dashboard/events", "What the dashboard shows, twice a second.", Dashboard(service).events,
                  streams=True),
        Operation("GET", "/version", "The version of Pelton.", small.version, None, VersionInfo, free=True),
    ]  # fmt: skip
    if service.config.runtime_adapters:
        table += [
            Operation("POST", "/v1/load_lora_adapter", "Load a LoRA adapter.", small.load_adapter, LoadAdapterRequest),
            Operation("POST", "/v1/unload_lora_adapter", "Unload one.", small.unload_adapter, UnloadAdapterRequest),
        ]
    return table


class _Small:
    def __init__(self, service: Service) -> None:
        self._service = service

    def _cards(self) -> list[ModelCard]:
        service = self._service
        created, names = int(service.started), service.config.model_names
        defaults = dict(service.config.sampling_defaults)
        length = service.replicas.hello.max_model_len if service.replicas.hello is not None else None
        common: dict[str, Any] = {"created": created, "max_model_len": length, "sampling_defaults": defaults}
        cards = [ModelCard(id=name, root=names[0], **common) for name in names]
        return cards + [
            ModelCard(id=name, root=name, parent=names[0], **common) for name in service.replicas.adapter_names()
        ]

    async def models(self, body: bytes, context: Context) -> Reply:
        return Reply(encode(ModelList(self._cards())))

    async def model(self, body: bytes, context: Context) -> Reply:
        name = context.scope["path_params"]["model"]
        for card in self._cards():
            if card.id == name:
                return Reply(encode(card))
        raise HttpError(404, f"there is no model {name!r}", param="model", code="model_not_found")

    async def tokenize(self, body: bytes, context: Context) -> Reply:
        request = msgspec.json.decode(body, type=TokenizeRequest)
        service = self._service
        service.adapter(request.model)
        if (request.prompt is None) == (request.messages is None):
            raise RequestError("tokenize needs either prompt or messages", "give one of them")
        if request.prompt is not None:
            special = True if request.add_special_tokens is None else request.add_special_tokens
            if request.tools or request.chat_template_kwargs:
                raise RequestError("tools and chat_template_kwargs are for messages", "leave them out beside prompt")
            (tokens,) = await service.encode([request.prompt], special)
        else:
            assert request.messages is not None
            if request.add_special_tokens is not None:
                raise RequestError("add_special_tokens is for prompt; templates write their own", "leave it out")
            ask = Ask(
                plain_messages(request.messages), len(body), [plain_tool(tool) for tool in request.tools or ()],
                variables=dict(request.chat_template_kwargs or {}),
            )  # fmt: skip
            tokens = (await conversation(service, ask)).given.token_ids
        strings = None
        if request.return_token_strs:
            decode = self._tokenizer().decode
            strings = await off_loop(
                len(tokens), lambda: [decode([token], skip_special_tokens=False) for token in tokens]
            )
        return Reply(
            encode(
                TokenizeResponse(
                    count=len(tokens), max_model_len=service.hello.max_model_len, tokens=tokens, token_strs=strings
                )
            )
        )

    async def detokenize(self, body: bytes, context: Context) -> Reply:
        request = msgspec.json.decode(body, type=DetokenizeRequest)
        service = self._service
        service.adapter(request.model)
        tokenizer = self._tokenizer()
        vocab_size = service.hello.vocab_size
        if any(token >= vocab_size for token in request.tokens):
            raise RequestError(f"tokens has an id beyond the {vocab_size} of the vocabulary", "give ids of this model")
        count = len(request.tokens)
        text = await off_loop(count, lambda: tokenizer.decode(request.tokens, skip_special_tokens=False))
        return Reply(encode(DetokenizeResponse(text)))

    async def tokenizer_info(self, body: bytes, context: Context) -> Reply:
        tokenizer, hello = self._tokenizer(), self._service.hello
        tokens = tokenizer.special_tokens
        known = {name: tokens.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        info = TokenizerInfo(
            **known, chat_template=tokenizer.chat_template, vocab_size=hello.vocab_size,
            max_model_len=hello.max_model_len,
        )  # fmt: skip
        return Reply(encode(info))

    def _tokenizer(self) -> Any:
        if self._service.tokenizer is None:
            raise RequestError("the model has no tokenizer", "use one that has")
        return self._service.tokenizer

    async def health(self, body: bytes, context: Context) -> Reply:
        """Engines that are still starting are no illness; one that has work and does none is."""
        service = self._service
        stalled = service.replicas.stalled()
        if stalled > min(30.0, service.config.stall_timeout / 2):
            raise HttpError(503, f"an engine has made no progress for {stalled:.0f} s", code="engine_stalled")
        if service.replicas.hello is not None and not service.replicas.num_ready:
            raise HttpError(503, "no engine is alive", code="engine_dead")
        return Reply(encode(Health("ok")))

    async def ready(self, body: bytes, context: Context) -> Reply:
        service = self._service
        if service.gate.draining:
            raise HttpError(503, "the server is shutting down", code="shutting_down")
        if not service.replicas.num_ready:
            raise HttpError(503, "no engine is ready", code="engine_unavailable", retry_after=1.0)
        return Reply(encode(Health("ready")))

    async def metrics(self, body: bytes, context: Context) -> Reply:
        text = self._service.observability.metrics()
        return Reply(text, media_type=b"text/plain; version=0.0.4; charset=utf-8")

    async def version(self, body: bytes, context: Context) -> Reply:
        return Reply(encode(VersionInfo(installed_version())))

    async def load_adapter(self, body: bytes, context: Context) -> Reply:
        request = msgspec.json.decode(body, type=LoadAdapterRequest)
        await self._service.replicas.call_all("add_lora", {"name": request.lora_name, "folder": request.lora_path})
        return Reply(encode({"status": f"adapter {request.lora_name} is loaded"}))

    async def unload_adapter(self, body: bytes, context: Context) -> Reply:
        request = msgspec.json.decode(body, type=UnloadAdapterRequest)
        await self._service.replicas.call_all("remove_lora", {"name": request.lora_name})
        return Reply(encode({"status": f"adapter {request.lora_name} is unloaded"}))
