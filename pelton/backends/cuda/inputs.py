"""The inputs of a step as one block of int32 words: one copy to the device, whatever the step is made of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..step_inputs import Ints
from .triton.sampling import NUM_WORDS

#: Fields begin at multiples of so many words: Triton compiles a kernel anew for pointers of another alignment.
_ALIGN = 4


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a step's inputs and outputs are as large as.

    tokens, sequences, rows (of hidden states), logits: T, S, N, L. decodes: sequences with one token, which have a
    kernel of their own; tiles: pieces of the others.
    """

    tokens: int
    sequences: int
    rows: int
    logits: int
    decodes: int
    tiles: int

    @classmethod
    def decode(cls, bucket: int) -> Sizes:
        """Of a step with one token for each of ``bucket`` sequences, all of them sampled from."""
        return cls(bucket, bucket, bucket, bucket, bucket, 0)

    def __getitem__(self, dim: str) -> int:
        """By the name of a step dimension."""
        return {"T": self.tokens, "S": self.sequences, "N": self.rows, "L": self.logits}[dim]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every input but the block table, which is last and as wide as the step needs."""
        return {
            "table_width": (1,),
            "token_ids": (self.tokens,),
            "pending": (self.tokens,),
            "positions": (self.tokens,),
            "slot_mapping": (self.tokens,),
            "lora_slots": (self.tokens,),
            "seq_lens": (self.sequences,),
            "query_start_loc": (self.sequences + 1,),
            "logits_indices": (self.rows,),
            "logits_lora_slots": (self.rows,),
            "decodes": (self.decodes,),
            "tiles": (self.tiles, 2),
            "sampling": (self.logits, NUM_WORDS),
        }


@lru_cache(maxsize=256)  # decode steps have few sizes
def layout(sizes: Sizes) -> tuple[dict[str, slice], int]:
    """Where each input lies, and where the block table begins: in words."""
    places, at = {}, 0
    for name, shape in sizes.shapes().items():
        count = math.prod(shape)
        places[name] = slice(at, at + count)
        at += -(-count // _ALIGN) * _ALIGN
    return places, at


#: What inputs hold for rows that only fill a bucket up: nothing is written to the KV cache, no sequence is read.
_PADDING = {"pending": -1, "slot_mapping": -1}


class DeviceInputs:
    """Device memory for the inputs of a step, and two places on the host that are copied from in turn.

    most: the largest step. table_words: the largest block table.
    """

    def __init__(self, device: torch.device, most: Sizes, table_words: int) -> None:
        words = layout(most)[1] + table_words
        pinned = device.type == "cuda"
        self.words = torch.zeros(words, dtype=torch.int32, device=device)
        self._staged = [torch.zeros(words, dtype=torch.int32, pin_memory=pinned) for _ in range(2)]
        self._turn = 0

    def views(self, sizes: Sizes) -> dict[str, torch.Tensor]:
        """The inputs of steps of this size on the device; the block table is flat and has no end."""
        places, end = layout(sizes)
        shapes = sizes.shapes()
        views = {name: self.words[place].view(shapes[name]) for name, place in places.items()}
        views["block_table"] = self.words[end:]
        return views

    def write(self, sizes: Sizes, arrays: Mapping[str, Ints]) -> None:
        """Send the inputs of a step to where ``views`` of this size are. Inputs may have fewer rows than those.

        May return before they are there: the host's copy must not be used again before the step has run, hence at most
        two steps may be on their way.
        """
        staged, self._turn = self._staged[self._turn], 1 - self._turn
        places, end = layout(sizes)
        words: npt.NDArray[Any] = staged.numpy()
        for name, place in places.items():
            given = arrays.get(name)
            count = 0 if given is None else given.size
            if given is not None:
                words[place.start : place.start + count] = given.reshape(-1)
            words[place.start + count : place.stop] = _PADDING.get(name, 0)
        table = arrays["block_table"]
        words[places["table_width"]] = table.shape[1]
        words[end : end + table.size] = table.reshape(-1)
        stop = end + table.size
        self.words[:stop].copy_(staged[:stop], non_blocking=True)


def padded(arrays: Mapping[str, Ints], bucket: int) -> dict[str, Ints]:
    """The inputs of a step of decodes for a bucket: sequences that fill it up have no tokens and a row each."""
    rows = np.arange(bucket + 1, dtype=np.int32)
    return {**arrays, "query_start_loc": rows, "logits_indices": rows[:-1], "decodes": rows[:-1]}
