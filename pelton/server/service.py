"""What all handlers share: engines, text side, limits and defaults; a request from its parameters to its pieces."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from ..async_answers import AsyncAnswers, Stream
from ..build import tokenizer_of
from ..config import SamplingParams, StructuredOutputsParams
from ..errors import RequestError
from ..metrics import RequestMetrics
from ..outputs import EmbeddingOutput, Logprob, RequestOutput
from ..prompts import EncodedPrompt
from ..text.tool_messages import ToolStyle, style_of
from . import wire
from .config import ServerConfig
from .errors import HttpError
from .http import Context, Gate
from .observability import Observability, ObservedRequest
from .replicas import BusyError, Replica, Replicas, UnavailableError
from .schemas import CompletionTokensDetails, PromptTokensDetails, ResponseFormat, Sampling, StructuredOutputs, Usage
from .tracing import Tracer

log = logging.getLogger("pelton.server")

_T = TypeVar("_T")

#: Characters beyond which a prompt is turned into tokens in a thread, so that others' streams do not stand still.
LONG_TEXT = 4096

#: Fields of a request that are fields of SamplingParams under the same name.
_SAME_NAMES = (
    "n", "temperature", "top_p", "seed", "stop", "presence_penalty", "frequency_penalty", "logit_bias", "best_of",
    "top_k", "min_p", "typical_p", "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids",
    "include_stop_str_in_output", "skip_special_tokens", "bad_words", "allowed_token_ids", "prompt_logprobs",
    "use_beam_search", "length_penalty", "early_stopping",
)  # fmt: skip


async def off_loop(size: int, work: Callable[[], _T]) -> _T:
    """Do what takes time in proportion to ``size``, of characters or tokens, where it holds no stream up."""
    return work() if size <= LONG_TEXT else await asyncio.to_thread(work)


def check_stream(request: Any) -> None:
    """Refuse what a request for text asks for in vain, streamed or not.

    Raises:
        RequestError: stream_options without a stream, or prompt_logprobs in one.
    """
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options is of no use without stream", "set stream, or leave it out")
    if request.stream and request.prompt_logprobs is not None:
        raise RequestError("prompt_logprobs cannot be streamed", "leave out one of the two")


class RemoteAnswers(AsyncAnswers):
    """The text side of engines in other processes."""

    def __init__(self, tokenizer: Any, replicas: Replicas, vocab_size: int) -> None:
        super().__init__(tokenizer, vocab_size, None)
        self._engine = replicas
        self.dispatch, self.fail = self._dispatch, self._fail


class Job:
    """One request to the engines, whose pieces a handler reads. Counts what its usage says."""

    def __init__(self, service: Service, context: Context, given: EncodedPrompt, params: SamplingParams) -> None:
        self.context = context
        self.given = given
        self.params = params
        self.completion_tokens = 0
        self.reasoning_tokens = 0
        self.cached_tokens = 0
        self.prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        self._metrics: RequestMetrics | None = None
        self._service = service
        self._stream: Stream | None = None
        self._observed: ObservedRequest | None = None

    @property
    def usage(self) -> Usage:
        prompt = len(self.given.token_ids)
        return Usage(
            prompt, self.completion_tokens, prompt + self.completion_tokens,
            PromptTokensDetails(self.cached_tokens), CompletionTokensDetails(self.reasoning_tokens),
        )  # fmt: skip

    def open(self, options: dict[str, Any], ready: Callable[[], None]) -> None:
        """Begin to stream; ``ready`` is called when there is something to take."""
        self._begin()
        self._stream = self._service.answers.open(
            self.given, self.params, ready, arrival_time=self.context.arrival_time, **options
        )

    def take(self) -> Iterator[RequestOutput]:
        """What is new of a stream. A choice that ends without an answer raises an HttpError."""
        assert self._stream is not None
        try:
            while (output := self._stream.take()) is not None:
                self._count(output)
                yield output
        except BusyError as error:
            raise self._busy(error) from None

    @property
    def ended(self) -> bool:
        """Whether all of the stream has been taken."""
        return self._stream is not None and self._stream.ended

    def close(self, error: BaseException | None = None) -> None:
        """The stream is over. error: why, if not because it has ended."""
        if self._stream is not None:
            self._stream.close()
        self._end(error)

    async def complete(self, options: dict[str, Any]) -> RequestOutput:
        """All of it, when it is there."""
        with self._waiting():
            output = await self._service.answers.generate(
                self.given, self.params, arrival_time=self.context.arrival_time, **options
            )
            self._count(output)
        self.prompt_logprobs = output.prompt_logprobs
        return output

    async def embed(self, options: dict[str, Any]) -> EmbeddingOutput:
        """The embedding of the prompt."""
        with self._waiting():
            output = await self._service.answers.embed(self.given, arrival_time=self.context.arrival_time, **options)
            if output.metrics is not None and self._observed is not None:
                self._metrics = output.metrics
                self._observed.finished(output.metrics, "stop")
        return output

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        """Begin; and end when the answer is there, or with why there is none."""
        self._begin()
        try:
            yield
        except BusyError as error:
            told = self._busy(error)
            self._end(told)
            raise told from None
        except BaseException as error:
            self._end(error)
            raise
        self._end(None)

    def _busy(self, error: BusyError) -> HttpError:
        """Other API processes have filled the queue."""
        return HttpError(429, str(error), code="queue_full", retry_after=self._service.observability.retry_after())

    def _begin(self) -> None:
        self._observed = self._service.observability.request(self.params, len(self.given.token_ids))

    def _end(self, error: BaseException | None) -> None:
        observed, self._observed = self._observed, None
        if observed is None:
            return
        if isinstance(error, RequestError):
            observed.refused("invalid")
        elif isinstance(error, HttpError) and error.status == 429:
            observed.refused("queue_full")
        else:
            observed.ended("error" if isinstance(error, Exception) else "abort")
        num_prompt_tokens, log = len(self.given.token_ids), self.context.log
        log["prompt_tokens"] = log.get("prompt_tokens", 0) + num_prompt_tokens
        log["output_tokens"] = log.get("output_tokens", 0) + self.completion_tokens
        if self._service.tracer is not None:
            self._service.tracer.record(
                self.context, num_prompt_tokens, self.completion_tokens, observed.reason, self._metrics
            )

    def _count(self, output: RequestOutput) -> None:
        for piece in output.outputs:
            self.completion_tokens += len(piece.token_ids)
            if piece.finish_reason is not None:
                _check_finish(piece.finish_reason, piece.stop_reason)
        if output.finished and output.metrics is not None:
            self.cached_tokens = output.metrics.num_cached_tokens
            self._metrics = output.metrics
            if self._observed is not None:
                self._observed.finished(output.metrics, output.outputs[0].finish_reason or "stop")


def _check_finish(reason: str, detail: int | str | None) -> None:
    if reason == "timeout":
        raise HttpError(504, "the answer was not complete when its time was over; ask for less", code="deadline")
    if reason == "error":
        raise HttpError(500, f"the answer could not go on: {detail}", code="generation_error")
    if reason == "abort":
        raise HttpError(503, "the answer was ended by the server", code="aborted", retry_after=2.0)


class Service:
    """The state of an API process.

    Args:
        config: of the server.
        sockets: of the engines.
        gate: what requests pass.
    """

    def __init__(self, config: ServerConfig, sockets: Sequence[str], gate: Gate) -> None:
        self.config = config
        self.gate = gate
        self.tokenizer = tokenizer_of(config.model)
        self.observability = Observability(config)
        self.replicas = Replicas(sockets, self._outputs, self._failure, self._state)
        self._listeners: list[Callable[[Replica, wire.State], None]] = [self.observability.state_came]
        self._answers: RemoteAnswers | None = None
        self.tracer: Tracer | None = None
        if config.otlp_endpoint is not None:
            self.tracer = Tracer(config.otlp_endpoint, config.model_names[0])
        self._tool_style: ToolStyle | None = None
        self.started = time.time()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Connect to the engines, which may take as long as they like to start."""
        self.replicas.start()
        self._tasks = [asyncio.create_task(self._prepare()), asyncio.create_task(self.gate.check_readers()),
                       asyncio.create_task(self._check_engines())]  # fmt: skip

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        self.replicas.close()
        if self.tracer is not None:
            await asyncio.to_thread(self.tracer.close)

    async def _prepare(self) -> None:
        hello = await self.replicas.wait_ready()
        self._answers = RemoteAnswers(self.tokenizer, self.replicas, hello.vocab_size)

    async def _check_engines(self) -> None:
        """An engine that is silent for too long cannot even end itself, so that its requests fail here."""
        while True:
            await asyncio.sleep(1.0)
            for replica in self.replicas.replicas:
                silent = time.monotonic() - replica.state_time
                if replica.ready and silent > self.config.stall_timeout:
                    replica.drop()

    @property
    def answers(self) -> RemoteAnswers:
        """Raises UnavailableError before the first engine is ready."""
        if self._answers is None or not self.replicas.num_ready:
            raise UnavailableError("no engine is ready", "ask again in a moment")
        return self._answers

    @property
    def hello(self) -> wire.Hello:
        if self.replicas.hello is None:
            raise UnavailableError("no engine is ready", "ask again in a moment")
        return self.replicas.hello

    def _outputs(self, outputs: Any) -> None:
        if self._answers is not None:
            self._answers.dispatch(outputs)

    def _failure(self, request_ids: Sequence[str], error: BaseException) -> None:
        if self._answers is not None:
            self._answers.fail(request_ids, error)

    def on_state(self, listener: Callable[[Replica, wire.State], None]) -> None:
        """Tell somebody else as well how engines stand."""
        self._listeners.append(listener)

    def _state(self, replica: Replica, state: wire.State) -> None:
        for listener in self._listeners:
            listener(replica, state)

    def adapter(self, model: str | None) -> str | None:
        """The LoRA adapter that a request's model names; None for the model itself.

        Raises:
            HttpError: 404, there is no such model.
        """
        if model is None or model in self.config.model_names:
            return None
        adapters = self.replicas.adapter_names()
        if model in adapters:
            return model
        known = ", ".join([*self.config.model_names, *adapters])
        raise HttpError(404, f"there is no model {model!r}; this server has {known}", param="model",
                        code="model_not_found")  # fmt: skip

    def check_room(self, prompts: int = 1, name: str = "prompt") -> None:
        """See that the queue has room, before work is spent on a request. name: of the field that they come from.

        Raises:
            HttpError: 429, it is full; 400, there would never be room for so many prompts.
        """
        seats = self.hello.max_num_seqs
        limit, most = (
            n * seats + self.config.max_queue for n in (self.replicas.num_ready, len(self.replicas.replicas))
        )
        if prompts > most:
            text = f"{name} has {prompts} items, and the queue has room for {most}; give fewer, or raise --max-queue"
            raise HttpError(400, text, param=name, code="invalid_value")
        if self.replicas.num_unfinished + prompts > limit:
            self.observability.rejected("queue_full")
            raise HttpError(429, f"{self.replicas.num_unfinished} requests are running or waiting; ask again later",
                            code="queue_full", retry_after=self.observability.retry_after())  # fmt: skip

    def params(self, request: Sampling, **more: Any) -> SamplingParams:
        """The parameters of a request, over the server's defaults.

        Raises:
            RequestError: a value is out of its range.
        """
        values: dict[str, Any] = dict(self.config.sampling_defaults)
        for name in _SAME_NAMES:
            value = getattr(request, name)
            if value is not None:
                values[name] = value
        if isinstance(values.get("stop"), list) and len(values["stop"]) > 64:
            raise RequestError("stop has more than 64 texts", "give fewer")
        structure = self.structure_of(request)
        if structure is not None:
            values["structured_outputs"] = structure
        return SamplingParams(**(values | more))

    def structure_of(self, request: Sampling) -> StructuredOutputsParams | None:
        """What the request prescribes for its answer."""
        return _structure(request.response_format, request.structured_outputs)

    async def tool_style(self) -> ToolStyle:
        """How the model is told of tools and calls them; found out once."""
        if self._tool_style is None:
            name = self.config.tool_call_parser or "auto"
            self._tool_style = await asyncio.to_thread(style_of, self.tokenizer, name)
            log.info("%s", self._tool_style)
        return self._tool_style

    def options(self, priority: int | None, timeout: float | None, adapter: str | None) -> dict[str, Any]:
        """What a request says besides its parameters, for the engines. timeout: seconds."""
        limits = [t for t in (timeout, self.config.request_timeout) if t is not None]
        return {"priority": priority or 0, "timeout": min(limits, default=None), "lora": adapter}

    async def prompts(
        self, name: str, given: str | Sequence[str | int | list[int]], special: bool | None, cache_salt: str | None
    ) -> list[EncodedPrompt]:
        """The prompts of a field: a text, token ids, or a list of either.

        special: add the model's special tokens to texts; None: yes.

        Raises:
            HttpError: the queue has no room for them.
            RequestError: they are none or too many, or of different kinds.
        """
        if isinstance(given, str):
            items: Sequence[Any] = [given]
        else:
            items = [given] if given and all(isinstance(item, int) for item in given) else given
        limit = self.config.max_prompts
        if not 1 <= len(items) <= limit:
            raise RequestError(f"{name} has {len(items)} items", f"give 1 to {limit}")
        self.check_room(len(items), name)
        if not all(isinstance(item, (str, list)) for item in items):
            raise RequestError(f"{name} mixes token ids with texts or lists", "give a text, token ids, or a list")
        encoded = iter(await self.encode([item for item in items if isinstance(item, str)], special is not False))
        prompts = [
            EncodedPrompt(item, next(encoded), False) if isinstance(item, str) else EncodedPrompt(None, item, False)
            for item in items
        ]
        for prompt in prompts:
            prompt.cache_salt = cache_salt or ""
        return prompts

    async def encode(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """The tokens of each text."""
        if not texts:
            return []
        if self.tokenizer is None:
            raise RequestError("the model has no tokenizer", "give prompts as token ids")
        size = sum(map(len, texts))
        return await off_loop(size, lambda: list(self.tokenizer.encode_batch(texts, add_special_tokens)))


def _structure(format: ResponseFormat | None, structured: StructuredOutputs | None) -> StructuredOutputsParams | None:
    if structured is not None:
        if format is not None and format.type != "text":
            raise RequestError("response_format and structured_outputs are two structures", "give one of them")
        return StructuredOutputsParams(
            structured.json, structured.regex, structured.choice, structured.grammar, bool(structured.json_object)
        )
    if format is None or format.type == "text":
        return None
    if format.type == "json_object":
        return StructuredOutputsParams(json_object=True)
    if format.json_schema is None:
        raise RequestError("response_format of type json_schema has no json_schema", "add one")
    if format.json_schema.schema is None:
        return StructuredOutputsParams(json_object=True)
    return StructuredOutputsParams(json=format.json_schema.schema)
