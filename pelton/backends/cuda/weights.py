"""Constants in device memory: sent tensor by tensor, quantized codes turned into floats on the device."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ...graph import BF16, F16, F32, DType, Graph, Node
from ...graph.quantized import CODE_VALUES, QuantizedArray
from ...program import Constant, ConstantRef, Program
from ...program.weights import Reader, evaluate, vector
from .memory import TORCH_TYPES

#: Of a piece of a tensor on its way: two of them are in flight.
_PIECE = 32 << 20
_PRODUCTS = ("linear", "gated_linear")


def compute_type(graph: Graph) -> DType:
    """The type that products run in: float32 where all matrices are, else the 16-bit type of most of them.

    Quantized matrices are turned into bfloat16.
    """
    matrices = [n.tensor for n in graph.leaves("weight") if len(n.tensor.shape) > 1]
    sizes = dict.fromkeys((F32, F16, BF16), 0)
    for tensor in matrices:
        dtype = tensor.dtype if isinstance(tensor.dtype, DType) else BF16
        sizes[dtype] += int(tensor.shape[0]) * int(tensor.shape[1])
    narrow = max((F16, BF16), key=lambda d: sizes[d])
    return narrow if sizes[narrow] else F32


def device_types(program: Program, compute: DType) -> list[DType]:
    """What each constant is stored in: matrices, and what products add, as products need them; all else float32."""
    added = {
        operand.index
        for call in program.calls
        for operand in call.operands[2:]
        if call.kernel in _PRODUCTS and isinstance(operand, ConstantRef)
    }

    def type_of(index: int, constant: Constant) -> DType:
        if constant.expr is None or (constant.packing == "vector" and index not in added):
            return F32
        if constant.packing == "vector":
            return compute
        return F32 if constant.expr.tensor.dtype == F32 else compute

    return [type_of(i, c) for i, c in enumerate(program.constants)]


def shape_of(constant: Constant) -> tuple[int, ...]:
    attrs = dict(constant.attrs)
    if constant.expr is not None:
        return tuple(int(d) for d in constant.expr.tensor.shape)
    return (attrs["positions"], attrs["rotary_dim"]) if constant.packing == "rope" else (attrs["num_heads"],)


def distinct(program: Program, types: list[DType]) -> dict[tuple[Any, ...], list[int]]:
    """Constants that are the same data, such as an output layer tied to the table of embeddings: kept once."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, constant in enumerate(program.constants):
        key = (constant.expr or (constant.packing, constant.attrs), types[index])
        groups.setdefault(key, []).append(index)
    return groups


