"""Packed weights on disk: found, checked, made again when they are not what they should be."""

import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest

from pelton.backends.cpu import packed_cache, packing
from pelton.backends.cpu.packed_cache import content_hash, open_or_pack
from tests.helpers.families import Sequences, load
from tests.helpers.tiny_models import tiny_checkpoint

PROMPT = [5, 9, 33, 7, 21]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PELTON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(tiny_checkpoint("llama")[0], tmp_path / "model")


def logits(folder, **options):
    built = load(folder, "generic", packed_cache=True, **options)
    result = Sequences(built.executor).step(a=PROMPT)
    built.close()
    return result


def packed_files(cache: Path) -> list[Path]:
    return sorted(p for p in (cache / "packed").iterdir() if p.suffix == ".safetensors")


@pytest.fixture
def packings(monkeypatch):
    """Counts the matrices that were packed."""
    counted = []
    inner = packing.pack_linear
    monkeypatch.setattr(packing, "pack_linear", lambda *a: counted.append(1) or inner(*a))
    return counted


def test_the_second_start_maps_and_gives_identical_logits(folder, cache, packings):
    first = logits(folder)
    assert packings
    (file,) = packed_files(cache)
    before = file.stat().st_mtime_ns
    packings.clear()
    second = logits(folder)
    assert not packings
    assert file.stat().st_mtime_ns == before
    np.testing.assert_array_equal(first, second)
    assert not list((cache / "packed").glob(".writing-*"))


def test_packed_weights_are_the_same_as_weights_packed_in_memory(folder):
    logits(folder)
    from_disk = logits(folder)
    built = load(folder, "generic", packed_cache=False)
    np.testing.assert_array_equal(from_disk, Sequences(built.executor).step(a=PROMPT))
    built.close()


