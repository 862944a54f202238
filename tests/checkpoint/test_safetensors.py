"""Safetensors folders against the ``safetensors`` library, and every way in which they can be wrong."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from pelton.checkpoint import open_checkpoint
from pelton.errors import CheckpointError
from pelton.graph.types import BF16, F16, F32, I32

DTYPES = [
    ("f32", np.float32),
    ("f16", np.float16),
    ("bf16", ml_dtypes.bfloat16),
    ("f64", np.float64),
    ("i64", np.int64),
    ("i32", np.int32),
    ("i16", np.int16),
    ("i8", np.int8),
    ("u8", np.uint8),
    ("u16", np.uint16),
    ("u32", np.uint32),
    ("u64", np.uint64),
]


def folder(path, config=None, **files):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"architectures": ["A"]} if config is None else config))
    for name, tensors in files.items():
        safetensors.numpy.save_file(tensors, path / f"{name.replace('__', '-')}.safetensors")
    return path


def raw(header, data=b"", length=None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_all_types_equal_what_the_library_reads(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {name: rng.integers(0, 100, (3, 4)).astype(dtype) for name, dtype in DTYPES}
    tensors |= {"scalar": np.array(3.5, np.float32), "empty": np.zeros((0, 5), np.float16)}
    checkpoint = open_checkpoint(folder(tmp_path / "m", model=tensors))
    library = safetensors.numpy.load_file(tmp_path / "m/model.safetensors")
    assert set(checkpoint.tensors) == set(library) == set(tensors)
    for name, want in library.items():
        tensor = checkpoint.tensors[name]
        got = tensor.read()
        assert got.dtype == want.dtype
        assert got.shape == tensor.type.shape == want.shape
        assert tensor.nbytes == want.nbytes
        np.testing.assert_array_equal(got, want)
    types = [checkpoint.tensors[n].type.dtype for n in ("f32", "f16", "bf16", "i32")]
    assert types == [F32, F16, BF16, I32]
    assert checkpoint.format == "safetensors"
    assert checkpoint.files == (tmp_path / "m/model.safetensors",)


def test_values_are_read_only_views_of_the_file(tmp_path):
    checkpoint = open_checkpoint(folder(tmp_path / "m", model={"w": np.ones((4, 4), np.float32)}))
    first, second = checkpoint.tensors["w"].read(), checkpoint.tensors["w"].read()
    assert np.shares_memory(first, second)
    assert not first.flags.writeable


def test_a_misaligned_tensor_is_copied(tmp_path):
    path = folder(tmp_path / "m")
    values = np.array([1.5, -2.5], np.float32)
    header = {"a": entry("U8", (1,), (0, 1)), "b": entry("F32", (2,), (1, 9))}
    (path / "model.safetensors").write_bytes(raw(header, b"\7" + values.tobytes()))
    result = open_checkpoint(path).tensors["b"].read()
    assert result.flags.aligned
    np.testing.assert_array_equal(result, values)


def test_configs_are_read(tmp_path):
    path = folder(tmp_path / "m", {"architectures": ["XForCausalLM"], "n": 3}, model={"w": np.ones(2, np.float32)})
    assert open_checkpoint(path).generation == {}
    (path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    checkpoint = open_checkpoint(path)
    assert checkpoint.architecture == "XForCausalLM"
    assert checkpoint.config["n"] == 3
    assert checkpoint.generation == {"eos_token_id": [1, 2]}
    assert checkpoint.gguf_metadata is None


def sharded(tmp_path):
    parts = [{f"t{i}.{j}": np.full((2, 3), 10 * i + j, np.float32) for j in range(3)} for i in range(2)]
    path = folder(tmp_path / "m", **{f"model__0000{i + 1}__of__00002": p for i, p in enumerate(parts)})
    names = {n: f"model-0000{i + 1}-of-00002.safetensors" for i, p in enumerate(parts) for n in p}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return path, names, parts[0] | parts[1]


@pytest.mark.parametrize("indexed", [True, False])
def test_shards_are_joined(indexed, tmp_path):
    path, _, tensors = sharded(tmp_path)
    if not indexed:
        (path / "model.safetensors.index.json").unlink()
    checkpoint = open_checkpoint(path)
    assert len(checkpoint.files) == 2
    assert set(checkpoint.tensors) == set(tensors)
    for name, want in tensors.items():
        np.testing.assert_array_equal(checkpoint.tensors[name].read(), want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, n: (p / n["t0.0"]).unlink(), "names model-00001-of-00002.safetensors, which is missing"),
        (lambda p, n: n.update(extra=n["t0.0"]), "tensor 'extra' is not in model-00001"),
        (lambda p, n: n.update(x="../secret.safetensors"), "is no name of a safetensors file"),
        (lambda p, n: n.update(x="/etc/secret.safetensors"), "is no name of a safetensors file"),
        (lambda p, n: n.update(x="pytorch_model.bin"), "is no name of a safetensors file"),
        (lambda p, n: n.update(x=3), "is no name of a safetensors file"),
        (lambda p, n: n.clear(), "has no 'weight_map'"),
    ],
)
def test_a_wrong_index_is_refused(change, message, tmp_path):
    path, names, _ = sharded(tmp_path)
    change(path, names)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


def test_an_incomplete_series_without_index_is_refused(tmp_path):
    w = {"w": np.ones(2, np.float32)}
    path = folder(tmp_path / "m", model__00001__of__00003=w, model__00003__of__00003=w)
    with pytest.raises(CheckpointError, match="not one complete series; download"):
        open_checkpoint(path)


def test_mistrals_second_copy_and_adapters_are_ignored(tmp_path):
    w = {"w": np.ones(2, np.float32)}
    checkpoint = open_checkpoint(folder(tmp_path / "m", model=w, consolidated={"v": w["w"]}, adapter_model=w))
    assert list(checkpoint.tensors) == ["w"]


@pytest.mark.parametrize(
    ("model_type", "stored", "full"),
    [
        ("gpt2", ["wte.weight", "h.0.attn.c_attn.bias", "ln_f.bias"], "transformer."),
        (
            "bloom",
            ["word_embeddings.weight", "word_embeddings_layernorm.bias", "h.1.mlp.dense_h_to_4h.bias"],
            "transformer.",
        ),
        ("llama", ["embed_tokens.weight", "layers.0.mlp.up_proj.weight", "norm.weight"], "model."),
    ],
)
def test_names_always_have_the_prefix_of_the_full_model(model_type, stored, full, tmp_path):
    tensors = {n: np.ones(2, np.float32) for n in [*stored, "lm_head.weight"]}
    bare = open_checkpoint(folder(tmp_path / "a", {"model_type": model_type}, model=tensors))
    assert set(bare.tensors) == {full + n for n in stored} | {"lm_head.weight"}
    assert all(name == tensor.name for name, tensor in bare.tensors.items())
    complete = open_checkpoint(
        folder(tmp_path / "b", {"model_type": model_type}, model={full + n: tensors[n] for n in stored})
    )
    assert set(complete.tensors) == {full + n for n in stored}
    both = folder(tmp_path / "c", {"model_type": model_type}, model=tensors | {full + stored[0]: tensors[stored[0]]})
    with pytest.raises(CheckpointError, match="appears twice"):
        open_checkpoint(both)


BAD = {
    "empty": (b"", "is empty"),
    "seven bytes": (bytes(7), "7 bytes are too few"),
    "header too long": (raw({}, length=1 << 62), "exceeds the limit of 100000000"),
    "header over the end": (raw({}, length=1000), "the header ends at byte 1008 but the file has 10"),
    "not JSON": (raw(b"{]"), "not valid JSON"),
    "not UTF-8": (raw(b'{"\xff": 1}'), "not valid JSON"),
    "deep JSON": (raw(b"[" * 100_000), "not valid JSON"),
    "long number": (raw(b'{"a": ' + b"9" * 10_000 + b"}"), "not valid JSON"),
    "duplicate": (raw(b'{"a": 1, "a": 2}'), "a name appears twice"),
    "list": (raw([1]), "not a JSON object"),
    "no description": (raw({"w": 1}), "tensor 'w' has no description"),
    "dtype": (raw({"w": entry("F4")}, bytes(8)), "unknown type 'F4'"),
    "dtype list": (raw({"w": entry([])}, bytes(8)), "unknown type"),
    "negative dimension": (raw({"w": entry(shape=(-1, -2))}, bytes(8)), "impossible shape"),
    "boolean dimension": (raw({"w": entry(shape=(True, 2))}, bytes(8)), "impossible shape"),
    "float dimension": (raw({"w": entry(shape=(2.0,))}, bytes(8)), "impossible shape"),
    "huge dimensions": (raw({"w": entry(shape=(2**61, 2**61))}, bytes(8)), "needs .* bytes but has 8"),
    "many dimensions": (raw({"w": entry(shape=(1,) * 40)}, bytes(8)), "impossible shape"),
    "one offset": (raw({"w": entry(offsets=(8,))}, bytes(8)), "impossible offsets"),
    "negative offset": (raw({"w": entry(offsets=(-8, 0))}, bytes(8)), "impossible offsets"),
    "reversed offsets": (raw({"w": entry(offsets=(8, 0))}, bytes(8)), "needs 8 bytes but has -8"),
    "size": (raw({"w": entry(offsets=(0, 12))}, bytes(12)), "needs 8 bytes but has 12"),
    "truncated": (raw({"w": entry()}, bytes(7)), r"ends at byte \d+ but the file has \d+; .*download"),
    "overlap": (raw({"v": entry(), "w": entry(offsets=(4, 12))}, bytes(12)), "'v' and 'w' overlap"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "no safetensors file"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_damaged_file_is_refused_in_one_line_with_its_name(case, tmp_path):
    content, message = BAD[case]
    path = folder(tmp_path / "m")
    (path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(path)
    assert str(path / "model.safetensors") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "; " in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "config.json is missing; download"), ("{", "not valid JSON"), ("[]", "not a JSON obj")],
)
def test_a_missing_or_broken_config_is_refused(content, message, tmp_path):
    path = folder(tmp_path / "m", model={"w": np.ones(2, np.float32)})
    (path / "config.json").unlink()
    if content is not None:
        (path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "weights.pth"])
def test_pickles_are_refused_with_the_command_that_converts_them(name, tmp_path):
    path = folder(tmp_path / "m")
    (path / name).write_bytes(b"\x80\x02cos\nsystem\n")
    for target in (path, path / name):
        with pytest.raises(CheckpointError, match=r"pickled checkpoint.*python -c .*save_pretrained") as caught:
            open_checkpoint(target)
        assert f"from_pretrained('{path}')" in str(caught.value)


def test_pickles_beside_safetensors_do_not_matter(tmp_path):
    path = folder(tmp_path / "m", model={"w": np.ones(2, np.float32)})
    (path / "pytorch_model.bin").write_bytes(b"\x80")
    assert list(open_checkpoint(path).tensors) == ["w"]


def test_other_paths_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist; give a folder"):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="holds no weights"):
        open_checkpoint(folder(tmp_path / "m"))
    path = folder(tmp_path / "s", model={"w": np.ones(2, np.float32)})
    with pytest.raises(CheckpointError, match=f"give the folder: {path}"):
        open_checkpoint(path / "model.safetensors")
