"""Every knob exactly once, with its unit and its reason."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeAlias, get_args

from .errors import RequestError

#: (prompt token ids, output token ids, logits float32 [vocab]) -> logits float32 [vocab], the same array or another.
LogitsProcessor: TypeAlias = Callable[[list[int], list[int], Any], Any]

#: What is made of the hidden states of a prompt: that of its last token, or the mean of all.
Pooling = Literal["last", "mean"]


@dataclass(frozen=True)
class StructuredOutputsParams:
    """What an answer must look like: exactly one of the fields. Names are vLLM's.

    json: a JSON schema, as a dict or a text. json_object: any JSON object. regex: of the whole answer, in the syntax of
    Rust's regex crate. choice: one of these texts. grammar: in Lark's syntax as llguidance has it, or GBNF.

    Raises:
        RequestError: none or several are given, or one is of a wrong type.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool = False

    def __post_init__(self) -> None:
        given = [f.name for f in fields(self) if getattr(self, f.name) not in (None, False)]
        if len(given) != 1:
            raise RequestError(
                f"structured_outputs has {' and '.join(given) or 'nothing'}",
                "give one of json, json_object, regex, choice and grammar",
            )
        value = getattr(self, given[0])
        kinds: dict[str, tuple[type, ...]] = {"json": (str, Mapping), "json_object": (bool,), "choice": (list, tuple)}
        if not isinstance(value, kinds.get(given[0], (str,))):
            raise RequestError(f"{given[0]} of structured_outputs is {value!r:.80}", "see StructuredOutputsParams")
        if self.choice is not None and (not self.choice or any(not isinstance(c, str) or not c for c in self.choice)):
            raise RequestError("choice of structured_outputs is empty or holds something else than texts", "give texts")


