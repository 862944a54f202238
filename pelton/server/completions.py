"""``/v1/completions``: texts, or token ids, that go on."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec
from msgspec import UNSET

from ..config import SamplingParams
from ..errors import RequestError
from ..outputs import CompletionOutput, Logprob, RequestOutput
from ..prompts import EncodedPrompt
from .http import Context, Reply, TokenStream
from .schemas import CompletionChoice, CompletionLogprobs, CompletionRequest, CompletionResponse, Usage, encode
from .service import Job, Service, check_stream
from .streaming import DONE, JobStream, sse

_decoder = msgspec.json.Decoder(CompletionRequest)


class Completions:
    """The handler, and what it makes of a request."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, body: bytes, context: Context) -> Reply | TokenStream:
        request = _decoder.decode(body)
        service = self._service
        adapter = service.adapter(request.model)
        prompts = await service.prompts("prompt", request.prompt, request.add_special_tokens, request.cache_salt)
        params = self._params(request)
        if service.config.log_prompts:
            context.log["prompts"] = [prompt.text or prompt.token_ids for prompt in prompts]
        work = _Work(
            service, request, context, prompts, params, service.options(request.priority, request.timeout, adapter)
        )
        return work if request.stream else Reply(encode(await work.complete()))

    def _params(self, request: CompletionRequest) -> SamplingParams:
        check_stream(request)
        more: dict[str, Any] = {"max_tokens": request.max_tokens}
        if request.max_tokens == 0:  # of interest with echo and logprobs: a prompt is scored
            more["max_tokens"] = 1
        if request.logprobs is not None:
            more["logprobs"] = request.logprobs
            if request.echo and request.prompt_logprobs is None:
                more["prompt_logprobs"] = request.logprobs
        if request.echo and request.stream and request.logprobs is not None:
            raise RequestError("echo with logprobs cannot be streamed", "leave out one of the three")
        return self._service.params(request, **more)


