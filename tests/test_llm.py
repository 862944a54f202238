import signal
import subprocess
import sys
import threading

import pytest

import pelton
from pelton import LLM, EngineConfig, SamplingParams
from pelton.backends.base import StepStats
from pelton.errors import RequestError, TokenizerError
from pelton.llm import _interrupts_deferred
from pelton.outputs import Logprob
from tests.helpers.fake_parts import FakeBuilt, FakeTokenizer, ids_of, prompt_text


def llm_of(*args, config=None, **kwargs) -> LLM:
    return LLM.from_parts(FakeBuilt(*args, **kwargs), config)


def texts(outputs) -> list[str]:
    return [output.outputs[0].text for output in outputs]


def engine_is_clean(llm: LLM) -> bool:
    llm._engine.check()
    return not llm._engine.has_unfinished and not llm._answers


def test_outputs_come_in_the_order_of_the_prompts():
    outputs = llm_of().generate(["a long prompt", "b", "some more"])
    assert texts(outputs) == ["A LONG PROMPT", "B", "SOME MORE"]
    first = outputs[0]
    assert (first.prompt, first.finished, first.outputs[0].finish_reason) == ("a long prompt", True, "stop")
    assert list(first.prompt_token_ids) == ids_of("a long prompt")
    assert first.outputs[0].token_ids == [*ids_of("A LONG PROMPT"), 0]
    assert first.metrics.num_output_tokens == 14


@pytest.mark.parametrize(
    "prompt",
    ["hi", ids_of("hi"), tuple(ids_of("hi")), [ids_of("hi")], {"prompt": "hi"}, {"prompt_token_ids": ids_of("hi")}],
)
def test_a_prompt_may_be_text_or_token_ids_alone_or_in_a_list(prompt):
    assert texts(llm_of().generate(prompt)) == ["HI"]


def test_no_prompts_give_no_outputs():
    assert llm_of().generate([]) == []


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        (3, "a prompt is of type int"),
        ([3.5], "type float"),
        ({"text": "x"}, "a prompt dict needs one of"),
        (["ok", "x" * 600], "the prompt has 600 tokens, the context holds 512"),
        ([[1, 1000]], "token id 1000"),
    ],
)
def test_a_bad_prompt_is_refused_and_nothing_is_left_behind(prompt, message):
    llm = llm_of()
    with pytest.raises(RequestError, match=message):
        llm.generate(prompt)
    assert engine_is_clean(llm)
    assert texts(llm.generate("ok")) == ["OK"]


def test_every_prompt_may_have_its_own_parameters():
    llm = llm_of()
    outputs = llm.generate(["abc", "def"], [SamplingParams(max_tokens=1), SamplingParams(max_tokens=2)])
    assert texts(outputs) == ["A", "DE"]
    assert [o.outputs[0].finish_reason for o in outputs] == ["length", "length"]
    with pytest.raises(RequestError, match="2 prompts and 1 sampling_params"):
        llm.generate(["abc", "def"], [SamplingParams()])


@pytest.mark.parametrize(("include", "text"), [(False, "ONE "), (True, "ONE TWO")])
def test_a_stop_string_cuts_the_text_and_is_the_reason(include, text):
    llm = llm_of()
    params = SamplingParams(stop=["TWO"], include_stop_str_in_output=include)
    (output,) = llm.generate("one two three", params)
    completion = output.outputs[0]
    assert (completion.text, completion.finish_reason, completion.stop_reason) == (text, "stop", "TWO")
    assert output.metrics.num_output_tokens < len("one two three")
    assert engine_is_clean(llm)


def test_a_stop_string_at_the_very_end_wins_over_the_length():
    (output,) = llm_of().generate("one two", SamplingParams(stop="TWO", max_tokens=7))
    completion = output.outputs[0]
    assert (completion.text, completion.finish_reason, completion.stop_reason) == ("ONE ", "stop", "TWO")


def test_a_stop_string_before_min_tokens_is_text():
    (output,) = llm_of().generate("one one one", SamplingParams(stop="ONE", min_tokens=4))
    assert output.outputs[0].text == "ONE "
    assert len(output.outputs[0].token_ids) > 4


def test_a_stop_token_is_not_part_of_the_text_unless_asked_for():
    (x,) = ids_of("X")
    for include, text in ((False, "A"), (True, "AX")):
        params = SamplingParams(stop_token_ids=[x], include_stop_str_in_output=include)
        completion = llm_of().generate("axb", params)[0].outputs[0]
        assert (completion.text, completion.finish_reason, completion.stop_reason) == (text, "stop", x)


