"""/v1/embeddings on the demo model, with OpenAI's client."""

from __future__ import annotations

import base64
from collections.abc import Iterator

import numpy as np
import openai
import pytest

from pelton import LLM
from tests.helpers.serving import Running, pelton_serve

from .test_metrics import samples, total

TEXTS = ["A cat sits on the mat.", "A kitten lies on the rug.", "Interest rates rose by half a percent."]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with pelton_serve("--max-model-len", "256", "--no-access-log", "--slo", "ttft=10s") as running:
        yield running


def test_openais_client_gets_the_embeddings_that_the_library_computes(server: Running) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    answer = client.embeddings.create(model=client.models.list().data[0].id, input=TEXTS)  # as base64
    got = np.array([row.embedding for row in answer.data], np.float32)
    with LLM(max_model_len=256) as llm:
        wanted = np.array([output.embedding for output in llm.embed(TEXTS)])
        tokens = sum(len(output.prompt_token_ids) for output in llm.embed(TEXTS))
    np.testing.assert_array_equal(got, wanted)
    assert answer.usage.prompt_tokens == tokens
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1.0, rtol=1e-6)


def test_formats_dimensions_and_pooling(server: Running) -> None:
    floats = server.ask("/v1/embeddings", {"input": "hello", "encoding_format": "float"}).json["data"][0]["embedding"]
    text = server.ask("/v1/embeddings", {"input": "hello", "encoding_format": "base64"}).json["data"][0]["embedding"]
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(text), "<f4"), np.array(floats, np.float32))
    short = server.ask("/v1/embeddings", {"input": "hello", "dimensions": 8}).json["data"][0]["embedding"]
    np.testing.assert_allclose(short, np.array(floats[:8]) / np.linalg.norm(floats[:8]), rtol=1e-5)
    mean = server.ask("/v1/embeddings", {"input": [[1, 2, 3], [4, 5]], "pooling": "mean"}).json["data"]
    assert [row["index"] for row in mean] == [0, 1]
    for wrong in ({"input": ""}, {"input": []}, {"input": "a", "dimensions": 10**6}, {"input": "a", "pooling": "cls"}):
        assert server.ask("/v1/embeddings", wrong).status == 400, wrong


def test_a_deadline_that_is_over_is_a_504(server: Running) -> None:
    reply = server.ask("/v1/embeddings", {"input": "hello", "timeout": 1e-9})
    assert reply.status == 504 and reply.json["error"]["code"] == "deadline"


def test_embeddings_are_counted_as_what_they_are(server: Running) -> None:
    names = ("request_success_total", "requests_rejected_total", "request_failures_total", "slo_requests_total")
    before = samples(server)
    assert server.ask("/v1/embeddings", {"input": ["hello", "you"]}).status == 200
    assert server.ask("/v1/embeddings", {"input": "too long " * 300}).status == 400
    after = samples(server)
    gained = {name: total(after, name) - total(before, name) for name in names}
    # They have no first token that could come in time.
    assert gained == {"request_success_total": 2, "requests_rejected_total": 1, "request_failures_total": 0,
                      "slo_requests_total": 0}  # fmt: skip


def test_more_inputs_than_the_queue_ever_holds(server: Running) -> None:
    reply = server.ask("/v1/embeddings", {"input": ["a"] * 1000})
    assert reply.status == 400 and reply.json["error"]["param"] == "input"
