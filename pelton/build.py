"""The composition root: checkpoint + model + passes + backend -> an executor. The only wiring."""

from __future__ import annotations

import gc
import hashlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .backends.backend import Backend, Model
from .backends.base import Executor, KVSpec
from .checkpoint import Checkpoint, PoolingRule, open_checkpoint, resolve_model
from .checkpoint.quantized_hf import zero_biases
from .config import EngineConfig, PoolerConfig
from .errors import CheckpointError, OutOfMemoryError, PeltonError, RequestError, TokenizerError
from .graph import F16, Graph, GroupQuant
from .ledger import Ledger, human
from .models import create, is_base_model
from .nn import trace
from .passes import bind_types, run_passes
from .program import Program
from .quantize import QUANTIZATIONS, fitting, weight_type

if TYPE_CHECKING:
    from .checkpoint.peft import LoraAdapter

#: Where configs say how long a context the model was trained for.
_CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "n_ctx", "seq_length", "max_seq_len")
#: BLOOM and other models without a limit of their own.
_DEFAULT_CONTEXT = 2048
#: A context that memory has cut down further than this is not worth starting with.
_LEAST_CONTEXT = 512

#: progress(done, total) in bytes of packed weights.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Plan:
    """Everything that is known before weights are read: what would run, and what memory it needs."""

    config: EngineConfig
    checkpoint: Checkpoint
    graph: Graph
    program: Program
    kv_spec: KVSpec
    ledger: Ledger
    available: int  # bytes this process may take now
    vocab_size: int
    backend: Backend
    draft: Plan | None = None  # of the speculative model
    notes: tuple[str, ...] = ()  # what differs from what a user might expect; shown at the start

    @property
    def isa(self) -> str:
        return self.backend.isa

    @property
    def threads(self) -> int:
        return self.backend.threads

    def check_memory(self) -> None:
        """Raises OutOfMemoryError if the ledger exceeds what is available, naming what would fit."""
        need, have = self.ledger.total, self.available
        if need > have:
            # The KV cache and the rope tables grow with the context, everything else is fixed.
            ropes = [dict(c.attrs) for c in self.program.constants if c.packing == "rope"]
            per_token = self.ledger.kv_bytes_per_token + sum(4 * rope["rotary_dim"] for rope in ropes)
            fixed = need - self.ledger.kv_cache - sum(4 * rope["rotary_dim"] * rope["positions"] for rope in ropes)
            fits = max(0, have - fixed) // max(1, per_token)
            if fits < self.config.block_size:
                remedy = self.backend.remedy(self.graph, fixed, have)
            elif self.config.kv_cache_memory is not None:
                remedy = f"kv_cache_memory of {human(fits * self.ledger.kv_bytes_per_token)} would fit"
            else:
                remedy = f"max_model_len={fits} or less, or a smaller max_num_seqs, would fit"
            where = "" if self.backend.device_name is None else f" on {self.backend.device_name}"
            raise OutOfMemoryError(
                f"{self.checkpoint.path.name} needs {human(need)}, {human(have)} are free{where}", remedy
            )


