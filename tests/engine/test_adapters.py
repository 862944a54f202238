"""Adapters in the engine: slots, names, and a prefix cache that tells them apart."""

import pytest

from pelton.config import SamplingParams
from pelton.engine.engine import LLMEngine
from pelton.engine.prefix_cache import CachePolicy, root_key
from pelton.engine.prefix_file import PrefixFileError
from pelton.errors import RequestError
from tests.helpers.fake_executor import ROOT, FakeExecutor, adapted_root, greedy_continuation

PROMPT = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
GREEDY = SamplingParams(temperature=0, max_tokens=4)


def engine_with(*names: str, max_loras: int = 3, **options) -> LLMEngine:
    engine = LLMEngine(
        FakeExecutor(), max_num_seqs=4, max_num_batched_tokens=64, max_loras=max_loras, eos_token_ids=frozenset(),
        vocab_size=50, **options,
    )  # fmt: skip
    for name in names:
        engine.add_adapter(name, f"identity of {name}", {name: 1})
    return engine


def expected(weights=None) -> list[int]:
    return greedy_continuation(PROMPT, 50, 4, ROOT if weights is None else adapted_root(weights))


def answers(engine: LLMEngine, **adapters) -> dict[str, list[int]]:
    """The answers of requests that run together: request id -> adapter."""
    for request_id, adapter in adapters.items():
        engine.add_request(request_id, PROMPT, GREEDY, adapter=adapter)
    tokens: dict[str, list[int]] = {name: [] for name in adapters}
    while engine.has_unfinished:
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
        engine.check()
    return tokens


def test_requests_of_several_adapters_share_a_step():
    engine = engine_with("a", "b")
    assert answers(engine, one="a", two="b", three=None) == {
        "one": expected({"a": 1}), "two": expected({"b": 1}), "three": expected(),
    }  # fmt: skip
    slots = [{s.adapter for s in batch.sequences} for batch in engine._executor.batches]
    assert {0, 1, 2} in slots


def test_the_prefix_cache_finds_what_the_same_adapter_computed_and_nothing_else():
    engine = engine_with("a", "b")
    answers(engine, one="a")
    assert engine.stats().cached_tokens == 0
    answers(engine, two="b", three=None)
    assert engine.stats().cached_tokens == 0
    assert answers(engine, four="a")["four"] == expected({"a": 1})
    assert engine.stats().cached_tokens == 8


def test_a_name_that_is_used_again_finds_nothing_of_the_weights_before():
    engine = engine_with("a")
    answers(engine, one="a")
    engine.remove_adapter("a")
    engine.add_adapter("a", "another identity", {"a": 2})
    assert answers(engine, two="a")["two"] == expected({"a": 2})
    assert engine.stats().cached_tokens == 0
    # The old weights under another name and in another slot are found again.
    engine.add_adapter("b", "identity of a", {"a": 1})
    assert answers(engine, three="b")["three"] == expected({"a": 1})
    assert engine.stats().cached_tokens == 8


def test_a_salt_cannot_be_made_to_look_like_an_adapter():
    pairs = [("", ""), ("x", ""), ("", "x"), ("x", "x"), ("1 x", ""), ("1 xx", ""), ("x", "y"), ("", "xy"), ("y", "x")]
    assert len({root_key(salt, adapter) for salt, adapter in pairs}) == len(pairs)


def test_n_answers_of_an_adapter_share_its_prompt():
    engine = engine_with("a", "b")
    engine.add_request("first", PROMPT, GREEDY, adapter="a")
    engine.add_request("second", PROMPT, GREEDY, adapter="a", parent_id="first")
    with pytest.raises(RequestError, match="another adapter than its parent"):
        engine.add_request("third", PROMPT, GREEDY, adapter="b", parent_id="first")
    got: dict[str, list[int]] = {"first": [], "second": []}
    while engine.has_unfinished:
        for output in engine.step():
            got[output.request_id] += output.token_ids
    assert got == {"first": expected({"a": 1}), "second": expected({"a": 1})}
    assert sum(batch.num_tokens for batch in engine._executor.batches) == len(PROMPT) + 1 + 2 * 3


