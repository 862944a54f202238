"""The same shapes in transformers: bf16, its default attention, ``generate`` on static batches, nothing compiled."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from .device import empty_cache, synchronize, torch_device
from .inflight import lengths
from .part import OutOfTimeError, Part
from .peaks import torch_type

#: As for Pelton: batches up to this size are run once before they are measured.
_WARM = 16


def random_model(part: Part) -> Any:
    """On the device; weights as transformers draws them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = {k: v for k, v in part.scale.config.items() if k not in ("architectures", "model_type")}
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch_type(part.scale.dtype))
    try:
        with torch.device(torch_device()):
            model = LlamaForCausalLM(LlamaConfig(**fields)).eval()
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = None  # answers have the length that is asked for
    model.generation_config.pad_token_id = 0
    return model


class Peer:
    """Generates greedily, until the part is out of time."""

    def __init__(self, part: Part) -> None:
        from transformers import StoppingCriteria

        class Clock(StoppingCriteria):  # type: ignore[misc]
            def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
                import torch

                return torch.full((len(input_ids),), part.left() < 5, device=input_ids.device)

        self._part = part
        self._model = random_model(part)
        self._criteria = [Clock()]

    def seconds(self, prompt_lens: Sequence[int], output_len: int) -> float:
        """Of a static batch: prompts padded on the left to the longest, all outputs as long as the longest.

        Raises:
            OutOfTimeError: it did not get so far.
        """
        import torch

        width = max(prompt_lens)
        ids = torch.randint(2, self._part.scale.config["vocab_size"], (len(prompt_lens), width))
        mask = torch.ones_like(ids)
        for row, length in zip(mask, prompt_lens, strict=True):
            row[: width - length] = 0
        ids, mask = ids.to(torch_device()), mask.to(torch_device())
        synchronize()
        start = time.perf_counter()
        with torch.inference_mode():
            out = self._model.generate(
                ids, attention_mask=mask, max_new_tokens=output_len, do_sample=False, stopping_criteria=self._criteria
            )
        synchronize()
        seconds = time.perf_counter() - start
        if out.shape[1] != width + output_len:
            raise OutOfTimeError(f"{out.shape[1] - width} of {output_len} tokens")
        return seconds


def run(part: Part) -> None:
    import transformers

    part.data["transformers"] = transformers.__version__
    part.say("making the model")
    peer = Peer(part)
    part.data["attention"] = peer._model.config._attn_implementation
    scale = part.scale
    peer.seconds([scale.batch_prompt_len], 4)
    _one(part, peer)
    _batches(part, peer)
    _sharegpt(part, peer)


def _one(part: Part, peer: Peer) -> None:
    scale = part.scale
    _batch(part, peer, 1, scale.prompt_len, scale.output_len)


def _batch(part: Part, peer: Peer, batch: int, prompt: int, output: int) -> None:
    if batch <= _WARM:
        peer.seconds([prompt] * batch, 2)
    first = peer.seconds([prompt] * batch, 1)
    seconds = peer.seconds([prompt] * batch, output)
    part.row(
        what="batch", batch=batch, prompt=prompt, output=output, seconds=seconds, ttft_ms=1e3 * first,
        tpot_ms=1e3 * (seconds - first) / (output - 1), output_tokens_per_s=batch * output / seconds,
    )  # fmt: skip


def _batches(part: Part, peer: Peer) -> None:
    import torch

    scale = part.scale
    for batch in scale.batches:
        part.check()
        try:
            _batch(part, peer, batch, scale.batch_prompt_len, scale.batch_output_len)
        except torch.OutOfMemoryError as error:
            part.row(what="batch", batch=batch, failure=str(error).split("\n")[0][:200])
            empty_cache()
            break


def _sharegpt(part: Part, peer: Peer) -> None:
    """As many static batches as the time allows; tokens that nobody asked for do not count."""
    scale = part.scale
    tokens, seconds, done = 0, 0.0, 0
    asked = lengths(part)
    for start in range(0, len(asked), scale.seats):
        some = asked[start : start + scale.seats]
        if done and (len(some) < scale.seats or part.left() < 1.2 * seconds * scale.seats / done):
            break
        seconds += peer.seconds([p for p, _ in some], max(o for _, o in some))
        tokens += sum(o for _, o in some)
        done += len(some)
        part.say(f"{done} conversations, {tokens / seconds:,.0f} tokens/s")
    part.row(
        what="sharegpt", requests=done, seats=scale.seats, seconds=seconds, output_tokens_per_s=tokens / seconds
    )  # fmt: skip
