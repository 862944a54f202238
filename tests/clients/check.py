"""Clients that know nothing of Pelton, unchanged, against a server that runs: ``check.py URL`` (tools/test_clients.sh).

The environment has openai, anthropic, litellm, lm-eval and schemathesis, and no Pelton.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

URL = sys.argv[1]
HERE = Path(__file__).parent
os.environ |= {"OPENAI_API_KEY": "none-is-needed", "ANTHROPIC_API_KEY": "none-is-needed", "HF_HUB_OFFLINE": "1",
               "LITELLM_LOCAL_MODEL_COST_MAP": "True"}  # fmt: skip
QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def model() -> str:
    import openai

    return str(openai.OpenAI(base_url=f"{URL}/v1").models.list().data[0].id)


def check_openai() -> None:
    import openai

    client = openai.OpenAI(base_url=f"{URL}/v1")
    name = model()
    answer = client.chat.completions.create(model=name, messages=QUESTION, temperature=0, max_tokens=20, logprobs=True)
    text = answer.choices[0].message.content
    assert text and "Paris" in text, text
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert len(answer.choices[0].logprobs.content) == answer.usage.completion_tokens
    options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    pieces = list(
        client.chat.completions.create(model=name, messages=QUESTION, temperature=0, max_tokens=20, **options)
    )
    assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == text
    assert pieces[-1].usage.completion_tokens == answer.usage.completion_tokens
    called = client.chat.completions.create(
        model=name, messages=[{"role": "user", "content": "Weather in Rome?"}], tools=[TOOL], temperature=0,
        tool_choice="required", parallel_tool_calls=False, max_tokens=60,
    )  # fmt: skip
    call = called.choices[0].message.tool_calls[0]
    assert called.choices[0].finish_reason == "tool_calls" and "city" in json.loads(call.function.arguments)
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    shaped = client.chat.completions.create(
        model=name, messages=QUESTION, max_tokens=40,
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}},
    )  # fmt: skip
    assert isinstance(json.loads(shaped.choices[0].message.content)["n"], int)
    texts = client.completions.create(model=name, prompt=["1 2 3", "a b c"], max_tokens=4, logprobs=2, echo=True)
    assert texts.choices[1].text.startswith("a b c") and texts.choices[0].logprobs.token_logprobs[0] is None
    try:
        client.chat.completions.create(model="other", messages=QUESTION)
        raise AssertionError("another model was answered")
    except openai.NotFoundError as error:
        assert error.code == "model_not_found"
    try:
        client.chat.completions.create(model=name, messages=QUESTION, temperature=99999)
        raise AssertionError("a temperature of 99999 was taken")
    except openai.BadRequestError as error:
        assert error.param == "temperature"


def check_openai_parses_pydantic_models() -> None:
    import openai
    from pydantic import BaseModel

    class City(BaseModel):
        name: str
        large: bool

    client = openai.OpenAI(base_url=f"{URL}/v1")
    parsed = client.chat.completions.parse(model=model(), messages=QUESTION, response_format=City, max_tokens=60)
    assert isinstance(parsed.choices[0].message.parsed, City)


def check_openai_async_cancellation() -> None:
    import openai

    async def run() -> None:
        client = openai.AsyncOpenAI(base_url=f"{URL}/v1")
        name = model()
        stream = await client.chat.completions.create(model=name, messages=QUESTION, max_tokens=400, stream=True)
        async for _ in stream:
            break
        await stream.close()
        answers = await asyncio.gather(
            *(client.completions.create(model=name, prompt=f"{i} ", max_tokens=8) for i in range(16))
        )
        assert len({answer.id for answer in answers}) == 16

    asyncio.run(run())


def check_anthropic() -> None:
    import anthropic

    client = anthropic.Anthropic(base_url=URL)
    # Not every version of the client has an argument for the temperature.
    greedy = {"temperature": 0}
    options: dict[str, Any] = {"model": model(), "messages": QUESTION, "max_tokens": 20, "extra_body": greedy}
    answer = client.messages.create(**options)
    text = answer.content[0].text
    assert "Paris" in text and answer.stop_reason in ("end_turn", "max_tokens"), answer
    assert answer.usage.input_tokens > 0 and 0 < answer.usage.output_tokens <= 20
    with client.messages.stream(**options) as stream:
        assert "".join(stream.text_stream) == text
        assert stream.get_final_message().usage.output_tokens == answer.usage.output_tokens
    try:
        client.messages.create(**(options | {"model": "other"}))
        raise AssertionError("another model was answered")
    except anthropic.NotFoundError:
        pass


def check_litellm() -> None:
    import litellm

    litellm.suppress_debug_info = True
    options = {"model": f"openai/{model()}", "api_base": f"{URL}/v1", "temperature": 0, "max_tokens": 20}
    answer = litellm.completion(messages=QUESTION, **options)
    assert "Paris" in answer.choices[0].message.content
    pieces = [p.choices[0].delta.content or "" for p in litellm.completion(messages=QUESTION, stream=True, **options)]
    assert "".join(pieces) == answer.choices[0].message.content
    text = litellm.text_completion(
        model=f"text-completion-openai/{model()}", api_base=f"{URL}/v1", prompt="The capital of France is",
        max_tokens=5, temperature=0,
    )  # fmt: skip
    assert "Paris" in text.choices[0].text
    try:
        litellm.completion(messages=QUESTION, **(options | {"temperature": -1}))
        raise AssertionError("a negative temperature was taken")
    except litellm.BadRequestError:
        pass


def check_lm_eval() -> None:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args",
             f"base_url={URL}/v1/completions,model={model()},num_concurrent=8,max_length=384", "--include_path",
             str(HERE / "lm_eval_tasks"), "--tasks", "opposites,opposites_said", "--output_path", folder],
            check=True, capture_output=True, cwd=HERE.parent.parent, timeout=300,
        )  # fmt: skip
        (file,) = Path(folder).rglob("results*.json")
        results = json.loads(file.read_text())["results"]
    # SmolLM2 knows its opposites: chance is 0.25.
    assert results["opposites"]["acc,none"] >= 0.75, results
    assert "exact_match,stripped" in results["opposites_said"]


def check_schemathesis() -> None:
    run = subprocess.run(
        [str(Path(sys.executable).parent / "schemathesis"), "--config-file", str(HERE / "schemathesis.toml"), "run",
         f"{URL}/openapi.json", "--url", URL, "--max-examples", "20", "--seed", "1", "--workers", "8",
         "--exclude-path", "/dashboard/events", "--request-timeout", "60", "--checks",
         "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"],
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


def main() -> None:
    failed = 0
    checks = [(name, function) for name, function in globals().items() if name.startswith("check_")]
    for name, function in checks:
        try:
            function()
        except Exception:
            failed += 1
            traceback.print_exc()
            print(f"{name} failed", flush=True)
        else:
            print(f"{name} passed", flush=True)
    print(f"{len(checks) - failed} passed, {failed} failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
