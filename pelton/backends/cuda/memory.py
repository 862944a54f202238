"""The device memory that steps work in, apart from constants and KV caches: sized once, for the largest step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch

from ...graph import BF16, E4M3, F16, F32, I8, DType
from ...program import CacheRef, Call, Program, View
from ..step_inputs import Ints
from .activations import Activations, Numerics
from .device import Device
from .inputs import DeviceInputs, Sizes
from .stored import PRODUCTS, product_operands
from .triton.attention import choose_splits, decode_workspace_size, prefill_tiles
from .triton.quantize import Codes
from .triton.sampling import scratch_words

TORCH_TYPES: dict[DType, torch.dtype] = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}
#: Quantized activations.
CODE_TYPES: dict[DType, torch.dtype] = {I8: torch.int8, E4M3: torch.float8_e4m3fn}
#: Elements of KV caches; codes of FP8 are known to kernels as uint8.
CACHE_TYPES: dict[DType, torch.dtype] = {**TORCH_TYPES, I8: torch.int8, E4M3: torch.uint8}

#: Address, type, columns, distance of rows, and the step dimension that counts the rows.
_Place: TypeAlias = "tuple[int, torch.dtype, int, int, str]"


class Rows(NamedTuple):
    """A view, and the step dimension that its rows count: that of the call that reads it, or fewer of its buffer."""

    view: View
    dim: str


def rows_of(program: Program, call: Call, view: View) -> Rows:
    """What a call reads or writes of a view. Rows are its own, but where it selects some."""
    own = program.buffers[view.buffer].rows
    return Rows(view, own if call.kernel == "take_rows" and view in call.operands else program.rows_of(call))


@dataclass(frozen=True, slots=True)
class Frame:
    """All that the calls of a step read and write but constants and caches.

    tensors: [rows of the step, columns]. codes: in place of tensors, what lies quantized where these would. num_splits:
    of the KV cache of each decoding sequence.
    """

    sizes: Sizes
    tensors: Mapping[Rows, torch.Tensor]
    codes: Mapping[Rows, Codes]
    inputs: Mapping[str, torch.Tensor]
    num_splits: int

    def written(self, rows: Rows) -> torch.Tensor | Codes:
        """What a kernel that can quantize writes there."""
        return self.codes.get(rows) or self.tensors[rows]


@dataclass(frozen=True, slots=True)
class CodeMemory:
    """uint8, flat: room for quantized rows."""

    memory: torch.Tensor

    @staticmethod
    def size(wanted: Activations, rows: int, cols: int) -> int:
        """Bytes of so many rows."""
        return -(-rows * cols // 16) * 16 + 4 * wanted.groups(cols) * _whole(rows)

    def of(self, wanted: Activations, rows: int, cols: int) -> Codes:
        """Of equal sizes it is the same memory."""
        groups, split = wanted.groups(cols), -(-rows * cols // 16) * 16
        codes = self.memory[: rows * cols].view(CODE_TYPES[wanted.codes]).view(rows, cols)
        scales = self.memory[split : split + 4 * groups * _whole(rows)].view(torch.float32)
        return Codes(codes, scales.view(groups, _whole(rows))[:, :rows])


def code_bytes(program: Program, numerics: Numerics) -> int:
    """Of the :class:`CodeMemory` that activations need which no kernel writes as codes."""
    sizes = [0]
    for call in program.calls:
        if call.kernel in PRODUCTS:
            x, weight = product_operands(call)
            wanted = numerics.activations.get(weight.index)
            if wanted is not None and x.buffer not in numerics.quantized:
                sizes.append(CodeMemory.size(wanted, program.limits[program.rows_of(call)], x.cols))
    return max(sizes)


def _whole(rows: int) -> int:
    """Scales of a group: rows of them begin at multiples of 16 bytes, as cuBLASLt and DeepGEMM ask for."""
    return -(-rows // 4) * 4


@dataclass(frozen=True, slots=True)
class Heads:
    """Of the attention layers, which are alike in this."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    cache_dtype: DType
    q_dtype: DType

    @classmethod
    def of(cls, program: Program) -> Heads:
        """
        Raises:
            ValueError: layers differ, so that one list of tiles does not serve all.
        """
        found = set()
        for call in program.calls:
            if call.kernel == "attention":
                cache = program.caches[next(o.index for o in call.operands if isinstance(o, CacheRef))]
                q = next(program.buffers[o.buffer].dtype for o in call.operands if isinstance(o, View))
                found.add(cls(call.params["num_heads"], cache.num_kv_heads, cache.head_dim, cache.dtype, q))
        if len(found) > 1:
            raise ValueError("attention layers of different shapes")
        return found.pop() if found else cls(1, 1, 1, F32, F32)

    def tiles(self, query_lens: Sequence[int], seq_lens: Sequence[int]) -> Ints:
        """The pieces that prefill attention works on."""
        group = self.num_heads // self.num_kv_heads
        types = CACHE_TYPES[self.cache_dtype], TORCH_TYPES[self.q_dtype]
        return prefill_tiles(query_lens, seq_lens, group, self.head_dim, *types)


