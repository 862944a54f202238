"""llama.cpp through its C API, as its own llama-bench and llama-batched-bench use it."""

from __future__ import annotations

import ctypes
import time
from typing import Any

import llama_cpp as lc
import numpy as np
from serve import serve

UBATCH = 512  # llama.cpp's default
PAGE = 256  # its KV cache grows in these steps


class Context:
    """A llama_context for `sequences` of at most `length` tokens."""

    def __init__(self, model: Any, vocab: int, sequences: int, length: int, threads: int) -> None:
        params = lc.llama_context_default_params()
        params.n_ctx = sequences * -(-length // PAGE) * PAGE
        params.n_batch = 2048
        params.n_ubatch = UBATCH
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = 1  # LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.kv_unified = False  # each sequence attends to its own cells only
        params.no_perf = True
        self.pointer = lc.llama_init_from_model(model, params)
        if not self.pointer:
            raise MemoryError(f"llama_init_from_model failed for {sequences} x {length} tokens")
        self.vocab = vocab
        self.n_batch = params.n_batch
        self.batch = lc.llama_batch_init(params.n_batch, 0, 1)

    def decode(self, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Rows of (token, position, sequence, wanted); greedy tokens of the wanted ones, in their order."""
        made = []
        for begin in range(0, len(rows), self.n_batch):
            part = rows[begin : begin + self.n_batch]
            batch = self.batch
            batch.n_tokens = len(part)
            for i, (token, position, sequence, wanted) in enumerate(part):
                batch.token[i] = token
                batch.pos[i] = position
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = sequence
                batch.logits[i] = wanted
            if lc.llama_decode(self.pointer, batch):
                raise RuntimeError("llama_decode failed")
            for i, (_, _, _, wanted) in enumerate(part):
                if wanted:
                    logits = lc.llama_get_logits_ith(self.pointer, i)
                    made.append(int(np.ctypeslib.as_array(logits, (self.vocab,)).argmax()))
        return made

    def clear(self) -> None:
        lc.llama_memory_clear(lc.llama_get_memory(self.pointer), False)

    def close(self) -> None:
        lc.llama_batch_free(self.batch)
        lc.llama_free(self.pointer)


def _rows(tokens: list[int], sequence: int) -> list[tuple[int, int, int, bool]]:
    return [(t, i, sequence, i == len(tokens) - 1) for i, t in enumerate(tokens)]


class Engine:
    def __init__(self, model: str, precision: str, threads: int, max_len: int, max_seqs: int) -> None:
        self._quiet = lc.llama_log_callback(lambda level, text, data: None)  # kept, or C calls freed memory
        lc.llama_log_set(self._quiet, ctypes.c_void_p(0))
        lc.llama_backend_init()
        params = lc.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = lc.llama_model_load_from_file(model.encode(), params)
        if not self.model:
            raise RuntimeError("llama_model_load_from_file failed")
        self.vocab = lc.llama_vocab_n_tokens(lc.llama_model_get_vocab(self.model))
        self.threads, self.max_len = threads, max_len
        self.version = f"llama-cpp-python {lc.__version__}"
        self.settings: dict[str, Any] = {
            "n_ubatch": UBATCH,
            "flash_attn": True,
            "kv_unified": False,
            "weights": "repacked where it has kernels for it",
            "kv_cache": "f16",
            "n_threads": threads,
            "system": lc.llama_print_system_info().decode().strip(),
        }
        self.context: Context | None = None
        self.shape = (0, 0)

    def _context(self, sequences: int, length: int) -> Context:
        """The context of that shape; making one is no part of what is timed."""
        if self.context is None or self.shape != (sequences, length):
            if self.context is not None:
                self.context.close()
            self.context = Context(self.model, self.vocab, sequences, length, self.threads)
            self.shape = (sequences, length)
        self.context.clear()
        return self.context

    def generate(self, tokens: list[int], count: int) -> tuple[float, float, list[int]]:
        context = self._context(1, self.max_len)
        start = time.perf_counter()
        made = context.decode(_rows(tokens, 0))
        first = time.perf_counter()
        for i in range(count):
            made += context.decode([(made[-1], len(tokens) + i, 0, True)])
        return first - start, time.perf_counter() - first, made

    def batch(self, prompts: list[list[int]], count: int) -> tuple[float, int]:
        length = len(prompts[0])
        context = self._context(len(prompts), length + count)
        start = time.perf_counter()
        last = context.decode([row for i, p in enumerate(prompts) for row in _rows(p, i)])
        for step in range(count - 1):
            last = context.decode([(t, length + step, i, True) for i, t in enumerate(last)])
        return time.perf_counter() - start, len(prompts) * count


if __name__ == "__main__":
    serve(Engine)
