"""Quantized Hugging Face checkpoints: one row per ``quant_method``, one weight of a GroupQuant type per layer.

A quantized layer is stored as several tensors (codes, scales, zero points). They become the one tensor that the
model asks for, ``<layer>.weight``; nothing is read but the order of GPTQ's columns. A layer without scales beside
it is an ordinary one, so the lists of ignored layers need no reading.

Sources: the packing code of AutoGPTQ, AutoAWQ and compressed-tensors, the FP8 and MXFP4 integrations of
transformers, the OCP MX specification.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from ..errors import CheckpointError
from ..graph.quantized import SCALE_ARRAYS, Array, QuantizedArray
from ..graph.types import BF16, DTYPES, E4M3, E8M0, F32, ROW, DType, GroupQuant, TensorType
from .base import LazyTensor

_FLOATS = ("f32", "f16", "bf16")
#: Nibble i of a word of AWQ holds column _AWQ_ORDER[i] of eight.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
#: Scales of activations and of the KV cache: Pelton finds the former per token and keeps the latter in floats.
_ACTIVATION_SCALES = ("input_scale", "input_zero_point", "input_global_scale", "activation_scale", "output_scale")
_CACHE_SCALES = ("k_scale", "v_scale", "q_scale", "kv_scale")
#: Rows unpacked at a time by the general path, whose temporaries are 8 times the codes.
_CHUNK_ROWS = 256


@dataclass
class _Layer:
    """The stored tensors of one layer by the last part of their names."""

    name: str
    parts: Mapping[str, LazyTensor]
    options: Mapping[str, Any]
    notes: dict[str, None]

    def fail(self, cause: str, remedy: str = "config and weights do not belong together, or were damaged") -> NoReturn:
        raise CheckpointError(f"layer {self.name}: {cause}", remedy)

    def part(self, suffix: str, *dtypes: str) -> LazyTensor:
        tensor = self.parts.get(suffix)
        if tensor is None:
            self.fail(f"{suffix} is missing", "download the whole model repository")
        if str(tensor.type.dtype) not in dtypes:
            self.fail(f"{suffix} is of type {tensor.type.dtype}, expected {' or '.join(dtypes)}")
        return tensor

    def check_shape(self, tensor: LazyTensor, *allowed: tuple[int, ...]) -> None:
        if _shape(tensor) not in allowed:
            last = tensor.name.rpartition(".")[2]
            self.fail(
                f"{last} has shape {list(tensor.type.shape)}, expected {' or '.join(str(list(a)) for a in allowed)}"
            )

    def matrix(self, tensor: LazyTensor) -> tuple[int, int]:
        shape = _shape(tensor)
        if len(shape) != 2 or 0 in shape:
            self.fail(f"{tensor.name.rpartition('.')[2]} has shape {list(shape)}, expected a matrix")
        return shape[0], shape[1]

    def weight(self, shape: tuple[int, int], type: GroupQuant | DType, read: Callable[[], Any]) -> LazyTensor:
        size = sum(t.nbytes for t in self.parts.values())
        return LazyTensor(f"{self.name}.weight", TensorType(shape, type), read, size)

    def finish(
        self, type: GroupQuant, codes: Array, scale: Array, minimum: Array | None = None, outer: Array | None = None
    ) -> QuantizedArray:
        """The value, once it is known to be made of finite numbers."""
        if type.floating and type.bits == 8 and bool(((codes & np.uint8(0x7F)) == 0x7F).any()):
            self.fail("the FP8 weight holds NaN", "the model was damaged when it was quantized: use another one")
        for values in (scale, outer):
            if values is not None and not np.isfinite(values.astype(np.float32)).all():
                self.fail("scales are not finite", "the model was damaged when it was quantized: use another one")
        return QuantizedArray(codes, scale, minimum, type, outer)


@dataclass(frozen=True)
class _Grid:
    """One scale for each ``rows`` x ``cols`` elements of a matrix of ``shape``, spread out to groups along rows."""

    shape: tuple[int, int]
    rows: int
    cols: int

    @property
    def stored(self) -> tuple[int, int]:
        return -(-self.shape[0] // self.rows), -(-self.shape[1] // self.cols)

    @property
    def group_size(self) -> int:
        """The largest group that no border of the grid cuts: a ragged last column of it is no obstacle."""
        return ROW if self.cols >= self.shape[1] else math.gcd(self.cols, self.shape[1])

    def spread(self, values: Array) -> Array:
        """[stored] -> [rows, groups]."""
        rows = np.arange(self.shape[0]) // self.rows
        cols = np.arange(0, self.shape[1], self.group_size or self.shape[1]) // self.cols
        return np.ascontiguousarray(values.reshape(self.stored)[rows[:, None], cols[None, :]])


def convert_quantized(
    config: Mapping[str, Any], tensors: dict[str, LazyTensor]
) -> tuple[dict[str, LazyTensor], tuple[str, ...]]:
    """Tensors with one weight per quantized layer, and notes on what is done differently than the config says.

    tensors: as stored. A model that is not quantized comes back as it is.

    Raises:
        CheckpointError: an unknown method, an option of it that no GroupQuant holds, parts that are missing or
            contradict each other.
    """
    schemes = (config.get("quantization_config"), config.get("compression_config"))  # the latter is an old name
    scheme = next((s for s in schemes if s is not None), None)
    if scheme is None:
        codes = next((n for n in tensors if n.endswith((".qweight", ".weight_packed"))), None)
        if codes is not None:
            raise CheckpointError(
                f"tensor {codes} is quantized, but config.json has no quantization_config",
                "download config.json again, or use a repository that has it",
            )
        return tensors, ()
    if not isinstance(scheme, Mapping):
        raise CheckpointError("quantization_config in config.json is no object", "download it again")
    name = scheme.get("quant_method", "compressed-tensors" if "config_groups" in scheme else None)
    method = METHODS.get(name) if isinstance(name, str) else None
    if method is None:
        raise CheckpointError(
            f"quantization method {str(name)[:40]!r} is not supported",
            f"use a model in {', '.join(METHODS)}, or a GGUF file",
        )
    layers: dict[str, dict[str, LazyTensor]] = {}
    result: dict[str, LazyTensor] = {}
    notes: dict[str, None] = {}
    for full, tensor in tensors.items():
        base, suffix = method.split(full)
        if suffix in _CACHE_SCALES:
            notes["scales of the KV cache are not used: it is kept in floats"] = None
        elif suffix in method.suffixes or suffix in _ACTIVATION_SCALES:
            layers.setdefault(base, {})[suffix] = tensor
        else:
            result[full] = tensor
    for base, parts in layers.items():
        static = [s for s in _ACTIVATION_SCALES if parts.pop(s, None) is not None]
        if static:
            notes["stored scales of activations are not used: they are found as the model runs"] = None
        if set(parts) == {"weight"}:
            plain = parts["weight"]
            if str(plain.type.dtype) in ("f8_e4m3", "i8"):
                raise CheckpointError(f"layer {base}: its scales are missing", "download the whole model repository")
            result[plain.name] = plain
            continue
        if not parts:
            continue  # a layer that is not quantized, with scales of its activations
        weight = method.make(_Layer(base, parts, scheme, notes))
        result[weight.name] = weight
    return result, tuple(notes)


def zero_biases(tensors: Mapping[str, LazyTensor], used: set[str]) -> set[str]:
    """Biases of quantized layers that the model does not have: AutoGPTQ stores zeros there."""
    return {
        name
        for name, tensor in tensors.items()
        if name.endswith(".bias") and name not in used
        and (weight := tensors.get(f"{name.removesuffix('.bias')}.weight")) is not None
        and isinstance(weight.type.dtype, GroupQuant) and not np.any(np.asarray(tensor.read()))
    }  # fmt: skip


# ------------------------------------------------------------------ GPTQ and AWQ


def _gptq(layer: _Layer) -> LazyTensor:
    options = layer.options
    stored = options.get("checkpoint_format", "gptq")
    if stored not in ("gptq", "gptq_v2"):
        raise CheckpointError(f"GPTQ in the format {str(stored)[:40]!r} is not supported", "use gptq or gptq_v2")
    words, zeros = layer.part("qweight", "i32"), layer.part("qzeros", "i32")
    scales = layer.part("scales", *_FLOATS)
    word_rows, rows = layer.matrix(words)
    groups, width = layer.matrix(scales)
    bits = _integer(options, "bits", (2, 3, 4, 8))
    size = _integer(options, "group_size")
    if options.get("dynamic"):  # layers differ: what they are follows from their shapes
        bits = 32 * layer.matrix(zeros)[1] // rows
        size = -1 if groups == 1 else -(-32 * word_rows // (max(bits, 1) * groups))
    if bits not in (2, 3, 4, 8) or 32 * word_rows % bits:
        layer.fail(f"qweight of shape {list(words.type.shape)} holds no {bits}-bit codes")
    cols = 32 * word_rows // bits
    grid = _Grid((rows, cols), 1, cols if size == -1 else size)
    layer.check_shape(zeros, (groups, -(-rows * bits // 32)))
    layer.check_shape(scales, (grid.stored[1], rows))
    symmetric = bool(options.get("sym", True))
    order = _gptq_order(layer, grid)
    middle, added = 1 << (bits - 1), 0 if stored == "gptq_v2" else 1

    def parts() -> tuple[Array, Array, Array]:
        codes = unpack_bits(np.asarray(words.read()).T, bits, cols)
        # The first version of the format stores zero points less one.
        points = (unpack_bits(np.asarray(zeros.read()), bits, width) + np.uint8(added)) & np.uint8((1 << bits) - 1)
        if symmetric and np.any(points != middle):
            layer.fail("zero points are not symmetric, as the config says", 'set "sym": false in config.json')
        return codes, np.asarray(scales.read()).T, points.T

    if order is not None:

        def dense() -> Array:
            codes, scale, points = parts()
            values = codes.astype(np.float32) - points[:, order].astype(np.float32)
            return (values * scale[:, order].astype(np.float32)).astype(ml_dtypes.bfloat16)

        layer.notes["GPTQ layers whose columns were reordered (desc_act) run as bf16: their groups are scattered"] = (
            None
        )
        return layer.weight((rows, cols), BF16, dense)
    type = GroupQuant(bits, grid.group_size, scale=_scale_type(scales, grid), zero_point=not symmetric)

    def read() -> QuantizedArray:
        codes, scale, points = parts()
        return layer.finish(type, codes, _cast(grid.spread(scale), type), None if symmetric else grid.spread(points))

    return layer.weight((rows, cols), type, read)


def _gptq_order(layer: _Layer, grid: _Grid) -> Array | None:
    """int32 [cols], the group of each column, if they are not groups in a row."""
    tensor = layer.parts.get("g_idx")
    if tensor is None:
        return None
    layer.check_shape(layer.part("g_idx", "i32", "i64"), (grid.shape[1],))
    order: Array = np.asarray(tensor.read())
    if not ((order >= 0) & (order < grid.stored[1])).all():
        layer.fail("g_idx names groups that do not exist")
    return None if np.array_equal(order, np.arange(grid.shape[1]) // grid.cols) else order


def _awq(layer: _Layer) -> LazyTensor:
    options = layer.options
    version = str(options.get("version", "gemm")).lower()
    if version != "gemm" or str(options.get("backend", "autoawq")).lower() == "llm-awq":
        raise CheckpointError(
            f"AWQ in the layout {version[:40]!r} is not supported", 'use a model with "version": "gemm"'
        )
    bits = _integer(options, "bits" if "bits" in options else "w_bit", (4,))
    size = _integer(options, "group_size" if "group_size" in options else "q_group_size")
    words, zeros = layer.part("qweight", "i32"), layer.part("qzeros", "i32")
    scales = layer.part("scales", *_FLOATS)
    cols, word_cols = layer.matrix(words)
    rows = 8 * word_cols
    grid = _Grid((rows, cols), 1, cols if size == -1 else size)
    layer.check_shape(scales, (grid.stored[1], rows))
    layer.check_shape(zeros, (grid.stored[1], word_cols))
    type = GroupQuant(bits, grid.group_size, scale=_scale_type(scales, grid), zero_point=True)

    def codes_of(tensor: LazyTensor) -> Array:
        packed = np.ascontiguousarray(np.asarray(tensor.read()).view(np.uint32).T)
        codes = np.empty((rows, packed.shape[1]), np.uint8)
        for nibble, column in enumerate(_AWQ_ORDER):
            codes[column::8] = (packed >> np.uint32(4 * nibble)) & np.uint32(15)
        return codes

    def read() -> QuantizedArray:
        scale = grid.spread(np.asarray(scales.read()).T)
        return layer.finish(type, codes_of(words), _cast(scale, type), grid.spread(codes_of(zeros)))

    return layer.weight((rows, cols), type, read)


# ------------------------------------------------------------------ compressed-tensors


def _compressed(layer: _Layer) -> LazyTensor:
    scheme = _layer_scheme(layer)
    weights = scheme.get("weights")
    if not isinstance(weights, Mapping):
        layer.fail("the config does not say how its weights are quantized")
    kind, bits = weights.get("type", "int"), _integer(weights, "num_bits", range(2, 9))
    if "weight_packed" in layer.parts:
        if kind == "float":
            return _packed_floats(layer, weights, bits)
        return _packed_integers(layer, weights, bits)
    tensor = layer.part("weight", "f8_e4m3" if kind == "float" else "i8")
    if kind == "float":
        if bits != 8:
            layer.fail(f"{bits}-bit floats are not stored one by one")
        mx = str(layer.part("weight_scale", "u8", *_FLOATS).type.dtype) == "u8"
        return _fp8(layer, tensor, "weight_scale", _weights_grid(layer, weights, layer.matrix(tensor)), mx)
    return _plain_integers(layer, tensor, weights, bits)


def _layer_scheme(layer: _Layer) -> Mapping[str, Any]:
    """The config group of a layer: one that names it, else the one for all layers of the class Linear."""
    options = layer.options
    sparsity = options.get("sparsity_config")
    formats = [options.get("format"), sparsity.get("format") if isinstance(sparsity, Mapping) else None]
    groups = options.get("config_groups")
    if not isinstance(groups, Mapping) or not all(isinstance(g, Mapping) for g in groups.values()):
        raise CheckpointError("quantization_config has no config_groups", "download config.json again")
    formats += [g.get("format") for g in groups.values()]
    for name in formats:
        if name is not None and name not in _COMPRESSED_FORMATS:
            raise CheckpointError(
                f"compressed-tensors in the format {str(name)[:40]!r} is not supported",
                f"use one of {', '.join(_COMPRESSED_FORMATS)}",
            )
    general: Mapping[str, Any] | None = None
    for group in groups.values():
        targets = group.get("targets")
        for target in targets if isinstance(targets, list) else ():
            if target == "Linear":
                general = group
            elif _names(target, layer.name):
                return group  # type: ignore[no-any-return]
    if general is None:
        layer.fail("is quantized, but no config group targets it")
    return general


_COMPRESSED_FORMATS = (
    "dense", "int-quantized", "float-quantized", "naive-quantized", "pack-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized", "mxfp8-quantized", "mixed-precision",
)  # fmt: skip


def _names(target: Any, layer: str) -> bool:
    if not isinstance(target, str):
        return False
    if not target.startswith("re:"):
        return target == layer
    try:
        return re.match(target[3:], layer) is not None
    except re.error as error:
        raise CheckpointError(
            f"target {target[:60]!r} is no regular expression ({error})", "check config.json"
        ) from None


def _weights_grid(layer: _Layer, weights: Mapping[str, Any], shape: tuple[int, int]) -> _Grid:
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "tensor")
    if strategy == "tensor":
        return _Grid(shape, *shape)
    if strategy == "channel":
        return _Grid(shape, 1, shape[1])
    if strategy in ("group", "tensor_group"):
        return _Grid(shape, 1, _integer(weights, "group_size", range(1, 1 << 20)))
    if strategy == "block":
        return _Grid(shape, *_block(weights.get("block_structure")))
    layer.fail(f"the strategy {str(strategy)[:40]!r} is not supported", "use tensor, channel, group or block")


def _scale_shapes(grid: _Grid) -> tuple[tuple[int, ...], ...]:
    rows, cols = grid.stored
    return ((rows, cols), *(((rows,),) if cols == 1 else ()), *(((),) if rows == cols == 1 else ()))


def _packed_integers(layer: _Layer, weights: Mapping[str, Any], bits: int) -> LazyTensor:
    words, sizes = layer.part("weight_packed", "i32"), layer.part("weight_shape", "i64", "i32")
    layer.check_shape(sizes, (2,))
    rows, cols = (int(n) for n in np.asarray(sizes.read()))
    layer.check_shape(words, (rows, -(-cols * bits // 32)))
    if rows < 1 or cols < 1:
        layer.fail(f"weight_shape is [{rows}, {cols}]")
    scales = layer.part("weight_scale", *_FLOATS)
    grid = _weights_grid(layer, weights, (rows, cols))
    layer.check_shape(scales, *_scale_shapes(grid))
    order = layer.parts.get("weight_g_idx")
    if order is not None and not np.array_equal(np.asarray(order.read()), np.arange(cols) // grid.cols):
        layer.fail("its columns were reordered (actorder: group), so its groups are scattered", "use actorder: static")
    symmetric = bool(weights.get("symmetric", True))
    type = GroupQuant(bits, grid.group_size, scale=_scale_type(scales, grid), zero_point=not symmetric)
    zeros = None if symmetric else layer.part("weight_zero_point", "i32")
    if zeros is not None:  # packed along the rows
        layer.check_shape(zeros, (-(-grid.stored[0] * bits // 32), grid.stored[1]))

    def read() -> QuantizedArray:
        codes = unpack_bits(np.asarray(words.read()), bits, cols)
        points = None
        if zeros is not None:
            points = grid.spread(unpack_bits(np.asarray(zeros.read()).T, bits, grid.stored[0]).T)
        return layer.finish(type, codes, _cast(grid.spread(np.asarray(scales.read())), type), points)

    return layer.weight((rows, cols), type, read)


def _plain_integers(layer: _Layer, tensor: LazyTensor, weights: Mapping[str, Any], bits: int) -> LazyTensor:
    shape = layer.matrix(tensor)
    scales = layer.part("weight_scale", *_FLOATS)
    grid = _weights_grid(layer, weights, shape)
    layer.check_shape(scales, *_scale_shapes(grid))
    symmetric = bool(weights.get("symmetric", True))
    type = GroupQuant(bits, grid.group_size, scale=_scale_type(scales, grid), zero_point=not symmetric)
    zeros = None if symmetric else layer.part("weight_zero_point", "i8")
    if zeros is not None:
        layer.check_shape(zeros, *_scale_shapes(grid))

    def codes_of(stored: LazyTensor) -> Array:
        values: Array = np.asarray(stored.read())
        half = 1 << (bits - 1)
        if bits < 8 and not ((values >= -half) & (values < half)).all():
            layer.fail(f"{stored.name.rpartition('.')[2]} holds values outside of {bits} bits")
        return values.view(np.uint8) + np.uint8(half)  # wraps: -half becomes 0

    def read() -> QuantizedArray:
        scale = _cast(grid.spread(np.asarray(scales.read())), type)
        return layer.finish(type, codes_of(tensor), scale, None if zeros is None else grid.spread(codes_of(zeros)))

    return layer.weight(shape, type, read)


def _packed_floats(layer: _Layer, weights: Mapping[str, Any], bits: int) -> LazyTensor:
    """NVFP4 and MXFP4."""
    words = layer.part("weight_packed", "u8")
    rows, half = layer.matrix(words)
    if bits != 4:
        layer.fail(f"packed floats of {bits} bits are not supported", "use NVFP4 or MXFP4")
    grid = _Grid((rows, 2 * half), 1, _integer(weights, "group_size", (16, 32)))
    if grid.cols == 16:
        scales = layer.part("weight_scale", "f8_e4m3")
        factor = layer.part("weight_global_scale", "f32")
        layer.check_shape(factor, (1,), ())
    else:
        scales, factor = layer.part("weight_scale", "u8", "f8_e8m0"), None
    layer.check_shape(scales, grid.stored)
    type = GroupQuant(4, grid.group_size, scale=E4M3, floating=True, outer=ROW) if factor else _mx(4, grid)

    def read() -> QuantizedArray:
        scale = grid.spread(np.asarray(scales.read()).view(SCALE_ARRAYS[type.scale]))
        outer = None
        if factor is not None:  # what the weights were multiplied by before they were rounded
            value = np.float32(np.asarray(factor.read()).reshape(-1)[0])
            if not value > 0:
                layer.fail(f"weight_global_scale is {value}")
            outer = np.full((rows, 1), np.float32(1) / value, np.float32)
        return layer.finish(type, unpack_bits(np.asarray(words.read()), 4, 2 * half), scale, None, outer)

    return layer.weight((rows, 2 * half), type, read)


# ------------------------------------------------------------------ FP8 and MXFP4


def _mx(bits: int, grid: _Grid) -> GroupQuant:
    return GroupQuant(bits, grid.group_size, scale=E8M0, floating=True)


def _fp8(layer: _Layer, tensor: LazyTensor, suffix: str, grid: _Grid, mx: bool = False) -> LazyTensor:
    scales = layer.part(suffix, *(("u8",) if mx else (*_FLOATS, "f8_e8m0")))
    layer.check_shape(scales, *_scale_shapes(grid))
    type = _mx(8, grid) if mx else GroupQuant(8, grid.group_size, scale=F32, floating=True)

    def read() -> QuantizedArray:
        scale: Array = np.asarray(scales.read())
        scale = grid.spread(scale.view(SCALE_ARRAYS[E8M0])) if mx else _cast(grid.spread(scale), type)
        return layer.finish(type, np.asarray(tensor.read()).view(np.uint8), scale)

    return layer.weight(grid.shape, type, read)


def _fine_grained_fp8(layer: _Layer) -> LazyTensor:
    options = layer.options
    if options.get("fmt", "e4m3") != "e4m3":
        layer.fail(f"FP8 of the kind {str(options.get('fmt'))[:40]!r} is not supported", "use e4m3")
    tensor = layer.part("weight", "f8_e4m3")
    shape = layer.matrix(tensor)
    # The names differ by writer, the meaning does not: weight = codes * scale.
    suffix = "weight_scale_inv" if "weight_scale_inv" in layer.parts else "weight_scale"
    stored = _shape(layer.part(suffix, *_FLOATS, "f8_e8m0"))
    if options.get("weight_block_size") is not None:
        grid = _Grid(shape, *_block(options["weight_block_size"]))
    else:
        grid = _Grid(shape, *(shape if math.prod(stored) == 1 else (1, shape[1])))
    return _fp8(layer, tensor, suffix, grid)


def _mxfp4(layer: _Layer) -> LazyTensor:
    blocks, scales = layer.part("blocks", "u8"), layer.part("scales", "u8", "f8_e8m0")
    shape = _shape(blocks)
    if len(shape) != 3 or shape[2] != 16 or 0 in shape:
        layer.fail(
            f"blocks have shape {list(shape)}, expected [rows, groups, 16]", "experts of mixtures are not supported"
        )
    grid = _Grid((shape[0], 32 * shape[1]), 1, 32)
    layer.check_shape(scales, grid.stored)
    type = _mx(4, grid)

    def read() -> QuantizedArray:
        codes = unpack_bits(np.asarray(blocks.read()).reshape(shape[0], -1), 4, grid.shape[1])
        return layer.finish(type, codes, grid.spread(np.asarray(scales.read()).view(SCALE_ARRAYS[E8M0])))

    return layer.weight(grid.shape, type, read)


# ------------------------------------------------------------------ the table


def _last_part(name: str) -> tuple[str, str]:
    base, _, suffix = name.rpartition(".")
    return base, suffix


def _mxfp4_part(name: str) -> tuple[str, str]:
    for suffix in ("blocks", "scales"):
        if name.endswith(f"_{suffix}"):
            return name.removesuffix(f"_{suffix}").removesuffix(".weight"), suffix
    return _last_part(name)


@dataclass(frozen=True)
class _Method:
    """suffixes: of the tensors that together are a quantized layer; ``weight`` alone is an ordinary one."""

    make: Callable[[_Layer], LazyTensor]
    suffixes: frozenset[str]
    split: Callable[[str], tuple[str, str]] = field(default=_last_part)


_COMPRESSED_PARTS = (
    "weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx",
    "weight_global_scale",
)  # fmt: skip
METHODS: dict[str, _Method] = {
    "gptq": _Method(_gptq, frozenset({"qweight", "qzeros", "scales", "g_idx"})),
    "awq": _Method(_awq, frozenset({"qweight", "qzeros", "scales"})),
    "compressed-tensors": _Method(_compressed, frozenset(_COMPRESSED_PARTS)),
    "fp8": _Method(_fine_grained_fp8, frozenset({"weight", "weight_scale_inv", "weight_scale"})),
    "mxfp4": _Method(_mxfp4, frozenset({"blocks", "scales"}), _mxfp4_part),
}


def unpack_bits(words: Array, bits: int, count: int) -> Array:
    """uint8 [n, count]: the first ``count`` fields of ``bits`` bits of every row of integers, lowest bits first.

    words: integers [n, k] of any size, little-endian; fields run on across their borders.
    """
    octets: Array = np.ascontiguousarray(words).view(np.uint8).reshape(len(words), -1)
    if bits == 8:
        return np.ascontiguousarray(octets[:, :count])
    if bits == 4:
        codes = np.empty((len(octets), 2 * octets.shape[1]), np.uint8)
        np.bitwise_and(octets, 15, out=codes[:, 0::2])
        np.right_shift(octets, 4, out=codes[:, 1::2])
        return np.ascontiguousarray(codes[:, :count])
    values = np.empty((len(octets), count), np.uint8)
    weights = np.left_shift(1, np.arange(bits)).astype(np.uint8)
    for start in range(0, len(octets), _CHUNK_ROWS):
        part = slice(start, start + _CHUNK_ROWS)
        fields = np.unpackbits(octets[part], axis=1, bitorder="little")[:, : count * bits]
        values[part] = fields.reshape(len(fields), count, bits) @ weights
    return values


def _shape(tensor: LazyTensor) -> tuple[int, ...]:
    return tuple(int(d) for d in tensor.type.shape)


def _scale_type(scales: LazyTensor, grid: _Grid) -> DType:
    """As stored; f32 for whole rows, where it costs nothing and makes one type of all checkpoints."""
    return F32 if grid.group_size == ROW else DTYPES[str(scales.type.dtype)]


def _cast(scale: Array, type: GroupQuant) -> Array:
    return np.ascontiguousarray(scale.astype(SCALE_ARRAYS[type.scale], copy=False))


def _integer(options: Mapping[str, Any], name: str, allowed: Any = None) -> int:
    value = options.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        fits = value == -1 or 1 <= value < 1 << 20 if allowed is None else value in allowed
        if fits:
            return value
    raise CheckpointError(
        f"quantization_config: {name} is {str(value)[:40]}", "this value is not supported: check config.json"
    )


def _block(value: Any) -> tuple[int, int]:
    if (
        not isinstance(value, list) or len(value) != 2
        or not all(isinstance(n, int) and not isinstance(n, bool) and 1 <= n < 1 << 20 for n in value)
    ):  # fmt: skip
        raise CheckpointError(
            f"quantization_config: a block of {str(value)[:40]}", "expected [rows, columns]: check config.json"
        )
    return value[0], value[1]