def test_the_pieces_of_a_stream_make_up_the_whole():
    llm = llm_of()
    params = SamplingParams(stop="FOUR")
    pieces = list(llm.stream("one two three four five", params))
    assert "".join(p.outputs[0].text for p in pieces) == "ONE TWO THREE "
    whole = llm.generate("one two three four five", params)[0]
    assert [t for p in pieces for t in p.outputs[0].token_ids] == whole.outputs[0].token_ids
    assert [p.finished for p in pieces] == [False] * (len(pieces) - 1) + [True]
    assert pieces[-1].outputs[0].stop_reason == "FOUR"
    assert pieces[-1].metrics is not None


def test_two_streams_can_be_read_in_turns():
    llm = llm_of()
    streams = [llm.stream("first"), llm.stream("second one")]
    read = ["", ""]
    while any(streams):
        for i, stream in enumerate(streams):
            if stream is not None and (piece := next(stream, None)) is None:
                streams[i] = None
            elif stream is not None:
                read[i] += piece.outputs[0].text
    assert read == ["FIRST", "SECOND ONE"]


def test_leaving_a_stream_aborts_its_request():
    llm = llm_of()
    stream = llm.stream("a long enough prompt")
    next(stream)
    stream.close()
    assert engine_is_clean(llm)


def test_ctrl_c_aborts_the_requests_and_the_llm_goes_on():
    built = FakeBuilt()
    llm = LLM.from_parts(built)
    stream = llm.stream(["a long enough prompt", "another"])
    next(stream)
    inner = built.executor.submit

    def interrupted(batch):
        signal.raise_signal(signal.SIGINT)  # in the middle of a step
        return inner(batch)

    built.executor.submit = interrupted
    with pytest.raises(KeyboardInterrupt):
        list(stream)
    built.executor.submit = inner
    assert engine_is_clean(llm)
    assert texts(llm.generate("hello")) == ["HELLO"]


def test_interrupts_are_left_alone_in_other_threads():
    errors = []

    def work():
        try:
            with _interrupts_deferred():
                pass
        except ValueError as error:  # signal.signal outside the main thread
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_of_the_executor_aborts_the_requests_and_the_llm_goes_on():
    built = FakeBuilt()
    llm = LLM.from_parts(built)
    built.executor.fail_with = RuntimeError("NaN in row 0")
    with pytest.raises(RuntimeError, match="NaN"):
        llm.generate(["a", "b"])
    assert engine_is_clean(llm)
    assert texts(llm.generate("c")) == ["C"]


def test_n_answers_have_seeds_of_their_own_and_one_request_id():
    built = FakeBuilt()
    llm = LLM.from_parts(built)
    (output,) = llm.generate("ab", SamplingParams(n=3, seed=5))
    assert [(o.index, o.text, o.finish_reason) for o in output.outputs] == [(i, "AB", "stop") for i in range(3)]
    seeds = [spec.seed for spec in built.specs]
    assert len(set(seeds)) == 3
    assert seeds[0] == 5  # the first answer is that of n = 1
    llm.generate("ab", SamplingParams(n=3, seed=5))
    assert [spec.seed for spec in built.specs[3:]] == seeds


def test_a_stream_of_n_answers_tells_them_apart():
    got = {0: "", 1: ""}
    for output in llm_of().stream("abc", SamplingParams(n=2)):
        (completion,) = output.outputs
        got[completion.index] += completion.text
    assert got == {0: "ABC", 1: "ABC"}


def test_chat_uses_the_template_for_one_conversation_or_many():
    built = FakeBuilt(lambda prompt: "fine")
    llm = LLM.from_parts(built)
    conversation = [{"role": "system", "content": "S"}, {"role": "user", "content": "hi"}]
    assert texts(llm.chat(conversation)) == ["fine"]
    assert prompt_text(built) == "<system>S<user>hi<assistant>"
    assert texts(llm.chat([conversation, conversation])) == ["fine", "fine"]
    assert "".join(o.outputs[0].text for o in llm.chat(conversation, stream=True)) == "fine"
    assert texts(llm.generate({"messages": conversation})) == ["fine"]


def test_without_a_tokenizer_ids_go_in_and_out():
    llm = llm_of(without_tokenizer=True)
    (output,) = llm.generate([ids_of("ab")])
    assert output.outputs[0].token_ids == [*ids_of("AB"), 0]
    assert output.outputs[0].text == ""
    with pytest.raises(TokenizerError, match="no tokenizer; give prompts as token ids"):
        llm.generate("ab")
    with pytest.raises(RequestError, match="stop strings need a tokenizer"):
        llm.generate([ids_of("ab")], SamplingParams(stop="x"))


