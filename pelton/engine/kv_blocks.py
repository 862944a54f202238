"""Which blocks of the KV cache are in use, and by how many sequences."""

from __future__ import annotations

from collections.abc import Iterable


class BlockAllocator:
    """Hands out block ids in [0, num_blocks) and counts the references to each.

    A block may belong to several sequences (``fork``); it is free again when the last of them frees
    it. The methods raise RuntimeError on misuse, which is a bug in the caller and never an input error.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise RuntimeError(f"a KV pool of {num_blocks} blocks")
        self.num_blocks = num_blocks
        # A stack: the block freed last is the one most likely still in the processor's cache.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._references = [0] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> tuple[int, ...]:
        """Take ``count`` blocks with one reference each. Check ``num_free`` first."""
        if not 0 <= count <= len(self._free):
            raise RuntimeError(f"{count} KV blocks wanted, {len(self._free)} free")
        taken = tuple(self._free.pop() for _ in range(count))
        for block in taken:
            self._references[block] = 1
        return taken

    def fork(self, block_ids: Iterable[int]) -> None:
        """Add a reference to each block: another sequence reads them too."""
        for block in block_ids:
            if self._references[block] < 1:
                raise RuntimeError(f"KV block {block} is forked while free")
            self._references[block] += 1

    def free(self, block_ids: Iterable[int]) -> None:
        """Drop one reference to each block."""
        for block in block_ids:
            references = self._references[block]
            if references < 1:
                raise RuntimeError(f"KV block {block} is freed twice")
            self._references[block] = references - 1
            if references == 1:
                self._free.append(block)

    def references(self, block: int) -> int:
        return self._references[block]

    def check(self, in_use: Iterable[Iterable[int]] | None = None) -> None:
        """Verify that every block is either free or referenced, exactly once in the books.

        ``in_use``, the block lists of all live sequences, is compared with the counts if given.

        Raises:
            RuntimeError: the books are wrong; the message names a block.
        """
        free = set(self._free)
        if len(free) != len(self._free):
            raise RuntimeError("a KV block is in the free list twice")
        for block, references in enumerate(self._references):
            if (references == 0) != (block in free):
                raise RuntimeError(f"KV block {block} has {references} references, free list says {block in free}")
        if in_use is None:
            return
        counted = [0] * self.num_blocks
        for block_ids in in_use:
            for block in block_ids:
                counted[block] += 1
        for block, (expected, references) in enumerate(zip(counted, self._references, strict=True)):
            if expected != references:
                raise RuntimeError(f"KV block {block} has {references} references, {expected} sequences hold it")