@dataclass
class Built:
    """A model that is ready to run."""

    plan: Plan
    executor: Executor
    tokenizer: Any  # pelton.text.Tokenizer, or None: token ids in and out only
    eos_token_ids: frozenset[int]
    vocab_size: int
    draft: Built | None = None  # the speculative model

    @property
    def draft_executor(self) -> Executor | None:
        return None if self.draft is None else self.draft.executor

    @property
    def draft_vocab_size(self) -> int | None:
        return None if self.draft is None else self.draft.vocab_size

    def peak_bandwidth(self, achieved: float = 0.0) -> float | None:
        """Measured DRAM read bandwidth in bytes/s, for MBU; measured once per machine and kept.

        achieved: bytes/s that somebody has read; a figure from another hour that is lower is measured again.
        """
        return self.plan.backend.read_bandwidth(achieved)

    def peak_flops(self) -> float | None:
        """Measured FLOP/s in the precision of most of the model's products, for MFU; measured once per machine."""
        return self.plan.backend.peak_flops(self.executor)

    def read_adapter(self, name: str) -> LoraAdapter:
        """A PEFT adapter for this model, from a folder or a hub id.

        Raises:
            PeltonError: the model was loaded without adapters, or this one cannot be used.
        """
        from .checkpoint.peft import read_adapter

        config = self.plan.config
        if not config.enable_lora:
            raise RequestError("this model was loaded without room for adapters", "load it with enable_lora=True")
        if not name:
            raise RequestError("the adapter has no path", "give a folder that PEFT wrote, or a hub id")
        modules = {
            module: (table.type.in_features, width)
            for table in self.plan.program.adapters
            for module, width in zip(table.modules, table.type.widths, strict=True)
        }
        folder = resolve_model(name, what="a folder that PEFT wrote, or a Hugging Face id like org/name")
        return read_adapter(folder, modules, config.max_lora_rank)

    @property
    def pooler(self) -> PoolerConfig:
        """What the model says about its embeddings."""
        outputs, rule = self.plan.graph.outputs, self.plan.checkpoint.pooling or PoolingRule()
        pooling: Any = rule.pooling
        size = int(outputs[-1].tensor.shape[-1])
        return PoolerConfig(size, pooling, rule.normalize, rule.refusal, embeds_only=len(outputs) == 1)

    @cached_property
    def kv_identity(self) -> str:
        """Which model computes keys and values, and how: two that agree may use each other's."""
        from .backends.cpu.packed_cache import content_hash
        from .version import installed_version

        config = self.plan.config
        how = (config.device, config.dtype, config.quantization, config.kv_cache_dtype, config.activations)
        text = repr(
            (installed_version(), how, config.block_size, self.plan.isa, content_hash(self.plan.checkpoint.files))
        )
        return hashlib.sha256(text.encode()).hexdigest()

    def close(self) -> None:
        self.executor.close()
        if self.draft is not None:
            self.draft.close()


def trained_context(config: Mapping[str, Any]) -> int:
    """Tokens of context the model is made for: as trained, times what its rope scaling stretches it by."""
    values = (config.get(name) for name in _CONTEXT_FIELDS)
    context = next((v for v in values if isinstance(v, int) and not isinstance(v, bool) and v > 0), _DEFAULT_CONTEXT)
    rules = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(rules, Mapping):  # families without rope never look at what stands there
        return context
    kind, factor = rules.get("rope_type") or rules.get("type"), rules.get("factor")
    if kind not in ("linear", "yarn") or not isinstance(factor, (int, float)) or not 1 <= factor < 1e6:
        return context
    if kind == "linear":
        return int(context * factor)
    original = rules.get("original_max_position_embeddings")  # published configs name it, or the trained context only
    return max(context, int((original if isinstance(original, int) else context) * factor))


def bound_graph(config: EngineConfig, checkpoint: Checkpoint, half: str = "bf16") -> Graph:
    """The model's graph with the checkpoint's types, before any pass. half: what stored f16 runs as by default."""
    model = create(checkpoint.config)
    try:
        graph = _without_absent_head(trace(model, checkpoint.architecture), checkpoint)
    except ValueError as error:  # a shape rule of the op table: sizes that are fine alone and not together
        raise CheckpointError(
            f"the config of this {checkpoint.architecture} contradicts itself ({error})", "check config.json"
        ) from error
    needless = zero_biases(checkpoint.tensors, {n.name for n in graph.leaves("weight")})
    stored = {name: tensor.type for name, tensor in checkpoint.tensors.items() if name not in needless}
    return bind_types(graph, stored, config.dtype, config.kv_cache_dtype, config.quantization, half)


def _without_absent_head(graph: Graph, checkpoint: Checkpoint) -> Graph:
    """Models that were made to embed texts are often saved without an output layer."""
    missing = {n.name for n in graph.leaves("weight")} - checkpoint.tensors.keys()
    embeds = checkpoint.pooling is not None and missing == {"lm_head.weight"}
    return Graph(graph.name, graph.outputs[-1:]) if embeds or is_base_model(checkpoint.config) else graph


