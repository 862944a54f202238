"""The CUDA executor: a program's calls as kernels in a stream, decode steps as graphs, tokens sampled on the device."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from ...program import Program, View
from ...program.weights import Reader
from ..base import Batch, KVSpec, SampledToken, Sampler, StepOutput, StepProfile, StepStats
from ..host import AdapterPart, BatchExecutor, check_blocks, last_tokens, rows_of_logits
from ..step_inputs import Ints, StepInputs
from . import weights
from .activations import Numerics
from .calls import Lowering
from .costs import call_costs, step_bytes
from .device import Device, Mark
from .graphs import Capture, CudaCapture, Graphs, buckets_for
from .inputs import Sizes, padded
from .lora import AdapterTensors
from .memory import CACHE_TYPES, CodeMemory, Frame, StepMemory, code_bytes
from .providers import Scratch
from .sampling import SamplingWords
from .triton.cache import Cache
from .triton.pointwise import fill_pending
from .triton.sampling import sample
from .tuning import Products, problems_of, rows_up_to


@dataclass(slots=True)
class _Step:
    """words: what the sampling kernel must know; None: the host samples, or needs what the step computes."""

    ticket: int
    batch: Batch
    inputs: StepInputs
    words: Ints | None
    stats: StepStats
    begin: Mark | None = None  # None: not started
    end: Mark | None = None
    tokens: torch.Tensor | None = None  # on the host, once ``end`` has passed
    error: Exception | None = None  # why it could not start


class CudaExecutor(BatchExecutor):
    """Runs a program on a GPU. Before the first step, :meth:`allocate` must give it a KV cache.

    read: yields a checkpoint tensor by name. sampler: for requests that the device's
    does not serve. on_sent(bytes) reports progress. capture: how decode steps are recorded, None: not at all.

    A step starts when it is submitted: the tokens that it needs of the step before are on the device. Only behind a
    step that the host samples from, or takes logits or hidden states of, it waits until that has been collected.
    """

    def __init__(
        self,
        program: Program,
        numerics: Numerics,
        read: Reader,
        kv_spec: KVSpec,
        sampler: Sampler,
        device: Device,
        *,
        on_sent: Callable[[int], None] = lambda size: None,
        capture: Callable[[Device], Capture] | None = CudaCapture,
    ) -> None:
        super().__init__(kv_spec, sampler, program.flops, step_bytes(program, numerics), program.adapters)
        self.program = program
        self._numerics = numerics
        self.precision = numerics.main_precision(program)
        self._device = device
        self._capture = capture
        self._graphs: Graphs | None = None
        with device.active():
            constants = weights.load(program, numerics.compute, read, device.torch_device, on_sent)
            max_blocks = -(-kv_spec.max_model_len // kv_spec.block_size)
            self._memory = StepMemory(program, device, max_blocks, kv_spec.block_size, numerics.quantized)
            self._tables = self._new_tables()
            self._caches: list[Cache] = []
            on = device.torch_device
            products = Products(device, Scratch.of(problems_of(program, numerics), device))
            codes = CodeMemory(torch.empty(code_bytes(program, numerics), dtype=torch.uint8, device=on))
            lowering = Lowering(
                program, numerics, constants, self._caches, self._tables, self._memory.workspace, products, codes
            )
            self._launches = lowering.launches()
            products.choose()
        rows = program.limits["L"]
        self._landing = [torch.zeros(rows, 2, dtype=torch.int32, pin_memory=device.is_cuda) for _ in range(2)]
        self._fetched_rows: dict[View, torch.Tensor] = {}  # where logits and hidden states land that the host wants
        self._words = SamplingWords(program.limits["S"])
        self._flights: list[_Step] = []
        self._sampled: dict[str, int] = {}  # the last tokens that the host has sampled
        self._rows: dict[str, int] = {}  # of the sequences that the last step samples from: their row on the device

    def _new_tables(self) -> list[AdapterTensors]:
        types = [table.type for table in self.program.adapters]
        ranks = max((len(t.widths) * t.max_rank for t in types), default=0)
        on = self._device.torch_device
        scratch = torch.empty(self.program.limits["T"], ranks, dtype=torch.float32, device=on)
        return [AdapterTensors(t, scratch) for t in types]

    def _new_caches(self, num_blocks: int) -> None:
        self._caches.clear()  # the old ones first
        on, size = self._device.torch_device, self._kv_spec.block_size
        for kind in self.program.caches:
            dtype = CACHE_TYPES[kind.dtype]
            self._caches.append(Cache.zeros(dtype, num_blocks, kind.num_kv_heads, size, kind.head_dim, on))

    def run_largest_step(self) -> None:
        """Take all memory that any step takes, and compile its kernels. The KV cache is lost."""
        limits = self.program.limits
        with self._device.active():
            self._new_caches(1)
            # Products of fewer rows may have other kernels, which nobody should wait for in the middle of a request.
            for tokens in reversed(rows_up_to(limits["T"]) if self._device.is_cuda else [limits["T"]]):
                self._run_prompts(tokens)
            # Attention is compiled for each number of splits: a bucket of each is enough, recording runs them all.
            by_splits = {self._memory.frame(Sizes.decode(n)).num_splits: n for n in buckets_for(limits["S"])}
            for bucket in by_splits.values():
                self._send_padding(bucket)
                self._run_decode(bucket)
                self._device.synchronize()

    def _run_prompts(self, tokens: int) -> None:
        """A step of so many tokens, in the longest sequences."""
        limits, longest, size = self.program.limits, self._kv_spec.max_model_len, self._kv_spec.block_size
        lens = [longest] * min(tokens // longest, limits["S"])
        if len(lens) < limits["S"] and tokens % longest:
            lens.append(tokens % longest)
        tokens = sum(lens)
        tiles = self._memory.heads.tiles(lens, lens)
        sizes = Sizes(tokens, len(lens), min(limits["N"], tokens), min(limits["L"], tokens), 0, len(tiles))
        arrays = {
            "seq_lens": np.array(lens, np.int32),
            "query_start_loc": np.cumsum([0, *lens], dtype=np.int32),
            "tiles": tiles,
            "block_table": np.zeros((len(lens), -(-lens[0] // size)), np.int32),  # one block, again and again
        }
        self._memory.inputs.write(sizes, arrays)
        frame = self._memory.frame(sizes)
        self._forward(frame)
        self._sample_on_device(frame)

    def allocate(self, kv_spec: KVSpec) -> None:
        """Make the KV cache, and record decode steps on it."""
        self._kv_spec = kv_spec
        with self._device.active():
            self._new_caches(kv_spec.num_blocks)
            if self._capture is not None:
                capture = self._capture(self._device)
                self._graphs = Graphs(self.program.limits["S"], self._send_padding, self._run_decode, capture)
            self._device.synchronize()

    def _send_padding(self, bucket: int) -> None:
        """Inputs of a decode step without sequences: what earlier steps left means nothing in another layout."""
        nothing = {"block_table": np.zeros((1, 1), np.int32)}
        self._memory.inputs.write(Sizes.decode(bucket), padded(nothing, bucket))

    def _run_decode(self, bucket: int) -> None:
        frame = self._memory.frame(Sizes.decode(bucket))
        self._forward(frame)
        self._sample_on_device(frame)

    # ------------------------------------------------------------------ a step

    def _forward(self, frame: Frame) -> None:
        i = frame.inputs
        fill_pending(i["token_ids"], i["pending"], self._memory.sampled.view(-1))
        for launch in self._launches:
            launch(frame)

    def _sample_on_device(self, frame: Frame) -> None:
        rows = frame.sizes.logits
        sample(
            self._memory.sampled[:rows], self._memory.first(self.program.output, rows), frame.inputs["sampling"],
            self._memory.scratch,
        )  # fmt: skip

    def _execute(self, inputs: StepInputs, words: Ints | None) -> Mark:
        """Start a step; since when the device works on it. Without ``words`` nothing is sampled on the device."""
        num_tokens, num_seqs, num_rows, num_logits = inputs.dims
        if self._graphs is not None and num_tokens == num_seqs == num_rows == num_logits:
            bucket = self._graphs.bucket(num_seqs)
            arrays = inputs.arrays if words is None else {**inputs.arrays, "sampling": words}
            self._memory.inputs.write(Sizes.decode(bucket), padded(arrays, bucket))
            begin = self._device.mark()
            self._graphs.replay(bucket)
            return begin
        frame = self._send(inputs, words)
        begin = self._device.mark()
        self._forward(frame)
        if words is not None and num_logits:
            self._sample_on_device(frame)
        return begin

    def _send(self, inputs: StepInputs, words: Ints | None) -> Frame:
        """The frame of a step of any kind, its inputs on their way."""
        query_lens, seq_lens = inputs.shape.query_lens, inputs.shape.seq_lens
        decodes = np.array([i for i, n in enumerate(query_lens) if n == 1], np.int32)
        tiles = self._memory.heads.tiles([0 if n == 1 else n for n in query_lens], seq_lens)
        arrays = {**inputs.arrays, "decodes": decodes, "tiles": tiles}
        if words is not None:
            arrays["sampling"] = words
        sizes = Sizes(*inputs.dims, len(decodes), len(tiles))
        self._memory.inputs.write(sizes, arrays)
        return self._memory.frame(sizes)

    def profile(self, batch: Batch) -> StepProfile:
        """Run a step without sampling from it, call by call: what the device needs for each, and for all together."""
        inputs = self._inputs_of(batch)
        with self._device.active():
            frame = self._send(inputs, None)
            self._device.hold(100e-6 * len(self._launches))  # the host needs longer for a launch than many a kernel
            marks = [self._device.mark()]
            for launch in self._launches:
                launch(frame)
                marks.append(self._device.mark())
        marks[-1].wait()
        calls = zip(call_costs(self.program, self._numerics), itertools.pairwise(marks), strict=True)
        stats = tuple(cost.stats(inputs.shape, after.seconds_since(before)) for cost, (before, after) in calls)
        return StepProfile(marks[-1].seconds_since(marks[0]), stats)

    def _fetched(self, view: View, count: int) -> npt.NDArray[np.float32]:
        """Rows of a buffer of the step that ran last, on the host."""
        with self._device.active():
            rows = self._memory.first(view, count).float()
            host = self._host_rows(view)[:count]
            host.copy_(rows, non_blocking=True)
            self._device.synchronize()
        array: npt.NDArray[np.float32] = host.numpy()
        return array

    def _host_rows(self, view: View) -> torch.Tensor:
        """float32 in pinned memory, as large as the view ever is; taken when first needed."""
        if view not in self._fetched_rows:
            rows = self.program.limits[self.program.buffers[view.buffer].rows]
            pinned = self._device.is_cuda
            self._fetched_rows[view] = torch.empty(rows, view.cols, dtype=torch.float32, pin_memory=pinned)
        return self._fetched_rows[view]

    def _run(self, inputs: StepInputs) -> tuple[npt.NDArray[np.float32], float]:
        with self._device.active():
            begin = self._execute(inputs, None)
            end = self._device.mark()
        end.wait()
        return self._fetched(self.program.output, inputs.shape.num_logits), end.seconds_since(begin)

    def _hidden(self, inputs: StepInputs) -> npt.NDArray[np.float32]:
        return self._fetched(self.program.hidden, inputs.shape.num_logits + inputs.shape.num_hidden)

    # ------------------------------------------------------------------ the protocol

    def submit(self, batch: Batch) -> int:
        self._next_ticket += 1
        inputs = self._inputs_of(batch)
        stats = StepStats(0.0, inputs.shape.evaluate(self._flops), inputs.shape.evaluate(self._bytes))
        step = _Step(self._next_ticket, batch, inputs, self._words.of(batch), stats)
        before = self._flights[-1] if self._flights else None
        if before is None or (before.begin is not None and before.words is not None):
            rows = self._rows
            try:
                self._begin_step(step)
            except BaseException:
                self._rows = rows
                self._device.synchronize()  # all copies of inputs on the host are free again
                raise
        self._flights.append(step)
        return step.ticket

    def _begin_step(self, step: _Step) -> None:
        pending = np.full(len(step.inputs.arrays["token_ids"]), -1, np.int32)
        for place, request_id in step.inputs.pending:
            row = self._rows.get(request_id)
            # A token that the host knows; one whose sampling failed has none, and nobody will look at what follows.
            step.inputs.arrays["token_ids"][place] = self._sampled.get(request_id, 0)
            if row is not None:
                pending[place] = 2 * row
        step.inputs.arrays["pending"] = pending
        with self._device.active():
            self._copy_blocks(step.batch.copies)
            step.begin = self._execute(step.inputs, step.words)
            self._rows = {}
            if step.words is not None:
                self._rows = _last_rows(step.batch)
                count = step.inputs.shape.num_logits
                self._landing.reverse()  # the other one may belong to the step before
                step.tokens = self._landing[0][:count]
                step.tokens.copy_(self._memory.sampled[:count], non_blocking=True)
            step.end = self._device.mark()

    def _copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        if copies:
            sources, targets = torch.tensor(copies, device=self._device.torch_device).unbind(1)
            for cache in self._caches:
                cache.memory[targets] = cache.memory[sources]

    def collect(self, ticket: int) -> StepOutput:
        step = self._flights.pop(0)
        try:
            if step.ticket != ticket:
                raise RuntimeError(f"step {ticket} is collected out of turn, or failed with the one before it")
            if step.error is not None:
                raise step.error
            assert step.begin is not None and step.end is not None
            step.end.wait()
            stats = replace(step.stats, seconds=step.end.seconds_since(step.begin))
            self._sampled = {}
            output = self._output(step, stats)
        except BaseException:
            self._flights.clear()
            self._device.synchronize()  # the host's copies of inputs are free again
            raise
        if self._flights and self._flights[0].begin is None:
            following = self._flights[0]
            try:
                self._begin_step(following)
            except Exception as error:  # whoever collects this step is told something else
                following.error = error
        return output

    def _output(self, step: _Step, stats: StepStats) -> StepOutput:
        if step.tokens is not None:
            return _sampled_output(step.batch, step.tokens.numpy(), stats)
        logits = self._fetched(self.program.output, step.inputs.shape.num_logits)
        output = self._sample(step.batch, logits, stats)
        if step.inputs.shape.num_hidden:
            output = replace(output, hidden=self._hidden_of(step.inputs, step.batch))
        self._sampled = last_tokens(step.batch, output)
        return output

    def read_blocks(self, block_ids: Sequence[int]) -> list[npt.NDArray[np.uint8]]:
        with self._device.active():
            ids = torch.tensor(list(block_ids), device=self._device.torch_device)
            return [cache.memory[ids].cpu().numpy() for cache in self._caches]

    def write_blocks(self, block_ids: Sequence[int], blocks: Sequence[npt.NDArray[np.uint8]]) -> None:
        with self._device.active():
            ids = torch.tensor(list(block_ids), device=self._device.torch_device)
            caches = [cache.memory for cache in self._caches]
            check_blocks(len(block_ids), [cache.shape[1] for cache in caches], blocks)
            for cache, block in zip(caches, blocks, strict=True):
                cache[ids] = torch.from_numpy(np.ascontiguousarray(block)).to(cache.device)

    def _write_adapter(self, index: int, slot: int, parts: Sequence[AdapterPart]) -> None:
        with self._device.active():
            self._tables[index].write(slot, parts)

    def close(self) -> None:
        try:
            self._device.synchronize()
        finally:  # an error of the device must not keep its memory
            self._graphs = None
            for held in (self._flights, self._launches, self._tables, self._caches, self._landing, self._fetched_rows):
                held.clear()
            self._memory = None  # type: ignore[assignment]


def _last_rows(batch: Batch) -> dict[str, int]:
    """The last row of logits of each sequence that is sampled from."""
    return {s.request_id: end - 1 for s, _, end in rows_of_logits(batch) if s.sample is not None}


def _sampled_output(batch: Batch, words: npt.NDArray[np.int32], stats: StepStats) -> StepOutput:
    """What the device sampled. words [L, 2]: a token, and the bits of the largest logit, not finite in a broken row."""
    token_ids: list[int] = words[:, 0].tolist()
    peaks = words[:, 1].view(np.float32) if len(words) else np.zeros(0, np.float32)
    if np.isfinite(peaks).all() and all(s.num_logits == 1 for s in batch.sequences):  # as a rule
        return StepOutput(tuple([(SampledToken(token),) for token in token_ids]), stats)
    tokens: list[Sequence[SampledToken]] = []
    failures: dict[int, str] = {}
    for index, (sequence, start, end) in enumerate(rows_of_logits(batch)):
        tokens.append([SampledToken(token) for token in token_ids[start:end]])
        broken = ~np.isfinite(peaks[start:end])
        if broken.any():
            tokens[-1] = ()
            failures[index] = f"logits of request {sequence.request_id} have maximum {peaks[start:end][broken][0]}"
    return StepOutput(tuple(tokens), stats, failures)
