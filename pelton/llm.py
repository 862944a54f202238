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
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, overload

from .answers import Answer, Grammars, add_to, answers_for, embedding_of, require_streamable, settle
from .config import EngineConfig, PoolerConfig, Pooling, PoolingParams, SamplingParams
from .errors import RequestError
from .metrics import throughput
from .outputs import EmbeddingOutput, RequestOutput
from .prompts import Conversation, EncodedPrompt, Prompt, Tokenizer, as_list, conversation, encode, with_lora

if TYPE_CHECKING:
    from .engine.engine import LLMEngine
    from .engine.stats import EngineStats, StepRecord

Params: TypeAlias = "SamplingParams | Sequence[SamplingParams] | None"


class Parts(Protocol):
    """What ``pelton.build.build`` makes of an EngineConfig."""

    @property
    def executor(self) -> Any: ...  # an Executor, a word of the layer below the engine

    @property
    def draft_executor(self) -> Any: ...  # of a speculative model, or None

    @property
    def draft_vocab_size(self) -> int | None: ...

    @property
    def tokenizer(self) -> Tokenizer | None: ...

    @property
    def eos_token_ids(self) -> frozenset[int]: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def kv_identity(self) -> str: ...

    @property
    def pooler(self) -> PoolerConfig: ...

    def read_adapter(self, name: str) -> Any: ...  # a LoraAdapter

    def peak_bandwidth(self, achieved: float = 0.0) -> float | None: ...

    def peak_flops(self) -> float | None: ...

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
        config = engine_config(model, options)
        from .build import build

        self._start(build(config, progress), config)

    @classmethod
    def from_parts(cls, parts: Parts, config: EngineConfig | None = None) -> LLM:
        """An LLM on parts built elsewhere, which it owns from now on. Of ``config`` the limits and the seed count."""
        llm = cls.__new__(cls)
        llm._start(parts, config or EngineConfig())
        return llm

    def _start(self, parts: Parts, config: EngineConfig) -> None:
        self._parts = parts
        self._closed = False
        self._grammars = Grammars(parts.tokenizer, parts.vocab_size, parts.eos_token_ids)
        self._ids = count()
        self._answers: dict[str, tuple[_Run, int, Answer]] = {}  # by the engine's request id
        try:
            self._engine = engine_of(parts, config)
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

    def peak_flops(self) -> float | None:
        """Measured FLOP/s of this machine in the precision that this model mostly computes in; None as above."""
        return self._parts.peak_flops()

    def get_stats(self) -> EngineStats:
        """Totals since the start: tokens, steps, preemptions, prefix cache hits, bytes and FLOPs.

        ``get_stats().mbu(llm.peak_bandwidth())`` and ``.mfu(llm.peak_flops())`` say what part of the machine that is.
        """
        return self._engine.stats()

    def get_steps(self) -> list[StepRecord]:
        """The latest steps, 1,024 at most: what each was made of, what it brought, how full the KV cache was."""
        return self._engine.steps()

    @overload
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        *,
        lora: str | None = None,
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
        lora: str | None = None,
        progress: bool = False,
        use_tqdm: bool = False,
        stream: Literal[True],
    ) -> Iterator[RequestOutput]: ...

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        *,
        lora: str | None = None,
        progress: bool = False,
        use_tqdm: bool = False,
        stream: bool = False,
    ) -> list[RequestOutput] | Iterator[RequestOutput]:
        """Continue one prompt or many, batched.

        Args:
            prompts: a text, token ids, ``{"prompt": ...}``, ``{"prompt_token_ids": ...}``,
                ``{"messages": ...}``, or a list of them.
            sampling_params: for all prompts, or one per prompt.
            lora: the adapter that answers, for prompts that name none themselves as ``{"prompt": ..., "lora": ...}``.
            progress: show a progress bar on stderr; ``use_tqdm`` is the same under the name vLLM has.
            stream: return an iterator over what is new instead, as :meth:`stream`.

        Returns:
            One output per prompt, in their order; always a list, also for a single prompt.

        Raises:
            RequestError: a prompt or a parameter is invalid. Nothing has run then.
        """
        inputs = [with_lora(encode(self._parts.tokenizer, prompt), lora) for prompt in as_list(prompts)]
        return self._answer(inputs, sampling_params, stream=stream, progress=progress or use_tqdm)

    def stream(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: Params = None, *, lora: str | None = None
    ) -> Iterator[RequestOutput]:
        """Yield what is new, as it comes: ``outputs[0].text`` is the piece that follows the last one.

        Every RequestOutput holds one answer; ``outputs[0].index`` tells the answers of n > 1 apart, and
        ``request_id`` the prompts. Leaving the loop early aborts what is unfinished.
        """
        return self.generate(prompts, sampling_params, lora=lora, stream=True)

    @overload
    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: Params = None,
        *,
        tools: list[dict[str, Any]] | None = None,
        lora: str | None = None,
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
        lora: str | None = None,
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
        lora: str | None = None,
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
        inputs = [with_lora(self.conversation(conversation, tools), lora) for conversation in conversations]
        return self._answer(inputs, sampling_params, stream=stream, progress=progress or use_tqdm)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling: Pooling | None = None,
        normalize: bool | None = None,
        dimensions: int | None = None,
        *,
        lora: str | None = None,
        progress: bool = False,
        use_tqdm: bool = False,
    ) -> list[EmbeddingOutput]:
        """The embeddings of one prompt or many, batched: what the model's last norm gives, pooled over the tokens.

        Texts get the tokens that the tokenizer puts around them, among which some models expect one for the end.

        Args:
            prompts: as for :meth:`generate`. An instruction that the model was trained with is part of the text.
            pooling: "last": of the last token; "mean": over all. None: as the checkpoint says, else "last".
            normalize: to length 1. None: as the checkpoint says, else True.
            dimensions: keep the first so many numbers, before they are normalised.
            lora: as for :meth:`generate`.
            progress: show a progress bar on stderr; ``use_tqdm`` is the same under the name vLLM has.

        Returns:
            One output per prompt, in their order; always a list, also for a single prompt.

        Raises:
            RequestError: a prompt or a parameter is invalid. Nothing has run then.
            PeltonError: what the model computed is not finite.
        """
        inputs = [with_lora(encode(self._parts.tokenizer, prompt), lora) for prompt in as_list(prompts)]
        params = PoolingParams(pooling, normalize, dimensions)
        answers: list[Answer] = []
        with self._run(stream=False) as run, _progress_bar(len(inputs), progress or use_tqdm) as advance:
            for index, given in enumerate(inputs):
                answers += self._add(run, index, given, params)
            while run.unfinished:
                self._step()
                while run.ready:
                    advance(len(run.ready.popleft()[1].prompt_token_ids))
        return [embedding_of(answer) for answer in answers]

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
                        self._add(run, index, encode(self._parts.tokenizer, prompt), params)
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
        return conversation(self._parts.tokenizer, messages, tools)

    def save_prefix(self, prompt: Prompt, path: str | Path) -> int:
        """Compute a prompt and write its keys and values to a file; how many tokens it holds, whole blocks only.

        A later process loads it in milliseconds: for a long system prompt, or a document that is asked about again.

        Raises:
            PeltonError: the prompt is invalid or shorter than a block, or the file cannot be written.
        """
        given = encode(self._parts.tokenizer, prompt)
        self._answer([given], SamplingParams(max_tokens=1), stream=False, progress=False)
        identity = self._parts.kv_identity
        return self._engine.save_prefix(Path(path), identity, given.token_ids, given.cache_salt, given.lora)

    def load_prefix(self, path: str | Path, *, cache_salt: str = "", lora: str | None = None) -> int:
        """Put what ``save_prefix`` wrote into the prefix cache; how many tokens that is.

        Prompts that begin with these tokens, and have this salt and adapter, compute only the rest.

        Raises:
            PeltonError: the file is missing, damaged or of another model, precision or instruction set.
        """
        self._require_open()
        return self._engine.load_prefix(Path(path), self._parts.kv_identity, cache_salt, adapter=lora)

    def add_lora(self, name: str, path: str | Path) -> None:
        """Load a low-rank adapter that prompts choose by ``name``, while others are being answered or not.

        Needs ``enable_lora=True``. path: a folder that the PEFT library wrote (adapter_config.json and
        adapter_model.safetensors), or a hub id.

        Raises:
            PeltonError: the name or all ``max_loras`` slots are in use, or the adapter cannot be used; the message
                says why.
        """
        self._require_open()
        adapter = self._parts.read_adapter(str(path))
        self._engine.add_adapter(name, adapter.identity, adapter.weights)

    def remove_lora(self, name: str) -> None:
        """Free an adapter's slot.

        Raises:
            RequestError: there is no such adapter, or unfinished requests (streams that are not read to their end)
                use it.
        """
        self._require_open()
        self._engine.remove_adapter(name)

    def list_loras(self) -> list[str]:
        """The names of all adapters, in the order in which they were added."""
        return self._engine.adapters.names()

    def _require_open(self) -> None:
        if self._closed:
            raise RequestError("this LLM is closed", "create a new one")

    def close(self) -> None:
        """Release the model's memory and threads. Idempotent."""
        if not self._closed:
            self._closed = True
            self._grammars.close()
            self._parts.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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
        self._require_open()
        run = _Run(stream)
        try:
            yield run
        finally:
            for request_id in run.unfinished:
                self._answers.pop(request_id, None)
                self._engine.abort(request_id)

    def _add(self, run: _Run, index: int, given: EncodedPrompt, params: SamplingParams | PoolingParams) -> list[Answer]:
        """Queue the n sequences of a prompt."""
        sampling = params if isinstance(params, SamplingParams) else None
        if run.stream and sampling is not None:
            require_streamable(sampling)
        answers = answers_for(str(next(self._ids)), given, params, self._parts.tokenizer, self._parts.vocab_size)
        add_to(self._engine, answers, given, self._grammars.compiled(sampling))
        for answer in answers:
            self._answers[answer.sequence_id] = (run, index, answer)
            run.unfinished.add(answer.sequence_id)
        return answers

    def _step(self) -> None:
        """One step of the engine; what it brings goes to the calls that wait for it."""
        self._require_open()
        with _interrupts_deferred():
            for output in self._engine.step(flush=True):
                run, index, answer = self._answers[output.request_id]
                if answer.take(output):  # a stop string, maybe in the very step that was the last
                    answer.metrics(output.metrics or self._engine.finish(output.request_id, "stop"))
                if answer.completion.finished:
                    del self._answers[output.request_id]
                    run.unfinished.discard(output.request_id)
                run.publish(index, answer)