@dataclass(frozen=True)
class _Lowered:
    """A model as far as it is known without its KV cache."""

    checkpoint: Checkpoint
    graph: Graph
    program: Program
    context: int  # tokens that it was trained for
    without_kv: Ledger
    block_bytes: int
    notes: tuple[str, ...]

    @property
    def vocab_size(self) -> int:
        logits, *hidden = self.graph.outputs
        return int(logits.tensor.shape[-1]) if hidden else int(self.checkpoint.config["vocab_size"])


def _lowered(config: EngineConfig, checkpoint: Checkpoint, backend: Backend) -> _Lowered:
    from .engine.speculation import max_num_logits, max_num_rows

    bound = bound_graph(config, checkpoint, backend.half)
    graph = run_passes(bound, lora=config.lora, fuse_gates=backend.fuses_gates)
    context = trained_context(checkpoint.config)
    if config.max_model_len is not None and config.max_model_len > context:
        raise RequestError(
            f"max_model_len {config.max_model_len} exceeds the {context} tokens the model was trained for",
            f"choose at most {context}",
        )
    notes = list(checkpoint.notes)
    if checkpoint.pooling is not None and checkpoint.pooling.note:
        notes.append(checkpoint.pooling.note)
    is_half = any(t.type.dtype == F16 for t in checkpoint.tensors.values())
    if config.dtype == "auto" and backend.half == "bf16" and is_half:
        notes.append("f16 weights run as bf16, which rounds them to 8 bits; dtype='f32' keeps all 11")
    notes += _fallback_notes(config, graph)
    limits = {
        "T": config.step_tokens,
        "S": config.max_num_seqs,
        "N": max_num_rows(config.max_num_seqs, config.num_speculative_tokens, config.step_tokens),
        "L": max_num_logits(config.max_num_seqs, config.num_speculative_tokens),
    }
    program = backend.lower(graph, limits, config.max_model_len or context)
    try:
        sizes = backend.sizes(graph, program)
    except ValueError as error:  # a group size, or rows that are no whole groups
        raise CheckpointError(
            f"{checkpoint.path.name} has weights that no kernel runs ({error})",
            "use a file quantized in groups of 32, as Q4_K_M and Q8_0 are",
        ) from error
    notes += backend.notes(graph)
    ledger = Ledger(sizes.weights, sizes.mapped, 0, 0, 0, sizes.step, adapters=sizes.adapters, runtime=sizes.runtime)
    block_bytes = backend.block_bytes(program, config.block_size)
    return _Lowered(checkpoint, graph, program, context, ledger, block_bytes, tuple(notes))


def _backend(config: EngineConfig) -> Backend:
    threads = config.threads or usable_cores()
    if config.device == "cuda":
        from .backends.cuda import cuda_backend

        return cuda_backend(config, threads)
    if config.device == "reference":
        from .backends.reference.backend import ReferenceBackend
        from .engine.sampling import HostSampler

        return ReferenceBackend(config.isa, threads, HostSampler())
    from .backends.cpu.backend import CpuBackend

    return CpuBackend(config.isa, threads)