def truncate(data: bytes) -> bytes:
    return data[: len(data) // 2]


def cut_the_header(data: bytes) -> bytes:
    return data[:20]


def empty(_: bytes) -> bytes:
    return b""


def garbage_header(data: bytes) -> bytes:
    return data[:8] + b"\xff" * 100 + data[108:]


def huge_header(data: bytes) -> bytes:
    return (2**63).to_bytes(8, "little") + data[8:]


def header_of(data: bytes, change) -> bytes:
    end = 8 + int.from_bytes(data[:8], "little")
    text = json.dumps(change(json.loads(data[8:end]))).encode()
    return data[:8] + text.ljust(end - 8) + data[end:]


def foreign(data: bytes) -> bytes:
    return header_of(data, lambda header: {"other": next(iter(header.values()))})


def no_object(data: bytes) -> bytes:
    return header_of(data, lambda header: [1, 2])


def swapped(data: bytes) -> bytes:
    def change(header):
        offsets = [entry["data_offsets"] for entry in header.values()]
        for entry, other in zip(header.values(), reversed(offsets), strict=True):
            entry["data_offsets"] = other
        return header

    return header_of(data, change)


def negative(data: bytes) -> bytes:
    def change(header):
        for entry in header.values():
            begin, end = entry["data_offsets"]
            entry["data_offsets"] = [begin - 4096, end - 4096]
        return header

    return header_of(data, change) + b""


def strings(data: bytes) -> bytes:
    return header_of(data, lambda h: {k: {**v, "data_offsets": ["a", "b"]} for k, v in h.items()})


def three_offsets(data: bytes) -> bytes:
    return header_of(data, lambda h: {k: {**v, "data_offsets": [0, 1, 2]} for k, v in h.items()})


def too_long(data: bytes) -> bytes:
    return data + bytes(4096)


@pytest.mark.parametrize(
    "damage",
    [truncate, cut_the_header, empty, garbage_header, huge_header, foreign, no_object, swapped, negative, strings,
     three_offsets, too_long],
)  # fmt: skip
def test_a_damaged_file_is_made_again_and_never_used(folder, cache, damage, packings):
    first = logits(folder)
    (file,) = packed_files(cache)
    sound = file.read_bytes()
    file.write_bytes(damage(sound))
    packings.clear()
    np.testing.assert_array_equal(logits(folder), first)
    assert packings
    assert file.read_bytes() == sound


def test_a_damaged_index_of_hashes_is_made_again(folder, cache):
    weights = [folder / "model.safetensors"]
    key = content_hash(weights)
    for content in ("", "[]", "3", '{"a": 1}', '"text"', "\x00"):
        (cache / "content-hashes.json").write_text(content)
        assert content_hash(weights) == key


def test_an_unwritable_cache_is_a_warning_and_the_model_runs(folder, cache, monkeypatch):
    expected = logits(folder)
    blocked = cache / "a-file"
    blocked.write_text("where a folder should be")  # also stops root, whom permissions do not
    monkeypatch.setenv("PELTON_CACHE", str(blocked / "below"))
    with pytest.warns(UserWarning, match="set PELTON_CACHE to a writable folder"):
        np.testing.assert_array_equal(logits(folder), expected)


def test_a_disk_that_fills_up_leaves_no_half_file(folder, cache, monkeypatch):
    expected = logits(folder)
    shutil.rmtree(cache / "packed")
    inner = packed_cache._write

    def full(path, chunks):
        def some():
            for i, chunk in enumerate(chunks):
                if i == 5:
                    raise OSError(28, "No space left on device")
                yield chunk

        return inner(path, some())

    monkeypatch.setattr(packed_cache, "_write", full)
    with pytest.warns(UserWarning, match="No space left"):
        np.testing.assert_array_equal(logits(folder), expected)
    assert not list((cache / "packed").iterdir())


def test_chunks_are_cut_where_huge_pages_end_and_nothing_is_lost(tmp_path, monkeypatch):
    huge = packed_cache._HUGE_PAGE
    data = np.random.default_rng(0).integers(0, 256, 5 * huge + 77, np.uint8)
    ends = [0, 1, 4097, huge, 3 * huge - 5, 3 * huge + 3, 5 * huge, len(data)]
    chunks = [data[i:j].data for i, j in itertools.pairwise(ends)]
    sizes = []

    class Raw(io.FileIO):
        def write(self, block):
            sizes.append(len(block))
            return super().write(block)

    monkeypatch.setattr(os, "fdopen", lambda f, mode, buffering: io.BufferedWriter(Raw(f, mode), buffering))
    written = packed_cache._write(tmp_path / "x", chunks)
    assert written.read_bytes() == data.tobytes()
    assert sizes == [huge] * 5 + [77]


PACK = """
import sys
import threading
from tests.helpers.families import Sequences, load
built = load(sys.argv[1], "generic", packed_cache=True)
print(Sequences(built.executor).step(a=[5, 9, 33, 7, 21]).tobytes().hex())
"""


def test_processes_that_pack_at_once_all_work(folder, cache):
    children = [
        subprocess.Popen([sys.executable, "-c", PACK, str(folder)], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    answers = {child.communicate(timeout=120)[0].strip() for child in children}
    assert [child.returncode for child in children] == [0, 0, 0]
    assert answers == {logits(folder).tobytes().hex()}
    assert len(packed_files(cache)) == 1


def test_a_changed_checkpoint_is_packed_anew(folder, cache):
    import safetensors.numpy

    first = logits(folder)
    path = folder / "model.safetensors"
    tensors = dict(safetensors.numpy.load_file(path))
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
    safetensors.numpy.save_file(tensors, path)
    assert not np.array_equal(logits(folder), first)
    assert len(packed_files(cache)) == 2


def test_the_same_content_elsewhere_is_not_packed_again(folder, cache, tmp_path, packings):
    logits(folder)
    packings.clear()
    logits(shutil.copytree(folder, tmp_path / "copy"))
    assert not packings and len(packed_files(cache)) == 1


def test_the_index_trusts_path_size_time_and_inode(folder):
    """A file replaced by another of the same size and time has another inode; one edited in place and given its
    old time back is taken for unchanged: that is the price of not reading gigabytes at every start."""
    path = folder / "model.safetensors"
    key = content_hash([path])
    stat, changed = path.stat(), path.read_bytes()[:-1] + b"\x7f"
    beside = folder / "beside"
    beside.write_bytes(changed)
    os.replace(beside, path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other = content_hash([path])
    assert other != key
    inode, data = path.stat().st_ino, path.read_bytes()
    with path.open("r+b") as stream:
        stream.write(data[:-1] + b"\x7e")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_ino == inode
    assert content_hash([path]) == other


def test_the_key_depends_on_the_types_but_not_on_limits_threads_or_isa(folder, cache):
    from pelton.backends.cpu import _native

    logits(folder)
    logits(folder, max_num_seqs=3, threads=1)
    built = load(folder, _native.supported_isas()[-1], packed_cache=True)
    built.close()
    assert len(packed_files(cache)) == 1
    logits(folder, dtype="bf16")
    assert len(packed_files(cache)) == 2


def test_constants_start_on_pages(cache):
    sizes = [3, 4096, 5000]
    parts = [np.full(size, i, np.uint8) for i, size in enumerate(sizes)]
    reported: list[int] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, publishing = open_or_pack("key", sizes, lambda i: parts[i], reported.append)
        publishing.join()
    assert reported == [0, 1, 2]
    for want, have in zip(parts, found, strict=True):
        np.testing.assert_array_equal(want, have)
        assert have.ctypes.data % 4096 == 0
        assert not have.flags.writeable


def test_the_first_start_does_not_wait_for_the_disk_and_close_does(folder, cache, monkeypatch):
    allowed = threading.Event()
    inner = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: allowed.wait(60) and inner(handle))
    monkeypatch.setattr(packed_cache, "content_hash", lambda files: "known")  # it publishes, too
    built = load(folder, "generic", packed_cache=True)
    answer = Sequences(built.executor).step(a=PROMPT)
    assert not packed_files(cache)
    allowed.set()
    built.close()
    assert len(packed_files(cache)) == 1
    np.testing.assert_array_equal(logits(folder), answer)


def test_a_file_that_the_disk_refuses_is_a_warning(folder, cache, monkeypatch):
    expected = logits(folder)
    shutil.rmtree(cache / "packed")

    def refused(handle):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", refused)
    with pytest.warns(UserWarning, match="Input/output error; see to the disk"):
        np.testing.assert_array_equal(logits(folder), expected)
    assert not list((cache / "packed").iterdir())
