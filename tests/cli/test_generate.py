import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.fake_parts import EOS, FakeBuilt, ids_of


@pytest.fixture
def files(tmp_path):
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


def write(path: Path, *lines) -> None:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))


def answers(path: Path) -> dict:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({row["index"] for row in rows}) == len(rows), "an answer is there twice"
    return {row["index"]: row for row in rows}


def test_every_prompt_gets_a_line(pelton, built, files):
    write(
        files[0],
        {"prompt": "hello"},
        {"id": "chat", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1},
        "",
        {"id": 7, "prompt_token_ids": ids_of("abc"), "n": 2},
    )
    result = pelton("generate", "-i", files[0], "-o", files[1])
    assert result.exit_code == 0, result.stderr
    rows = answers(files[1])
    assert rows[0] == {
        "index": 0,
        "id": 0,
        "text": "HELLO",
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11},
    }
    assert (rows[1]["id"], rows[1]["text"], rows[1]["finish_reason"]) == ("chat", "H", "length")
    assert (rows[2]["id"], [o["text"] for o in rows[2]["outputs"]]) == (7, ["ABC", "ABC"])
    assert "3 of 3 prompts" in result.stderr
    assert result.stdout == ""


def test_token_ids_are_written_on_request_and_without_a_tokenizer(pelton, built, files):
    write(files[0], {"prompt_token_ids": ids_of("a")})
    pelton("generate", "-i", files[0], "-o", files[1], "--token-ids")
    assert answers(files[1])[0]["token_ids"] == [*ids_of("A"), EOS]
    built.parts = FakeBuilt(without_tokenizer=True)
    pelton("generate", "-i", files[0], "-o", files[1], "--overwrite")
    assert answers(files[1])[0]["token_ids"] == [*ids_of("A"), EOS]


def test_a_line_overrides_the_options(pelton, built, files):
    write(files[0], {"prompt": "long answer"}, {"prompt": "long answer", "max_tokens": 2})
    pelton("generate", "-i", files[0], "-o", files[1], "--max-tokens", "4", "--temperature", "0")
    assert [answers(files[1])[i]["text"] for i in (0, 1)] == ["LONG", "LO"]
    assert all(spec.params.temperature == 0 for spec in built.parts.specs)


def test_a_line_may_have_any_sampling_parameter(pelton, built, files):
    write(files[0], {"prompt": "a", "logit_bias": {"7": 2}, "allowed_token_ids": [7, 8], "bad_words": ["b"]})
    pelton("generate", "-i", files[0], "-o", files[1], "--min-p", "0.1", "--typical-p", "0.9")
    params = built.parts.specs[0].params
    assert (params.logit_bias, params.allowed_token_ids, params.min_p, params.typical_p) == ({7: 2}, (7, 8), 0.1, 0.9)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: no JSON"),
        ("[1]", "line 2: no JSON object"),
        ('{"prompt": "a", "temprature": 1}', "line 2: unknown field 'temprature'; did you mean temperature?"),
        ('{"id": 1}', "line 2: has no prompt; give one of prompt, messages, prompt_token_ids"),
        ('{"prompt": "a", "messages": []}', "line 2: has prompt and messages; give one"),
        ('{"prompt": 5}', "line 2: prompt is no text"),
        ('{"messages": ["hi"]}', "line 2: messages is no conversation"),
        ('{"prompt_token_ids": [1.5]}', "line 2: prompt_token_ids is no list of token ids"),
        ('{"prompt": "a", "top_p": 7}', "line 2: top_p is 7; choose a value"),
        ('{"prompt": "a", "logit_bias": {"7": 101}}', "line 2: logit_bias of token 7 is 101; choose a value"),
        ('{"prompt": "a", "logits_processors": []}', "line 2: unknown field 'logits_processors'"),
        ('{"prompt": "a", "stop": 7}', "line 2: stop is 7; give a list"),
        ('{"prompt": "a", "id": 0}', "line 2: id 0 is that of line 1; make ids unique"),
        ('{"prompt": "a", "id": [0]}', "line 2: id is neither text nor integer"),
    ],
)
def test_a_bad_line_is_named_before_anything_is_loaded(pelton, built, files, line, message):
    write(files[0], {"prompt": "fine"}, line)
    result = pelton("generate", "-i", files[0], "-o", files[1])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {files[0]} {message}")
    assert result.stderr.count("\n") == 1
    assert not built.configs
    assert not files[1].exists()


