"""A computed prefix on disk, so that a long system prompt survives a restart.

A safetensors file: the token ids, and the bytes of the blocks as they lie in the KV cache. These belong to
one model, computed one way; the ``identity`` in the header says which, and a file of another one is refused.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..errors import PeltonError

Bytes = npt.NDArray[np.uint8]

_VERSION = "1"


class PrefixFileError(PeltonError):
    """A file with a prefix cannot be written, read or used."""


def write_prefix(path: Path, identity: str, token_ids: Sequence[int], blocks: Sequence[Bytes]) -> None:
    """Write a prefix beside its place and move it there when it is whole.

    blocks: uint8 [num_blocks, bytes], one per part of the KV cache.

    Raises:
        PrefixFileError: the folder cannot be written.
    """
    from safetensors.numpy import save_file

    tensors = {f"cache.{i}": np.ascontiguousarray(block) for i, block in enumerate(blocks)}
    tensors["token_ids"] = np.asarray(token_ids, np.int32)
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        os.close(handle)
        try:
            save_file(tensors, name, {"format": "pelton prefix", "version": _VERSION, "identity": identity})
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise PrefixFileError(f"{path} cannot be written ({error.strerror or error})", "choose another place") from None


def read_prefix(path: Path, identity: str) -> tuple[list[int], list[Bytes]]:
    """(token ids, uint8 [num_blocks, bytes] per part of the KV cache).

    Raises:
        PrefixFileError: there is no such file, it is none of these, or it belongs to another model.
    """
    from safetensors import SafetensorError, safe_open

    remedy = "save the prefix again"
    try:
        with safe_open(path, "np") as file:
            header = file.metadata() or {}
            if header.get("format") != "pelton prefix" or header.get("version") != _VERSION:
                raise PrefixFileError(f"{path} holds no prefix that this version reads", remedy)
            if header.get("identity") != identity:
                raise PrefixFileError(
                    f"{path} was computed by another model, or in another precision or instruction set", remedy
                )
            names = sorted((n for n in file.keys() if n.startswith("cache.")), key=lambda n: int(n[6:]))  # noqa: SIM118
            token_ids = file.get_tensor("token_ids")
            if token_ids.dtype != np.int32 or token_ids.ndim != 1:
                raise PrefixFileError(f"{path} holds no token ids", remedy)
            return token_ids.tolist(), [file.get_tensor(name) for name in names]
    except FileNotFoundError:
        raise PrefixFileError(f"{path} does not exist", "save a prefix there first") from None
    except (OSError, SafetensorError, ValueError) as error:
        raise PrefixFileError(f"{path} cannot be read ({error})", remedy) from None
