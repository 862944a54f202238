"""Packed weights on disk: written once, mmapped at every later start.

A file is a valid safetensors file of uint8 tensors, one per constant of the program, each aligned to
a page. Its name is a hash of the checkpoint's content, of what is packed and how, and of the packing's
version. It is written beside its place and renamed once it is on the disk, so a reader never sees half of
one. The process that packs maps the file as soon as it is written and does not wait for the disk.

Linux keeps what a file system with large folios (ext4 since 6.16, XFS) writes or reads ahead 2 MB at a time in huge
pages, and maps them as such: weights then cost a TLB entry per 2 MB, and all processes share them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...paths import cache_dir

Bytes = npt.NDArray[np.uint8]
_PAGE = 4096
_HUGE_PAGE = 2 << 20


def content_hash(files: Sequence[Path]) -> str:
    """SHA-256 over the files' bytes. Known results are kept by path, size and time of change."""
    index_path = cache_dir() / "content-hashes.json"
    try:
        kept = json.loads(index_path.read_text())
    except (OSError, ValueError):
        kept = None
    index: dict[str, str] = kept if isinstance(kept, dict) else {}
    digests, changed = [], False
    for file in files:
        stat = file.stat()
        key = f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ino}"
        if key not in index:
            with file.open("rb") as stream:
                digest = hashlib.sha256()
                while block := stream.read(1 << 22):
                    digest.update(block)
            index[key], changed = digest.hexdigest(), True
        digests.append(index[key])
    if changed:
        with contextlib.suppress(OSError):  # only a shortcut: without it the hash is made again
            _publish(_write(index_path, [json.dumps(index).encode()]), index_path)
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def open_or_pack(
    key: str, sizes: Sequence[int], pack: Callable[[int], Bytes], on_packed: Callable[[int], None]
) -> tuple[list[Bytes], threading.Thread | None]:
    """The packed constants, from the cache or packed now and kept there.

    pack(i) makes constant i, of sizes[i] bytes; on_packed(i) reports progress. Only one constant is in
    memory at a time. The second result, if anything was packed, ends when the file is safe on the disk.

    Raises:
        OSError: the cache cannot be written; the caller decides what then.
    """
    path = cache_dir() / "packed" / f"{key}.safetensors"
    found = _open(path, sizes)
    if found is not None:
        return found, None

    def chunks() -> Iterator[bytes | memoryview]:
        yield _header(sizes)
        for i, size in enumerate(sizes):
            data = pack(i)
            assert data.nbytes == size, f"constant {i}: {data.nbytes} bytes packed, {size} expected"
            yield data.data
            yield bytes(_aligned(size) - size)
            on_packed(i)

    written = _write(path, chunks())
    found = _open(written, sizes)
    if found is None:
        written.unlink(missing_ok=True)
        raise OSError(f"{written} cannot be read back")
    publishing = threading.Thread(target=_publish, args=(written, path), name="pelton-packed-cache")
    publishing.start()
    return found, publishing


def _aligned(offset: int) -> int:
    return -(-offset // _PAGE) * _PAGE


def _header(sizes: Sequence[int]) -> bytes:
    """The file up to its data: whole pages, and constants padded to pages, so that each starts on one."""
    header: dict[str, Any] = {}
    offset = 0
    for i, size in enumerate(sizes):
        end = offset + _aligned(size)
        header[str(i)] = {"dtype": "U8", "shape": [end - offset], "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (_aligned(8 + len(text)) - 8 - len(text))
    return len(text).to_bytes(8, "little") + text


def _open(path: Path, sizes: Sequence[int]) -> list[Bytes] | None:
    """The mmapped constants, or None if there is no file or it is not what would be written.

    The header must be the very one that these sizes give, and the length must fit; data is not read.
    """
    header = _header(sizes)
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):  # ValueError: an empty file
        return None
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without
            data.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(data, np.uint8)
    if len(whole) != len(header) + sum(map(_aligned, sizes)) or whole[: len(header)].tobytes() != header:
        return None
    constants, offset = [], len(header)
    for size in sizes:
        constants.append(whole[offset : offset + size])
        offset += _aligned(size)
    return constants


def _write(path: Path, chunks: Iterable[bytes | memoryview]) -> Path:
    """Write a file beside ``path``; its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for abandoned in path.parent.glob(".writing-*"):  # by a process that was killed; nobody else cleans up
        with contextlib.suppress(OSError):
            if time.time() - abandoned.stat().st_mtime > 3600:
                abandoned.unlink()
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    try:
        with os.fdopen(handle, "wb", buffering=_HUGE_PAGE) as stream:
            for chunk in chunks:
                data = memoryview(chunk)
                while data:  # cut where a huge page ends, which is where the buffer is full
                    count = _HUGE_PAGE - stream.tell() % _HUGE_PAGE
                    stream.write(data[:count])
                    data = data[count:]
    except BaseException:
        os.unlink(name)
        raise
    return Path(name)


def _publish(written: Path, path: Path) -> None:
    """Put a written file in its place, once it is on the disk.

    Without the wait, a power failure could leave a file of the right name and length, full of zeros.
    """
    try:
        with written.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(written, path)
    except OSError as error:
        warnings.warn(f"{path} was not kept: {error}; see to the disk and start again", stacklevel=2)
        written.unlink(missing_ok=True)
