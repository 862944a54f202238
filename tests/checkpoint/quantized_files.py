"""Writes layers as quantized checkpoints on the hub store them, element by element: the oracle of quantized_hf.

A writer takes float32 weights [rows, cols] and returns the stored tensors by suffix and the values they mean.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

Array = Any
Written = tuple[dict[str, Array], Array]

FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def words(values: Array, bits: int) -> Array:
    """int32 [n, ceil(k * bits / 32)]: the fields of each row as one string of bits, the lowest first."""
    out = []
    for row in np.asarray(values, dtype=object):
        number = sum(int(v) << (bits * i) for i, v in enumerate(row))
        count = -(-len(row) * bits // 32)
        out.append([(number >> (32 * i)) & 0xFFFFFFFF for i in range(count)])
    return np.array(out, np.uint32).view(np.int32)


def rounded(weight: Array, bits: int, size: int, symmetric: bool, real: Any = np.float16) -> tuple[Array, ...]:
    """Codes, scales [rows, groups], zero points [rows, groups] and values."""
    rows, cols = weight.shape
    top = (1 << bits) - 1
    groups = -(-cols // size)
    owner = np.arange(cols) // size
    scale, zero = np.zeros((rows, groups), real), np.zeros((rows, groups), int)
    for g in range(groups):
        part = weight[:, owner == g]
        if symmetric:
            scale[:, g], zero[:, g] = np.abs(part).max(1) * 2 / top, 1 << (bits - 1)
        else:
            low, high = np.minimum(part.min(1), -1e-3), np.maximum(part.max(1), 1e-3)
            scale[:, g] = (high - low) / top
            zero[:, g] = np.clip(np.rint(-low / scale[:, g].astype(np.float32)), 1, top)
    wide, offset = scale.astype(np.float32)[:, owner], zero[:, owner]
    codes = np.clip(np.rint(weight / wide) + offset, 0, top).astype(int)
    return codes, scale, zero, ((codes - offset) * wide).astype(np.float32)


def gptq(bits: int, size: int, symmetric: bool, *, version: int = 1, order: str = "") -> Callable[[Array], Written]:
    def write(weight: Array) -> Written:
        cols = weight.shape[1]
        width = cols if size == -1 else size
        shuffle = np.random.default_rng(cols).permutation(cols) if order == "shuffled" else np.arange(cols)
        codes, scale, zero, values = rounded(weight[:, shuffle], bits, width, symmetric)
        back = np.argsort(shuffle)
        g_idx = (np.arange(cols) // width)[back].astype(np.int32)
        parts = {
            "qweight": np.ascontiguousarray(words(codes[:, back], bits).T),
            "qzeros": words((zero.T - (version == 1)) & ((1 << bits) - 1), bits),
            "scales": np.ascontiguousarray(scale.T),
        }
        if order:
            parts["g_idx"] = g_idx
        values = values[:, back]
        return parts, values.astype(ml_dtypes.bfloat16).astype(np.float32) if order == "shuffled" else values

    return write


def awq(size: int) -> Callable[[Array], Written]:
    def pack(values: Array) -> Array:
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        out = np.zeros((values.shape[0], values.shape[1] // 8), np.uint32)
        for col in range(out.shape[1]):
            for i in range(8):
                out[:, col] |= values[:, 8 * col + order[i]].astype(np.uint32) << np.uint32(4 * i)
        return out.view(np.int32)

    def write(weight: Array) -> Written:
        codes, scale, zero, values = rounded(weight, 4, size, False)
        return {"qweight": pack(codes.T), "qzeros": pack(zero.T), "scales": np.ascontiguousarray(scale.T)}, values

    return write


def pack_quantized(bits: int, size: int | None, symmetric: bool) -> Callable[[Array], Written]:
    def write(weight: Array) -> Written:
        rows, cols = weight.shape
        codes, scale, zero, values = rounded(weight, bits, size or cols, symmetric, ml_dtypes.bfloat16)
        parts = {
            "weight_packed": words(codes, bits),
            "weight_scale": scale,
            "weight_shape": np.array([rows, cols], np.int64),
        }
        if not symmetric:
            parts["weight_zero_point"] = np.ascontiguousarray(words(zero.T, bits).T)
        return parts, values

    return write


def int_quantized(symmetric: bool) -> Callable[[Array], Written]:
    def write(weight: Array) -> Written:
        codes, scale, zero, values = rounded(weight, 8, weight.shape[1], symmetric, ml_dtypes.bfloat16)
        parts = {"weight": (codes - 128).astype(np.int8), "weight_scale": scale}
        if not symmetric:
            parts["weight_zero_point"] = (zero - 128).astype(np.int8)
        return parts, values

    return write


def fp8(block: tuple[int, int] | None, suffix: str, *, channel: bool = False, static: bool = False) -> Any:
    """block: rows and columns per scale; None: one scale for all, or for each row with ``channel``."""

    def write(weight: Array) -> Written:
        rows, cols = weight.shape
        height, width = block or ((1 if channel else rows), cols)
        owner = np.arange(rows)[:, None] // height, np.arange(cols)[None, :] // width
        scale = np.zeros((-(-rows // height), -(-cols // width)), np.float32)
        np.maximum.at(scale, owner, np.abs(weight) / 448)
        codes = (weight / scale[owner]).astype(ml_dtypes.float8_e4m3fn)
        stored = scale if block or channel else scale.reshape(())
        parts = {"weight": codes, suffix: stored}
        if static:
            parts["input_scale"] = np.float32(0.01).reshape(1)
        return parts, codes.astype(np.float32) * scale[owner]

    return write


def fp4_codes(values: Array) -> Array:
    """Nearest E2M1 codes."""
    nearest = np.abs(np.abs(values)[..., None] - FP4).argmin(-1)
    return np.where(values < 0, nearest + 8, nearest).astype(np.uint8)


def nvfp4(weight: Array) -> Written:
    rows, cols = weight.shape
    groups = weight.reshape(rows, -1, 16)
    factor = np.float32(448 * 6 / np.abs(weight).max())
    scale = (np.abs(groups).max(2) / 6 * factor).astype(ml_dtypes.float8_e4m3fn)
    wide = (scale.astype(np.float32) / factor)[:, :, None]
    codes = fp4_codes(groups / wide)
    values = np.where(codes > 7, -FP4[codes & 7], FP4[codes & 7]) * wide
    flat = codes.reshape(rows, cols)
    parts = {
        "weight_packed": flat[:, 0::2] | flat[:, 1::2] << 4,
        "weight_scale": scale,
        "weight_global_scale": factor.reshape(1),
        "input_global_scale": np.ones(1, np.float32),
    }
    return parts, values.reshape(rows, cols)


def _mx(weight: Array) -> tuple[Array, Array, Array]:
    rows, cols = weight.shape
    groups = weight.reshape(rows, -1, 32)
    exponent = np.floor(np.log2(np.abs(groups).max(2))) - 2
    codes = fp4_codes(groups / 2.0 ** exponent[:, :, None])
    values = np.where(codes > 7, -FP4[codes & 7], FP4[codes & 7]) * 2.0 ** exponent[:, :, None]
    flat = codes.reshape(rows, cols)
    return flat[:, 0::2] | flat[:, 1::2] << 4, (exponent + 127).astype(np.uint8), values.reshape(rows, cols)


def mxfp4_packed(weight: Array) -> Written:
    octets, scale, values = _mx(weight)
    return {"weight_packed": octets, "weight_scale": scale}, values.astype(np.float32)


def mxfp4_blocks(weight: Array) -> Written:
    octets, scale, values = _mx(weight)
    return {"weight_blocks": octets.reshape(len(octets), -1, 16), "weight_scales": scale}, values.astype(np.float32)


def compressed(format: str, weights: dict[str, Any], **fields: Any) -> dict[str, Any]:
    scheme = {"targets": ["Linear"], "weights": {"dynamic": False, **weights}, "input_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": scheme},
        "ignore": ["lm_head"], "kv_cache_scheme": None, "quantization_status": "compressed", **fields,
    }  # fmt: skip


def _gptq(bits: int, size: int, sym: bool, **fields: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": size, "sym": sym, "desc_act": False, **fields}


def _int(bits: int, symmetric: bool = True, strategy: str = "channel", size: int | None = None) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "group_size": size}


def _float(bits: int, strategy: str, **fields: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "float", "symmetric": True, "strategy": strategy, **fields}


#: name -> (quantization_config, writer, the type that it becomes)
FORMATS: dict[str, tuple[dict[str, Any], Callable[[Array], Written], str]] = {
    "gptq-4": (_gptq(4, 32, True), gptq(4, 32, True), "int4g32:f16"),
    "gptq-4-asymmetric": (_gptq(4, 32, False), gptq(4, 32, False, order="in a row"), "int4g32z:f16"),
    "gptq-v2": (
        _gptq(4, 16, False, checkpoint_format="gptq_v2"), gptq(4, 16, False, version=2), "int4g16z:f16"
    ),
    "gptq-8-channel": (_gptq(8, -1, True), gptq(8, -1, True), "int8g0:f32"),
    "gptq-3": (_gptq(3, 32, False), gptq(3, 32, False), "int3g32z:f16"),
    "gptq-2": (_gptq(2, 16, True), gptq(2, 16, True), "int2g16:f16"),
    "gptq-reordered": (_gptq(4, 32, True, desc_act=True), gptq(4, 32, True, order="shuffled"), "bf16"),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}, awq(32),
        "int4g32z:f16",
    ),
    "w8a8": (
        compressed("int-quantized", _int(8)), int_quantized(True), "int8g0:f32"
    ),
    "w8a8-asymmetric": (compressed("int-quantized", _int(8, False)), int_quantized(False), "int8g0z:f32"),
    "w4a16": (compressed("pack-quantized", _int(4, True, "group", 32)), pack_quantized(4, 32, True), "int4g32:bf16"),
    "w4a16-asymmetric": (
        compressed("pack-quantized", _int(4, False, "group", 16)), pack_quantized(4, 16, False), "int4g16z:bf16"
    ),
    "w8a16-channel": (compressed("pack-quantized", _int(8)), pack_quantized(8, None, True), "int8g0:f32"),
    "fp8-dynamic": (
        compressed("float-quantized", _float(8, "channel")), fp8(None, "weight_scale", channel=True), "fp8g0:f32"
    ),
    "fp8-static": (
        compressed("float-quantized", _float(8, "tensor")), fp8(None, "weight_scale", static=True), "fp8g0:f32"
    ),
    "nvfp4": (compressed("nvfp4-pack-quantized", _float(4, "tensor_group", group_size=16)), nvfp4, "fp4g16:e4m3/0"),
    "mxfp4-packed": (
        compressed("mxfp4-pack-quantized", _float(4, "group", group_size=32)), mxfp4_packed, "fp4g32:e8m0"
    ),
    "fp8-blocks": (
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [24, 40]},
        fp8((24, 40), "weight_scale_inv"), "fp8g8:f32",
    ),
    "fp8-blocks-whole": (
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]},
        fp8((32, 32), "weight_scale_inv"), "fp8g32:f32",
    ),
    "fp8-tensor": (
        {"quant_method": "fp8", "activation_scheme": "static"}, fp8(None, "weight_scale", static=True), "fp8g0:f32"
    ),
    "mxfp4": ({"quant_method": "mxfp4"}, mxfp4_blocks, "fp4g32:e8m0"),
}  # fmt: skip
