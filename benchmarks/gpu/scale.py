"""How large everything is: the model's shapes, batches, prompts and repetitions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "max_position_embeddings": 8192, "vocab_size": 128256, "tie_word_embeddings": False,
    "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
#: The config.json of a model, by the name that --model has for it.
MODELS: dict[str, dict[str, Any]] = {
    "llama-8b": _LLAMA | {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128,
    },
    "llama-1b": _LLAMA | {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
    },
    "tiny": _LLAMA | {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 128, "max_position_embeddings": 256,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """Lengths are tokens."""

    model: str = "llama-8b"
    dtype: str = "bf16"
    # One sequence.
    prompt_len: int = 2048
    output_len: int = 128
    chunk: int = 2048  # tokens of a step: the prompt is one
    iterations: int = 5
    # Batches that come together.
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    batch_prompt_len: int = 512
    batch_output_len: int = 128
    batch_chunk: int = 8192
    # Requests of many lengths.
    seats: int = 64
    requests: int = 320
    longest: int = 2048
    # Low precision, by the names of precision.py. Prompts and outputs of the budget are those of one sequence.
    precisions: tuple[str, ...] = ("bf16", "fp8", "int4", "w8a8", "int8", "nvfp4", "kv-fp8", "kv-int8")
    precision_iterations: int = 3
    precision_batches: tuple[int, ...] = (1, 4, 16, 64, 256)
    budgets: tuple[float, ...] = (1, 2, 4, 6, 8, 10)  # seconds that a response may take
    budget_seats: int = 256
    budget_chunk: int = 4096
    least_requests: int = 4
    roofline_batches: tuple[int, ...] = (1, 16, 64)
    quality_tokens: int = 512
    # Peaks.
    copy_bytes: tuple[int, ...] = (1 << 30, 2 << 30, 4 << 30)
    matmul_size: int = 8192
    repeats: int = 20
    # Checks.
    small: bool = False  # models of one layer, some dozens wide
    prompt_lens: tuple[int, ...] = (1, 5, 33, 129, 300, 128)
    check_chunk: int = 128
    check_tokens: int = 64
    sampled_steps: int = 16
    check_dtypes: tuple[str, ...] = ("f32", "bf16", "f16")
    families: tuple[str, ...] = ()  # () is all

    @property
    def config(self) -> Mapping[str, Any]:
        return MODELS[self.model]


FULL = Scale()
#: For the interpreter on a CPU, where a kernel takes milliseconds to seconds.
TINY = Scale(
    model="tiny", prompt_len=9, output_len=4, chunk=16, iterations=1,
    batches=(1, 2), batch_prompt_len=5, batch_output_len=4, batch_chunk=16,
    seats=2, requests=3, longest=16,
    precision_iterations=1, precision_batches=(2,), budgets=(0.5, 1), budget_seats=4, budget_chunk=16,
    least_requests=2, roofline_batches=(2,),
    copy_bytes=(1 << 20,), matmul_size=64, repeats=2,
    small=True, prompt_lens=(3, 19), check_chunk=16, check_tokens=4, sampled_steps=2, families=("llama",),
)  # fmt: skip
