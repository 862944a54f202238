import signal

import pytest

from pelton.backends.base import StepStats
from pelton.cli import run as run_module
from pelton.cli.run import Session, statistics_line
from pelton.config import EngineConfig, SamplingParams
from pelton.engine.stats import EngineStats
from pelton.errors import RequestError
from pelton.llm import LLM
from pelton.metrics import RequestMetrics
from tests.helpers.fake_parts import EOS, FakeBuilt, FakeTokenizer, ids_of, prompt_text


def test_dash_p_answers_once_on_stdout_and_counts_on_stderr(pelton, built):
    result = pelton("run", "some-model", "-p", "hello", "--max-model-len", "99", "--threads", "2")
    assert result.exit_code == 0
    assert result.stdout == "HELLO\n"
    assert "TTFT" in result.stderr and "6 tokens" in result.stderr
    (config,) = built.configs
    assert (config.model, config.max_model_len, config.threads) == ("some-model", 99, 2)
    assert built.parts.closed


def test_no_stats_is_silent(pelton, built):
    result = pelton("run", "-p", "hello", "--no-stats")
    assert (result.stdout, result.stderr) == ("HELLO\n", "")


def test_a_prompt_comes_from_a_pipe(pelton, built):
    assert pelton("run", input="from a pipe\n").stdout == "FROM A PIPE\n"
    assert prompt_text(built.parts) == "<user>from a pipe<assistant>"


def test_dash_p_and_a_pipe_are_joined_in_this_order(pelton, built):
    pelton("run", "-p", "sum up:", input="the text\n")
    assert prompt_text(built.parts) == "<user>sum up:\n\nthe text<assistant>"


def test_the_system_prompt_comes_first(pelton, built):
    pelton("run", "-p", "hi", "--system", "be kind")
    assert prompt_text(built.parts) == "<system>be kind<user>hi<assistant>"


def test_no_chat_continues_the_raw_text(pelton, built):
    pelton("run", "--no-chat", "-p", "once upon")
    assert prompt_text(built.parts) == "once upon"


def test_sampling_options_reach_the_request(pelton, built):
    pelton("run", "-p", "x", "--temperature", "0", "--top-k", "3", "--max-tokens", "7", "--seed", "9", "--stop", "END")
    params = built.parts.specs[0].params
    assert (params.temperature, params.top_k, params.max_tokens, params.seed) == (0.0, 3, 7, 9)
    assert params.stop == ("END",)


def test_penalties_and_bad_words_reach_the_request(pelton, built):
    options = ["--typical-p", "0.5", "--presence-penalty", "1", "--frequency-penalty", "0.25"]
    pelton("run", "-p", "x", *options, "--bad-words", "no", "--bad-words", "never")
    params = built.parts.specs[0].params
    assert (params.typical_p, params.presence_penalty, params.frequency_penalty) == (0.5, 1.0, 0.25)
    assert len(params.bad_words) == 4  # with and without a space before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "x", "--temperature", "-1"], "error: temperature is -1.0; choose a value from 0 to 100"),
        ([], "error: the prompt is empty; give -p TEXT or pipe a text in"),
        (["-p", "x" * 600], "error: the prompt has 602 tokens"),
    ],
)
def test_user_errors_are_one_line(pelton, built, arguments, message):
    result = pelton("run", *arguments, input="")
    assert result.exit_code == 2
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1


def test_a_missing_chat_template_is_a_user_error(pelton, built):
    built.parts = FakeBuilt(tokenizer=FakeTokenizer(has_template=False))
    result = pelton("run", "-p", "x")
    assert result.exit_code == 2
    assert "no chat template" in result.stderr


# The interactive loop, with lines in place of a terminal.


def session_of(built=None, **options) -> Session:
    settings = {"system": None, "chat": True, "stats": False} | options
    return Session(LLM.from_parts(built or FakeBuilt()), SamplingParams(max_tokens=64), **settings)


def converse(session: Session, *lines) -> None:
    """Feed lines; an exception stands for a key; then Ctrl-D."""
    waiting = [*lines, EOFError()]

    def read() -> str:
        line = waiting.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line

    session.loop(read)
    session.llm._engine.check()
    assert not session.llm._engine.has_unfinished


