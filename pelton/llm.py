"""The offline API: prompts in, texts out, on one engine in this process."""

from __future__ import annotations

import difflib
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, overload

from .config import EngineConfig, SamplingParams
from .errors import RequestError, TokenizerError
from .metrics import throughput
from .outputs import CompletionOutput, RequestOutput

if TYPE_CHECKING:
    from .engine.engine import EngineOutput, EngineStats, LLMEngine

#: A text, token ids, or a dict with "prompt" (text), "prompt_token_ids" or "messages" (a conversation).
Prompt: TypeAlias = "str | Sequence[int] | Mapping[str, Any]"
#: [{"role": "user", "content": "..."}, ...]
Conversation: TypeAlias = "Sequence[Mapping[str, Any]]"
Params: TypeAlias = "SamplingParams | Sequence[SamplingParams] | None"


class EncodedPrompt:
    """A prompt as token ids; ``is_chat`` if the answer starts a text instead of going on with one."""

    __slots__ = ("is_chat", "text", "token_ids")

    def __init__(self, text: str | None, token_ids: list[int], is_chat: bool) -> None:
        self.text = text
        self.token_ids = token_ids
        self.is_chat = is_chat


class Detokenizer(Protocol):
    """Text of a growing sequence of tokens."""

    def add(self, token_ids: Sequence[int], /) -> str: ...

    def finish(self) -> str: ...


class Tokenizer(Protocol):
    """What this module needs of :class:`pelton.text.tokenizer.Tokenizer`."""

    @property
    def chat_template(self) -> str | None: ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...

    def encode_chat(self, messages: Any, *, tools: Any = None) -> list[int]: ...

    def detokenizer(self, skip_special_tokens: bool = True, *, at_start: bool = True) -> Detokenizer: ...


class Parts(Protocol):
    """What ``pelton.build.build`` makes of an EngineConfig."""

    @property
    def executor(self) -> Any: ...  # an Executor, a word of the layer below the engine

    @property
    def tokenizer(self) -> Tokenizer | None: ...

    @property
    def eos_token_ids(self) -> frozenset[int]: ...

    @property
    def vocab_size(self) -> int: ...

    def peak_bandwidth(self, achieved: float = 0.0) -> float | None: ...

    def close(self) -> None: ...


