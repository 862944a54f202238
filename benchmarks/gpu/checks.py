"""Whole models against transformers on the same device, and against the CPU backend.

float32: 64 greedy tokens of every prompt are those of transformers and of the CPU backend, in a batch, with prompts of
several chunks, with CUDA graphs and without. Where the two likeliest tokens are nearer to each other than rounding
errors reach, either is right: a *tie*, which is counted. bf16 and f16: logits are not further from those of float32
arithmetic on the same weights than transformers' own are, by more than half. Sampling: the tokens that the device draws
are those of the host's sampler for the same logits.
"""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .check_models import FAMILIES, Checked, make
from .device import empty_cache
from .part import OutOfTimeError, Part

if TYPE_CHECKING:
    import numpy as np

    from pelton.build import Built

#: Of the error of narrow types to transformers' own. Both are sums of as many random roundings, in other places.
_MOST_RATIO = 1.5
#: Tokens that are given one by one behind each prompt when logits are compared.
_GIVEN = 8


def run(part: Part) -> None:
    families = part.scale.families or tuple(FAMILIES)
    part.data["families"] = list(families)
    with tempfile.TemporaryDirectory(prefix="pelton-checks-") as folder:
        for family in families:
            part.check()
            _guarded(part, family, "model", lambda f=family: _family(part, f, Path(folder), f == families[0]))  # type: ignore[misc]
            empty_cache()
    failed = [f"{row['family']} {row['check']}" for row in part.data["rows"] if not row["ok"]]
    part.data["passed"], part.data["failed"] = len(part.data["rows"]) - len(failed), len(failed)
    if failed:
        part.data["problem"] = f"{len(failed)} checks failed: {'; '.join(failed)}"


def _family(part: Part, family: str, work: Path, first: bool) -> None:
    checked = make(family, small=part.scale.small)
    if first:
        _guarded(part, family, "sampling", lambda: _sampling(part, checked, work))
    _greedy(part, checked, work)
    for dtype in part.scale.check_dtypes:
        part.check()
        _guarded(part, family, f"logits, {dtype}", lambda d=dtype: _logits(part, checked, work, d))  # type: ignore[misc]


def _guarded(part: Part, family: str, check: str, run: Callable[[], None]) -> None:
    """An error of one check is a row; the others go on."""
    try:
        run()
    except (OutOfTimeError, KeyboardInterrupt):
        raise
    except Exception as error:
        if "CUDA error" in str(error):  # the context is lost: nothing that follows would say anything
            raise
        part.row(family=family, check=check, ok=False, error=repr(error)[:300], traceback=traceback.format_exc())


def _prompts(part: Part, checked: Checked) -> list[list[int]]:
    import numpy as np

    rng = np.random.default_rng(7)
    return [rng.integers(3, checked.vocab_size, n).tolist() for n in part.scale.prompt_lens]


def _options(part: Part, folder: Path, dtype: str) -> dict[str, Any]:
    return {
        "model": str(folder), "dtype": dtype, "max_num_seqs": 8, "max_model_len": 64 if part.scale.small else 512,
        "max_num_batched_tokens": part.scale.check_chunk, "packed_cache": False, "kv_cache_memory": 1 << 28,
    }  # fmt: skip


# ---------------------------------------------------------------------- greedy tokens


def _greedy(part: Part, checked: Checked, work: Path) -> None:
    folder, _, model = checked.saved(work / checked.family, "f32")
    prompts, count = _prompts(part, checked), part.scale.check_tokens
    answers: dict[str, list[list[int]]] = {}

    def answer(name: str, options: dict[str, Any]) -> None:
        found = _answers(_options(part, folder, "f32") | options, prompts, count)
        answers[name] = found
        same = sum(a == b for a, b in zip(found, answers.get("CPU backend", ()), strict=False))
        check, of_cpu = f"greedy, f32, {name}", f"{same} of {len(prompts)}"
        _compare(part, checked, model, prompts, found, check, same_as_cpu=of_cpu)

    ways: dict[str, dict[str, Any]] = {
        "CPU backend": {"device": "cpu"},
        "graphs on": {"device": "cuda", "enforce_eager": False},
        "graphs off": {"device": "cuda", "enforce_eager": True},
    }
    for name, options in ways.items():
        part.check()
        _guarded(part, checked.family, f"greedy, f32, {name}", lambda n=name, o=options: answer(n, o))  # type: ignore[misc]


def _answers(options: dict[str, Any], prompts: list[list[int]], count: int) -> list[list[int]]:
    from pelton import LLM, SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
    with LLM(**options) as llm:
        return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, params)]


def _compare(
    part: Part,
    checked: Checked,
    model: Any,
    prompts: list[list[int]],
    answers: list[list[int]],
    check: str,
    **more: Any,
) -> None:
    """Every token against transformers' logits behind the same tokens: one pass per prompt shows all of them."""
    import numpy as np

    from tests.helpers.families import tolerance

    tokens, ties, wrong = 0, 0, []
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        logits = checked.logits(model, prompt + answer)[len(prompt) - 1 : -1]
        # Both sides' errors, of two logits.
        reach = 2 * tolerance(checked.terms) * np.abs(logits).max()
        for at, (row, token) in enumerate(zip(logits, answer, strict=True)):
            tokens += 1
            gap = float(row.max() - row[token])
            if gap > reach:
                wrong.append(f"prompt {number} of {len(prompt)} tokens, token {at}: {gap:.3g} below the likeliest")
                break  # what follows has another history than greedy tokens have
            ties += token != int(row.argmax())
    ok = not wrong and all(len(a) == part.scale.check_tokens for a in answers)
    part.row(family=checked.family, check=check, ok=ok, tokens=tokens, ties=int(ties), wrong=wrong[:5], **more)


