"""Read-only memory maps of weight files."""

from __future__ import annotations

import mmap
from pathlib import Path

from ..errors import CheckpointError


def map_file(path: Path) -> mmap.mmap:
    """Map a whole file read-only; views of it keep the map alive.

    Raises:
        CheckpointError: the file is missing, unreadable or empty.
    """
    try:
        with path.open("rb") as file:
            if path.stat().st_size == 0:
                raise CheckpointError(f"{path} is empty", "download the file again")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist", "check the path") from None
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror or error}", "check the path and its rights"
        ) from None