class LLM:
    """A model, ready to answer.

    >>> with LLM("HuggingFaceTB/SmolLM2-135M-Instruct") as llm:  # doctest: +SKIP
    ...     print(llm.generate("The capital of France is")[0].outputs[0].text)

    Not thread-safe. Several streams of one LLM may be consumed in turns; they share its batches.

    Args:
        model: folder, .gguf file or hub id; empty: the demo model.
        progress: called with (done, total) bytes while weights are packed, which happens only the first time.
        **options: the other fields of :class:`pelton.EngineConfig`.

    Raises:
        RequestError: an option that does not exist; the message names similar ones.
        PeltonError: the model cannot be loaded.
    """

    def __init__(self, model: str = "", *, progress: Callable[[int, int], None] | None = None, **options: Any) -> None:
        known = EngineConfig.field_names()
        for name in options:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=3)
                raise RequestError(
                    f"LLM has no option {name!r}",
                    f"did you mean {' or '.join(close)}?" if close else f"the options are {', '.join(known)}",
                )
        config = EngineConfig(model=model, **options)
        from .build import build

        self._start(build(config, progress), config)

    @classmethod
    def from_parts(cls, parts: Parts, config: EngineConfig | None = None) -> LLM:
        """An LLM on parts built elsewhere, which it owns from now on. Of ``config`` the limits and the seed count."""
        llm = cls.__new__(cls)
        llm._start(parts, config or EngineConfig())
        return llm

    def _start(self, parts: Parts, config: EngineConfig) -> None:
        from .engine.engine import LLMEngine

        self._parts = parts
        self._closed = False
        self._ids = count()
        self._answers: dict[str, _Answer] = {}  # by the engine's request id
        try:
            self._engine: LLMEngine = LLMEngine(
                parts.executor,
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                eos_token_ids=parts.eos_token_ids,
                vocab_size=parts.vocab_size,
                seed=config.seed,
            )
        except BaseException:
            parts.close()
            raise
        self._max_num_seqs = config.max_num_seqs

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._parts.tokenizer

    @property
    def engine(self) -> LLMEngine:
        """The engine below, for callers that drive it step by step themselves, as benchmarks do.

        Do not mix: a request added there is unknown to the methods here, and its tokens would end their steps.
        """
        return self._engine

    @property
    def max_model_len(self) -> int:
        """Tokens, prompt + output, that one conversation may have."""
        return self._engine.max_model_len

    def peak_bandwidth(self, achieved: float = 0.0) -> float | None:
        """Measured memory bandwidth of this machine in bytes/s; None if the device has no such figure.

        achieved: bytes/s that you have seen. A figure of another hour that is lower is measured again.
        """
        return self._parts.peak_bandwidth(achieved)

    def stats(self) -> EngineStats:
        """Totals since the start."""
        return self._engine.stats()

    @overload
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        *,
        progress: bool = False,
        use_tqdm: bool = False,
        stream: Literal[False] = False,
    ) -> list[RequestOutput]: ...

    @overload
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        *,
        progress: bool = False,
        use_tqdm: bool = False,
        stream: Literal[True],
    ) -> Iterator[RequestOutput]: ...

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        *,
        progress: bool = False,
        use_tqdm: bool = False,
        stream: bool = False,
    ) -> list[RequestOutput] | Iterator[RequestOutput]:
        """Continue one prompt or many, batched.

        Args:
            prompts: a text, token ids, ``{"prompt": ...}``, ``{"prompt_token_ids": ...}``,
                ``{"messages": ...}``, or a list of them.
            sampling_params: for all prompts, or one per prompt.
            progress: show a progress bar on stderr; ``use_tqdm`` is the same under the name vLLM has.
            stream: return an iterator over what is new instead, as :meth:`stream`.

        Returns:
            One output per prompt, in their order; always a list, also for a single prompt.

        Raises:
            RequestError: a prompt or a parameter is invalid. Nothing has run then.
        """
        inputs = [self._tokenized(prompt) for prompt in _as_list(prompts)]
        return self._answer(inputs, sampling_params, stream=stream, progress=progress or use_tqdm)

    def stream(self, prompts: Prompt | Sequence[Prompt], sampling_params: Params = None) -> Iterator[RequestOutput]:
        """Yield what is new, as it comes: ``outputs[0].text`` is the piece that follows the last one.

        Every RequestOutput holds one answer; ``outputs[0].index`` tells the answers of n > 1 apart, and
        ``request_id`` the prompts. Leaving the loop early aborts what is unfinished.
        """
        return self.generate(prompts, sampling_params, stream=True)

    @overload
    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: Params = None,
        *,
        tools: list[dict[str, Any]] | None = None,
        progress: bool = False,
        use_tqdm: bool = False,
        stream: Literal[False] = False,
    ) -> list[RequestOutput]: ...

    @overload
    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: Params = None,
        *,
        tools: list[dict[str, Any]] | None = None,
        progress: bool = False,
        use_tqdm: bool = False,
        stream: Literal[True],
    ) -> Iterator[RequestOutput]: ...

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: Params = None,
        *,
        tools: list[dict[str, Any]] | None = None,
        progress: bool = False,
        use_tqdm: bool = False,
        stream: bool = False,
    ) -> list[RequestOutput] | Iterator[RequestOutput]:
        """Answer one conversation or many, with the model's chat template; otherwise as :meth:`generate`.

        Raises:
            TokenizerError: the checkpoint has no tokenizer or no chat template.
        """
        one = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Sequence[Any] = [messages] if one else messages
        inputs = [self.conversation(conversation, tools) for conversation in conversations]
        return self._answer(inputs, sampling_params, stream=stream, progress=progress or use_tqdm)

    def as_completed(
        self, prompts: Iterable[tuple[Prompt, SamplingParams]]
    ) -> Iterator[tuple[int, RequestOutput | RequestError]]:
        """Yield (index of the prompt, complete output) as answers get ready; for many prompts.

        Prompts are drawn from the iterable as there is room, so that it may be long. One that is refused
        yields its error in place of an output, and the others go on.

        Raises:
            TokenizerError: no tokenizer or chat template for what is to be encoded.
        """
        source = enumerate(prompts)
        with self._run(stream=False) as run:
            while True:
                # Twice what runs at once: the next request is tokenized and waiting when one finishes.
                while len(run.unfinished) < 2 * self._max_num_seqs and (item := next(source, None)) is not None:
                    index, (prompt, params) = item
                    try:
                        self._add(run, index, self._tokenized(prompt), params)
                    except RequestError as error:
                        yield index, error
                if not run.unfinished and not run.ready:
                    return
                while run.ready:
                    yield run.ready.popleft()
                if run.unfinished:
                    self._step()

    def conversation(self, messages: Conversation, tools: list[dict[str, Any]] | None = None) -> EncodedPrompt:
        """The tokens of a conversation, the start of the answer included.

        Raises:
            TokenizerError: no tokenizer or no chat template.
        """
        return EncodedPrompt(None, self._needed_tokenizer().encode_chat(messages, tools=tools), True)

    def close(self) -> None:
        """Release the model's memory and threads. Idempotent."""
        if not self._closed:
            self._closed = True
            self._parts.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _needed_tokenizer(self) -> Tokenizer:
        if self._parts.tokenizer is None:
            raise TokenizerError("the checkpoint has no tokenizer", "give prompts as token ids")
        return self._parts.tokenizer

    def _tokenized(self, prompt: Prompt) -> EncodedPrompt:
        if isinstance(prompt, Mapping):
            keys = set(prompt) & {"prompt", "prompt_token_ids", "messages"}
            if len(keys) != 1:
                raise RequestError(
                    "a prompt dict needs one of 'prompt', 'prompt_token_ids' and 'messages'",
                    f"it has {', '.join(map(repr, prompt)) or 'nothing'}",
                )
            key = keys.pop()
            prompt = prompt[key]
            if key == "messages":
                return self.conversation(prompt)  # type: ignore[arg-type]
        if isinstance(prompt, str):
            return EncodedPrompt(prompt, self._needed_tokenizer().encode(prompt), False)
        return EncodedPrompt(None, _token_ids(prompt), False)

    def _answer(
        self, inputs: list[EncodedPrompt], sampling_params: Params, *, stream: bool, progress: bool
    ) -> list[RequestOutput] | Iterator[RequestOutput]:
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            params = [sampling_params or SamplingParams()] * len(inputs)
        else:
            params = list(sampling_params)
            if len(params) != len(inputs):
                raise RequestError(f"{len(inputs)} prompts and {len(params)} sampling_params", "give one, or one each")
        if stream:
            return self._stream(inputs, params)
        outputs: dict[int, RequestOutput] = {}
        with self._run(stream=False) as run, _progress_bar(len(inputs), progress) as advance:
            for index, (given, wanted) in enumerate(zip(inputs, params, strict=True)):
                self._add(run, index, given, wanted)
            while run.unfinished:
                self._step()
                while run.ready:
                    index, output = run.ready.popleft()
                    outputs[index] = output
                    advance(sum(len(o.token_ids) for o in output.outputs))
        return [outputs[index] for index in range(len(inputs))]

    def _stream(self, inputs: list[EncodedPrompt], params: list[SamplingParams]) -> Iterator[RequestOutput]:
        with self._run(stream=True) as run:
            for index, (given, wanted) in enumerate(zip(inputs, params, strict=True)):
                self._add(run, index, given, wanted)
            while run.unfinished or run.ready:
                while run.ready:
                    yield run.ready.popleft()[1]
                if run.unfinished:
                    self._step()

    @contextmanager
    def _run(self, *, stream: bool) -> Iterator[_Run]:
        """A call's requests. Whatever ends the call (Ctrl-C, an error, a stream that nobody reads on) aborts
        what it left unfinished, so the LLM stays usable."""
        if self._closed:
            raise RequestError("this LLM is closed", "create a new one")
        run = _Run(stream)
        try:
            yield run
        finally:
            for request_id in run.unfinished:
                self._answers.pop(request_id, None)
                self._engine.abort(request_id)

    def _add(self, run: _Run, index: int, given: EncodedPrompt, params: SamplingParams) -> None:
        """Queue the n sequences of a prompt."""
        from .engine.request import derive_seed
        from .text.detokenize import StopStrings

        tokenizer = self._parts.tokenizer
        if params.stop and tokenizer is None:
            raise RequestError("stop strings need a tokenizer, and the checkpoint has none", "use stop_token_ids")
        request_id = str(next(self._ids))
        output = RequestOutput(request_id, given.text, given.token_ids, [CompletionOutput(i) for i in range(params.n)])
        for i, completion in enumerate(output.outputs):
            one = params if params.n == 1 else replace(params, n=1)
            if i and params.seed is not None:
                one = replace(one, seed=derive_seed(params.seed, i))
            answer = _Answer(
                run,
                index,
                output,
                completion,
                one,
                tokenizer,
                None
                if tokenizer is None
                else tokenizer.detokenizer(params.skip_special_tokens, at_start=given.is_chat),
                StopStrings(tuple(params.stop), params.include_stop_str_in_output) if params.stop else None,
            )
            sequence_id = request_id if params.n == 1 else f"{request_id}.{i}"
            # The first of the n is refused or none is: they differ in nothing but the seed.
            self._engine.add_request(sequence_id, given.token_ids, one)
            self._answers[sequence_id] = answer
            run.unfinished.add(sequence_id)

    def _step(self) -> None:
        """One step of the engine; what it brings goes to the calls that wait for it."""
        if self._closed:
            raise RequestError("this LLM is closed", "create a new one")
        with _interrupts_deferred():
            for output in self._engine.step():
                answer = self._answers[output.request_id]
                if answer.take(output) and output.finish_reason is None:
                    answer.metrics(self._engine.finish(output.request_id, "stop"))
                if answer.completion.finished:
                    del self._answers[output.request_id]
                    answer.run.unfinished.discard(output.request_id)
                answer.publish()