# ---------------------------------------------------------------------- logits


def _logits(part: Part, checked: Checked, work: Path, dtype: str) -> None:
    """Rows of prefill in chunks, and of decode steps, all prompts in one batch."""
    import numpy as np

    from pelton import EngineConfig
    from pelton.build import build
    from tests.helpers.families import tolerance

    folder, narrow, exact = checked.saved(work / f"{checked.family}-{dtype}", dtype)
    given = min(_GIVEN, part.scale.check_tokens)
    texts = [p + t[:given] for p, t in zip(_prompts(part, checked), _prompts(part, checked)[::-1], strict=True)]
    rows = [slice(max(len(t) - given - 1, 0), None) for t in texts]
    want = [checked.logits(exact, t)[r] for t, r in zip(texts, rows, strict=True)]
    own = [checked.logits(narrow, t)[r] for t, r in zip(texts, rows, strict=True)]
    built = build(EngineConfig(**_options(part, folder, dtype), device="cuda"))
    try:
        found = _rows(built, texts, [r.start for r in rows], part.scale.check_chunk)
    finally:
        built.close()
    got, right, theirs = (np.concatenate(x) for x in (found, want, own))
    scale = float(np.abs(right).max())
    errors = {
        "rms": _rms(got - right) / scale, "max": float(np.abs(got - right).max()) / scale,
        "transformers_rms": _rms(theirs - right) / scale,
        "transformers_max": float(np.abs(theirs - right).max()) / scale,
    }  # fmt: skip
    if dtype == "f32":
        ok, limit = errors["max"] <= tolerance(checked.terms), tolerance(checked.terms)
    else:
        limit = _MOST_RATIO * errors["transformers_rms"]
        ok = errors["rms"] <= limit
    ok = ok and bool(np.isfinite(got).all())
    part.row(family=checked.family, check=f"logits, {dtype}", ok=bool(ok), limit=limit, logits=len(got), **errors)


def _rms(values: np.ndarray) -> float:
    import numpy as np

    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def _rows(built: Built, texts: Sequence[list[int]], starts: Sequence[int], chunk: int) -> list[Any]:
    """Logits of each text from its start on: up to there in chunks, all texts together, then token by token."""
    import numpy as np

    from tests.helpers.families import Sequences

    sequences = Sequences(built.executor)
    found: list[list[Any]] = [[] for _ in texts]
    done = [0] * len(texts)
    share = max(1, chunk // len(texts))
    while any(d <= start for d, start in zip(done, starts, strict=True)):
        pieces = {n: texts[n][d : min(d + share, starts[n] + 1)] for n, d in enumerate(done) if d <= starts[n]}
        logits = sequences.step(**{f"s{n}": piece for n, piece in pieces.items()})
        for (n, piece), row in zip(pieces.items(), logits, strict=True):
            done[n] += len(piece)
            found[n] = [row]  # the last piece's counts
    while True:
        going = [n for n, text in enumerate(texts) if done[n] < len(text)]
        if not going:
            return [np.stack(rows) for rows in found]
        logits = sequences.step(**{f"s{n}": [texts[n][done[n]]] for n in going})
        for n, row in zip(going, logits, strict=True):
            found[n].append(row)
            done[n] += 1


# ---------------------------------------------------------------------- sampling


def _sampling(part: Part, checked: Checked, work: Path) -> None:
    """One step after another: the logits of a batch, then the tokens of the same batch."""
    import numpy as np

    from pelton import EngineConfig, SamplingParams
    from pelton.backends.base import Batch, SampleSpec, ScheduledSequence
    from pelton.build import build
    from pelton.engine.sampling import HostSampler

    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.3, "top_k": 50}, {"temperature": 1.0, "min_p": 0.05},
        {"temperature": 1.0, "top_k": 1000, "top_p": 0.5}, {"temperature": 2.0, "top_p": 0.99},
        {"temperature": 1.0, "typical_p": 0.8},
    ]  # fmt: skip
    folder, _, _ = checked.saved(work / "sampling", "f32")
    built = build(EngineConfig(**_options(part, folder, "f32"), device="cuda"))
    executor, size = built.executor, built.executor.kv_spec.block_size
    rng = np.random.default_rng(11)
    length = part.scale.check_chunk // len(kinds)
    histories = [rng.integers(3, checked.vocab_size, length).tolist() for _ in kinds]
    outputs: list[list[int]] = [[] for _ in kinds]
    specs = [
        SampleSpec(SamplingParams(**k), tuple(h), o, seed=1000 + i)
        for i, (k, h, o) in enumerate(zip(kinds, histories, outputs, strict=True))
    ]
    most = -(-(length + part.scale.sampled_steps) // size)
    blocks = [range(i * most, (i + 1) * most) for i in range(len(kinds))]
    wrong: list[str] = []
    total, computed = 0, [0] * len(kinds)
    try:
        for step in range(part.scale.sampled_steps):
            batch = Batch(tuple(
                ScheduledSequence(str(i), tuple(h[c:]), c, tuple(blocks[i][: -(-len(h) // size)]), s)
                for i, (h, c, s) in enumerate(zip(histories, computed, specs, strict=True))
            ))  # fmt: skip
            want = HostSampler()(np.array(executor.logits(batch)), specs)
            got = executor.collect(executor.submit(batch)).tokens
            for i, (w, (g,)) in enumerate(zip(want, got, strict=True)):
                total += 1
                if w.token_id != g.token_id:
                    wrong.append(f"step {step}, {kinds[i]}: {g.token_id}, the host says {w.token_id}")
                computed[i] = len(histories[i])
                histories[i].append(g.token_id)
                outputs[i].append(g.token_id)
    finally:
        built.close()
    part.row(family=checked.family, check="sampling", ok=not wrong, tokens=total, wrong=wrong[:10])
