"""Which type a weight gets by ``EngineConfig.quantization``: one row per choice."""

from __future__ import annotations

from dataclasses import replace

from ..graph.types import E4M3, F16, ROW, GroupQuant

#: Groups, so that int8 activations share their scales among few: one per row would cost more than the weights do.
_INT8 = GroupQuant(8, 32, scale=F16)
_CHANNEL = GroupQuant(8, ROW)

#: choice -> type of the layers' weights. The output layer is int8 in all of them, see docs/quantization.md.
_RECIPES: dict[str, GroupQuant] = {
    "int8": _INT8,
    "int4": GroupQuant(4, 32, minimum=True, scale=F16),
    "fp8": GroupQuant(8, ROW, floating=True),
    "nvfp4": GroupQuant(4, 16, scale=E4M3, floating=True, outer=ROW),
    "w8a8": _CHANNEL,  # beside activations with one scale per token: whole rows of exact integers
}
QUANTIZATIONS = tuple(_RECIPES)
#: Smaller groups cost more in scales than they gain, and kernels take inputs in eights.
_LEAST_GROUP = 8


def weight_type(quantization: str, *, head: bool = False) -> GroupQuant:
    """The type that a choice means. head: for the layer that makes logits, which takes errors worst."""
    return _INT8 if head else _RECIPES[quantization]


def fitting(type: GroupQuant, cols: int) -> GroupQuant:
    """``type``, or what comes closest to it for rows of ``cols`` that are no whole groups.

    Integers get the largest smaller group that divides the row, anything else becomes int8, per channel where need be.
    """
    size = type.group_size
    if not size or cols % size == 0:
        return type
    while not type.floating and size >= _LEAST_GROUP:
        if cols % size == 0:
            return replace(type, group_size=size)
        size //= 2
    return _CHANNEL if type == _INT8 else fitting(_INT8, cols)