class _Run:
    """The requests of one call: what is unfinished, and outputs that nobody has fetched."""

    __slots__ = ("ready", "stream", "unfinished")

    def __init__(self, stream: bool) -> None:
        self.stream = stream
        self.unfinished: set[str] = set()
        self.ready: deque[tuple[int, RequestOutput]] = deque()


class _Answer:
    """One of the n answers to a prompt while it grows: tokens to text, stop strings."""

    __slots__ = ("_delta", "_detokenizer", "_index", "_params", "_stops", "_tokenizer", "completion", "output", "run")

    def __init__(
        self,
        run: _Run,
        index: int,
        output: RequestOutput,
        completion: CompletionOutput,
        params: SamplingParams,
        tokenizer: Tokenizer | None,
        detokenizer: Detokenizer | None,
        stops: Any,
    ) -> None:
        self.run = run
        self.output = output
        self.completion = completion
        completion.token_ids = []
        completion.logprobs = None if params.logprobs is None else []
        completion.cumulative_logprob = None if params.logprobs is None else 0.0
        self._index = index
        self._params = params
        self._tokenizer = tokenizer
        self._detokenizer = detokenizer
        self._stops = stops
        self._delta = CompletionOutput(completion.index)

    def take(self, new: EngineOutput) -> bool:
        """Append what a step brought; True if a stop string ended the answer."""
        whole, params = self.completion, self._params
        assert isinstance(whole.token_ids, list)
        whole.token_ids.extend(new.token_ids)
        logprobs = None
        if whole.logprobs is not None:
            logprobs = [entry for entry in new.logprobs if entry is not None]
            if self._tokenizer is not None:
                for token_id, logprob in ((t, p) for entry in logprobs for t, p in entry.items()):
                    logprob.decoded_token = self._tokenizer.decode([token_id], skip_special_tokens=False)
            whole.logprobs.extend(logprobs)
            assert whole.cumulative_logprob is not None
            for token_id, entry in zip(new.token_ids, logprobs, strict=True):
                whole.cumulative_logprob += entry[token_id]
        if new.finish_reason is not None:
            whole.finish_reason, whole.stop_reason = new.finish_reason, new.stop_reason
            self.metrics(new.metrics)
        text, matched = self._text(new, len(whole.token_ids) <= params.min_tokens)
        whole.text += text
        if matched is not None:
            whole.finish_reason, whole.stop_reason = "stop", matched
        self._delta = CompletionOutput(
            whole.index,
            text,
            new.token_ids,
            logprobs,
            whole.finish_reason,
            whole.stop_reason,
            whole.cumulative_logprob,
        )
        return matched is not None

    def _text(self, new: EngineOutput, too_early: bool) -> tuple[str, str | None]:
        if self._detokenizer is None:
            return "", None
        shown: Sequence[int] = new.token_ids
        if new.finish_reason == "stop" and not self._params.include_stop_str_in_output:
            shown = shown[:-1]  # the token that stopped is no part of the answer
        final = new.finish_reason is not None
        text = self._detokenizer.add(shown)
        if final:
            text += self._detokenizer.finish()
        if self._stops is None or too_early:
            return text, None
        emitted, matched = self._stops.push(text, final)
        return emitted, matched

    def metrics(self, metrics: Any) -> None:
        if self.completion.index == 0:
            self.output.metrics = metrics

    def publish(self) -> None:
        """Hand out what is new, or the whole output once all n answers are finished."""
        self.output.finished = all(completion.finished for completion in self.output.outputs)
        if self.run.stream:
            self.run.ready.append((self._index, replace(self.output, outputs=[self._delta])))
        elif self.output.finished:
            self.run.ready.append((self._index, self.output))


def _as_list(prompts: Any) -> list[Any]:
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


@contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Let Ctrl-C wait for the end of a step, so that it never falls between a step and its bookkeeping.

    Costs no promptness: native code cannot be interrupted either. A second Ctrl-C does not wait.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    pending: list[tuple[int, Any]] = []

    def remember(number: int, frame: Any) -> None:
        if pending:
            handler(number, frame)
        pending.append((number, frame))

    signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if pending:
        handler(*pending[0])


@contextmanager
def _progress_bar(total: int, show: bool) -> Iterator[Any]:
    """Yields advance(num_tokens), to be called once per finished prompt."""
    if not show:
        yield lambda num_tokens: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, rate="")
        tokens, start = 0, time.monotonic()

        def advance(num_tokens: int) -> None:
            nonlocal tokens
            tokens += num_tokens
            bar.update(task, advance=1, rate=f"{throughput(tokens, time.monotonic() - start):.0f} tok/s")

        yield advance