def plan(config: EngineConfig, checkpoint: Checkpoint | None = None) -> Plan:
    """Open, trace, rewrite, lower and account; no weight is read.

    checkpoint: in place of the one that the config names, such as one of random weights in memory.

    Raises:
        PeltonError: any problem of the checkpoint or the configuration, in one line.
    """
    checkpoint = checkpoint or open_checkpoint(resolve_model(config.model))
    _check(config)
    backend = _backend(config)
    model = _lowered(config, checkpoint, backend)
    draft_config, draft = _lowered_draft(config, model.context, backend)
    block_bytes = model.block_bytes + (0 if draft is None else draft.block_bytes)
    without_kv = model.without_kv
    if draft is not None:
        without_kv = replace(without_kv, draft=draft.without_kv.total - draft.without_kv.runtime)
    available = backend.available()
    kv_spec = _kv_spec(config, model.context, block_bytes, max(0, available - without_kv.total), backend)
    notes = model.notes
    if config.max_model_len is None and kv_spec.max_model_len < model.context:
        notes += (f"memory holds a context of {kv_spec.max_model_len:,} of the model's {model.context:,} tokens",)
    ledger = replace(
        without_kv,
        kv_cache=kv_spec.num_blocks * block_bytes,
        kv_bytes_per_token=block_bytes // config.block_size,
        kv_tokens=kv_spec.num_blocks * config.block_size,
    )

    def planned(config: EngineConfig, model: _Lowered, draft: Plan | None, notes: tuple[str, ...]) -> Plan:
        length = min(kv_spec.max_model_len, config.max_model_len or model.context)
        spec = replace(kv_spec, bytes_per_block=model.block_bytes, max_model_len=length)
        return Plan(
            config, model.checkpoint, model.graph, model.program, spec, ledger, available, model.vocab_size,
            backend, draft, notes,
        )  # fmt: skip

    draft_plan = None
    if draft is not None and draft_config is not None:
        draft_plan = planned(draft_config, draft, None, draft.notes)
    return planned(config, model, draft_plan, notes)


def _lowered_draft(config: EngineConfig, context: int, backend: Backend) -> tuple[EngineConfig | None, _Lowered | None]:
    """The speculative model, loaded as the other is, for steps of its own size; (None, None) without one."""
    from .engine.draft_model import CATCH_UP

    if config.speculative_model is None:
        return None, None
    checkpoint = open_checkpoint(resolve_model(config.speculative_model))
    draft = replace(
        config,
        model=config.speculative_model,
        speculative_model=None,
        quantization=config.speculative_quantization,
        speculative_quantization=None,
        enable_lora=False,
        num_speculative_tokens=0,
        max_num_batched_tokens=config.max_num_seqs + CATCH_UP,
        max_model_len=min(trained_context(checkpoint.config), config.max_model_len or context),
    )
    lowered = _lowered(draft, checkpoint, backend)
    if len(lowered.graph.outputs) == 1:
        raise RequestError(
            f"the speculative model {config.speculative_model} has no output layer", "choose one that generates"
        )
    return draft, lowered


def _fallback_notes(config: EngineConfig, graph: Graph) -> list[str]:
    """Which layers got another type than was asked for, because their rows are no whole groups."""
    if config.quantization is None:
        return []
    type = weight_type(config.quantization)
    widths = {int(w.tensor.shape[1]) for w in graph.leaves("weight") if isinstance(w.tensor.dtype, GroupQuant)}
    return [
        f"rows of {cols} are no whole groups of {type.group_size}: layers with such inputs run as {fitting(type, cols)}"
        for cols in sorted(widths) if fitting(type, cols) != type
    ]  # fmt: skip


