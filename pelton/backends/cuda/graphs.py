"""CUDA graphs of decode steps: captured once per bucket of sequences, replayed with one call."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch

from .device import Device

#: capture(run) runs it, records it, and returns what replays it.
Capture: TypeAlias = Callable[[Callable[[], None]], Callable[[], None]]


def buckets_for(max_num_seqs: int) -> list[int]:
    """Powers of two and the numbers half way between, up to ``max_num_seqs``: of a step, 3/8 are padding at most."""
    steps = [1, 2, 4, *(n << shift for shift in range(2, 20) for n in (2, 3))]
    return [*(n for n in steps if n < max_num_seqs), max_num_seqs]


class Graphs:
    """A recorded step per bucket.

    prepare(bucket) sends inputs that such a step can run on, run(bucket) runs it, in memory that stays where it is.
    """

    def __init__(
        self, max_num_seqs: int, prepare: Callable[[int], None], run: Callable[[int], None], capture: Capture
    ) -> None:
        self._buckets = buckets_for(max_num_seqs)
        self._replays: dict[int, Callable[[], None]] = {}
        for bucket in reversed(self._buckets):  # the largest first: the memory it takes serves the others
            prepare(bucket)
            self._replays[bucket] = capture(partial(run, bucket))

    def bucket(self, num_seqs: int) -> int:
        """The smallest bucket that holds so many sequences."""
        return self._buckets[bisect_left(self._buckets, num_seqs)]

    def replay(self, bucket: int) -> None:
        self._replays[bucket]()


class CudaCapture:
    """A :data:`Capture` on a device; all graphs share the memory that is taken during a capture."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        run()  # compiles kernels and lets libraries take their workspaces, which a capture must not
        self._device.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile: only what this one does is recorded, or forbidden.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._device.stream, capture_error_mode="thread_local"):
            run()
        return graph.replay  # type: ignore[no-any-return]
