"""Where Pelton keeps what it can make again: packed weights, measured peaks."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """``PELTON_CACHE``, else ``$XDG_CACHE_HOME/pelton``, else ``~/.cache/pelton``. Not created here."""
    if explicit := os.environ.get("PELTON_CACHE"):
        return Path(explicit).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "pelton"
