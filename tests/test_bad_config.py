"""Config values changed at random: a plan or a PeltonError, never anything else.

Seeded, so that a failure repeats.
"""

import copy
import json
import math
import random
import shutil
import time

import pytest

from pelton.build import plan
from pelton.config import EngineConfig
from pelton.errors import PeltonError
from tests.helpers.tiny_models import tiny_checkpoint

CASES = 250  # per family
SECONDS = 2.0  # at most, per case
ABSURD = [
    0, 1, -1, 2, 3, 7, 1.5, -0.0, 1e-30, 1e30, 1e308, math.nan, math.inf, 10**12, 2**31, 2**63, 2**64, True, False,
    None, "", "x", "0", "silu", [], [0], ["a"], {}, {"a": 1}, {"rope_type": "llama3"},
    {"rope_type": "yarn", "factor": "x"},
    {"rope_type": "linear", "factor": 0}, {"rope_type": []}, {"factor": math.nan, "rope_type": "yarn"},
    {"full_attention": 3, "sliding_attention": []}, [[[]]], "sliding_attention", ["sliding_attention"],
]  # fmt: skip
EXTRA = [
    "rope_scaling", "rope_parameters", "rope_theta", "head_dim", "sliding_window", "partial_rotary_factor",
    "layer_types", "attention_bias", "mlp_bias", "use_sliding_window", "max_window_layers", "query_pre_attn_scalar",
    "final_logit_softcapping", "attn_logit_softcapping", "sliding_window_pattern", "architectures", "model_type",
    "n_inner", "eos_token_id", "hidden_activation", "tie_word_embeddings",
]  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "qwen2-window", "gemma2", "gemma3", "gpt2", "bloom"])
def test_mutated_configs_give_a_plan_or_a_pelton_error(family, tmp_path):
    source, _ = tiny_checkpoint(family)
    folder = tmp_path / family
    shutil.copytree(source, folder)
    original = json.loads((folder / "config.json").read_text())
    rng = random.Random(family)
    outcomes = set()
    for case in range(CASES):
        config = copy.deepcopy(original)
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            target = config
            nested = [v for v in config.values() if isinstance(v, dict) and v]
            if nested and rng.random() < 0.3:
                target = rng.choice(nested)
            name = rng.choice([*target, *EXTRA])
            if rng.random() < 0.15:
                target.pop(name, None)
            else:
                target[name] = copy.deepcopy(rng.choice(ABSURD))
        (folder / "config.json").write_text(json.dumps(config))
        start = time.perf_counter()
        try:
            plan(EngineConfig(model=str(folder), max_num_seqs=2, max_num_batched_tokens=8))
            outcomes.add("plan")
        except PeltonError as error:
            assert "\n" not in str(error)
            outcomes.add("error")
        except Exception as error:
            changed = {k: v for k, v in config.items() if original.get(k, "absent") != v}
            removed = set(original) - set(config)
            raise AssertionError(f"case {case}: {error!r} for {changed}, removed {removed}") from error
        assert time.perf_counter() - start < SECONDS, f"case {case} took too long: {config}"
    assert outcomes == {"plan", "error"}