def test_on_a_terminal_it_is_a_conversation(pelton, built, monkeypatch):
    monkeypatch.setattr(run_module, "is_terminal", lambda stream: True)
    result = pelton("run", "--no-stats", input="hello\n/exit\n")
    assert result.exit_code == 0
    assert "HELLO\n" in result.stdout
    assert "context of 512 tokens" in result.stderr


def test_the_history_is_kept_until_it_is_cleared(capsys):
    built = FakeBuilt()
    converse(session_of(built), "one", "two", "/clear", "three")
    assert [prompt_text(built, i) for i in range(3)] == [
        "<user>one<assistant>",
        "<user>one<assistant>ONE<user>two<assistant>",
        "<user>three<assistant>",
    ]
    assert capsys.readouterr().out.startswith("ONE\nONEONETWO\n")


def test_a_new_system_prompt_starts_a_new_conversation():
    built = FakeBuilt()
    converse(session_of(built), "one", "/system be brief", "two", "/system", "three")
    assert prompt_text(built, 1) == "<system>be brief<user>two<assistant>"
    assert prompt_text(built, 2) == "<user>three<assistant>"


def test_set_changes_a_parameter_and_refuses_nonsense(capsys):
    session = session_of()
    converse(
        session, "/set temperature 0.25", "/set max_tokens none", "/set stop END", "/set temprature 1",
        "/set top_p 7", "/set stop_token_ids 5", "/nonsense",
    )  # fmt: skip
    assert (session.params.temperature, session.params.max_tokens, session.params.stop) == (0.25, None, ("END",))
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 4
    assert "no parameter 'temprature'; did you mean temperature?" in errors[0]
    assert "top_p is 7" in errors[1]
    assert "stop_token_ids is 5; give a list" in errors[2]
    assert "no command /nonsense; /help lists them" in errors[3]


def test_help_and_stats(capsys):
    session = session_of()
    converse(session, "/help", "/stats", "hi", "/stats", "hi")
    err = capsys.readouterr().err
    assert "/set NAME VALUE" in err
    assert err.count("TTFT") == 1


def test_ctrl_c_stops_the_answer_and_not_the_program(capsys):
    built = FakeBuilt(lambda prompt: "a rather long answer")
    steps = 0
    inner = built.executor.collect

    def collect(ticket):
        nonlocal steps
        steps += 1
        if steps == 6:
            signal.raise_signal(signal.SIGINT)
        return inner(ticket)

    built.executor.collect = collect
    session = session_of(built)
    converse(session, "one", "two")
    captured = capsys.readouterr()
    assert captured.out.startswith("a ra\na rather long answer\n")  # the fake detokenizer holds a letter back
    assert "(stopped)" in captured.err
    assert session.history[1] == {"role": "assistant", "content": "a ra"}
    assert prompt_text(built) == "<user>one<assistant>a ra<user>two<assistant>"


def test_ctrl_c_at_the_prompt_only_says_how_to_leave(capsys):
    converse(session_of(), KeyboardInterrupt(), "hi")
    captured = capsys.readouterr()
    assert "Ctrl-D leaves" in captured.err
    assert "HI\n" in captured.out


def test_a_conversation_that_outgrows_the_context_loses_its_oldest_turns_with_a_note(capsys):
    built = FakeBuilt(lambda prompt: "ok", max_model_len=60)
    session = session_of(built, system="S")
    converse(session, "first " * 3, "second " * 2, "third " * 2)
    assert prompt_text(built) == "<system>S<user>second second<assistant>ok<user>third third<assistant>"
    assert "has outgrown the context of 60 tokens: dropped the oldest turn" in capsys.readouterr().err


def test_a_question_longer_than_the_context_is_refused_and_forgotten(capsys):
    built = FakeBuilt(max_model_len=30)
    session = session_of(built)
    converse(session, "x" * 50, "short")
    captured = capsys.readouterr()
    assert "error: the prompt has 52 tokens, the context holds 30" in captured.err
    assert "SHORT" in captured.out
    assert prompt_text(built) == "<user>short<assistant>"


def test_an_empty_answer_is_forgotten():
    built = FakeBuilt(lambda prompt: "" if prompt == "one" else "ok")
    assert ids_of("") == [] and EOS == 0
    session = session_of(built)
    converse(session, "one", "two")
    assert prompt_text(built) == "<user>two<assistant>"


