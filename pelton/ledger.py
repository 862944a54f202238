"""The memory ledger: what a model will need, known before anything is loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

#: Interpreter, libraries and the tokenizer; measured on CPython 3.11 with SmolLM2.
RUNTIME_BYTES = 120 << 20


@dataclass(frozen=True, slots=True)
class Ledger:
    """Bytes by purpose. ``mapped`` is read from disk where it is needed and can be dropped again."""

    weights: int  # packed matrices and vectors
    mapped: int  # looked-up tables (embeddings)
    kv_cache: int
    kv_bytes_per_token: int
    kv_tokens: int
    arena: int  # activations and logits of the largest step
    draft: int = 0  # the speculative model, but for its KV cache
    adapters: int = 0  # max_loras at max_lora_rank
    runtime: int = RUNTIME_BYTES

    @property
    def total(self) -> int:
        """What must fit in memory; mapped tables count, because a long batch touches most of them."""
        return self.weights + self.mapped + self.kv_cache + self.arena + self.draft + self.adapters + self.runtime

    def rows(self) -> list[tuple[str, int, str]]:
        """(purpose, bytes, remark) for a table."""
        draft = [("speculative model", self.draft, "weights and activations")] if self.draft else []
        return [
            ("weights", self.weights, "packed"),
            ("lookup tables", self.mapped, "mapped from disk, touched rows only"),
            ("KV cache", self.kv_cache, f"{self.kv_tokens:,} tokens of {self.kv_bytes_per_token:,} bytes"),
            ("activations", self.arena, "arena of the largest step"),
            *draft,
            *([("adapters", self.adapters, "max_loras of max_lora_rank")] if self.adapters else []),
            ("runtime", self.runtime, "Python and libraries"),
            ("total", self.total, ""),
        ]


def available_memory() -> int:
    """Bytes that this process may still take: the machine's available memory, or its cgroup's if less."""
    limits = [_meminfo_available()]
    for folder, limit, usage, prefix in (
        ("/sys/fs/cgroup", "memory.max", "memory.current", ""),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        group = Path(folder)
        try:
            free = int((group / limit).read_text()) - int((group / usage).read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue  # no such cgroup version, or the limit is "max"
        # Usage counts the page cache, which the kernel gives back on demand: a model file just
        # downloaded would else look like memory in use.
        limits.append(free + sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive")))
    return max(0, min(limits))


def _meminfo_available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return int(os.sysconf("SC_PHYS_PAGES")) * int(os.sysconf("SC_PAGE_SIZE"))


def human(size: float) -> str:
    """Bytes for people: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024 or unit == "TiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError
