"""The CUDA executor on tiny models: its steps against the oracle, its tokens against the host's sampler."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pelton.backends.base import PENDING, Batch, SampleSpec, ScheduledSequence
from pelton.backends.cuda import graphs
from pelton.config import SamplingParams
from pelton.engine.sampling import HostSampler
from tests.backends.cuda.executors import executor
from tests.helpers.families import Sequences, tolerance
from tests.helpers.tiny_models import oracle_logits, tiny_checkpoint

#: One of each kind of attention, norm and position, and as many layers as it has kinds of.
SOME = {"llama": 1, "gemma2": 2, "gpt2": 1, "bloom": 1, "qwen3": 1}


def ids(count: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(3, 101, count)]


@pytest.mark.parametrize("family", SOME)
def test_chunks_decodes_and_company_give_the_oracles_logits(family: str) -> None:
    folder, model = tiny_checkpoint(family, layers=SOME[family])
    a, b = ids(30), ids(12, 1)
    want_a, want_b = oracle_logits(model, a), oracle_logits(model, b)
    run = executor(folder, max_num_seqs=4)
    sequences = Sequences(run)
    limit = tolerance(240) * np.abs(want_a).max()
    for step, rows in (
        ({"a": a[:19]}, [want_a[18]]),
        ({"a": a[19:20], "b": b[:7]}, [want_a[19], want_b[6]]),  # a decode beside a prompt
        ({"a": a[20:21], "b": b[7:8]}, [want_a[20], want_b[7]]),  # recorded
        ({"b": b[8:9]}, [want_b[8]]),
        ({"a": a[21:30], "b": b[9:12]}, [want_a[29], want_b[11]]),  # two chunks on top of a cache
    ):
        got = sequences.step(**step)
        assert np.abs(got - np.stack(rows)).max() <= limit, step
    run.close()


def test_a_batch_uses_the_smallest_graph_that_holds_it() -> None:
    folder, _ = tiny_checkpoint("llama", layers=1)
    run = executor(folder, max_num_seqs=6)
    assert graphs.buckets_for(6) == [1, 2, 4, 6]
    assert graphs.buckets_for(64) == [1, 2, 4, 8, 12, 16, 24, 32, 48, 64]
    assert graphs.buckets_for(1) == [1]
    assert run._graphs is not None
    assert [run._graphs.bucket(n) for n in range(1, 7)] == [1, 2, 4, 4, 6, 6]
    used: list[int] = []
    replay = run._graphs.replay
    run._graphs.replay = lambda bucket: (used.append(bucket), replay(bucket))[1]  # type: ignore[assignment, method-assign]
    sequences = Sequences(run)
    names = "abcde"
    sequences.step(**{n: ids(3, i) for i, n in enumerate(names)})
    alone = executor(folder, graphs=False)
    others = Sequences(alone)
    others.step(**{n: ids(3, i) for i, n in enumerate(names)})
    assert not used
    got, want = (s.step(**{n: ids(1, i) for i, n in enumerate(names)}) for s in (sequences, others))
    assert used == [6]
    assert np.abs(got - want).max() <= tolerance(240) * np.abs(want).max()
    # The row that filled the bucket up wrote to nobody's cache.
    got, want = (s.step(a=ids(1, 9), b=ids(1, 8)) for s in (sequences, others))
    assert used == [6, 2]
    assert np.abs(got - want).max() <= tolerance(240) * np.abs(want).max()


def test_16_bit_types_are_near_the_oracle() -> None:
    folder, model = tiny_checkpoint("llama", layers=1)
    token_ids = ids(24)
    want = oracle_logits(model, token_ids)
    for dtype, eps in (("bf16", 2.0**-8), ("f16", 2.0**-11)):
        run = executor(folder, dtype=dtype)
        assert run.precision == dtype and {c.dtype.name for c in run.program.caches} == {dtype}
        sequences = Sequences(run)
        got = [sequences.step(a=token_ids[:23])[0], sequences.step(a=token_ids[23:])[0]]
        # Of each layer, a handful of roundings of operands of about the size of what they are added to; they average
        # out over sums. Some thirty steps of relative error eps, at random.
        error = max(np.abs(g - w).max() for g, w in zip(got, want[22:], strict=True))
        assert error <= 6 * eps * np.abs(want).max()
        run.close()


class Decoder:
    """Feeds requests to an executor as an engine does: the next step is submitted before one is collected."""

    def __init__(self, run: Any) -> None:
        self.run = run
        self.sequences = Sequences(run)
        self.specs: dict[str, SampleSpec] = {}

    def scheduled(self, name: str, tokens: list[int]) -> ScheduledSequence:
        return self.sequences.scheduled(name, tokens, self.specs[name])

    def generate(self, prompts: dict[str, list[int]], count: int, *, ahead: bool) -> dict[str, list[int]]:
        """``count`` tokens of each."""
        first = Batch(tuple(self.scheduled(n, p) for n, p in prompts.items()))
        tickets = [self.run.submit(first)]
        for number in range(count):
            more = number + 1 < count
            if more and ahead:
                tickets.append(self.run.submit(Batch(tuple(self.scheduled(n, [PENDING]) for n in prompts))))
            output = self.run.collect(tickets.pop(0))
            assert not output.failures
            for name, new in zip(prompts, output.tokens, strict=True):
                self.specs[name].output_token_ids.append(new[0].token_id)  # type: ignore[attr-defined]
            if more and not ahead:
                last = {n: list(self.specs[n].output_token_ids)[-1] for n in prompts}
                tickets.append(self.run.submit(Batch(tuple(self.scheduled(n, [t]) for n, t in last.items()))))
        return {n: list(self.specs[n].output_token_ids) for n in prompts}


PARAMS = {
    "greedy": SamplingParams(temperature=0.0),
    "sampled": SamplingParams(temperature=0.9, top_p=0.8, top_k=20, seed=1),
    "typical": SamplingParams(temperature=1.3, typical_p=0.7, min_p=0.01, seed=2),
}
HOST = {
    "penalty": SamplingParams(temperature=0.0, repetition_penalty=1.7, frequency_penalty=0.5),
    "logprobs": SamplingParams(temperature=0.7, seed=3, logprobs=2),
}


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("params", [PARAMS, PARAMS | HOST], ids=["device", "host"])
def test_tokens_are_those_of_the_host_sampler(params: dict[str, SamplingParams], ahead: bool) -> None:
    folder, _ = tiny_checkpoint("llama", layers=1)
    prompts = {name: ids(4 + i, i) for i, name in enumerate(params)}
    run = executor(folder)
    decoder = Decoder(run)
    decoder.specs = {n: SampleSpec(p, prompts[n], [], p.seed or 0) for n, p in params.items()}
    got = decoder.generate(prompts, 4, ahead=ahead)
    # The same by hand: logits of the executor, tokens of the definition.
    other = Decoder(run)
    other.sequences.free = list(range(40, 64))
    other.specs = {n: SampleSpec(p, prompts[n], [], p.seed or 0) for n, p in params.items()}
    step = prompts
    for _ in range(4):
        logits = run.logits(Batch(tuple(other.scheduled(n, t) for n, t in step.items())))
        tokens = HostSampler()(logits, list(other.specs.values()))
        step = {n: [t.token_id] for n, t in zip(params, tokens, strict=True)}
        for name, token in step.items():
            other.specs[name].output_token_ids.extend(token)  # type: ignore[attr-defined]
    assert got == {n: list(s.output_token_ids) for n, s in other.specs.items()}


def test_broken_logits_fail_their_request_alone() -> None:
    folder, _ = tiny_checkpoint("llama", layers=1)
    run = executor(folder)
    decoder = Decoder(run)
    decoder.specs = {n: SampleSpec(PARAMS["greedy"], (), [], 0) for n in "ab"}
    run.collect(run.submit(Batch((decoder.scheduled("a", ids(3)), decoder.scheduled("b", ids(3, 1))))))
    keys = run._caches[0].codes
    keys[decoder.sequences.blocks["b"][0], 0] = float("nan")
    output = run.collect(run.submit(Batch((decoder.scheduled("a", ids(1)), decoder.scheduled("b", ids(1))))))
    assert len(output.tokens[0]) == 1 and output.tokens[1] == () and list(output.failures) == [1]
    assert "maximum nan" in output.failures[1]


@pytest.mark.parametrize("stored", ["auto", "int8", "fp8"])
def test_blocks_are_copied_read_and_written(stored: str) -> None:
    folder, model = tiny_checkpoint("llama", layers=1)
    token_ids = ids(20)
    run = executor(folder, kv_cache_dtype=stored)
    sequences = Sequences(run)
    sequences.step(a=token_ids[:19])
    first, second = sequences.blocks["a"]
    kept = run.read_blocks([first, second])
    assert all(part.dtype == np.uint8 and len(part) == 2 and part.any(1).all() for part in kept)
    assert sum(part.shape[1] for part in kept) == run.kv_spec.bytes_per_block
    want = sequences.step(a=token_ids[19:])[0]
    assert stored != "auto" or want.argmax() == oracle_logits(model, token_ids)[-1].argmax()
    run.write_blocks([50, 51], kept)
    with pytest.raises(ValueError, match="another shape"):
        run.write_blocks([50], kept)
    spec = SampleSpec(SamplingParams(temperature=0.0, logprobs=0), (), [], 0)
    copied = Batch((ScheduledSequence("b", (token_ids[19],), 19, (50, 52), spec),), copies=((51, 52),))
    output = run.collect(run.submit(copied))
    assert output.tokens[0][0].token_id == int(want.argmax())
    moved = run.read_blocks([50, 51])
    assert all(np.array_equal(a, b) for a, b in zip(kept, moved, strict=True))


def test_hidden_states_and_prompt_logprobs_come_to_the_host() -> None:
    folder, model = tiny_checkpoint("llama", layers=1)
    token_ids = ids(9)
    run = executor(folder, max_num_seqs=12)
    logits = oracle_logits(model, token_ids).astype(np.float64)
    spec = SampleSpec(SamplingParams(temperature=0.0), (), [], 0)
    batch = Batch((
        ScheduledSequence("t", tuple(token_ids), 0, (1,), spec, targets=tuple(token_ids[1:]), num_top=1),
        ScheduledSequence("h", tuple(token_ids), 0, (2,), None, num_hidden=2),
    ))  # fmt: skip
    output = run.collect(run.submit(batch))
    wanted = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for place, found in enumerate(output.targets[0]):
        target = token_ids[place + 1]
        assert abs(found[target].logprob - wanted[place, target]) < 1e-4
    import torch

    with torch.no_grad():
        states = model.model(torch.tensor([token_ids])).last_hidden_state[0, -2:].float().numpy()
    assert np.abs(output.hidden[1] - states).max() < 1e-4


def test_a_step_that_fails_takes_the_one_behind_it_with_it() -> None:
    folder, _ = tiny_checkpoint("llama", layers=1)
    run = executor(folder, graphs=False)
    decoder = Decoder(run)
    decoder.specs = {"a": SampleSpec(SamplingParams(temperature=0.0, logprobs=1), (), [], 0)}
    first = run.submit(Batch((decoder.scheduled("a", ids(3)),)))
    second = run.submit(Batch((decoder.scheduled("a", [PENDING]),)))
    launches, run._launches[:] = list(run._launches), [lambda frame: (_ for _ in ()).throw(RuntimeError("broken"))]
    assert run.collect(first).tokens[0]  # it had run; the one behind it could not start
    with pytest.raises(RuntimeError, match="broken"):
        run.collect(second)
    run._launches[:] = launches
    decoder.sequences.length["a"] = 3
    assert run.collect(run.submit(Batch((decoder.scheduled("a", ids(1)),)))).tokens[0]


def test_a_submit_that_fails_changes_nothing() -> None:
    folder, _ = tiny_checkpoint("llama", layers=1)
    run = executor(folder, graphs=False)
    decoder = Decoder(run)
    decoder.specs = {n: SampleSpec(PARAMS["greedy"], (), [], 0) for n in "ab"}
    first = run.submit(Batch((decoder.scheduled("a", ids(3)), decoder.scheduled("b", ids(5, 1)))))
    following = Batch((decoder.scheduled("b", [PENDING]), decoder.scheduled("a", [PENDING])))
    launches, run._launches[:] = list(run._launches), [lambda frame: (_ for _ in ()).throw(MemoryError("none left"))]
    with pytest.raises(MemoryError):
        run.submit(following)
    run._launches[:] = launches
    second = run.submit(following)  # once more: the tokens it waits for are still those of the first step
    tokens = [t[0].token_id for t in run.collect(first).tokens]
    got = [t[0].token_id for t in run.collect(second).tokens]
    other = Decoder(run)
    other.sequences.free, other.specs = list(range(40, 64)), decoder.specs
    run.collect(run.submit(Batch((other.scheduled("a", ids(3)), other.scheduled("b", ids(5, 1))))))
    last = Batch((other.scheduled("b", tokens[1:]), other.scheduled("a", tokens[:1])))
    assert got == [t[0].token_id for t in run.collect(run.submit(last)).tokens]