def test_an_adapter_in_use_is_not_removed():
    engine = engine_with("a")
    engine.add_request("one", PROMPT, GREEDY, adapter="a")
    for _ in range(3):  # waiting, running
        with pytest.raises(RequestError, match="'a' is used by a request that is unfinished; wait for them, or abort"):
            engine.remove_adapter("a")
        engine.step()
    engine.add_request("two", PROMPT, GREEDY, adapter="a")
    with pytest.raises(RequestError, match="2 requests that are"):
        engine.remove_adapter("a")
    engine.abort("one"), engine.abort("two")
    engine.remove_adapter("a")
    assert engine.adapters.names() == [] and engine._executor.adapters == {}


def test_adapters_are_added_beside_running_requests():
    engine = engine_with("a")
    engine.add_request("one", PROMPT, GREEDY, adapter="a")
    first = engine.step()[0].token_ids
    engine.add_adapter("b", "identity of b", {"b": 1})
    engine.add_request("two", PROMPT, GREEDY, adapter="b")
    got = {"one": list(first), "two": []}
    while engine.has_unfinished:
        for output in engine.step():
            got[output.request_id] += output.token_ids
    assert got == {"one": expected({"a": 1}), "two": expected({"b": 1})}


def test_names_and_slots():
    engine = engine_with("a", "b", max_loras=2)
    with pytest.raises(RequestError, match="there are 2 adapters already; remove one, or raise max_loras"):
        engine.add_adapter("c", "c", {})
    with pytest.raises(RequestError, match="an adapter 'a' already"):
        engine.add_adapter("a", "c", {})
    with pytest.raises(RequestError, match=r"no adapter 'c'; .*there is: a, b"):
        engine.add_request("one", PROMPT, GREEDY, adapter="c")
    with pytest.raises(RequestError, match="no adapter 'c'"):
        engine.remove_adapter("c")
    with pytest.raises(RequestError, match="name of an adapter"):
        engine.add_adapter("", "c", {})
    engine.remove_adapter("a")
    engine.add_adapter("c", "c", {"c": 1})
    assert engine.adapters.names() == ["b", "c"]
    assert sorted(engine._executor.adapters) == [1, 2]
    with pytest.raises(RequestError, match="there are 0 adapters already"):
        engine_with("a", max_loras=0)


def test_an_executor_that_refuses_leaves_the_slot_free():
    engine = engine_with(max_loras=1)

    def refuse(slot, weights):
        raise ValueError("no such module")

    good, engine._executor.set_adapter = engine._executor.set_adapter, refuse
    with pytest.raises(ValueError, match="no such module"):
        engine.add_adapter("a", "a", {})
    engine._executor.set_adapter = good
    engine.add_adapter("b", "b", {})
    assert engine.adapters.names() == ["b"]


def test_a_prefix_on_disk_belongs_to_its_adapter(tmp_path):
    engine = engine_with("a", "b")
    answers(engine, one="a")
    with pytest.raises(PrefixFileError, match="nothing of the 10 tokens"):
        engine.save_prefix(tmp_path / "p", "model", PROMPT)
    assert engine.save_prefix(tmp_path / "p", "model", PROMPT, adapter="a") == 8
    later = engine_with("b", "a")
    for wrong in (None, "b"):
        with pytest.raises(PrefixFileError, match="computed by another model"):
            later.load_prefix(tmp_path / "p", "model", adapter=wrong)
    assert later.load_prefix(tmp_path / "p", "model", adapter="a") == 8
    assert answers(later, one="a")["one"] == expected({"a": 1})
    assert later.stats().cached_tokens == 8


def test_a_cache_policy_without_reading_reads_nothing_of_an_adapter_either():
    engine = engine_with("a")
    answers(engine, one="a")
    engine.add_request("two", PROMPT, GREEDY, adapter="a", cache=CachePolicy(read=False))
    while engine.has_unfinished:
        engine.step()
    assert engine.stats().cached_tokens == 0
