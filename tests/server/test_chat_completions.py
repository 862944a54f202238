"""/v1/completions and /v1/chat/completions over HTTP, on an engine that says the prompt in capitals."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from pelton.config import StructuredOutputsParams
from pelton.outputs import CompletionOutput
from pelton.prompts import EncodedPrompt
from pelton.server.chat_events import Conversation
from pelton.server.schemas import CompletionRequest
from pelton.text.reasoning import ReasoningFormat
from tests.helpers.chat_tokenizer import ChatTokenizer
from tests.helpers.fake_parts import FakeBuilt, FakeTokenizer, prompt_text
from tests.helpers.serving import Running, serving


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving() as running:
        yield running


def test_a_text_goes_on(server: Running) -> None:
    reply = server.ask("/v1/completions", {"prompt": "abc", "max_tokens": 10})
    assert reply.status == 200
    answer = reply.json
    assert answer["object"] == "text_completion" and answer["model"] == "fake"
    assert [(c["text"], c["finish_reason"]) for c in answer["choices"]] == [("ABC", "stop")]
    assert answer["usage"]["prompt_tokens"] == 3 and answer["usage"]["completion_tokens"] == 4


def test_several_prompts_and_answers_have_an_index_each(server: Running) -> None:
    reply = server.ask("/v1/completions", {"prompt": ["ab", "cd"], "n": 2, "max_tokens": 10})
    assert [(c["index"], c["text"]) for c in reply.json["choices"]] == [(0, "AB"), (1, "AB"), (2, "CD"), (3, "CD")]


def test_a_stream_brings_the_same_text_in_pieces(server: Running) -> None:
    body = {"prompt": "hello", "max_tokens": 10, "stream": True, "stream_options": {"include_usage": True}}
    reply = server.ask("/v1/completions", body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    *chunks, usage, done = reply.events
    assert done == "[DONE]" and usage["choices"] == [] and usage["usage"]["completion_tokens"] == 6
    assert "".join(c["choices"][0]["text"] for c in chunks) == "HELLO"
    assert [c["choices"][0]["finish_reason"] for c in chunks][-1] == "stop"
    assert len({c["id"] for c in chunks}) == 1


def test_a_conversation_is_answered(server: Running) -> None:
    body = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]}
    answer = server.ask("/v1/chat/completions", body).json
    message = answer["choices"][0]["message"]
    assert message["role"] == "assistant" and message["content"] == "SHI"
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_a_streamed_conversation_begins_with_the_role(server: Running) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": True, "n": 2}
    *chunks, done = server.ask("/v1/chat/completions", body).events
    assert done == "[DONE]"
    for index in (0, 1):
        deltas = [c["choices"][0]["delta"] for c in chunks if c["choices"][0]["index"] == index]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert "".join(d.get("content") or "" for d in deltas) == "HI"


def test_a_begun_answer_goes_on() -> None:
    begun = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": [{"type": "text", "text": "Well, "}]}]
    with serving(FakeBuilt(tokenizer=ChatTokenizer())) as server:
        answer = server.ask("/v1/chat/completions", {"messages": begun, "continue_final_message": True}).json
        assert answer["choices"][0]["message"]["content"] == "HIWELL, "
        assert prompt_text(server.built) == "<user>hi<assistant>Well, "
        for wrong in (
            {"messages": begun[:1], "continue_final_message": True},
            {"messages": begun, "continue_final_message": True, "add_generation_prompt": True},
            {"messages": begun, "add_generation_prompt": False},
            {"messages": begun, "continue_final_message": True, "response_format": {"type": "json_object"}},
        ):
            assert server.ask("/v1/chat/completions", wrong).status == 400, wrong


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"prompt": "a", "no_such": 1}, "no_such", "unsupported_parameter"),
        ({"prompt": "a", "suffix": "b"}, "suffix", "invalid_type"),
        ({"prompt": "a", "temperature": "hot"}, "temperature", "invalid_type"),
        ({"prompt": "a", "temperature": -1}, "temperature", "invalid_value"),
        ({"prompt": "a", "max_tokens": 0.5}, "max_tokens", "invalid_type"),
        ({"prompt": "a", "max_tokens": 2**70}, "max_tokens", "invalid_type"),
        ({"prompt": "a", "top_k": 2**70}, "top_k", "invalid_type"),
        ({"prompt": "a", "priority": -(2**70)}, "priority", "invalid_type"),
        ({}, "prompt", "missing_required_parameter"),
        ({"prompt": [1, "a"]}, None, "invalid_value"),
        ({"prompt": []}, "prompt", "invalid_value"),
        ({"prompt": [[]]}, None, "invalid_value"),
        ({"prompt": [10**6]}, None, "invalid_value"),
        ({"prompt": "a", "stream_options": {}}, "stream_options", "invalid_value"),
        ({"prompt": "a", "stream": True, "prompt_logprobs": 1}, None, "invalid_value"),
    ],
)
def test_what_is_wrong_is_refused_by_name(server: Running, body: object, param: str | None, code: str) -> None:
    reply = server.ask("/v1/completions", body)
    assert reply.status == 400
    error = reply.json["error"]
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error"), error
    assert param is None or param in error["message"]


@pytest.mark.parametrize("name", ["chat_template", "self", "messages", "tools", "add_generation_prompt"])
def test_requests_bring_no_template_of_their_own(server: Running, name: str) -> None:
    body = {
        "messages": [{"role": "user", "content": "hi"}],
        "chat_template_kwargs": {name: "{% for i in range(9**9) %}"},
    }
    for path in ("/v1/chat/completions", "/tokenize"):
        reply = server.ask(path, body)
        assert reply.status == 400 and name in reply.json["error"]["message"], path


@pytest.fixture(scope="module")
def thinking() -> Iterator[Running]:
    """A model whose prompts open its thoughts."""

    class Thinker(ChatTokenizer):
        def apply_chat_template(self, messages: Any, **options: Any) -> str:
            return super().apply_chat_template(messages, **options) + "<think>\n"

    with serving(FakeBuilt(lambda prompt: "YES", tokenizer=Thinker())) as running:
        yield running


def test_an_answer_that_is_prescribed_is_no_thought() -> None:
    request, thoughts = CompletionRequest(prompt=""), ReasoningFormat("think", "<think>", "</think>", inside=True)
    for structure, thinks in (({"choice": ["YES", "NO"]}, False), ({"regex": "YES|NO"}, False), ({"json": "{}"}, True)):
        asked = Conversation(EncodedPrompt(None, [], False), thoughts)
        service: Any = SimpleNamespace(
            structure_of=lambda request, s=structure: StructuredOutputsParams(**s), params=lambda request, **more: more,
            tokenizer=FakeTokenizer(),
        )  # fmt: skip
        asked.params(service, request, {})
        piece = CompletionOutput(0, "YES", finish_reason="stop")
        answer = asked.reader().whole(piece)
        assert (answer.reasoning, answer.content) == (("YES", "") if thinks else ("", "YES")), structure


@pytest.mark.parametrize("schema", ["{oops", "[1]"])
def test_a_schema_that_is_none(thinking: Running, schema: str) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "structured_outputs": {"json": schema}}
    reply = thinking.ask("/v1/chat/completions", body)
    assert reply.status == 400 and "structured_outputs" in reply.json["error"]["message"]


def test_token_ids_of_prompt_and_answer(server: Running) -> None:
    for path, prompt in (("/v1/completions", {"prompt": "ab"}),
                         ("/v1/chat/completions", {"messages": [{"role": "user", "content": "ab"}]})):  # fmt: skip
        body = prompt | {"max_tokens": 2, "return_token_ids": True}
        whole = server.ask(path, body).json
        chunks = server.ask(path, body | {"stream": True}).events[:-1]
        where = whole if "messages" in prompt else whole["choices"][0]
        first = chunks[0] if "messages" in prompt else chunks[0]["choices"][0]
        assert first["prompt_token_ids"] == where["prompt_token_ids"] and where["prompt_token_ids"]
        told = [i for chunk in chunks for i in chunk["choices"][0].get("token_ids") or ()]
        assert told == whole["choices"][0]["token_ids"] and len(told) == 2


def test_no_tokens_are_none(server: Running) -> None:
    body = {"prompt": "ab", "max_tokens": 0, "echo": True, "return_token_ids": True}
    answer = server.ask("/v1/completions", body).json
    assert answer["choices"][0]["text"] == "ab" and answer["choices"][0]["token_ids"] == []
    assert answer["usage"]["completion_tokens"] == 0 and answer["usage"]["total_tokens"] == 2
    del body["echo"]
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, usage, _ = server.ask("/v1/completions", body | options).events
    assert all(not c["choices"][0]["text"] and not c["choices"][0]["token_ids"] for c in chunks)
    assert usage["usage"]["completion_tokens"] == 0


def test_no_json_no_model_no_path_no_method(server: Running) -> None:
    assert (
        server.ask("/v1/completions", b'{"prompt": "a", "structured_outputs": {"json":' + 5000 * b'{"a":').json[
            "error"
        ]["code"]
        == "invalid_json"
    )
    assert server.ask("/v1/completions", b"{").json["error"]["code"] == "invalid_json"
    assert server.ask("/v1/completions", b'{"prompt": "\xff"}').json["error"]["code"] == "invalid_json"
    assert server.ask("/v1/completions", {"prompt": "a", "model": "b"}).status == 404
    assert server.ask("/nowhere").json["error"]["type"] == "not_found_error"
    assert server.ask("/v1/completions").status == 405


def test_the_request_id_comes_back(server: Running) -> None:
    reply = server.ask("/v1/completions", {"prompt": "a"}, headers={"X-Request-Id": "my-id"})
    assert reply.headers["x-request-id"] == "my-id" and reply.json["id"] == "cmpl-my-id"
    odd = server.ask("/v1/completions", {"prompt": "a"}, headers={"X-Request-Id": "a b"})
    assert odd.headers["x-request-id"] not in ("a b", "")


def test_tokens_there_and_back(server: Running) -> None:
    tokens = server.ask("/tokenize", {"prompt": "Hi"}).json
    assert tokens["count"] == 2
    assert server.ask("/detokenize", {"tokens": tokens["tokens"]}).json == {"prompt": "Hi"}
    chat = server.ask("/tokenize", {"messages": [{"role": "user", "content": "Hi"}]}).json
    assert chat["count"] == 4  # with two roles
    for ignored in ({"prompt": "a", "tools": [{"type": "function", "function": {"name": "f"}}]},
                    {"prompt": "a", "chat_template_kwargs": {"a": 1}},
                    {"messages": [{"role": "user", "content": "a"}], "add_special_tokens": False}):  # fmt: skip
        assert server.ask("/tokenize", ignored).status == 400, ignored
    long = "x" * 5000
    tokens = server.ask("/tokenize", {"prompt": long, "return_token_strs": True}).json
    assert tokens["token_strs"] == list(long) and server.ask("/detokenize", {"tokens": tokens["tokens"]}).json == {
        "prompt": long
    }