def test_answers_are_handed_out_as_they_get_ready_and_a_refused_prompt_does_not_stop_the_others():
    llm = llm_of(config=EngineConfig(max_num_seqs=2))
    params = SamplingParams()
    results = list(llm.as_completed((p, params) for p in ["a long prompt", "b", "x" * 600, "", "cc", "d"]))
    assert sorted(index for index, _ in results) == list(range(6))
    by_index = dict(results)
    assert [by_index[i].outputs[0].text for i in (0, 1, 4, 5)] == ["A LONG PROMPT", "B", "CC", "D"]
    assert all(isinstance(by_index[i], RequestError) for i in (2, 3))
    assert next(i for i, r in results if not isinstance(r, RequestError)) == 1
    assert engine_is_clean(llm)


def test_a_missing_chat_template_ends_the_whole_batch():
    llm = llm_of(tokenizer=FakeTokenizer(has_template=False))
    with pytest.raises(TokenizerError, match="no chat template"):
        list(llm.as_completed([({"messages": [{"role": "user", "content": "x"}]}, SamplingParams())]))


def test_as_completed_draws_prompts_only_as_there_is_room():
    drawn = 0

    def prompts():
        nonlocal drawn
        for i in range(50):
            drawn += 1
            yield f"prompt {i}", SamplingParams()

    llm = llm_of(config=EngineConfig(max_num_seqs=2))
    stream = llm.as_completed(prompts())
    next(stream)
    assert drawn <= 8  # twice max_num_seqs, and what finished in the meantime
    assert len(list(stream)) == 49


def test_logprobs_come_with_the_tokens_and_add_up():
    from pelton.backends.base import SampledToken
    from tests.helpers.fake_executor import FakeExecutor

    def sampler(logits, specs):
        return [
            SampledToken(5, {5: Logprob(-0.5, 1), 6: Logprob(-1.0, 2)}) if spec.params.logprobs else SampledToken(5)
            for spec in specs
        ]

    built = FakeBuilt()
    built.executor = FakeExecutor(vocab_size=100, sampler=sampler)
    completion = LLM.from_parts(built).generate("a", SamplingParams(max_tokens=3, logprobs=1))[0].outputs[0]
    assert completion.logprobs == [{5: -0.5, 6: -1.0}] * 3
    second = completion.logprobs[0][6]
    assert (second.logprob, second.rank) == (-1.0, 2)
    assert second.decoded_token == built.tokenizer.decode([6])
    assert completion.cumulative_logprob == -1.5


def test_an_unknown_option_names_similar_ones_before_anything_is_loaded():
    with pytest.raises(RequestError, match="no option 'max_model_length'; did you mean max_model_len"):
        LLM("nowhere", max_model_length=5)
    with pytest.raises(RequestError, match="no option 'qqq'; the options are model, device"):
        LLM("nowhere", qqq=5)


def test_a_closed_llm_refuses_and_closing_twice_is_fine():
    built = FakeBuilt()
    with LLM.from_parts(built) as llm:
        pass
    llm.close()
    assert built.closed
    with pytest.raises(RequestError, match="closed; create a new one"):
        llm.generate("a")


def test_parts_are_closed_if_the_engine_refuses_its_limits():
    built = FakeBuilt()
    with pytest.raises(RequestError, match="max_num_seqs is 0"):
        LLM.from_parts(built, EngineConfig(max_num_seqs=0))
    assert built.closed


def test_progress_is_shown_on_stderr(capsys):
    llm_of().generate(["a", "b"], progress=True)
    assert "2/2" in capsys.readouterr().err


def test_the_public_names_exist_and_importing_them_is_light():
    for name in pelton.__all__:
        assert getattr(pelton, name) is not None
    code = (
        "import sys, pelton; assert 'numpy' not in sys.modules\n"
        "import pelton.llm, pelton.engine.engine, pelton.engine.sampling\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'pelton.graph', 'pelton.text', 'pelton.build'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_types_may_be_called_as_torch_calls_them():
    assert EngineConfig(dtype="bfloat16", kv_cache_dtype="float32") == EngineConfig(dtype="bf16", kv_cache_dtype="f32")
    assert EngineConfig(kv_cache_dtype="float16") == EngineConfig(kv_cache_dtype="f16")


def test_every_step_leaves_a_record():
    llm = LLM.from_parts(FakeBuilt(stats=StepStats(seconds=0.5, flops=100.0, bytes=10.0)))
    llm.generate(["abc", "abcd"], SamplingParams(max_tokens=3))
    steps, stats = llm.get_steps(), llm.get_stats()
    assert len(steps) == stats.steps == 3
    assert [(s.num_prefills, s.num_decodes, s.num_running) for s in steps] == [(2, 0, 2), (0, 2, 2), (0, 2, 0)]
    assert steps[0].prefill_tokens == 7 and steps[0].kv_use > 0 == steps[-1].kv_use
    assert stats.mbu(40.0) == steps[1].mbu(40.0) == 0.5
    assert stats.mfu(400.0) == steps[1].mfu(400.0) == 0.5
