"""Prefixes on disk: what is there is found again, and nothing wrong is taken for it."""

import pickle

import numpy as np
import pytest
from safetensors.numpy import save_file

from pelton.config import SamplingParams
from pelton.engine.engine import LLMEngine
from pelton.engine.prefix_file import PrefixFileError, read_prefix, write_prefix
from tests.helpers.fake_executor import FakeExecutor, greedy_continuation

PROMPT = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
GREEDY = SamplingParams(temperature=0, max_tokens=4)


def engine_of(**options) -> LLMEngine:
    executor = FakeExecutor(**({"num_blocks": 8} | {k: v for k, v in options.items() if k != "enable_prefix_caching"}))
    caching = options.get("enable_prefix_caching", True)
    return LLMEngine(
        executor, max_num_seqs=4, max_num_batched_tokens=64, enable_prefix_caching=caching, eos_token_ids=frozenset(),
        vocab_size=50,
    )  # fmt: skip


def answer(engine: LLMEngine, prompt: list[int]) -> list[int]:
    engine.add_request("a", prompt, GREEDY)
    tokens: list[int] = []
    while engine.has_unfinished:
        tokens += [t for output in engine.step() for t in output.token_ids]
    engine.check()
    return tokens


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "prefix"
    engine = engine_of()
    answer(engine, PROMPT)
    assert engine.save_prefix(path, "me", PROMPT) == 8
    return path


def test_what_was_saved_is_found_by_another_engine(file):
    engine = engine_of()
    assert engine.load_prefix(file, "me") == 8
    engine.check()
    assert answer(engine, [*PROMPT, 11]) == greedy_continuation([*PROMPT, 11], 50, 4)
    assert engine.stats().cached_tokens == 8
    assert engine.load_prefix(file, "me") == 8  # it is there already
    assert engine.stats().num_cached_blocks == 3


def test_it_belongs_to_the_salt_that_it_is_loaded_for(file):
    engine = engine_of()
    engine.load_prefix(file, "me", salt="tenant")
    answer(engine, PROMPT)
    assert engine.stats().cached_tokens == 0


def test_nothing_to_save_is_said(tmp_path):
    engine = engine_of()
    with pytest.raises(PrefixFileError, match="nothing of the 10 tokens is in the prefix cache"):
        engine.save_prefix(tmp_path / "x", "me", PROMPT)
    answer(engine, PROMPT)
    with pytest.raises(PrefixFileError, match="cannot be written"):
        engine.save_prefix(tmp_path / "no folder" / "x", "me", PROMPT)
    assert not list(tmp_path.iterdir())


def test_a_file_of_another_model_or_no_file_is_refused(file, tmp_path):
    engine = engine_of()
    for path, identity, message in (
        (file, "other", "another model"),
        (tmp_path / "none", "me", "does not exist"),
        (tmp_path, "me", "cannot be read"),
    ):
        with pytest.raises(PrefixFileError, match=message) as caught:
            engine.load_prefix(path, identity)
        assert "\n" not in str(caught.value)
    with pytest.raises(PrefixFileError, match="of no use without a prefix cache"):
        engine_of(enable_prefix_caching=False).load_prefix(file, "me")
    with pytest.raises(PrefixFileError, match="holds 8 tokens, the KV cache has room for 4; raise"):
        engine_of(num_blocks=1).load_prefix(file, "me")


def test_damaged_files_are_refused_and_lose_no_block(file, tmp_path):
    whole = file.read_bytes()
    engine = engine_of()
    bad = tmp_path / "bad"
    for content in (b"", whole[:40], whole[:-8], whole + b"x", b"\0" * 100, pickle.dumps([1])):
        bad.write_bytes(content)
        with pytest.raises(PrefixFileError):
            engine.load_prefix(bad, "me")
    save_file({"token_ids": np.zeros(4, np.int32)}, bad)
    with pytest.raises(PrefixFileError, match="holds no prefix"):
        engine.load_prefix(bad, "me")
    save_file(
        {"token_ids": np.zeros(4, np.float32)}, bad, {"format": "pelton prefix", "version": "1", "identity": "me"}
    )
    with pytest.raises(PrefixFileError, match="holds no token ids"):
        engine.load_prefix(bad, "me")
    for blocks in ([np.zeros((2, 5), np.uint8)], [], [np.zeros((1, 32), np.uint8)]):
        write_prefix(bad, "me", PROMPT[:8], blocks)
        with pytest.raises(PrefixFileError):
            engine.load_prefix(bad, "me")
        engine.check()
    assert engine.stats().num_free_blocks == engine.stats().num_blocks and not engine.stats().num_cached_blocks


def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "prefix"
    write_prefix(path, "me", [1, 2], [np.arange(6, dtype=np.uint8).reshape(1, 6)])
    tokens, (blocks,) = read_prefix(path, "me")
    assert tokens == [1, 2] and blocks.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert [p.name for p in tmp_path.iterdir()] == ["prefix"]