def device_bytes(program: Program, compute: DType) -> int:
    """Of all constants."""
    types = device_types(program, compute)
    first = [indices[0] for indices in distinct(program, types).values()]
    return sum(math.prod(shape_of(program.constants[i])) * types[i].bits // 8 for i in first)


def load(
    program: Program, compute: DType, read: Reader, device: torch.device, on_sent: Callable[[int], None]
) -> list[torch.Tensor]:
    """All constants on the device, by number. on_sent: called with the bytes of each that is there."""
    types = device_types(program, compute)
    sender = _Sender(device)
    loaded: dict[int, torch.Tensor] = {}
    for indices in distinct(program, types).values():
        constant, dtype = program.constants[indices[0]], TORCH_TYPES[types[indices[0]]]
        tensor = torch.empty(shape_of(constant), dtype=dtype, device=device)
        if constant.expr is None:
            sender.send(vector(constant, read), tensor)
        else:
            for expr, part in _parts(constant.expr, tensor):
                value = evaluate(expr, read)
                if isinstance(value, QuantizedArray):
                    sender.dequantize(value, part)
                else:
                    sender.send(value, part)
        loaded |= dict.fromkeys(indices, tensor)
        on_sent(tensor.nbytes)
    sender.wait()
    return [loaded[i] for i in range(len(program.constants))]


def _parts(expr: Node, tensor: torch.Tensor) -> Iterator[tuple[Node, torch.Tensor]]:
    """Stacked matrices apart: each is sent to its rows, and never lies on the host beside the others."""
    if expr.op != "concat":
        yield expr, tensor
        return
    row = 0
    for part in expr.inputs:
        rows = int(part.tensor.shape[0])
        yield from _parts(part, tensor[row : row + rows])
        row += rows


class _Sender:
    """Copies from the host in pieces: while one is on its way from pinned memory, the next is read from the file."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_cuda = device.type == "cuda"
        self._turn = 0
        if self._is_cuda:
            self._pinned = [torch.empty(_PIECE, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
            self._done = [torch.cuda.Event() for _ in range(2)]

    def send(self, value: npt.NDArray[Any], to: torch.Tensor) -> None:
        """Copy an array of any float type; ``to`` has its shape, is contiguous, and may have another type."""
        source = _as_tensor(value)
        if source.dtype != to.dtype and self._is_cuda:
            staged = torch.empty(source.shape, dtype=source.dtype, device=self._device)
            self.send(value, staged)
            to.copy_(staged)
        elif self._is_cuda:
            self._send_bytes(source.reshape(-1).view(torch.uint8), to.view(-1).view(torch.uint8))
        else:
            to.copy_(source)

    def _send_bytes(self, source: torch.Tensor, to: torch.Tensor) -> None:
        for start in range(0, len(source), _PIECE):
            piece = source[start : start + _PIECE]
            pinned, done = self._pinned[self._turn][: len(piece)], self._done[self._turn]
            done.synchronize()  # what was sent from here before
            pinned.copy_(piece)
            to[start : start + len(piece)].copy_(pinned, non_blocking=True)
            done.record()
            self._turn = 1 - self._turn

    def dequantize(self, value: QuantizedArray, to: torch.Tensor) -> None:
        """As :meth:`QuantizedArray.dequantize`, some rows at a time, then rounded to the type of ``to``."""
        rows, cols = value.shape
        step = max(1, _PIECE // (8 * cols))  # codes, and the floats they become, beside each other
        for first in range(0, rows, step):
            some = value[first : first + step]
            to[first : first + step].copy_(self._floats(some))

    def _floats(self, value: QuantizedArray) -> torch.Tensor:
        rows, cols = value.shape
        type = value.type
        codes, scale = self._there(value.codes), self._there(value.scales())[:, :, None]
        if type.floating:
            numbers = self._there(CODE_VALUES[type.bits])[codes.long()]
            return (numbers.view(rows, scale.shape[1], -1) * scale).view(rows, cols)
        numbers = codes.view(rows, scale.shape[1], -1).float()
        if type.minimum:
            minima = value.minima()
            assert minima is not None
            return (numbers * scale + self._there(minima)[:, :, None]).view(rows, cols)
        zero = type.offset if value.minimum is None else self._there(value.minimum)[:, :, None].float()
        return ((numbers - zero) * scale).view(rows, cols)

    def _there(self, value: npt.NDArray[Any]) -> torch.Tensor:
        source = _as_tensor(value)
        tensor = torch.empty(source.shape, dtype=source.dtype, device=self._device)
        self.send(value, tensor)
        return tensor

    def wait(self) -> None:
        if self._is_cuda:
            torch.cuda.current_stream(self._device).synchronize()


def _as_tensor(value: npt.NDArray[Any]) -> torch.Tensor:
    """The same memory; bfloat16, which NumPy has from ``ml_dtypes``, as torch's."""
    array = np.ascontiguousarray(value)
    is_bf16 = array.dtype.name == "bfloat16"
    with warnings.catch_warnings():  # of mapped files: nobody writes to the tensor
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        tensor = torch.from_numpy(array.view(np.int16) if is_bf16 else array)
    return tensor.view(torch.bfloat16) if is_bf16 else tensor
