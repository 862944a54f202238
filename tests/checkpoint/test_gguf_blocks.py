"""Every block type against ``gguf.quants``, bit for bit."""

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from pelton.checkpoint.gguf_blocks import GGML_TYPES, decode_tensor
from pelton.errors import CheckpointError
from pelton.graph.quantized import SCALE_ARRAYS, QuantizedArray
from pelton.graph.types import E4M3, E8M0, F16, F32, I8, ROW, U8, GroupQuant

from .gguf_files import random_blocks

NATIVE = {
    Kind.Q4_0: GroupQuant(4, 32, False, F16),
    Kind.Q4_1: GroupQuant(4, 32, True, F16),
    Kind.Q5_0: GroupQuant(5, 32, False, F16),
    Kind.Q5_1: GroupQuant(5, 32, True, F16),
    Kind.Q8_0: GroupQuant(8, 32, False, F16),
    Kind.Q2_K: GroupQuant(2, 16, True, U8, outer=256),
    Kind.Q3_K: GroupQuant(3, 16, False, I8, outer=256),
    Kind.Q4_K: GroupQuant(4, 32, True, U8, outer=256),
    Kind.Q5_K: GroupQuant(5, 32, True, U8, outer=256),
    Kind.Q6_K: GroupQuant(6, 16, False, I8, outer=256),
    Kind.MXFP4: GroupQuant(4, 32, scale=E8M0, floating=True),
    Kind.NVFP4: GroupQuant(4, 16, scale=E4M3, floating=True, outer=ROW),
}
BY_LIBRARY = [Kind.IQ4_NL, Kind.IQ4_XS, Kind.IQ2_XXS, Kind.IQ3_S, Kind.TQ1_0, Kind.TQ2_0]


def decode(kind, raw, shape):
    return decode_tensor(GGML_TYPES[kind], raw.reshape(-1), shape)


def test_sizes_of_all_types_are_those_of_the_library():
    library = {int(kind): (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items() if kind.name != "Q8_1"}
    ours = {number: (t.name, t.block_size, t.block_bytes) for number, t in GGML_TYPES.items() if t.name != "Q8_1"}
    assert {n: ours[n] for n in library} == library


@pytest.mark.parametrize("kind", NATIVE, ids=lambda k: k.name)
def test_random_blocks_decode_to_exactly_the_values_of_the_library(kind):
    shape = (3, 1024)
    raw = random_blocks(kind, shape)
    value = decode(kind, raw, shape)
    assert isinstance(value, QuantizedArray)
    assert value.type == NATIVE[kind] == GGML_TYPES[kind].tensor_type(shape).dtype
    assert value.scale.dtype == SCALE_ARRAYS[value.type.scale]
    assert value.codes.max() == 2**value.type.bits - 1
    np.testing.assert_array_equal(value.dequantize(), gguf.quants.dequantize(raw, kind))


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0], ids=lambda k: k.name)
def test_values_quantized_by_the_library_come_back_within_half_a_step(kind):
    values = np.random.default_rng(1).normal(size=(4, 96)).astype(np.float32)
    result = decode(kind, gguf.quants.quantize(values, kind), values.shape)
    bound = np.abs(values).max() * {4: 0.16, 5: 0.08, 8: 0.005}[result.type.bits]
    assert np.abs(result.dequantize() - values).max() < bound


@pytest.mark.parametrize("kind", NATIVE, ids=lambda k: k.name)
def test_chunked_decoding_joins_without_seams(kind, monkeypatch):
    shape = (5, 768)
    raw = random_blocks(kind, shape, seed=2)
    monkeypatch.setattr("pelton.checkpoint.gguf_blocks._CHUNK_CODES", 512)
    np.testing.assert_array_equal(decode(kind, raw, shape).dequantize(), gguf.quants.dequantize(raw, kind))


@pytest.mark.parametrize("shape", [(512,), (2, 3, 256)], ids=str)
def test_quantized_vectors_and_stacks_become_float32(shape):
    raw = random_blocks(Kind.Q4_K, shape)
    value = decode(Kind.Q4_K, raw, shape)
    assert GGML_TYPES[Kind.Q4_K].tensor_type(shape).dtype == F32
    assert isinstance(value, np.ndarray)
    np.testing.assert_array_equal(value, gguf.quants.dequantize(raw, Kind.Q4_K))


@pytest.mark.parametrize("kind", BY_LIBRARY, ids=lambda k: k.name)
def test_other_types_are_decoded_by_the_library(kind):
    shape = (2, 512)
    raw = random_blocks(kind, shape)
    value = decode(kind, raw, shape)
    assert value.dtype == np.float32
    assert value.shape == shape
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(value, gguf.quants.dequantize(raw, kind))


def test_a_type_that_nobody_decodes_is_refused_by_name():
    with pytest.raises(CheckpointError, match=r"no decoder .* Q8_K; use a file quantized as"):
        decode(Kind.Q8_K, np.zeros(292, np.uint8), (1, 256))


@pytest.mark.parametrize("dtype", ["<f4", "<f2", ml_dtypes.bfloat16, "<f8", "i1", "<i2", "<i4", "<i8"], ids=str)
def test_plain_types_are_views_and_misaligned_ones_copies(dtype):
    dtype = np.dtype(dtype)
    kind = next(t for t in GGML_TYPES.values() if t.dense is not None and t.dense == dtype)
    values = np.arange(6).astype(dtype).reshape(2, 3)
    raw = np.zeros(values.nbytes + 1 + 64, np.uint8)
    aligned = -raw.ctypes.data % 64
    for start in (aligned, aligned + 1):
        raw[start : start + values.nbytes] = values.reshape(-1).view(np.uint8)
        result = decode_tensor(kind, raw[start : start + values.nbytes], (2, 3))
        np.testing.assert_array_equal(result, values)
        assert result.flags.aligned
        assert np.shares_memory(result, raw) == (start == aligned or dtype.itemsize == 1)