class _Work(JobStream):
    """The prompts of one request, answered side by side."""

    def __init__(
        self,
        service: Service,
        request: CompletionRequest,
        context: Context,
        prompts: list[EncodedPrompt],
        params: SamplingParams,
        options: dict[str, Any],
    ) -> None:
        self._request = request
        self._tokenizer = service.tokenizer
        super().__init__([Job(service, context, prompt, params) for prompt in prompts], options)
        self._n = params.n
        self._offsets: dict[int, int] = {}  # of log-probabilities in the text, by choice
        self._begun: set[int] = set()
        self._id = f"cmpl-{context.request_id}"
        self._created = int(time.time())
        self._model = request.model or service.config.model_names[0]

    def _response(self, choices: list[CompletionChoice], usage: Any = UNSET) -> CompletionResponse:
        return CompletionResponse(
            id=self._id, created=self._created, model=self._model, choices=choices, usage=usage
        )  # fmt: skip

    def _usage(self) -> Usage:
        usage = total([job.usage for job in self._jobs])
        if self._request.max_tokens == 0:  # one was needed to get that far
            usage.total_tokens -= usage.completion_tokens
            usage.completion_tokens = 0
        return usage

    async def complete(self) -> CompletionResponse:
        outputs = await gathered([job.complete(self._options) for job in self._jobs])
        choices = []
        for number, output in enumerate(outputs):
            for answer in output.outputs:
                choices.append(self._choice(number * self._n + answer.index, output, answer))
        return self._response(choices, self._usage())

    def _choice(self, index: int, output: RequestOutput, answer: CompletionOutput) -> CompletionChoice:
        request = self._request
        no_tokens = request.max_tokens == 0
        token_ids, text = list(answer.token_ids), answer.text
        entries: list[dict[int, Logprob] | None] = list(answer.logprobs or ())
        if no_tokens:
            token_ids, text, entries = [], "", []
        new_ids = token_ids
        if request.echo:
            prompt = list(output.prompt_token_ids)
            shown = output.prompt if output.prompt is not None else self._decode(prompt)
            token_ids, text = prompt + token_ids, shown + text
            entries = [*(output.prompt_logprobs or ()), *entries]
        choice = CompletionChoice(
            index=index, text=text, finish_reason="length" if no_tokens else answer.finish_reason,
            stop_reason=answer.stop_reason,
        )  # fmt: skip
        if request.logprobs is not None:
            choice.logprobs = self._logprobs(token_ids, entries, request.logprobs, 0)
        if request.prompt_logprobs is not None and output.prompt_logprobs is not None:
            choice.prompt_logprobs = plain_prompt_logprobs(output.prompt_logprobs)
        if request.return_token_ids:
            choice.token_ids, choice.prompt_token_ids = new_ids, list(output.prompt_token_ids)
        return choice

    def words(self, number: int, output: RequestOutput) -> bytes:
        request, new = self._request, b""
        no_tokens = request.max_tokens == 0
        for piece in output.outputs:
            index = number * self._n + piece.index
            text = "" if no_tokens else piece.text
            is_first = index not in self._begun
            if is_first:
                self._begun.add(index)
                if request.echo:
                    shown = output.prompt
                    text = (shown if shown is not None else self._decode(list(output.prompt_token_ids))) + text
            choice = CompletionChoice(
                index=index, text=text, finish_reason=piece.finish_reason, stop_reason=piece.stop_reason
            )
            if no_tokens:
                choice.finish_reason = "length"
            elif request.logprobs is not None and piece.logprobs is not None:
                start = self._offsets.get(index, 0)
                choice.logprobs = self._logprobs(list(piece.token_ids), list(piece.logprobs), request.logprobs, start)
                self._offsets[index] = start + sum(map(len, choice.logprobs.tokens))
            if request.return_token_ids:
                choice.token_ids = [] if no_tokens else list(piece.token_ids)
                if is_first:
                    choice.prompt_token_ids = list(output.prompt_token_ids)
            new += sse(self._response([choice], self._running_usage()))
        return new

    def last_words(self) -> bytes:
        options = self._request.stream_options
        wants_usage = options is not None and options.include_usage
        return (sse(self._response([], self._usage())) if wants_usage else b"") + DONE

    def _running_usage(self) -> Any:
        options = self._request.stream_options
        if options is None or not options.include_usage:
            return UNSET
        return self._usage() if options.continuous_usage_stats else None

    def _decode(self, token_ids: list[int]) -> str:
        return "" if self._tokenizer is None else str(self._tokenizer.decode(token_ids, skip_special_tokens=False))

    def _logprobs(
        self, token_ids: list[int], entries: list[dict[int, Logprob] | None], count: int, offset: int
    ) -> CompletionLogprobs:
        tokens: list[str] = []
        values: list[float | None] = []
        top: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for token_id, entry in zip(token_ids, entries, strict=False):
            text = entry[token_id].decoded_token if entry is not None else self._decode([token_id])
            tokens.append(text or "")
            offsets.append(offset)
            offset += len(tokens[-1])
            values.append(None if entry is None else float(entry[token_id]))
            top.append(None if entry is None else likeliest(entry, count))
        return CompletionLogprobs(tokens, values, top if count else None, offsets)


def likeliest(entry: dict[int, Logprob], count: int) -> dict[str, float]:
    """By text; of two tokens with the same text the likelier one counts."""
    found: dict[str, float] = {}
    for logprob in entry.values():
        if logprob.rank <= count:
            found.setdefault(logprob.decoded_token or "", float(logprob))
    return found


def plain_prompt_logprobs(entries: list[dict[int, Logprob] | None]) -> list[dict[str, Any] | None]:
    return [
        None if entry is None else {
            str(token): {"logprob": float(p), "rank": p.rank, "decoded_token": p.decoded_token}
            for token, p in entry.items()
        } for entry in entries
    ]  # fmt: skip


def total(parts: list[Usage]) -> Usage:
    """The usage of several prompts as one."""
    result = parts[0]
    for part in parts[1:]:
        result.prompt_tokens += part.prompt_tokens
        result.completion_tokens += part.completion_tokens
        result.total_tokens += part.total_tokens
        assert result.prompt_tokens_details is not None and part.prompt_tokens_details is not None
        result.prompt_tokens_details.cached_tokens += part.prompt_tokens_details.cached_tokens
    return result


async def gathered(coroutines: list[Any]) -> list[Any]:
    """All results, or the first exception; nothing runs on afterwards."""
    if len(coroutines) == 1:
        return [await coroutines[0]]
    tasks = [asyncio.ensure_future(c) for c in coroutines]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
