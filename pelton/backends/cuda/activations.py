"""What meets quantized weights: activations as codes, made by the kernels that compute them where that is possible."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from ...graph import E4M3, I8, DType, GroupQuant
from ...program import Call, ConstantRef, Program, View
from .stored import PRODUCTS, device_types, product_operands, shape_of
from .triton.quantize import supports_groups

#: Kernels that can quantize what they write: the index of that output.
_PRODUCERS = {
    "rms_norm": 0, "layer_norm": 0, "add_rms_norm": 1, "add_layer_norm": 1, "activation": 0, "gated_activation": 0,
}  # fmt: skip
#: Columns of a product of 8-bit numbers on tensor cores.
_LEAST_GROUP = 32


@dataclass(frozen=True, slots=True)
class Activations:
    """Codes, and how many columns of a row share a scale; ROW: all of them."""

    codes: DType
    group_size: int

    def groups(self, cols: int) -> int:
        return cols // (self.group_size or cols)


@dataclass(frozen=True)
class Numerics:
    """In what types a program's products run.

    compute: of floats. activations: by the number of a quantized weight that meets codes. quantized: by the number of a
    buffer that holds codes.
    """

    compute: DType
    activations: Mapping[int, Activations]
    quantized: Mapping[int, Activations]

    @classmethod
    def of(cls, program: Program, compute: DType, choice: str, fp8_products: bool) -> Numerics:
        """choice: ``EngineConfig.product_activations``. fp8_products: the device has them."""
        types = device_types(program, compute)
        found = {
            index: activations_of(type, choice, fp8_products)
            for index, type in enumerate(types)
            if isinstance(type, GroupQuant) and program.constants[index].packing == "panels"
        }
        activations = {index: one for index, one in found.items() if one is not None}
        return cls(compute, activations, quantized_buffers(program, activations))

    def precision(self, weight: int) -> str:
        """What the product with a weight is counted as: "bf16", "fp8", "int8" ..."""
        wanted = self.activations.get(weight)
        return self.compute.name if wanted is None else "fp8" if wanted.codes == E4M3 else "int8"

    def main_precision(self, program: Program) -> str:
        """Of most products."""
        work: Counter[str] = Counter()
        for call in program.calls:
            if call.kernel in PRODUCTS:
                _, weight = product_operands(call)
                rows, cols = shape_of(program.constants[weight.index])
                work[self.precision(weight.index)] += rows * cols
        return max(work, key=lambda name: work[name], default=self.compute.name)


def activations_of(type: GroupQuant, choice: str, fp8_products: bool) -> Activations | None:
    """What weights of a type are multiplied with; None: floats. Scales are shared by as many columns as the weight's.

    choice: ``EngineConfig.product_activations``; "auto" is floats beside integers, codes beside FP8. fp8_products:
    the device has them.
    """
    if choice == "float" or (type.group_size and type.group_size % _LEAST_GROUP):
        return None
    if type.floating:
        return Activations(E4M3, type.group_size) if type.bits == 8 and fp8_products else None
    return Activations(I8, type.group_size) if choice == "int8" else None


def quantized_buffers(program: Program, of_weight: Mapping[int, Activations]) -> dict[int, Activations]:
    """Buffers that hold codes instead of floats, as nobody but products that want the same codes reads them.

    of_weight: by the number of a constant.
    """
    readers: dict[int, list[tuple[Call, View]]] = {}
    for call in program.calls:
        for operand in call.operands:
            if isinstance(operand, View):
                readers.setdefault(operand.buffer, []).append((call, operand))
    found = {}
    for call in program.calls:
        if call.kernel not in _PRODUCERS:
            continue
        out = call.outputs[_PRODUCERS[call.kernel]]
        wanted = {_wanted(program, reader, view, out, of_weight) for reader, view in readers.get(out.buffer, ())}
        one = wanted.pop() if len(wanted) == 1 else None
        if one is None or out.buffer == program.hidden.buffer or _by_heads(program, call, out):
            continue
        if supports_groups(out.cols, one.groups(out.cols)):
            found[out.buffer] = one
    return found


def _wanted(
    program: Program, reader: Call, view: View, out: View, of_weight: Mapping[int, Activations]
) -> Activations | None:
    if reader.kernel not in PRODUCTS or view != out:
        return None
    if program.rows_of(reader) != program.buffers[out.buffer].rows:  # it reads some of the rows
        return None
    return of_weight.get(product_operands(reader)[1].index)


def _by_heads(program: Program, call: Call, out: View) -> bool:
    """Whether a norm takes parts of a row by themselves."""
    weight = next((o for o in call.operands if isinstance(o, ConstantRef)), None)
    expr = None if weight is None else program.constants[weight.index].expr
    return expr is not None and int(expr.tensor.shape[0]) != out.cols