def test_missing_and_empty_inputs_are_user_errors(pelton, built, files):
    assert "cannot read" in pelton("generate", "-i", files[0], "-o", files[1]).stderr
    write(files[0], "")
    assert "holds no prompt" in pelton("generate", "-i", files[0], "-o", files[1]).stderr
    write(files[0], {"prompt": "a"})
    assert "are the same file" in pelton("generate", "-i", files[0], "-o", files[0]).stderr
    assert json.loads(files[0].read_text()) == {"prompt": "a"}


def test_a_refused_prompt_gets_an_error_line_and_the_others_their_answers(pelton, built, files):
    write(files[0], {"prompt": "a"}, {"prompt": "x" * 600}, {"prompt": "b"})
    result = pelton("generate", "-i", files[0], "-o", files[1])
    assert result.exit_code == 2
    assert f"error: 1 of 3 prompts were refused; see 'error' in {files[1]}" in result.stderr
    rows = answers(files[1])
    assert "the prompt has 600 tokens" in rows[1]["error"]
    assert [rows[i]["text"] for i in (0, 2)] == ["A", "B"]

    built.parts = FakeBuilt()
    again = pelton("generate", "-i", files[0], "-o", files[1])
    assert again.exit_code == 2  # the same prompt was tried again, and nothing else
    assert [row["index"] for row in map(json.loads, files[1].read_text().splitlines())][3:] == [1]


def test_a_finished_run_is_not_run_again(pelton, built, files):
    write(files[0], {"prompt": "a"})
    pelton("generate", "-i", files[0], "-o", files[1])
    before = files[1].read_bytes()
    result = pelton("generate", "-i", files[0], "-o", files[1])
    assert (result.exit_code, len(built.configs)) == (0, 1)
    assert f"all 1 answers are in {files[1]}" in result.stderr
    assert files[1].read_bytes() == before


def test_a_torn_last_line_is_answered_again(pelton, built, files):
    write(files[0], *({"prompt": f"prompt {i}"} for i in range(4)))
    pelton("generate", "-i", files[0], "-o", files[1])
    whole = files[1].read_bytes()
    files[1].write_bytes(whole[:-10])
    built.parts = FakeBuilt()
    result = pelton("generate", "-i", files[0], "-o", files[1])
    assert result.exit_code == 0
    assert len(built.parts.prompts) == 1
    assert sorted(answers(files[1])) == [0, 1, 2, 3]
    assert "4 of 4" in result.stderr


def test_an_output_of_another_input_or_model_is_refused_unless_overwritten(pelton, built, files):
    write(files[0], {"prompt": "a"})
    pelton("generate", "-i", files[0], "-o", files[1])
    before = files[1].read_bytes()
    result = pelton("generate", "other-model", "-i", files[0], "-o", files[1], "--temperature", "0")
    assert result.exit_code == 2
    assert "was made from another model, sampling; choose another --output or --overwrite" in result.stderr
    write(files[0], {"prompt": "b"})
    assert "was made from another input" in pelton("generate", "-i", files[0], "-o", files[1]).stderr
    assert files[1].read_bytes() == before
    built.parts = FakeBuilt()
    assert pelton("generate", "-i", files[0], "-o", files[1], "--overwrite").exit_code == 0
    assert answers(files[1])[0]["text"] == "B"