def test_the_line_of_statistics_says_what_is_known():
    metrics = RequestMetrics(0.0, token_times=(0.0412, *(0.0412 + 0.0062 * i for i in range(1, 128))))
    before = EngineStats(decode_bytes=1e9, decode_seconds=1.0)
    after = EngineStats(decode_bytes=44e9, decode_seconds=2.0)
    line = "TTFT 41 ms · TPOT 6.2 ms · 161 tok/s · 128 tokens"
    asked = []

    def peak(rate):
        return lambda achieved: asked.append(achieved) or rate

    assert statistics_line(metrics, before, after, peak(100e9)) == f"{line} · MBU 43 %"
    assert asked == [43e9]  # a kept figure that is lower than this is measured again
    assert statistics_line(metrics, before, after, peak(10e9)) == f"{line} · MBU 430 % (partly from cache)"
    assert statistics_line(metrics, before, after, peak(None)) == line
    first = RequestMetrics(0.0, token_times=(0.5,))
    assert statistics_line(first, before, before, peak(1e9)) == "TTFT 500 ms · 1 token"


def test_mbu_is_that_of_the_decode_steps(pelton, built):
    built.parts = FakeBuilt(peak_bandwidth=1000.0, stats=StepStats(seconds=0.5, bytes=250.0))
    assert "MBU 50 %" in pelton("run", "-p", "hello").stderr


def test_a_base_model_goes_on_with_the_raw_text(pelton, built, monkeypatch):
    monkeypatch.setattr(type(built.parts.tokenizer), "chat_template", None)
    result = pelton("run", "base", "-p", "hello", "--no-stats")
    assert (result.exit_code, result.stdout) == (0, "HELLO\n")
    assert "note: the model has no chat template" in result.stderr


def test_lora_answers_with_the_adapter(pelton, built, tmp_path):
    folder = tmp_path / "my-adapter"
    folder.mkdir()
    result = pelton("run", "-p", "hello", "--lora", folder, "--no-stats")
    assert (result.exit_code, result.stdout) == (0, "HELLO\n")
    (config,) = built.configs
    assert (config.enable_lora, config.max_loras, config.max_lora_rank) == (True, 1, 64)
    assert built.parts.read_adapters == [str(folder)]
    assert {s.adapter for batch in built.parts.executor.batches for s in batch.sequences} == {1}


def test_of_several_adapters_the_first_answers(pelton, built):
    pelton("run", "-p", "hello", "--lora", "sql=org/one", "--lora", "poet=org/two", "--max-lora-rank", "8", "--no-chat")
    (config,) = built.configs
    assert (config.max_loras, config.max_lora_rank) == (2, 8)
    assert built.parts.read_adapters == ["org/one", "org/two"]
    assert {s.adapter for batch in built.parts.executor.batches for s in batch.sequences} == {1}


def test_without_lora_there_is_no_room_for_adapters(pelton, built):
    pelton("run", "-p", "hello")
    assert not built.configs[0].enable_lora


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        (["--lora", "a=x", "--lora", "a=y"], "--lora is 'a=y'; give NAME=DIR, each name once"),
        (["--lora", "=x"], "--lora is '=x'"),
        (["--lora", "a="], "--lora is 'a='"),
        (["--max-lora-rank", "8"], "--max-lora-rank without --lora has no use"),
    ],
)
def test_adapters_that_are_asked_for_wrongly(pelton, built, options, cause):
    result = pelton("run", "-p", "hello", *options)
    assert result.exit_code == 2 and cause in result.stderr
    assert not built.configs


def test_slash_lora_changes_the_adapter_in_a_new_conversation(capsys):
    built = FakeBuilt()
    with LLM.from_parts(built, EngineConfig(enable_lora=True)) as llm:
        llm.add_lora("sql", "one"), llm.add_lora("poet", "two")
        session = Session(llm, SamplingParams(), system=None, chat=True, stats=False, lora="sql")
        session.answer("a")
        session.command("/lora poet")
        session.answer("b")
        assert prompt_text(built) == "<user>b<assistant>"
        session.command("/lora")
        session.answer("c")
        used = [{s.adapter for s in batch.sequences}.pop() for batch in built.executor.batches]
        assert list(dict.fromkeys(used)) == [1, 2, 0]
        with pytest.raises(RequestError, match="no adapter 'nobody'; there is: sql, poet"):
            session.command("/lora nobody")
    assert "conversation with adapter poet" in capsys.readouterr().err
