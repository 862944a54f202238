"""Tiny models for tools/aarch64.sh: what transformers says of them here, which Pelton has to say there.

python -m tools.aarch64_models write FOLDER: checkpoints and greedy tokens; needs torch and transformers, not the
native module. python -m tools.aarch64_models check FOLDER: Pelton's tokens are the same; needs neither of the two.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

#: Between them every kind of norm, position, activation, attention mask and soft-cap.
FAMILIES = ["llama", "gemma2", "gpt2", "bloom"]
COUNT = 16


def write(folder: Path) -> None:
    from tests.helpers.families import greedy_oracle
    from tests.helpers.tiny_models import tiny_checkpoint

    for family in FAMILIES:
        prompt, tokens, _ = greedy_oracle(family, COUNT)
        shutil.copytree(tiny_checkpoint(family)[0], folder / family)
        (folder / family / "tokens.json").write_text(json.dumps([prompt, tokens]))


def check(folder: Path) -> None:
    from pelton import LLM, SamplingParams

    for family in FAMILIES:
        prompt, want = json.loads((folder / family / "tokens.json").read_text())
        params = SamplingParams(temperature=0.0, max_tokens=COUNT, ignore_eos=True)
        with LLM(model=str(folder / family), device="cpu", threads=2, packed_cache=False, max_num_seqs=4) as llm:
            got = list(llm.generate({"prompt_token_ids": prompt}, params)[0].outputs[0].token_ids)
        assert got == want, f"{family}: {got} instead of {want}"
    print(f"{COUNT} greedy tokens of tiny {', '.join(FAMILIES)}: those of transformers")


if __name__ == "__main__":
    {"write": write, "check": check}[sys.argv[1]](Path(sys.argv[2]))