def engine_config(model: str, options: Mapping[str, Any]) -> EngineConfig:
    """A config from keyword arguments.

    Raises:
        RequestError: an option that does not exist; the message names similar ones.
    """
    known = EngineConfig.field_names()
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3)
            raise RequestError(
                f"LLM has no option {name!r}",
                f"did you mean {' or '.join(close)}?" if close else f"the options are {', '.join(known)}",
            )
    return EngineConfig(model=model, **options)


def engine_of(parts: Parts, config: EngineConfig) -> LLMEngine:
    """An engine on the parts' executor, with the limits, rules and seed of ``config``."""
    from .engine.engine import LLMEngine

    return LLMEngine(
        parts.executor,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.step_tokens,
        capacity_policy=config.capacity_policy,
        batching=config.batching,
        batching_delay=config.batching_delay,
        num_speculative_tokens=config.num_speculative_tokens,
        draft_executor=parts.draft_executor,
        draft_vocab_size=parts.draft_vocab_size,
        async_scheduling=config.device == "cuda" if config.async_scheduling is None else config.async_scheduling,
        enable_prefix_caching=config.enable_prefix_caching,
        max_loras=config.max_loras if config.enable_lora else 0,
        eos_token_ids=parts.eos_token_ids,
        vocab_size=parts.vocab_size,
        pooler=parts.pooler,
        seed=config.seed,
    )


class _Run:
    """The requests of one call: what is unfinished, and outputs that nobody has fetched."""

    __slots__ = ("ready", "stream", "unfinished")

    def __init__(self, stream: bool) -> None:
        self.stream = stream
        self.unfinished: set[str] = set()
        self.ready: deque[tuple[int, RequestOutput]] = deque()

    def publish(self, index: int, answer: Answer) -> None:
        """Hand out what is new, or the whole output once all n answers are finished."""
        output = answer.output
        settle(answer)
        if self.stream:
            self.ready.append((index, replace(output, outputs=[answer.delta])))
        elif output.finished:
            self.ready.append((index, output))


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
