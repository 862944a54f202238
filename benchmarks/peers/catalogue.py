"""What is compared: models, peers, the precisions of each peer, workloads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Model:
    """config: Hugging Face fields of a model with random weights; empty: the demo model and its real weights."""

    name: str
    title: str
    config: Mapping[str, Any] = field(default_factory=dict)
    bits: tuple[int, ...] = (16, 8, 4)  # the weight precisions that fit an ordinary machine
    gguf_only: bool = False  # a bf16 folder would not fit, so nothing that is converted from one can take part


@dataclass(frozen=True)
class Precision:
    """How a peer stores weights.

    bits: the class it is compared in. source: "hf" (the bf16 folder), "gguf" (a file of that name), or
    "convert" (what the peer's own converter makes of the folder). elsewhere: why it takes part in the models
    `only` alone; empty: the precision does not exist elsewhere.
    """

    name: str
    bits: int
    source: str
    only: tuple[str, ...] = ()  # models; empty: all
    elsewhere: str = ""
    note: str = ""


@dataclass(frozen=True)
class Peer:
    name: str
    title: str
    precisions: tuple[Precision, ...]
    batching: str  # how several sequences run together
    own_environment: bool = True  # Pelton runs in the environment of the benchmark

    @property
    def worker(self) -> Path:
        return HERE / "workers" / f"{self.name}_worker.py"

    @property
    def requirements(self) -> Path:
        return HERE / "requirements" / f"{self.name}.txt"


@dataclass(frozen=True)
class Workload:
    """sequences == 1: prefill `prompt` tokens, then decode `output` more. Otherwise: all prompts at once."""

    name: str
    sequences: int
    prompt: int
    output: int


_LLAMA_1B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "attention_bias": False,
    "mlp_bias": False, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16", "hidden_size": 2048,
    "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 64, "vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0,
    "tie_word_embeddings": True,
}  # fmt: skip
_LLAMA_8B = _LLAMA_1B | {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128,
    "tie_word_embeddings": False,
}  # fmt: skip
_QWEN_05B = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "torch_dtype": "bfloat16", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 8192,
    "rope_theta": 1000000.0, "tie_word_embeddings": True, "use_sliding_window": False,
}  # fmt: skip

MODELS = {
    m.name: m
    for m in (
        Model("smollm2", "SmolLM2-135M-Instruct"),
        Model("llama-1b", "Llama-3.2-1B shapes, random weights", _LLAMA_1B),
        Model("qwen-0.5b", "Qwen2.5-0.5B shapes, random weights", _QWEN_05B),
        Model("llama-8b", "Llama-3.1-8B shapes, random weights", _LLAMA_8B, bits=(4,), gguf_only=True),
    )
}

#: What stands in for 16 bits where an engine has none: worth its disk and memory for a small model only.
_F32: dict[str, Any] = {
    "only": ("smollm2",),
    "elsewhere": "it has no 16-bit weights on this kind of CPU, and f32 at this size would be another contest",
    "note": "no 16-bit weights on this kind of CPU: twice the bytes",
}

_GGUF = (
    Precision("Q8_0", 8, "gguf"),
    Precision("Q4_1", 4, "gguf", only=("smollm2",), note="the published file"),
    Precision("Q4_0", 4, "gguf"),
)

#: Pelton comes first: it is what the others are compared with.
PEERS = {
    p.name: p
    for p in (
        Peer("pelton", "Pelton", (Precision("bf16", 16, "hf"), *_GGUF), "in-flight batching", own_environment=False),
        Peer("llama_cpp", "llama.cpp", (Precision("BF16", 16, "gguf"), *_GGUF), "one llama_decode for all sequences"),
        Peer(
            "openvino_genai",
            "OpenVINO GenAI",
            (Precision("bf16", 16, "convert"), Precision("int8", 8, "convert"), Precision("int4", 4, "convert")),
            "in-flight batching",
        ),
        Peer(
            "vllm_cpu",
            "vLLM (CPU)",
            (
                Precision("bf16", 16, "hf"),
                Precision("W8A8", 8, "convert", note="int8 activations"),
                Precision("W4A16", 4, "convert"),
            ),
            "in-flight batching",
        ),
        Peer(
            "transformers",
            "transformers",
            (
                Precision("bf16", 16, "hf", note="eager"),
                Precision("bf16 compiled", 16, "hf", note="torch.compile"),
            ),
            "one static batch of equal lengths",
        ),
        Peer(
            "onnxruntime_genai",
            "ONNX Runtime GenAI",
            (
                Precision("f32", 16, "convert", **_F32),
                Precision("int8", 8, "convert"),
                Precision("int4", 4, "convert"),
            ),
            "one static batch of equal lengths",
        ),
        Peer(
            "ctranslate2",
            "CTranslate2",
            (
                Precision("f32", 16, "convert", **_F32),
                Precision("int8", 8, "convert"),
            ),
            "one static batch of equal lengths",
        ),
    )
}

SINGLE = (Workload("512", 1, 512, 32), Workload("2048", 1, 2048, 32))
BATCH = tuple(Workload(f"{n} sequences", n, 128, 64) for n in (8, 32, 64))
#: What --quick runs: enough to see that a peer works, too short to compare.
QUICK = (Workload("128", 1, 128, 8), Workload("4 sequences", 4, 32, 8))
MAX_LEN = 2048 + 64  # tokens of the longest sequence, prompt and output


def workloads(names: list[str] | None, quick: bool) -> tuple[Workload, ...]:
    """The workloads called `names` ("512", "2048", "8", "32", "64"); None: all."""
    every = QUICK if quick else SINGLE + BATCH
    return tuple(w for w in every if names is None or w.name.split()[0] in names)
