"""Many requests of one event loop, answered by an engine that is elsewhere: in a thread, or in another process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any, Protocol

from .answers import Answer, Grammars, add_to, answers_for, embedding_of, merged, require_streamable, settle
from .config import Pooling, PoolingParams, SamplingParams
from .errors import PeltonError, RequestError
from .outputs import CompletionOutput, EmbeddingOutput, RequestOutput
from .prompts import Conversation, EncodedPrompt, Prompt, Tokenizer, conversation, encode, with_lora

if TYPE_CHECKING:
    from .engine.engine import EngineOutput
    from .engine.prefix_cache import CachePolicy
    from .engine.stats import EngineStats
    from .engine.structured import Grammar


log = logging.getLogger("pelton.answers")


class AnsweringEngine(Protocol):
    """What is needed of :class:`pelton.engine.async_engine.AsyncEngine`. Ids are new for every request."""

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Iterable[int],
        params: SamplingParams | PoolingParams,
        *,
        arrival_time: float,
        priority: int = 0,
        deadline: float | None = None,
        cache: CachePolicy | None = None,
        parent_id: str | None = None,
        grammar: Any = None,
        adapter: str | None = None,
    ) -> None: ...

    def finish(self, request_id: str, reason: Any = "abort") -> None: ...

    def stats(self) -> EngineStats: ...

    def adapter_names(self) -> list[str]: ...

    def close(self) -> None: ...


class AsyncAnswers:
    """The text side of an engine: prompts to tokens, tokens to text, stop strings, one stream per caller.

    The owner sets ``_engine``, and tells what it brings with ``_dispatch`` and ``_fail``, both in the event loop.

    Args:
        tokenizer: of the model; None: token ids in and out.
        vocab_size: of the logits.
        grammars: compiles structured outputs here; None: the engine does.
    """

    _engine: AnsweringEngine

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, grammars: Grammars | None) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._grammars = grammars
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ids = count()
        self._streams: dict[str, tuple[Stream, Answer]] = {}  # by the engine's request id
        self._closed = False

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._tokenizer

    def get_stats(self) -> EngineStats:
        """Totals since the start, as of the last step."""
        return self._engine.stats()

    async def generate(
        self, prompt: Prompt | EncodedPrompt, sampling_params: SamplingParams | None = None, **options: Any
    ) -> RequestOutput:
        """The complete answers to a prompt; arguments as for :meth:`stream`."""
        grammar = await self._grammar(sampling_params)
        async with contextlib.aclosing(self._open(prompt, sampling_params, grammar, **options)) as stream:
            async for _ in stream:
                pass
            return stream.output

    async def stream(
        self, prompt: Prompt | EncodedPrompt, sampling_params: SamplingParams | None = None, **options: Any
    ) -> AsyncIterator[RequestOutput]:
        """Yield what is new, as it comes. Every RequestOutput holds a piece of one answer.

        A reader that is slower than the model gets larger pieces. One that leaves, or is cancelled, ends the request.

        Args:
            prompt: a text, token ids, a dict (see :data:`pelton.prompts.Prompt`), or what :meth:`conversation` gave.
            sampling_params: None: the defaults.
            priority: lower ones go first; default 0.
            timeout: seconds after which the request ends with the finish_reason "timeout".
            lora: the adapter that answers, unless the prompt names one itself.
            arrival_time: when the request came, in seconds of ``time.monotonic``; None: now.

        Raises:
            RequestError: the request is invalid. Nothing has run then.
            PeltonError: the step that was to answer failed.
        """
        if sampling_params is not None:
            require_streamable(sampling_params)
        grammar = await self._grammar(sampling_params)
        async with contextlib.aclosing(self._open(prompt, sampling_params, grammar, **options)) as stream:
            async for output in stream:
                yield output

    async def embed(
        self,
        prompt: Prompt | EncodedPrompt,
        pooling: Pooling | None = None,
        normalize: bool | None = None,
        dimensions: int | None = None,
        **options: Any,
    ) -> EmbeddingOutput:
        """The embedding of a prompt; ``pooling``, ``normalize`` and ``dimensions`` as for :meth:`pelton.LLM.embed`.

        Args:
            **options: priority, timeout, lora and arrival_time, as for :meth:`stream`.

        Raises:
            RequestError: the request is invalid. Nothing has run then.
            PeltonError: the step failed, time was up, or what the model computed is not finite.
        """
        params = PoolingParams(pooling, normalize, dimensions)
        async with contextlib.aclosing(self._open(prompt, params, **options)) as stream:
            async for _ in stream:
                pass
            return embedding_of(stream.answers[0])

    def list_loras(self) -> list[str]:
        """The names of all adapters, in the order in which they were added."""
        return self._engine.adapter_names()

    def conversation(self, messages: Conversation, tools: list[dict[str, Any]] | None = None) -> EncodedPrompt:
        """The tokens of a conversation, with the model's chat template, as a prompt.

        Raises:
            TokenizerError: no tokenizer or no chat template.
        """
        return conversation(self._tokenizer, messages, tools)

    def open(
        self, prompt: Prompt | EncodedPrompt, sampling_params: SamplingParams, ready: Callable[[], None], **options: Any
    ) -> Stream:
        """As :meth:`stream`, for callers that have no task to wait in. Structured outputs are the engine's affair.

        ready: called in the event loop whenever there is something to take; never before this method has returned.
        """
        require_streamable(sampling_params)
        return self._open(prompt, sampling_params, ready=ready, **options)

    def _open(
        self,
        prompt: Prompt | EncodedPrompt,
        sampling_params: SamplingParams | PoolingParams | None,
        grammar: Grammar | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
        lora: str | None = None,
        arrival_time: float | None = None,
        ready: Callable[[], None] | None = None,
    ) -> Stream:
        if self._closed:
            raise RequestError(f"this {type(self).__name__} is closed", "create a new one")
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        elif self._loop is not loop:
            raise RequestError(f"this {type(self).__name__} belongs to another event loop", "create one per loop")
        given = prompt if isinstance(prompt, EncodedPrompt) else encode(self._tokenizer, prompt)
        given = with_lora(given, lora)
        params = sampling_params or SamplingParams()
        answers = answers_for(str(next(self._ids)), given, params, self._tokenizer, self._vocab_size)
        stream = Stream(self, answers, ready)
        arrival = time.monotonic() if arrival_time is None else arrival_time  # the clock of engines
        deadline = None if timeout is None else arrival + timeout
        # Outputs are dispatched by this loop, hence after this method has returned.
        for answer in answers:
            self._streams[answer.sequence_id] = (stream, answer)
        try:
            options = {"arrival_time": arrival, "priority": priority, "deadline": deadline}
            add_to(self._engine, answers, given, grammar, **options)
        except BaseException:
            self._leave(stream)
            raise
        return stream

    async def _grammar(self, params: SamplingParams | None) -> Grammar | None:
        """Compiled in a thread, as a large schema takes a moment."""
        if params is None or params.structured_outputs is None or self._grammars is None:
            return None
        return await asyncio.to_thread(self._grammars.compiled, params)

    def _leave(self, stream: Stream) -> None:
        """Nobody reads any more: end what is unfinished."""
        for answer in stream.answers:
            if self._streams.pop(answer.sequence_id, None) is not None:
                self._engine.finish(answer.sequence_id, "abort")

    def _dispatch(self, outputs: Iterable[EngineOutput]) -> None:
        """What a step brought, to those who asked. An answer whose text fails, fails alone."""
        for output in outputs:
            entry = self._streams.get(output.request_id)
            if entry is None:
                continue  # left, or ended by a stop string
            try:
                self._hand_over(output, *entry)
            except Exception as error:
                log.exception("the answer of request %s failed", output.request_id)
                self._fail([output.request_id], error)
                self._engine.finish(output.request_id, "abort")

    def _hand_over(self, output: EngineOutput, stream: Stream, answer: Answer) -> None:
        if answer.take(output):  # a stop string, maybe in the very step that was the last
            answer.metrics(output.metrics or output.sequence.metrics())
            if output.finish_reason is None:
                self._engine.finish(output.request_id, "stop")
        if answer.completion.finished:
            del self._streams[output.request_id]
        stream.put(answer)

    def _fail(self, request_ids: Sequence[str], error: BaseException) -> None:
        for request_id in request_ids:
            entry = self._streams.pop(request_id, None)
            if entry is not None:
                entry[0].fail(error)

    def _fail_all(self, error: BaseException) -> None:
        self._fail(list(self._streams), error)


class Stream:
    """What one caller has not read yet: a piece of each answer, merged if there are more.

    ``take`` gives one without waiting; iterating waits.
    """

    def __init__(self, owner: AsyncAnswers, answers: list[Answer], ready: Callable[[], None] | None) -> None:
        self._owner = owner
        self.answers = answers
        self.output = answers[0].output
        self._pieces: dict[int, CompletionOutput] = {}
        self._error: BaseException | None = None
        self._event = asyncio.Event()
        self._ready = ready or self._event.set

    def put(self, answer: Answer) -> None:
        settle(answer)
        new = answer.delta
        old = self._pieces.pop(new.index, None)  # to the end: what came last is read last
        self._pieces[new.index] = new if old is None else merged(old, new)
        self._ready()

    def fail(self, error: BaseException) -> None:
        self._error = error
        self._ready()

    @property
    def ended(self) -> bool:
        """Whether everything has been taken."""
        return self.output.finished and not self._pieces

    def take(self) -> RequestOutput | None:
        """A piece of one answer; None if nothing is new.

        Raises:
            PeltonError: nothing more will come, and why.
        """
        if not self._pieces:
            error = self._error
            if error is None:
                return None
            raise (
                error
                if isinstance(error, PeltonError)
                else PeltonError(
                    f"the step failed ({type(error).__name__}: {error})", "ask again; if it persists, report it"
                )
            ) from error
        piece = self._pieces.pop(next(iter(self._pieces)))
        output = self.output
        return RequestOutput(
            output.request_id, output.prompt, output.prompt_token_ids, [piece], self.ended, output.metrics,
            output.prompt_logprobs,
        )  # fmt: skip

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> RequestOutput:
        while (output := self.take()) is None:
            if self.output.finished:
                raise StopAsyncIteration
            self._event.clear()
            await self._event.wait()
        return output

    def close(self) -> None:
        """Nobody reads any more: what is unfinished ends."""
        self._owner._leave(self)

    async def aclose(self) -> None:
        self.close()