#: Twice as many continuations of each are looked at, which are as many log-probabilities as a sampler gives.
MAX_BEAMS = 10


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt. Field names and defaults are those vLLM and OpenAI users know.

    Raises:
        RequestError: a value is out of its range; the message names field, value and range.
    """

    n: int = 1  # answers per prompt
    best_of: int | None = None  # answers generated, of which the n likeliest are returned; None: n
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 or -1: off
    top_p: float = 1.0
    min_p: float = 0.0
    use_beam_search: bool = False  # the n likeliest answers of a search with best_of beams; no random numbers
    length_penalty: float = 1.0  # a beam's score is its log-probability / length ** this
    early_stopping: bool = False  # end a search with the first best_of answers, whatever might still come
    typical_p: float = 1.0  # the tokens of most typical surprise that together have this probability
    repetition_penalty: float = 1.0  # > 1 discourages tokens of prompt and output
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)  # token id -> what is added to its logit
    bad_words: Sequence[str | Sequence[int]] = ()  # texts, or token ids, that the answer never contains
    allowed_token_ids: Sequence[int] | None = None  # all others are forbidden; None: off
    logits_processors: Sequence[LogitsProcessor] = ()  # change a row of logits; Python's time, every token
    seed: int | None = None
    max_tokens: int | None = 256  # None: until the context is full
    min_tokens: int = 0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None  # top log-probabilities per output token, besides the sampled one
    prompt_logprobs: int | None = None  # the same per prompt token
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids", "bad_words", "allowed_token_ids", "logits_processors"):
            if not isinstance(getattr(self, name) or (), (str, Sequence, set, frozenset)):
                raise RequestError(f"{name} is {getattr(self, name)!r}", "give a list")
        for name in (
            "ignore_eos",
            "use_beam_search",
            "early_stopping",
            "include_stop_str_in_output",
            "skip_special_tokens",
        ):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} is {getattr(self, name)!r}", "give True or False")
        structured: Any = self.structured_outputs
        if isinstance(structured, Mapping):
            try:
                structured = StructuredOutputsParams(**structured)
            except TypeError as error:
                raise RequestError(f"structured_outputs: {error}", "see StructuredOutputsParams") from None
            object.__setattr__(self, "structured_outputs", structured)
        if not isinstance(structured, StructuredOutputsParams | None):
            raise RequestError(f"structured_outputs is {structured!r:.80}", "see StructuredOutputsParams")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        object.__setattr__(self, "logits_processors", tuple(self.logits_processors or ()))
        self._check_tokens()
        for name, low, high in (
            ("n", 1, 128),
            ("best_of", 1, 128),
            ("temperature", 0.0, 100.0),
            ("top_k", -1, math.inf),
            ("top_p", math.ulp(0.0), 1.0),
            ("min_p", 0.0, 1.0),
            ("typical_p", math.ulp(0.0), 1.0),
            ("repetition_penalty", 0.01, 100.0),
            ("presence_penalty", -2.0, 2.0),
            ("frequency_penalty", -2.0, 2.0),
            ("seed", 0, 2**64 - 1),
            ("max_tokens", 1, math.inf),
            ("min_tokens", 0, math.inf),
            ("logprobs", 0, 20),
            ("prompt_logprobs", 0, 20),
            ("length_penalty", -100.0, 100.0),
        ):
            value = getattr(self, name)
            if value is None and name in ("best_of", "seed", "max_tokens", "logprobs", "prompt_logprobs"):
                continue
            kind = float if isinstance(low, float) else int
            if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
                raise RequestError(f"{name} is {value!r}", f"give {'a number' if kind is float else 'an integer'}")
            if not low <= value <= high:  # also refuses NaN
                raise RequestError(f"{name} is {value}", f"choose a value from {_bound(low)} to {_bound(high)}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens {self.min_tokens} exceeds max_tokens {self.max_tokens}", "lower min_tokens")
        if self.best_of is not None and self.best_of < self.n:
            raise RequestError(f"best_of {self.best_of} is less than n {self.n}", "raise it to n or more")
        if self.use_beam_search:
            self._check_beam_search()
        if any(not isinstance(s, str) or not s for s in stop):
            raise RequestError("a stop string is empty or no string", "remove it")
        if any(not callable(p) for p in self.logits_processors):
            raise RequestError("logits_processors holds something that cannot be called", "give functions")

    def _check_beam_search(self) -> None:
        if (self.best_of or self.n) > MAX_BEAMS:
            raise RequestError(f"best_of of a beam search is {self.best_of or self.n}", f"choose at most {MAX_BEAMS}")
        unfit = {"stop": (), "bad_words": (), "allowed_token_ids": None, "logits_processors": (), "logit_bias": None,
                 "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
                 "structured_outputs": None}  # fmt: skip
        for name, default in unfit.items():
            if getattr(self, name) != default:
                raise RequestError(f"{name} has no meaning in a beam search", "leave it out, or use_beam_search")

    def _check_tokens(self) -> None:
        """What names tokens: plain tuples and dicts from here on, with ids from 0."""
        given: tuple[Any, ...] = (self.bad_words,) if isinstance(self.bad_words, str) else tuple(self.bad_words or ())
        words = tuple(tuple(w) if isinstance(w, Sequence) and not isinstance(w, str) else w for w in given)
        object.__setattr__(self, "bad_words", words)
        if any(not isinstance(w, (str, tuple)) or not w for w in words):
            raise RequestError("bad_words holds something that is empty or no text", "give texts or lists of token ids")
        for word in words:
            if not isinstance(word, str):
                _check_ids("bad_words", word)
        _check_ids("stop_token_ids", self.stop_token_ids)
        if self.allowed_token_ids is not None:
            allowed = tuple(self.allowed_token_ids)
            object.__setattr__(self, "allowed_token_ids", allowed)
            _check_ids("allowed_token_ids", allowed)
            if not allowed:
                raise RequestError("allowed_token_ids is empty", "give at least one id, or leave it out")
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise RequestError(f"logit_bias is {self.logit_bias!r}", "give {token id: bias}")
            # JSON has no keys but texts.
            asked: Mapping[Any, Any] = self.logit_bias
            bias = {int(t) if isinstance(t, str) and t.isdecimal() else t: b for t, b in asked.items()}
            object.__setattr__(self, "logit_bias", bias)
            _check_ids("logit_bias", bias)
            for token, value in bias.items():
                if isinstance(value, bool) or not isinstance(value, (int, float)) or not -100 <= value <= 100:
                    raise RequestError(f"logit_bias of token {token} is {value!r}", "choose a value from -100 to 100")


@dataclass(frozen=True)
class PoolingParams:
    """How the hidden states of a prompt become one embedding.

    pooling: "last" takes that of the last token, "mean" the mean of all. normalize: to length 1. Both default to what
    the checkpoint says, else to "last" and True. dimensions: keep the first so many numbers, before they are
    normalised, for models that are trained for it (Matryoshka; Kusupati et al. 2022).

    Raises:
        RequestError: a value is none of these.
    """

    pooling: Pooling | None = None
    normalize: bool | None = None
    dimensions: int | None = None  # None: all

    def __post_init__(self) -> None:
        if self.pooling not in (None, *get_args(Pooling)):
            raise RequestError(f"pooling is {self.pooling!r:.80}", "choose one of last, mean")
        if self.normalize is not None and not isinstance(self.normalize, bool):
            raise RequestError(f"normalize is {self.normalize!r:.80}", "give True or False")
        size: Any = self.dimensions
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise RequestError(f"dimensions is {size!r:.80}", "give a whole number from 1")


@dataclass(frozen=True)
class PoolerConfig:
    """What a model says about its embeddings.

    hidden_size: their length, None if unknown. pooling, normalize: unless a request says otherwise. refusal: why the
    model's own way to embed is not implemented, "cause; remedy"; "" if it is. embeds_only: it has no output layer.
    """

    hidden_size: int | None = None
    pooling: Pooling = "last"
    normalize: bool = True
    refusal: str = ""
    embeds_only: bool = False

    def resolve(self, params: PoolingParams) -> PoolingParams:
        """The parameters with all defaults filled in.

        Raises:
            RequestError: more dimensions than the model has, or its own way to pool is asked for and not implemented.
        """
        if self.refusal and params.pooling is None:
            raise RequestError(self.refusal, "choose a pooling yourself if you know what you do")
        if self.hidden_size is not None and params.dimensions is not None and params.dimensions > self.hidden_size:
            raise RequestError(
                f"dimensions is {params.dimensions}, the embeddings of this model have {self.hidden_size}", "lower it"
            )
        normalize = self.normalize if params.normalize is None else params.normalize
        return PoolingParams(params.pooling or self.pooling, normalize, params.dimensions)


def _check_ids(name: str, ids: Iterable[object]) -> None:
    if any(isinstance(t, bool) or not isinstance(t, int) or t < 0 for t in ids):
        raise RequestError(f"{name} holds something that is no token id", "give integers from 0")


def _bound(value: float) -> str:
    if value == math.inf:
        return "any larger"
    return "just above 0" if value == math.ulp(0.0) else f"{value:g}"


Quantization = Literal["int8", "int4", "fp8", "nvfp4", "w8a8"]
KVDType = Literal["auto", "f32", "f16", "bf16", "int8", "fp8"]
_TORCH_NAMES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class EngineConfig:
    """How a model is loaded and run. Everything has a default that suits a laptop and a server."""

    model: str = ""  # folder, .gguf file or hub id; empty: the demo model
    device: Literal["cpu", "cuda", "reference"] = "cpu"
    dtype: Literal["auto", "f32", "f16", "bf16"] = "auto"  # of weights that are not quantized; auto: as stored
    quantization: Quantization | None = None  # of linear layers, as they are loaded
    kv_cache_dtype: KVDType = "auto"  # auto: as the model, bf16 beside codes; int8, fp8: half of that
    max_model_len: int | None = None  # tokens; None: what the model allows and memory holds
    max_num_seqs: int = 64  # sequences in one step
    max_num_batched_tokens: int | None = None  # tokens in one step: bounds arena and duration; None: ``step_tokens``
    capacity_policy: Literal["max_utilization", "guaranteed_no_evict"] = "max_utilization"  # preempt, or never
    batching: Literal["inflight", "dynamic", "static"] = "inflight"  # the others only to see the difference
    batching_delay: float | None = None  # seconds such a batch waits to fill; None: 0.05 dynamic, 1 static
    num_speculative_tokens: int = 0  # longest draft; 0: no speculation, or 4 if there is a speculative_model
    speculative_model: str | None = None  # makes the drafts; None: they are guessed from the text so far
    speculative_quantization: Quantization | None = None  # of the speculative model; as ``quantization``
    async_scheduling: bool | None = None  # decide on a step while one runs; None: on devices that are not the CPU
    enable_lora: bool = False  # adapters at run time; costs a little even while no request uses one
    max_loras: int = 4  # adapters in memory at once; their room is taken at the start
    max_lora_rank: int = 16  # of an adapter; the room of all grows with it
    enable_prefix_caching: bool = True  # find what earlier requests have computed
    block_size: int = 16  # tokens per KV block; 16 keys fill one 512-bit register
    kv_cache_memory: int | None = None  # bytes; None: room for max_num_seqs, within free memory
    gpu_memory_utilization: float = 0.9  # of the GPU's memory; what weights and steps leave of it is KV cache
    enforce_eager: bool = False  # no CUDA graphs: decoding takes the host's time, starting takes less
    threads: int | None = None  # None: the cores this process may use
    activations: Literal["auto", "float", "int8"] = "auto"  # beside quantized weights; auto: docs/quantization.md
    isa: str | None = None  # None: PELTON_CPU_ISA, else the best one
    packed_cache: bool = True  # keep packed weights on disk, mmapped at the next start
    seed: int = 0  # for requests without one

    def __post_init__(self) -> None:
        for name in ("dtype", "kv_cache_dtype"):  # the names that torch and vLLM have for the same types
            value = getattr(self, name)
            object.__setattr__(self, name, _TORCH_NAMES.get(value, value))
        if self.speculative_model is not None and self.num_speculative_tokens == 0:
            object.__setattr__(self, "num_speculative_tokens", 4)

    @property
    def step_tokens(self) -> int:
        """``max_num_batched_tokens``, or what suits the device: a GPU needs more to be busy."""
        return self.max_num_batched_tokens or (4096 if self.device == "cuda" else 1024)

    @property
    def product_activations(self) -> str:
        """``activations``, but "int8" for a quantization whose name says so."""
        return "int8" if self.quantization == "w8a8" and self.activations == "auto" else self.activations

    @property
    def lora(self) -> tuple[int, int] | None:
        """(max_loras, max_lora_rank); None without adapters."""
        return (self.max_loras, self.max_lora_rank) if self.enable_lora else None

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        return tuple(f.name for f in fields(cls))
