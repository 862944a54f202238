"""SamplingParams refuses what it cannot mean, and names field, value and range."""

import pytest

from pelton import LLM, SamplingParams
from pelton.errors import RequestError
from tests.helpers.fake_parts import VOCAB_SIZE, FakeBuilt, ids_of


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"typical_p": 0.0}, "typical_p is 0.0; choose a value from just above 0 to 1"),
        ({"typical_p": 1.5}, "typical_p is 1.5"),
        ({"typical_p": "much"}, "typical_p is 'much'; give a number"),
        ({"best_of": 0}, "best_of is 0; choose a value from 1 to 128"),
        ({"n": 3, "best_of": 2}, "best_of 2 is less than n 3"),
        ({"prompt_logprobs": 21}, "prompt_logprobs is 21; choose a value from 0 to 20"),
        ({"logit_bias": [1]}, "logit_bias is [1]; give {token id: bias}"),
        ({"logit_bias": {1: 100.5}}, "logit_bias of token 1 is 100.5; choose a value from -100 to 100"),
        ({"logit_bias": {1: "x"}}, "logit_bias of token 1 is 'x'"),
        ({"logit_bias": {1: float("nan")}}, "logit_bias of token 1 is nan"),
        ({"logit_bias": {-1: 1}}, "logit_bias holds something that is no token id; give integers from 0"),
        ({"logit_bias": {"one": 1}}, "logit_bias holds something that is no token id"),
        ({"bad_words": [""]}, "bad_words holds something that is empty or no text"),
        ({"bad_words": [[]]}, "bad_words holds something that is empty or no text"),
        ({"bad_words": [7]}, "bad_words holds something that is empty or no text"),
        ({"bad_words": [[1, -2]]}, "bad_words holds something that is no token id"),
        ({"bad_words": 3}, "bad_words is 3; give a list"),
        ({"allowed_token_ids": []}, "allowed_token_ids is empty; give at least one id, or leave it out"),
        ({"allowed_token_ids": [1.5]}, "allowed_token_ids holds something that is no token id"),
        ({"allowed_token_ids": 5}, "allowed_token_ids is 5; give a list"),
        ({"logits_processors": ["x"]}, "logits_processors holds something that cannot be called"),
        ({"logits_processors": 1}, "logits_processors is 1; give a list"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(fields, message):
    with pytest.raises(RequestError) as raised:
        SamplingParams(**fields)
    assert str(raised.value).startswith(message)


def test_what_names_tokens_is_normalised():
    params = SamplingParams(logit_bias={"3": 1, 4: -2.5}, bad_words="never", allowed_token_ids=[3, 4])
    assert params.logit_bias == {3: 1, 4: -2.5}
    assert params.bad_words == ("never",)
    assert params.allowed_token_ids == (3, 4)
    assert SamplingParams(bad_words=["a", [1, 2]]).bad_words == ("a", (1, 2))
    same = SamplingParams(logit_bias={3: 1, 4: -2.5}, bad_words=["never"], allowed_token_ids=(3, 4))
    assert params == same
    assert hash(params) == hash(same)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (SamplingParams(logit_bias={VOCAB_SIZE: 1}), f"logit_bias names token id {VOCAB_SIZE}"),
        (SamplingParams(allowed_token_ids=[1, VOCAB_SIZE]), f"allowed_token_ids names token id {VOCAB_SIZE}"),
        (SamplingParams(bad_words=[[1, VOCAB_SIZE]]), f"bad_words names token id {VOCAB_SIZE}"),
        (SamplingParams(bad_words=[" "]), "the bad word ' ' has no tokens"),
    ],
)
def test_an_llm_refuses_what_its_model_cannot_do(params, message):
    llm = LLM.from_parts(FakeBuilt())
    with pytest.raises(RequestError, match=message):
        llm.generate("abc", params)
    assert llm.generate("abc")[0].outputs[0].text == "ABC"


def test_bad_words_reach_the_sampler_as_tokens_with_and_without_a_space_before():
    built = FakeBuilt()
    llm = LLM.from_parts(built)
    llm.generate("abc", SamplingParams(bad_words=[" no", "yes", [9, 10]]))
    words = [ids_of(word) for word in ("no", " no", "yes", " yes")]
    assert built.specs[0].params.bad_words == (*map(tuple, words), (9, 10))


def test_bad_words_without_a_tokenizer_must_be_token_ids():
    llm = LLM.from_parts(FakeBuilt(without_tokenizer=True))
    with pytest.raises(RequestError, match="bad_words need a tokenizer"):
        llm.generate([ids_of("ab")], SamplingParams(bad_words=["no"]))
    assert llm.generate([ids_of("ab")], SamplingParams(bad_words=[[5]]))[0].outputs[0].token_ids
