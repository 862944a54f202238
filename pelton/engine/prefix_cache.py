"""Prefix caching: full KV blocks found again by what they hold.

The keys and values of a token depend on all tokens before it, so a full block is identified by a chain of hashes: the
key of the block before it and its own token ids. The chain starts with the tenant's salt, and different salts share
nothing. Keys are 128 bits of BLAKE2b: a collision would answer with somebody else's context, so it must not happen,
nor be made to happen.

A block that no sequence holds keeps its content until the pool needs it. The one to go is of the lowest retention
priority, and among those the least recently used; of one sequence the last block goes first, as a prefix is of use
without its end, but never the other way round.
"""

from __future__ import annotations

import hashlib
import heapq
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

Key = bytes


@dataclass(frozen=True, slots=True)
class CachePolicy:
    """How a request uses the prefix cache.

    salt: requests with different salts share no blocks, so that nobody can tell by the time to the first token what
    another tenant asked. retention: 0 to 100; blocks of lower ones are evicted first. ttl: seconds after its last
    use that a block may be found; None: as long as there is room. read, store: whether to look for blocks, and
    whether to leave any.
    """

    salt: str = ""
    retention: int = 35
    ttl: float | None = None
    read: bool = True
    store: bool = True


def root_key(salt: str, adapter: str = "") -> Key:
    """Where the chains of a tenant start; ``adapter``: the identity of the adapter that computes."""
    if adapter:  # two texts, so the first one's length is hashed as well
        text = f"{len(adapter)} {adapter}{salt}".encode()
        return hashlib.blake2b(text, digest_size=16, person=b"pelton lora").digest()
    return hashlib.blake2b(salt.encode(), digest_size=16, person=b"pelton root").digest()


def extend_keys(keys: list[Key], root: Key, token_ids: Sequence[int], block_size: int) -> None:
    """Append the keys of all full blocks of ``token_ids`` that ``keys`` does not have yet."""
    start = len(keys) * block_size
    end = len(token_ids) // block_size * block_size
    if start >= end:
        return
    data = array("i", token_ids[start:end]).tobytes()
    step = block_size * 4
    parent = keys[-1] if keys else root
    for at in range(0, len(data), step):
        parent = hashlib.blake2b(parent + data[at : at + step], digest_size=16).digest()
        keys.append(parent)


def keys_of(token_ids: Sequence[int], salt: str, block_size: int, adapter: str = "") -> list[Key]:
    """The keys of all full blocks of ``token_ids``."""
    keys: list[Key] = []
    extend_keys(keys, root_key(salt, adapter), token_ids, block_size)
    return keys


class _Entry:
    __slots__ = ("expires", "key", "retention", "ttl")

    def __init__(self, key: Key, policy: CachePolicy) -> None:
        self.key = key
        self.retention = policy.retention
        self.ttl = policy.ttl
        self.expires: float | None = None


class PrefixCache:
    """Which block holds what, and in which order idle blocks are given up. Knows no references: see BlockPool."""

    def __init__(self) -> None:
        self._block_of: dict[Key, int] = {}
        self._entries: dict[int, _Entry] = {}
        self._idle: dict[int, OrderedDict[int, None]] = {}  # retention -> blocks, least recently used first
        self._num_idle = 0
        self._expiring: list[tuple[float, int]] = []  # a heap; entries that moved on are skipped

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_idle(self) -> int:
        """Blocks that hold something and that no sequence holds."""
        return self._num_idle

    def __contains__(self, block: int) -> bool:
        return block in self._entries

    def find(self, keys: Sequence[Key]) -> list[int]:
        """The blocks of the longest prefix of ``keys`` that is there."""
        found: list[int] = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def add(self, block: int, key: Key, policy: CachePolicy, now: float) -> bool:
        """Remember what a block in use holds. False if another block holds the same already."""
        if key in self._block_of or block in self._entries:
            return False
        self._block_of[key] = block
        self._entries[block] = _Entry(key, policy)
        self._touch(block, now)
        return True

    def use(self, block: int, policy: CachePolicy, now: float) -> None:
        """A request found the block: its time starts again, with the better of both retentions."""
        entry = self._entries[block]
        entry.retention = max(entry.retention, policy.retention)
        if entry.ttl is not None:  # what somebody keeps without limit stays so
            entry.ttl = None if policy.ttl is None else max(entry.ttl, policy.ttl)
        self._touch(block, now)

    def _touch(self, block: int, now: float) -> None:
        entry = self._entries[block]
        entry.expires = None if entry.ttl is None else now + entry.ttl
        if entry.expires is not None:
            heapq.heappush(self._expiring, (entry.expires, block))

    def forget(self, block: int) -> None:
        """The block, which must be in use, no longer holds what it held."""
        del self._block_of[self._entries.pop(block).key]

    def set_idle(self, block: int) -> None:
        """The last sequence that held the block has let go of it."""
        self._idle.setdefault(self._entries[block].retention, OrderedDict())[block] = None
        self._num_idle += 1

    def set_busy(self, block: int) -> None:
        """A sequence holds an idle block again. Call before ``use``, which may change its retention."""
        retention = self._entries[block].retention
        blocks = self._idle[retention]
        del blocks[block]
        if not blocks:
            del self._idle[retention]
        self._num_idle -= 1

    def evict(self) -> int:
        """Give up the least valuable idle block; it holds nothing from now on."""
        block = next(iter(self._idle[min(self._idle)]))
        self.set_busy(block)
        self.forget(block)
        return block

    def expire(self, now: float) -> list[int]:
        """Forget all blocks whose time is over; those of them that were idle."""
        freed = []
        while self._expiring and self._expiring[0][0] <= now:
            expires, block = heapq.heappop(self._expiring)
            entry = self._entries.get(block)
            if entry is None or entry.expires != expires:
                continue  # evicted, or used again
            if block in self._idle.get(entry.retention, ()):
                self.set_busy(block)
                freed.append(block)
            self.forget(block)
        return freed

    def idle_blocks(self) -> list[int]:
        return [block for blocks in self._idle.values() for block in blocks]

    def check(self) -> None:
        """Raises RuntimeError if the books contradict each other."""
        if {e.key: b for b, e in self._entries.items()} != self._block_of:
            raise RuntimeError("the prefix cache finds a block by another key than its own")
        idle = self.idle_blocks()
        if len(idle) != self._num_idle or not self._entries.keys() >= set(idle):
            raise RuntimeError("the prefix cache counts idle blocks wrongly")
