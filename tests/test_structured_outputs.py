"""Answers that follow a schema, regex, grammar or choice: on the real small model, mixed with free ones."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections.abc import Iterator

import pytest

from pelton import LLM, AsyncLLM, SamplingParams
from pelton.errors import RequestError

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
ASK = [{"role": "user", "content": "Describe a person as JSON."}]


def is_person(text: str) -> bool:
    value = json.loads(text)
    assert list(value) == ["name", "age", "tags"]
    assert isinstance(value["name"], str) and len(value["name"]) <= 20
    assert isinstance(value["age"], int) and 0 <= value["age"] <= 150
    assert len(value["tags"]) <= 3 and set(value["tags"]) <= {"a", "b", "c"}
    return True


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(max_model_len=512) as llm:
        yield llm


def params(**options) -> SamplingParams:
    structured = {k: options.pop(k) for k in ("json", "regex", "choice", "grammar", "json_object") if k in options}
    return SamplingParams(**({"max_tokens": 200, "structured_outputs": structured} | options))


@pytest.mark.parametrize("temperature", [0.0, 1.0, 3.0])
def test_every_finished_answer_satisfies_the_schema(llm, temperature):
    outputs = llm.chat([ASK] * 4, params(json=PERSON, temperature=temperature, seed=1))
    finished = [o.outputs[0].text for o in outputs if o.outputs[0].finish_reason == "stop"]
    assert all(is_person(text) for text in finished)
    assert len(finished) >= 3  # an age or name ends somewhere; only a random walk through whitespace may not


def test_regex_choice_grammar_and_any_object(llm):
    cases = [
        (params(regex=r"[A-Z][a-z]{2,9}, [0-9]{3}"), lambda t: re.fullmatch(r"[A-Z][a-z]{2,9}, [0-9]{3}", t)),
        (params(choice=["yes", "no", 'per"haps\n']), lambda t: t in ("yes", "no", 'per"haps\n')),
        (params(grammar='start: "(" start ")" | "x"', max_tokens=400, temperature=2.0, seed=3), balanced),
        (params(grammar='root ::= "a" root | "b"', temperature=2.0, seed=3), lambda t: re.fullmatch("a*b", t)),
        (params(json_object=True), lambda t: isinstance(json.loads(t), dict)),
        (params(json='{"type": "boolean"}'), lambda t: t.strip() in ("true", "false")),
    ]
    outputs = llm.chat([ASK] * len(cases), [given for given, _ in cases])
    for (given, satisfied), output in zip(cases, outputs, strict=True):
        answer = output.outputs[0]
        if answer.finish_reason == "stop":
            assert satisfied(answer.text), (given.structured_outputs, answer.text)
    assert sum(o.outputs[0].finish_reason == "stop" for o in outputs) >= 5


def balanced(text: str) -> bool:
    depth = text.count("(")
    return text == "(" * depth + "x" + ")" * depth


def test_free_requests_beside_constrained_ones_get_their_own_tokens(llm):
    free = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    constrained = params(json=PERSON, temperature=0)
    (alone,) = llm.chat([ASK], free)
    (person,) = llm.chat([ASK], constrained)
    mixed = llm.chat([ASK] * 6, [free, constrained] * 3)
    for output, expected in zip(mixed, [alone, person] * 3, strict=True):
        assert output.outputs[0].token_ids == expected.outputs[0].token_ids


def test_with_everything_else(llm):
    (output,) = llm.chat([ASK], params(json=PERSON, n=3, temperature=1.0, seed=7, top_p=0.9, frequency_penalty=0.2))
    assert len({o.text for o in output.outputs}) > 1
    assert all(is_person(o.text) for o in output.outputs if o.finish_reason == "stop")
    (output,) = llm.chat([ASK], params(json=PERSON, temperature=0, ignore_eos=True, min_tokens=3))
    assert is_person(output.outputs[0].text)
    pieces = list(llm.chat([ASK], params(json=PERSON, temperature=0), stream=True))
    assert is_person("".join(p.outputs[0].text for p in pieces))
    (output,) = llm.chat([ASK], params(json=PERSON, temperature=0, max_tokens=5))
    assert output.outputs[0].finish_reason == "length"


def test_with_speculation_and_preemption():
    with LLM(max_model_len=512) as llm:
        expected = [o.outputs[0].token_ids for o in llm.chat([ASK] * 4, params(json=PERSON, seed=5))]
    options = {"num_speculative_tokens": 3, "max_model_len": 128, "kv_cache_memory": 14 * 16 * 23_040}
    with LLM(enable_prefix_caching=False, **options) as llm:
        got = [o.outputs[0].token_ids for o in llm.chat([ASK] * 4, params(json=PERSON, seed=5))]
        stats = llm.get_stats()
    assert got == expected
    assert stats.preemptions > 0 and stats.accepted_tokens > 0


@pytest.mark.parametrize(
    ("structured", "message"),
    [
        ({}, "structured_outputs has nothing; give one of"),
        ({"json": PERSON, "regex": "a"}, "has json and regex; give one of"),
        ({"yaml": "x"}, "unexpected keyword"),
        ({"regex": 3}, "regex of structured_outputs is 3"),
        ({"choice": []}, "choice of structured_outputs is empty"),
        ({"json": "{"}, "the JSON schema of structured_outputs cannot be used"),
        ({"json": {"type": "objekt"}}, "Invalid type: objekt"),
        ({"json": {"type": "string", "minLength": 5, "maxLength": 2}}, "Unsatisfiable"),
        ({"json": {"$ref": "https://example.com/x.json"}}, "not present in a registry"),
        ({"json": {"$ref": "#"}}, "cannot be used"),
        ({"regex": "(["}, "the regex of structured_outputs cannot be used"),
        ({"regex": r"[^\s\S]"}, "cannot be used"),
        ({"grammar": "start: nothing"}, "the grammar of structured_outputs cannot be used"),
        ({"json": {"enum": ["x" * 100] * 20_000}}, "more than 1,048,576"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_followed_is_refused_in_one_line_and_bounded_time(llm, structured, message):
    start = time.monotonic()
    with pytest.raises(RequestError, match=message) as caught:
        llm.generate("x", SamplingParams(structured_outputs=structured))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert time.monotonic() - start < 10
    assert not llm._engine.has_unfinished


@pytest.mark.parametrize("regex", ["(a?){5000}a{5000}", "((((a{100}){100}){100}){100})", ".*a.{500}b.*c.{500}"])
def test_hostile_patterns_take_bounded_time(llm, regex):
    start = time.monotonic()
    with contextlib.suppress(RequestError):
        llm.generate("x", params(regex=regex, max_tokens=10, temperature=1.0))
    assert time.monotonic() - start < 30
    llm._engine.check()


def test_deeply_nested_schemas_are_refused_or_followed(llm):
    schema: dict = {"type": "string"}
    for _ in range(3000):
        schema = {"type": "array", "items": schema}
    with pytest.raises(RequestError, match="cannot be used"):
        llm.generate("x", params(json=schema))
    with pytest.raises(RequestError, match="cannot be used"):
        llm.generate("x", params(json='{"type":"array","items":' * 3000 + "{}" + "}" * 3000))


def test_in_an_event_loop():
    async def main() -> list[str]:
        async with AsyncLLM(max_model_len=512) as llm:
            prompt = llm.conversation(ASK)
            outputs = await asyncio.gather(*(llm.generate(prompt, params(json=PERSON, seed=s)) for s in range(4)))
            with pytest.raises(RequestError, match="Invalid type"):
                await llm.generate(prompt, params(json={"type": "objekt"}))
            return [o.outputs[0].text for o in outputs if o.outputs[0].finish_reason == "stop"]

    texts = asyncio.run(main())
    assert len(texts) >= 3 and all(is_person(text) for text in texts)


def test_in_the_terminal(tmp_path):
    from click.testing import CliRunner

    from pelton.cli.main import pelton as command_line

    def run(*arguments: str) -> tuple[int, str, str]:
        result = CliRunner().invoke(
            command_line,
            ["run", "-p", "Describe a person.", "--temperature", "0", "--max-model-len", "512", *arguments],
        )
        return result.exit_code, result.stdout.strip(), result.stderr

    schema = tmp_path / "person.json"
    schema.write_text(json.dumps(PERSON))
    assert is_person(run("--json-schema", str(schema))[1])
    assert run("--choice", "maybe", "--choice", "never")[1] in ("maybe", "never")
    assert re.fullmatch("[0-9]{3}", run("--regex", "[0-9]{3}")[1])
    for arguments, message in (
        (["--json-schema", str(tmp_path / "none")], "cannot be read"),
        (["--regex", "(["], "the regex of structured_outputs cannot be used"),
        (["--regex", "a", "--choice", "b"], "regex and choice; give one of"),
    ):
        code, _, error = run(*arguments)
        assert code == 2 and message in error and "Traceback" not in error