def test_a_file_of_unknown_origin_is_not_touched(pelton, built, files):
    write(files[0], {"prompt": "a"})
    files[1].write_text("my thesis\n")
    result = pelton("generate", "-i", files[0], "-o", files[1])
    assert result.exit_code == 2
    assert "out.jsonl.meta.json, which says what it was made from, does not" in result.stderr
    assert files[1].read_text() == "my thesis\n"


def test_a_second_run_on_the_same_output_is_refused(pelton, built, files):
    fcntl = pytest.importorskip("fcntl")
    write(files[0], {"prompt": "a"})
    with files[1].open("a+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        result = pelton("generate", "-i", files[0], "-o", files[1], "--overwrite")
    assert result.exit_code == 2
    assert "another run is writing" in result.stderr


def test_the_seed_of_a_line_does_not_depend_on_where_a_run_was_interrupted(pelton, built, files):
    write(files[0], *({"prompt": f"p{i}"} for i in range(3)), {"prompt": "own", "seed": 5})
    pelton("generate", "-i", files[0], "-o", files[1])
    seeds = {len(s.prompt_token_ids) + s.prompt_token_ids[1]: s.seed for s in built.parts.specs}
    assert len(set(seeds.values())) == 4 and 5 in seeds.values()
    lines = files[1].read_bytes().splitlines(keepends=True)
    files[1].write_bytes(lines[0])
    built.parts = FakeBuilt()
    pelton("generate", "-i", files[0], "-o", files[1])
    again = {len(s.prompt_token_ids) + s.prompt_token_ids[1]: s.seed for s in built.parts.specs}
    assert len(again) == 3
    assert again.items() <= seeds.items()


def test_ctrl_c_says_how_to_go_on(pelton, built, files):
    write(files[0], {"prompt": "a"}, {"prompt": "a much longer prompt"})
    inner, steps = built.parts.executor.submit, 0

    def submit(batch):
        nonlocal steps
        steps += 1
        if steps == 5:
            signal.raise_signal(signal.SIGINT)
        return inner(batch)

    built.parts.executor.submit = submit
    result = pelton("generate", "-i", files[0], "-o", files[1])
    assert result.exit_code == 130
    assert "stopped after 1 of 2; the same command goes on" in result.stderr
    built.parts = FakeBuilt()
    assert pelton("generate", "-i", files[0], "-o", files[1]).exit_code == 0
    assert [answers(files[1])[i]["text"] for i in (0, 1)] == ["A", "A MUCH LONGER PROMPT"]


CHILD = """
import sys, time, types
from tests.helpers.fake_parts import FakeBuilt
built = FakeBuilt()
inner = built.executor.submit
def slowly(batch):
    time.sleep(0.01)
    return inner(batch)
built.executor.submit = slowly
sys.modules["pelton.build"] = types.SimpleNamespace(build=lambda config, progress: built)
from pelton.cli.main import main
sys.argv = ["pelton", "generate", *sys.argv[1:]]
main()
"""


def test_a_killed_run_goes_on_and_the_answers_are_those_of_an_unbroken_one(pelton, built, files):
    lines = [{"prompt": f"{'word ' * (i % 7)}{i}"} for i in range(40)]
    write(files[0], *lines)
    command = [sys.executable, "-c", CHILD, "-i", str(files[0]), "-o", str(files[1]), "--max-num-seqs", "3"]
    root = Path(__file__).resolve().parents[2]
    kills = 0
    for wanted in (4, 10, 18):
        process = subprocess.Popen(command, cwd=root, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            if files[1].exists() and files[1].read_bytes().count(b"\n") >= wanted:
                os.kill(process.pid, signal.SIGKILL)
                kills += process.wait() == -signal.SIGKILL
            time.sleep(0.002)
    assert kills == 3
    assert len(answers(files[1])) < 40
    result = pelton("generate", "-i", files[0], "-o", files[1], "--max-num-seqs", "3")
    assert result.exit_code == 0
    rows = answers(files[1])
    assert [rows[i]["text"] for i in range(40)] == [line["prompt"].upper() for line in lines]