def _kv_spec(config: EngineConfig, context: int, block_bytes: int, free: int, backend: Backend) -> KVSpec:
    """How many blocks, and the longest sequence. ``free``: bytes left beside everything else."""
    wanted = config.max_model_len or context
    blocks_for = -(-wanted // config.block_size)
    if config.kv_cache_memory is not None:
        num_blocks = config.kv_cache_memory // block_bytes
    else:
        share = backend.kv_share(free, blocks_for * block_bytes)
        num_blocks = min(share // block_bytes, blocks_for * config.max_num_seqs)
    if config.max_model_len is not None:
        if config.kv_cache_memory is not None and num_blocks < blocks_for:
            raise OutOfMemoryError(
                f"kv_cache_memory holds {num_blocks * config.block_size} tokens, max_model_len is {wanted}",
                f"raise it to {human(blocks_for * block_bytes)} or lower max_model_len",
            )
        num_blocks = max(num_blocks, blocks_for)
    elif config.kv_cache_memory is None:  # no use starting with less
        num_blocks = max(num_blocks, -(-min(wanted, _LEAST_CONTEXT) // config.block_size))
    num_blocks = max(num_blocks, 1)  # whatever is too much here, the ledger says so
    return KVSpec(num_blocks, config.block_size, block_bytes, min(wanted, num_blocks * config.block_size))


def build(config: EngineConfig, progress: Progress | None = None, checkpoint: Checkpoint | None = None) -> Built:
    """Load a model.

    progress is called while weights are packed, which on CPUs happens only the first time. checkpoint: as for ``plan``.

    Raises:
        PeltonError: the model cannot be loaded; the line names cause and remedy.
    """
    with _uncollected():
        return _build(config, progress, checkpoint)


def _build(config: EngineConfig, progress: Progress | None, checkpoint: Checkpoint | None) -> Built:
    planned = plan(config, checkpoint)
    planned.check_memory()
    for note in planned.notes:
        warnings.warn(note, stacklevel=4)
    tokenizer = _tokenizer(planned.checkpoint)
    draft_tokenizer = None if planned.draft is None else _tokenizer(planned.draft.checkpoint)
    if planned.draft is not None:
        _require_same_tokens(tokenizer, draft_tokenizer, config)
    done, total = 0, planned.ledger.weights + planned.ledger.mapped + planned.ledger.draft

    def on_packed(size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, total)

    draft = None
    if planned.draft is not None:
        executor = _executor(planned.draft, on_packed)
        draft = Built(planned.draft, executor, draft_tokenizer, frozenset(), planned.draft.vocab_size)
    executors: list[Executor] = [] if draft is None else [draft.executor]
    try:
        executors.append(_executor(planned, on_packed))
        planned.backend.settle(executors, config)
    except BaseException:
        for executor in executors:
            executor.close()
        raise
    executor = executors[-1]
    eos_ids: set[int] = set(tokenizer.stop_token_ids) if tokenizer is not None else set()
    for fields in (planned.checkpoint.generation, planned.checkpoint.config):
        eos = fields.get("eos_token_id")
        eos_ids.update(eos if isinstance(eos, list) else [] if eos is None else [eos])
    return Built(planned, executor, tokenizer, frozenset(eos_ids), planned.vocab_size, draft)


def _executor(planned: Plan, on_packed: Callable[[int], None]) -> Executor:
    from .backends.cpu.packed_cache import content_hash

    checkpoint = planned.checkpoint
    model = Model(
        planned.config, planned.graph, planned.program, lambda name: checkpoint.tensors[name].read(), planned.kv_spec,
        lambda: content_hash(checkpoint.files),
    )  # fmt: skip
    return planned.backend.executor(model, on_packed)


#: What two tokenizers must agree on to be taken for the same.
_PROBE = "The quick brown fox: 1,234.5 += naïve ünïcode\n\tdef f(x): return {'a': [x]}  # 数字 🙂"


def _require_same_tokens(tokenizer: Any, draft: Any, config: EngineConfig) -> None:
    """Raises RequestError if the speculative model means something else by its tokens."""
    if tokenizer is None and draft is None:  # token ids in and out: their owner knows what they mean
        return
    if tokenizer is None or draft is None or tokenizer.encode(_PROBE) != draft.encode(_PROBE):
        raise RequestError(
            f"the speculative model {config.speculative_model} has another tokenizer than the model",
            "choose a smaller model of the same family",
        )


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection: graph and vocabulary are 10^5 objects that stay, searched again and again for nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def tokenizer_of(model: str) -> Any:
    """The tokenizer of a model, None if it has none; without its weights.

    For a process that speaks to an engine elsewhere. model: as in an EngineConfig.

    Raises:
        PeltonError: the checkpoint cannot be read.
    """
    checkpoint = open_checkpoint(resolve_model(model))
    with _uncollected():
        return _tokenizer(checkpoint)


def _tokenizer(checkpoint: Checkpoint) -> Any:
    from .text import load_tokenizer, tokenizer_from_gguf

    if checkpoint.gguf_metadata is not None:
        if "tokenizer.ggml.model" not in checkpoint.gguf_metadata:
            return None
        return tokenizer_from_gguf(checkpoint.gguf_metadata, checkpoint.generation)
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    try:
        return load_tokenizer(folder, checkpoint.generation)
    except TokenizerError:
        if _has_tokenizer_files(folder):
            raise
        return None  # random weights and test models: token ids in and out still work


def _has_tokenizer_files(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"))


def _check(config: EngineConfig) -> None:
    for name in ("max_num_seqs", "block_size"):
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise PeltonError(f"{name} is {value!r}", "give a whole number from 1")
    for name, most in (("max_loras", 1024), ("max_lora_rank", 512)):
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise PeltonError(f"{name} is {value!r}", f"give a whole number from 1 to {most}")
    if not isinstance(config.enable_lora, bool):
        raise PeltonError(f"enable_lora is {config.enable_lora!r}", "give True or False")
    for name in ("max_num_batched_tokens", "threads", "max_model_len", "kv_cache_memory"):
        value = getattr(config, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise PeltonError(f"{name} is {value!r}", "give a whole number from 1, or leave it out")
    if config.num_speculative_tokens not in range(17) or isinstance(config.num_speculative_tokens, bool):
        raise PeltonError(f"num_speculative_tokens is {config.num_speculative_tokens!r}", "give a number from 0 to 16")
    for name in ("quantization", "speculative_quantization"):
        if getattr(config, name) not in (None, *QUANTIZATIONS):
            remedy = f"choose one of {', '.join(QUANTIZATIONS)}, or leave it out"
            raise PeltonError(f"{name} is {getattr(config, name)!r}", remedy)
    for name, allowed in (("device", ("cpu", "cuda", "reference")), ("dtype", ("auto", "f32", "f16", "bf16")),
                          ("kv_cache_dtype", ("auto", "f32", "f16", "bf16", "int8", "fp8")),
                          ("capacity_policy", ("max_utilization", "guaranteed_no_evict")),
                          ("batching", ("inflight", "dynamic", "static")),
                          ("activations", ("auto", "float", "int8"))):  # fmt: skip
        if getattr(config, name) not in allowed:
            raise PeltonError(f"{name} is {getattr(config, name)!r}", f"choose one of {', '.join(allowed)}")
    if config.dtype == "f16" and config.device != "cuda":
        raise PeltonError("dtype is 'f16', which CPUs do not multiply", "choose bf16 or f32, or device='cuda'")
    share: Any = config.gpu_memory_utilization
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise PeltonError(f"gpu_memory_utilization is {share!r}", "give a number above 0, up to 1")
    if not isinstance(config.enforce_eager, bool):
        raise PeltonError(f"enforce_eager is {config.enforce_eager!r}", "give True or False")
    delay = config.batching_delay
    if delay is not None and (isinstance(delay, bool) or not isinstance(delay, (int, float)) or not 0 <= delay < 3600):
        raise PeltonError(f"batching_delay is {delay!r}", "give seconds from 0 to 3600, or leave it out")
    if config.block_size % 16:
        raise PeltonError(f"block_size is {config.block_size}", "give a multiple of 16")
    if config.step_tokens < config.max_num_seqs:
        raise PeltonError(
            f"max_num_batched_tokens {config.step_tokens} is less than max_num_seqs {config.max_num_seqs}",
            "every running sequence needs one token per step: raise the first or lower the second",
        )


def usable_cores() -> int:
    """Cores by affinity and by the cgroup's CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # cgroup v2, v1
        try:
            quota, period = " ".join((Path("/sys/fs/cgroup") / f).read_text() for f in files).split()
            if int(quota) > 0:
                cores = min(cores, max(1, int(quota) // int(period)))
        except (OSError, ValueError):
            continue  # no such version, or "max"
    return cores
