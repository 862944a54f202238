"""Constants in device memory: sent tensor by tensor, quantized codes packed on the device."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from ...graph import DType, GroupQuant, Node
from ...graph.quantized import CODE_VALUES, QuantizedArray
from ...graph.types import ElementType
from ...program import Constant, Program
from ...program.weights import Reader, evaluate, vector
from . import packing
from .memory import TORCH_TYPES
from .packing import PackedWeight
from .stored import device_types, distinct, shape_of

#: Of a piece of a tensor on its way: two of them are in flight.
_PIECE = 32 << 20

#: A constant on the device.
Held: TypeAlias = "torch.Tensor | PackedWeight"


def load(
    program: Program, compute: DType, read: Reader, device: torch.device, on_sent: Callable[[int], None]
) -> list[Held]:
    """All constants on the device, by number. on_sent: called with the bytes of each that is there."""
    types = device_types(program, compute)
    sender = _Sender(device)
    loaded: dict[int, Held] = {}
    for indices in distinct(program, types).values():
        constant, type = program.constants[indices[0]], types[indices[0]]
        held = _load(constant, type, read, sender, device)
        loaded |= dict.fromkeys(indices, held)
        on_sent(held.nbytes)
    sender.wait()
    return [loaded[i] for i in range(len(program.constants))]


def _load(constant: Constant, type: ElementType, read: Reader, sender: _Sender, device: torch.device) -> Held:
    if isinstance(type, GroupQuant):
        assert constant.expr is not None
        rows, cols = shape_of(constant)
        packed = packing.empty(type, rows, cols, device)
        for expr, first in _parts(constant.expr):
            codes = evaluate(expr, read)
            assert isinstance(codes, QuantizedArray)
            sender.pack(codes, packed, first)
        return packed
    tensor = torch.empty(shape_of(constant), dtype=TORCH_TYPES[type], device=device)
    if constant.expr is None:
        sender.send(vector(constant, read), tensor)
        return tensor
    for expr, first in _parts(constant.expr):
        value, to = evaluate(expr, read), tensor[first : first + int(expr.tensor.shape[0])]
        if isinstance(value, QuantizedArray):
            sender.dequantize(value, to)
        else:
            sender.send(value, to)
    return tensor


def _parts(expr: Node, first: int = 0) -> Iterator[tuple[Node, int]]:
    """Stacked matrices apart, with their first row: none lies on the host beside the others."""
    if expr.op != "concat":
        yield expr, first
        return
    for part in expr.inputs:
        yield from _parts(part, first)
        first += int(part.tensor.shape[0])


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

    def pack(self, value: QuantizedArray, to: PackedWeight, first: int) -> None:
        """Codes and scales become rows ``first`` and up, some at a time."""
        rows, cols = value.shape
        step = max(1, _PIECE // (4 * cols))  # codes, and what packing makes of them on its way
        for row in range(0, rows, step):
            parts = [None if part is None else self._there(part) for part in value[row : row + step].parts()]
            packing.write(to, first + row, *parts)

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
    """The same memory; bfloat16, which NumPy has from ``ml_dtypes``, as torch's, types of 8 bits as bytes."""
    array = np.ascontiguousarray(value)
    is_bf16 = array.dtype.name == "bfloat16"
    if is_bf16:
        array = array.view(np.int16)
    elif array.dtype.name.startswith("float8"):
        array = array.view(np.uint8)
    with warnings.catch_warnings():  # of mapped files: nobody writes to the tensor
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if is_bf16 else tensor
