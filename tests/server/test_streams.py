"""Streams when clients leave, sleep or are slow, when engines fail, and when there are many."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from pelton import EngineConfig
from pelton.backends.base import StepOutput
from pelton.server import http
from tests.helpers.fake_engine import PacedExecutor
from tests.helpers.fake_parts import FakeBuilt, FakeDetokenizer, text_of
from tests.helpers.http_stream import Stream, paced, until
from tests.helpers.serving import Running, serving

LONG = {"prompt": "abcdefgh", "max_tokens": 4000, "stream": True}
SHORT = {"prompt": "ab", "max_tokens": 4}


def nothing_left(server: Running) -> None:
    """No request in the engine, no block in use, nothing active in the API process."""
    engine = server.engine.engine
    until(lambda: not engine.num_unfinished, 2)
    until(lambda: engine.stats().num_free_blocks == engine.stats().num_blocks, 2)
    until(lambda: not server.gate.num_active, 2)
    assert not server.engine._live


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """Two sequences run at once, at 100 tokens a second each."""
    with serving(paced(0.01), engine=EngineConfig(max_num_seqs=2, enable_prefix_caching=False)) as running:
        yield running
        nothing_left(running)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_in_the_middle_ends_its_request(server: Running, path: str, stream: bool) -> None:
    body: dict[str, Any] = {"max_tokens": 4000, "stream": stream, "n": 2}
    body |= {"prompt": "abc"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "abc"}]}
    client = Stream(server, body, path=path)
    until(lambda: server.engine.engine.stats().num_free_blocks < server.engine.engine.stats().num_blocks)
    if stream:
        events = client.events()
        for _ in range(4):
            next(events)
    client.leave()
    began = time.monotonic()
    nothing_left(server)
    assert time.monotonic() - began < 1


def test_who_leaves_the_queue_is_not_waited_for(server: Running) -> None:
    running = [Stream(server, LONG) for _ in range(2)]
    until(lambda: server.engine.engine.stats().num_running == 2)
    waiting = [Stream(server, LONG | {"stream": stream}) for stream in (True, False)]
    until(lambda: server.engine.engine.num_unfinished == 4)
    for client in waiting:
        client.leave()
    until(lambda: server.engine.engine.num_unfinished == 2, 1)
    assert next(running[0].events())["choices"]
    for client in running:
        client.leave()
    nothing_left(server)


def test_who_leaves_before_its_body_is_complete_asks_for_nothing(server: Running) -> None:
    clients = [Stream(server, b'{"prompt": "abc", ', length=100) for _ in range(3)]
    until(lambda: server.gate.num_active == 3)
    for client in clients:
        client.leave()
    nothing_left(server)


def test_who_leaves_while_its_grammar_is_compiled_leaves_nothing_behind(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def compiled(params: Any) -> None:
        begun.set()
        assert go_on.wait(10)

    monkeypatch.setattr(server.engine._grammars, "compiled", compiled)
    added: list[str] = []
    add_request = server.engine.engine.add_request
    monkeypatch.setattr(
        server.engine.engine, "add_request", lambda i, *a, **k: (added.append(i), add_request(i, *a, **k))
    )
    first = Stream(server, LONG | {"structured_outputs": {"regex": "a*"}})
    second = Stream(server, LONG | {"structured_outputs": {"regex": "b*"}})
    assert begun.wait(10)
    until(lambda: len(server.engine._live) == 2)
    first.leave()
    second.leave()
    until(lambda: not server.engine._live)
    go_on.set()
    until(lambda: len(added) == 1)  # of the first; the second was not even begun
    nothing_left(server)


def test_a_beam_search_that_is_done_is_done() -> None:
    with serving(paced(0.002), engine=EngineConfig(max_num_seqs=8)) as server:
        body = {"prompt": "abcd", "max_tokens": 4, "use_beam_search": True, "n": 2, "temperature": 0}
        texts = [choice["text"] for choice in server.ask("/v1/completions", body).json["choices"]]
        assert texts[0] == "ABCD" and len(texts) == 2
        nothing_left(server)
        left = Stream(server, body | {"max_tokens": 4000, "prompt": "abcdefgh"})
        until(lambda: server.engine.engine.num_unfinished == 2)
        left.leave()
        nothing_left(server)


def test_a_slow_reader_gets_everything_in_larger_pieces() -> None:
    with serving(paced(0.001), send_buffer=4096) as server:
        client = Stream(server, LONG | {"max_tokens": 1500}, receive_buffer=4096)
        client.head()
        until(lambda: not server.engine.engine.num_unfinished, 30)  # nobody waits for it
        texts = [event["choices"][0]["text"] for event in client.events() if event != "[DONE]"]
        assert "".join(texts) == ("ABCDEFGH" * 188)[:1500]
        assert len(texts) < 1000 and max(map(len, texts)) > 500, "what waits is put together"
        nothing_left(server)


def test_a_reader_that_sleeps_is_dropped() -> None:
    with serving(paced(0.003), send_buffer=4096, send_timeout=1.0) as server:
        asleep = Stream(server, LONG | {"max_tokens": 8000, "n": 2}, receive_buffer=2048)
        chat = {"messages": [{"role": "user", "content": "abc"}], "max_tokens": 8000, "n": 2, "stream": True}
        chat_asleep = Stream(server, chat, path="/v1/chat/completions", receive_buffer=2048)
        half = Stream(server, b"{", length=100)  # does not send what it began
        awake = Stream(server, LONG | {"max_tokens": 500})
        until(lambda: server.gate.num_active == 4)
        assert len(awake.text()) == 500  # takes longer than send_timeout
        until(lambda: not server.gate.num_active, 10)
        nothing_left(server)  # long before the engine would have been done
        assert server.engine.engine.stats().output_tokens < 20_000
        for client in (asleep, chat_asleep, half):
            client.leave()


def test_many_streams_flow_evenly() -> None:
    count, tokens = 32, 60
    with serving(paced(0.02), engine=EngineConfig(max_num_seqs=count, enable_prefix_caching=False)) as server:
        times: list[list[float]] = [[] for _ in range(count)]
        texts = [""] * count

        def read(number: int) -> None:
            prompt = f"{chr(97 + number % 26)}{number:02}"
            client = Stream(server, {"prompt": prompt, "max_tokens": tokens, "stream": True})
            for event in client.events():
                if event == "[DONE]":
                    break
                times[number].append(time.monotonic())
                texts[number] += event["choices"][0]["text"]

        threads = [threading.Thread(target=read, args=(i,)) for i in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        for number, text in enumerate(texts):
            prompt = f"{chr(65 + number % 26)}{number:02}"
            assert text == (prompt * tokens)[:tokens], "in order, and nobody else's"
        assert min(map(len, times)) > tokens // 2, "a stream came in large pieces"
        gaps = sorted(b - a for series in times for a, b in itertools.pairwise(series))
        assert gaps[len(gaps) // 2] < 0.06
        ends = [series[-1] for series in times]
        assert max(ends) - min(ends) < 0.5 * (max(ends) - min(series[0] for series in times)), "one was starved"
        nothing_left(server)


def test_one_of_several_prompts_fails_and_the_others_end_with_it(server: Running) -> None:
    for stream in (False, True):
        body = {"prompt": ["abc", "a" * 9000, "abd"], "max_tokens": 4000, "stream": stream}
        reply = server.ask("/v1/completions", body)
        assert reply.status in (200, 400), reply.body
        error = reply.json["error"] if reply.status == 400 else reply.events[-1]["error"]
        assert "9000 tokens" in error["message"]
        nothing_left(server)


def test_several_prompts_and_choices_are_told_apart(server: Running) -> None:
    body = {"prompt": ["ab", "cd", "ef"], "n": 2, "max_tokens": 6, "stream": True}
    texts = [""] * 6
    for event in Stream(server, body).events():
        if event != "[DONE]":
            for choice in event["choices"]:
                texts[choice["index"]] += choice["text"]
    assert texts == ["ABABAB"] * 2 + ["CDCDCD"] * 2 + ["EFEFEF"] * 2
    nothing_left(server)


# Failures of the engine.


class Failing(PacedExecutor):
    """fails: raise with the next step. refuses: a prompt whose logits are of no use from its third token on."""

    fails = False
    refuses = "bad"

    def collect(self, ticket: int) -> StepOutput:
        if self.fails:
            self.fails = False
            raise RuntimeError("a broken kernel")
        assert self._submitted is not None
        output = super().collect(ticket)
        failures = {}
        for index, sequence in enumerate(self._submitted[1].sequences):
            spec = sequence.sample
            if spec is None or text_of(spec.prompt_token_ids) != self.refuses or len(spec.output_token_ids) < 2:
                continue
            failures[index] = "all logits are NaN"
        tokens = tuple([] if i in failures else new for i, new in enumerate(output.tokens))
        return replace(output, tokens=tokens, failures=failures)


@pytest.fixture
def failing() -> Iterator[Running]:
    built: Any = FakeBuilt()
    built.executor = Failing(0.01)
    with serving(built, engine=EngineConfig(max_num_seqs=8, enable_prefix_caching=False)) as running:
        yield running


def test_a_step_that_fails_is_told_to_all_and_the_next_request_works(failing: Running) -> None:
    streams = [Stream(failing, LONG) for _ in range(3)]
    begun = [stream.events() for stream in streams]
    for events in begun:
        next(events)
    whole = Stream(failing, LONG | {"stream": False})
    until(lambda: failing.engine.engine.num_unfinished == 4)
    failing.built.executor.fails = True
    for events in begun:
        *_, last = events
        assert "a broken kernel" in last["error"]["message"] and last["error"]["code"] == "engine_error"
    assert whole.head() == 500 and "a broken kernel" in whole.body()["error"]["message"]
    assert Stream(failing, SHORT | {"stream": True}).text() == "ABAB"
    assert failing.ask("/health").status == 200
    nothing_left(failing)


def test_a_request_without_logits_fails_alone(failing: Running) -> None:
    others = [Stream(failing, {"prompt": "good", "max_tokens": 40, "stream": True}) for _ in range(2)]
    bad = Stream(failing, {"prompt": "bad", "max_tokens": 40, "stream": True})
    *pieces, last = bad.events()
    # The letter that a detokenizer holds back is told with the end, hence not at all.
    assert "".join(p["choices"][0]["text"] for p in pieces) == "B"
    assert last["error"]["code"] == "generation_error" and "NaN" in last["error"]["message"]
    reply = failing.ask("/v1/completions", {"prompt": "bad", "max_tokens": 40})
    assert reply.status == 500 and reply.json["error"]["code"] == "generation_error"
    for other in others:
        assert other.text() == "GOOD" * 10
    nothing_left(failing)


def test_an_answer_that_cannot_be_put_into_words_fails_alone(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    add = FakeDetokenizer.add

    def broken(self: FakeDetokenizer, token_ids: Any) -> str:
        text = add(self, token_ids)
        if "B" in text:
            raise ValueError("no such character")
        return text

    monkeypatch.setattr(FakeDetokenizer, "add", broken)
    other = Stream(server, {"prompt": "acd", "max_tokens": 30, "stream": True})
    *pieces, last = Stream(server, {"prompt": "aab", "max_tokens": 4000, "stream": True}).events()
    assert "".join(p["choices"][0]["text"] for p in pieces) == "AA" and "ValueError" in last["error"]["message"]
    assert server.ask("/v1/completions", {"prompt": "ab", "max_tokens": 4000}).status == 500
    assert other.text() == "ACD" * 10
    nothing_left(server)


def test_a_bug_in_the_server_is_a_500_that_tells_nothing(
    server: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("inner secret")

    tokenizer = server.built.tokenizer
    monkeypatch.setattr(tokenizer, "encode_batch", broken)
    with caplog.at_level("ERROR", logger=http.log.name):
        reply = server.ask("/v1/completions", SHORT)
    assert reply.status == 500 and "inner secret" not in reply.body.decode()
    assert reply.json["error"]["code"] == "internal_error"
    assert any(record.exc_info for record in caplog.records), "the log has more"
    monkeypatch.undo()
    assert server.ask("/v1/completions", SHORT).json["choices"][0]["text"] == "ABAB"
    assert server.ask("/health").status == 200