def memory_bytes(program: Program, numerics: Numerics) -> int:
    """Of a :class:`StepMemory` and of codes, but for inputs and partial results of attention, which are small."""
    sampling = 8 * scratch_words(program.limits["L"], program.output.cols)
    return program.arena_bytes + sampling + code_bytes(program, numerics)


class StepMemory:
    """Inputs, the program's buffers in one arena, and what kernels need besides.

    max_blocks: of a sequence, of ``block_size`` tokens each. quantized: by the number of a buffer, the codes in it.
    """

    def __init__(
        self,
        program: Program,
        device: Device,
        max_blocks: int,
        block_size: int,
        quantized: Mapping[int, Activations],
    ) -> None:
        self.heads = Heads.of(program)
        self._program = program
        self._num_sms = device.num_sms
        self._max_seq_len = max_blocks * block_size
        self._quantized = quantized
        limits, on = program.limits, device.torch_device
        tokens, sequences, rows, logits = (limits[dim] for dim in "TSNL")
        # A tile has at least one token.
        most = Sizes(tokens, sequences, rows, logits, sequences, tokens)
        self.inputs = DeviceInputs(on, most, sequences * max_blocks)
        self._arena = torch.zeros(max(program.arena_bytes, 1), dtype=torch.uint8, device=on)
        #: Layers work in the same places of the arena, one after the other: a place has one tensor in a frame.
        self._places: dict[_Place, torch.Tensor] = {}
        self._place_of: dict[Rows, _Place] = {}
        for call in program.calls:
            for view in (*call.outputs, *call.operands):
                if isinstance(view, View):
                    key, whole = rows_of(program, call, view), self._buffer(view)
                    place = (whole.data_ptr(), whole.dtype, whole.shape[1], whole.stride(0), key.dim)
                    self._place_of[key] = place
                    self._places.setdefault(place, whole)
        self.workspace = torch.empty(self._workspace_size(sequences), dtype=torch.float32, device=on)
        #: Per row of logits: the token, and the bits of the largest logit.
        self.sampled = torch.zeros(logits, 2, dtype=torch.int32, device=on)
        self.scratch = torch.empty(scratch_words(logits, program.output.cols), dtype=torch.int64, device=on)

    def _memory(self, index: int) -> torch.Tensor:
        """A buffer's bytes."""
        buffer = self._program.buffers[index]
        size = self._program.limits[buffer.rows] * buffer.cols * buffer.dtype.bits // 8
        return self._arena[buffer.offset : buffer.offset + size]

    def _buffer(self, view: View) -> torch.Tensor:
        """A view as large as the largest step needs it."""
        buffer = self._program.buffers[view.buffer]
        whole = self._memory(view.buffer).view(TORCH_TYPES[buffer.dtype]).view(-1, buffer.cols)
        return whole[:, view.start : view.start + view.cols]

    def _num_splits(self, num_seqs: int) -> int:
        return choose_splits(num_seqs, self.heads.num_kv_heads, self._num_sms, self._max_seq_len)

    def _workspace_size(self, max_num_seqs: int) -> int:
        """Fewer sequences may need more, as they are split up further."""
        return max(
            decode_workspace_size(n, self.heads.num_heads, self.heads.head_dim, self._num_splits(n))
            for n in range(1, max_num_seqs + 1)
        )

    def frame(self, sizes: Sizes) -> Frame:
        """The memory of a step of this size. Of equal sizes it is the same memory."""
        parts = {place: whole[: sizes[place[-1]]] for place, whole in self._places.items()}
        tensors = {rows: parts[place] for rows, place in self._place_of.items()}
        made: dict[tuple[_Place, Activations], Codes] = {}
        codes = {}
        for rows, place in self._place_of.items():
            if (wanted := self._quantized.get(rows.view.buffer)) is not None:
                if (place, wanted) not in made:
                    memory = CodeMemory(self._memory(rows.view.buffer))
                    made[place, wanted] = memory.of(wanted, sizes[rows.dim], rows.view.cols)
                codes[rows] = made[place, wanted]
        return Frame(sizes, tensors, codes, self.inputs.views(sizes), self._num_splits(max(sizes.decodes, 1)))

    def first(self, view: View, count: int) -> torch.Tensor:
        """The first rows of a view."""
        return self._buffer(view)[:count]
