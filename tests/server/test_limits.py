"""What a server refuses, and how: full queues, bodies, prompts, deadlines, keys, origins, while it ends; its log."""

from __future__ import annotations

import contextlib
import hmac
import io
import json
import logging
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pelton import EngineConfig
from pelton.errors import PeltonError
from pelton.server import http, wire
from pelton.server.config import ServerConfig
from pelton.server.http import access_log
from pelton.server.logs import JsonFormatter
from pelton.server.supervisor import Supervisor
from tests.helpers.http_stream import Stream, paced, until
from tests.helpers.serving import Running, serving

LONG = {"prompt": "abcdefgh", "max_tokens": 4000, "stream": True}
SHORT = {"prompt": "a", "max_tokens": 2}


class Peer:
    """Another API process, as an engine sees it."""

    def __init__(self, server: Running) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(10)
        self.socket.connect(server.socket_path)
        self.messages: list[Any] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        file = self.socket.makefile("rb")
        while head := file.read(4):
            self.messages.append(wire.to_api_decoder.decode(file.read(int.from_bytes(head, "little"))))

    def add(self, request_id: str, parent_id: str | None = None, **params: Any) -> None:
        params = {"max_tokens": 4000} | params
        self.send(wire.Add(request_id, [50, 51], params, time.monotonic(), parent_id=parent_id))

    def send(self, message: wire.ToEngine) -> None:
        self.socket.sendall(wire.frame(message))

    def refused(self) -> list[str]:
        failed = [m for m in self.messages if isinstance(m, wire.Failed)]
        assert all(m.kind == "busy" for m in failed), failed
        return [request_id for m in failed for request_id in m.request_ids]

    def close(self) -> None:
        self.socket.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def small() -> Iterator[Running]:
    """Two sequences run, two wait."""
    with serving(
        paced(0.01), engine=EngineConfig(max_num_seqs=2), max_queue=2, max_unfinished=4, max_body_bytes=4096,
        max_prompts=3,
    ) as running:  # fmt: skip
        yield running


def idle(server: Running) -> None:
    assert server.engine is not None
    until(lambda: not server.engine.engine.num_unfinished)
    until(lambda: "pelton:num_requests_running{" in server.ask("/metrics").body.decode())


def test_a_full_queue_answers_429_with_retry_after(small: Running) -> None:
    idle(small)
    streams = [Stream(small, LONG) for _ in range(4)]
    until(lambda: small.engine.engine.num_unfinished == 4)
    for body in (SHORT, SHORT | {"stream": True}):
        reply = small.ask("/v1/completions", body)
        error = reply.json["error"]
        assert (reply.status, error["type"], error["code"]) == (429, "rate_limit_error", "queue_full")
        assert 1 <= int(reply.headers["retry-after"]) <= 60
    assert small.ask("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}).status == 429
    assert small.ask("/health").status == 200 and small.ask("/ready").status == 200
    for stream in streams:
        stream.leave()
    idle(small)
    assert small.ask("/v1/completions", SHORT).status == 200
    metrics = small.ask("/metrics").body.decode()
    assert 'pelton:requests_rejected_total{model_name="fake",reason="queue_full"} 3.0' in metrics


def test_the_engine_refuses_what_api_processes_together_have_too_much(small: Running) -> None:
    idle(small)
    peer = Peer(small)
    for number in range(4):
        peer.add(str(number))
    until(lambda: small.engine.engine.num_unfinished == 4)
    before = rejected(small)
    for body in (SHORT, SHORT | {"stream": True}, SHORT | {"n": 3}):
        reply = small.ask("/v1/completions", body)
        assert (reply.status, reply.json["error"]["code"]) == (429, "queue_full"), reply.body
        assert int(reply.headers["retry-after"]) >= 1
    assert rejected(small) == before + 3
    beam = SHORT | {"n": 2, "use_beam_search": True}
    assert small.ask("/v1/completions", beam).status == 429  # its answers have ids of their own
    assert small.engine.engine.num_unfinished == 4
    peer.close()
    idle(small)
    assert small.ask("/v1/completions", SHORT).status == 200


def rejected(server: Running) -> float:
    for line in server.ask("/metrics").body.decode().splitlines():
        if line.startswith("pelton:requests_rejected_total{"):
            return float(line.rpartition(" ")[2])
    return 0.0


def test_a_burst_within_a_step_does_not_get_past_the_limit() -> None:
    with serving(paced(0.3), engine=EngineConfig(max_num_seqs=2), max_unfinished=4) as server:
        peer = Peer(server)
        peer.add("first")
        until(lambda: server.engine.engine.num_unfinished == 1)
        for number in range(30):  # which the engine sees when its step is over
            peer.add(str(number))
            peer.add(f"fork of {number}", parent_id=str(number))
        until(lambda: len(peer.refused()) >= 2 * 28, 3)
        time.sleep(0.4)
        # The first, and 0 and 1 with their forks, which nobody refuses.
        assert server.engine.engine.num_unfinished <= 5
        peer.close()


def test_more_prompts_than_the_queue_ever_holds(small: Running) -> None:
    idle(small)
    with serving(engine=EngineConfig(max_num_seqs=2), max_queue=2, max_unfinished=4) as server:
        never = server.ask("/v1/completions", {"prompt": ["a"] * 5})
        assert never.status == 400 and "5 items" in never.json["error"]["message"], "to ask again is of no use"
        assert len(server.ask("/v1/completions", {"prompt": ["a"] * 4}).json["choices"]) == 4
    streams = [Stream(small, LONG) for _ in range(3)]
    until(lambda: small.engine.engine.num_unfinished == 3)
    assert small.ask("/v1/completions", {"prompt": ["a"] * 2}).status == 429
    streams.append(Stream(small, LONG | {"prompt": ["a"]}))
    until(lambda: small.engine.engine.num_unfinished == 4)
    for stream in streams:
        stream.leave()


def test_a_body_that_is_too_large_is_refused(small: Running) -> None:
    reply = small.ask("/v1/completions", b" " * 5000)  # some: it is read to its end
    assert (reply.status, reply.json["error"]["code"]) == (413, "body_too_large")
    assert "4096" in reply.json["error"]["message"]
    declared = Stream(small, b"", length=10**9)  # it says so itself, and need not send it
    assert declared.body()["error"]["code"] == "body_too_large" and declared.headers["connection"] == "close"
    for size, end in ((3000, b"0\r\n\r\n"), (18_000, b"")):  # nobody knows before the end, or is told before it
        chunked = Stream(small, b"", headers={"Content-Length": "", "Transfer-Encoding": "chunked"})
        chunked.socket.sendall((f"{size:x}\r\n".encode() + b" " * size + b"\r\n") * 2 + end)
        assert chunked.head() == 413
        chunked.leave()
    whole = json.dumps(SHORT).encode()
    assert small.ask("/v1/completions", whole + b" " * (4096 - len(whole))).status == 200  # as large as allowed


def test_a_content_length_that_lies(small: Running) -> None:
    body = json.dumps(SHORT).encode()
    short = Stream(small, body, length=len(body) - 4)  # what follows is no request
    assert short.head() == 400
    short.leave()
    before = small.gate.num_active
    long = Stream(small, body, length=len(body) + 4)
    until(lambda: small.gate.num_active == before + 1)
    long.leave()
    until(lambda: small.gate.num_active == before)


@pytest.mark.parametrize("stream", [False, True])
def test_what_does_not_fit_is_refused_by_its_name(stream: bool) -> None:
    with serving(max_prompts=3) as server:
        reply = server.ask("/v1/completions", {"prompt": "a" * 600, "stream": stream})
        message = reply.json["error"]["message"]
        assert reply.status == 400 and "600 tokens" in message and "512" in message
        many = server.ask("/v1/completions", {"prompt": ["a"] * 4, "stream": stream})
        assert many.status == 400 and "4 items" in many.json["error"]["message"]
        other = server.ask("/v1/completions", {"prompt": "a", "model": "other", "stream": stream})
        error = other.json["error"]
        assert (other.status, error["code"], error["param"]) == (404, "model_not_found", "model")
        assert "'other'" in error["message"] and "fake" in error["message"]
        assert server.ask("/v1/models/other").status == 404 and server.ask("/v1/models/fake").json["id"] == "fake"


def test_a_deadline_ends_an_answer() -> None:
    with serving(paced(0.02), request_timeout=0.5) as server:
        reply = server.ask("/v1/completions", {"prompt": "ab", "max_tokens": 4000, "timeout": 0.1})
        assert (reply.status, reply.json["error"]["code"]) == (504, "deadline")
        began = time.monotonic()
        *events, last = Stream(server, LONG).events()  # the server's own limit
        assert 0.4 < time.monotonic() - began < 3
        assert last["error"]["code"] == "deadline" and last["error"]["type"] == "timeout_error"
        assert len(events) > 3
        began = time.monotonic()
        assert Stream(server, LONG | {"timeout": 1000}).head() == 200  # asks for more than there is
        until(lambda: not server.engine.engine.num_unfinished, 3)
        assert server.ask("/v1/completions", SHORT | {"timeout": -1}).status == 400


# Keys and origins.

KEYS = ("first-key-of-two", "other-key-of-two")


@pytest.fixture(scope="module")
def locked() -> Iterator[Running]:
    with serving(api_keys=KEYS, allowed_origins=("https://good.example",)) as running:
        yield running


def test_a_key_opens_the_server(locked: Running) -> None:
    for key in KEYS:
        for header in ({"Authorization": f"Bearer {key}"}, {"authorization": f"bearer  {key} "}, {"x-api-key": key}):
            assert locked.ask("/v1/completions", SHORT, headers=header).status == 200, header
    wrong: list[tuple[dict[str, str], str]] = [
        ({}, "needed"), ({"Authorization": f"Bearer {KEYS[0]}x"}, "wrong"), ({"Authorization": "Bearer"}, "needed"),
        ({"Authorization": f"Basic {KEYS[0]}"}, "needed"), ({"x-api-key": KEYS[0][:-1]}, "wrong"),
        ({"Authorization": "Bearer wrong-key", "x-api-key": KEYS[0]}, "wrong"),
    ]  # fmt: skip
    for header, word in wrong:
        reply = locked.ask("/v1/completions", SHORT, headers=header)
        assert reply.status == 401 and word in reply.json["error"]["message"], header
        assert reply.headers["www-authenticate"] == "Bearer"
        assert KEYS[0] not in reply.body.decode()


def test_a_long_answer_that_nobody_reads_is_dropped() -> None:
    with serving(send_timeout=1.0) as server:
        sleeper = Stream(server, {"prompt": "x" * 4_000_000}, path="/tokenize", receive_buffer=4096)
        until(lambda: server.gate.num_active == 1)
        time.sleep(0.5)
        assert server.gate.num_active == 1, "it has not been sent"
        until(lambda: not server.gate.num_active)
        with pytest.raises((OSError, ValueError)):  # it is cut off
            sleeper.body()
        assert server.ask("/tokenize", {"prompt": "x" * 4_000_000}).json["count"] == 4_000_000


def test_what_needs_no_key(locked: Running) -> None:
    for path in ("/health", "/ready", "/metrics", "/version", "/", "/dashboard", "/openapi.json"):
        assert locked.ask(path).status == 200, path
    for path in ("/v1/models", "/v1/models/fake", "/dashboard/events"):
        assert locked.ask(path).status == 401, path
    for path in ("/tokenize", "/detokenize", "/v1/chat/completions"):
        assert locked.ask(path, {}).status == 401, path


def test_every_key_is_compared_whichever_is_right(locked: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []
    whole = hmac.compare_digest

    def compare(a: bytes, b: bytes) -> bool:
        compared.append(a)
        return whole(a, b)

    monkeypatch.setattr(http.hmac, "compare_digest", compare)
    for key in (KEYS[0], KEYS[1], "no-key-of-this"):
        compared.clear()
        locked.ask("/v1/models", headers={"x-api-key": key})
        assert compared == [known.encode() for known in KEYS]


def test_origins(locked: Running) -> None:
    good, bad = {"Origin": "https://good.example"}, {"Origin": "https://bad.example"}
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    preflight = locked.ask("/v1/chat/completions", headers=good | asked, method="OPTIONS")
    assert preflight.status == 200
    assert preflight.headers["access-control-allow-origin"] == "https://good.example"
    assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
    assert "POST" in preflight.headers["access-control-allow-methods"]
    refused = locked.ask("/v1/chat/completions", headers=bad | asked, method="OPTIONS")
    assert refused.status == 400 and "access-control-allow-origin" not in refused.headers
    key = {"x-api-key": KEYS[0]}
    for path, body, headers, status in (
        ("/v1/completions", SHORT, key, 200), ("/v1/completions", SHORT, {}, 401), ("/v1/completions", b"{", key, 400),
        ("/nowhere", None, key, 404),
    ):  # fmt: skip
        reply = locked.ask(path, body, headers=headers | good)
        assert (reply.status, reply.headers.get("access-control-allow-origin")) == (status, good["Origin"]), path
        assert "x-request-id" in reply.headers["access-control-expose-headers"]
        assert "access-control-allow-origin" not in locked.ask(path, body, headers=headers | bad).headers


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": 70_000}, {"max_queue": -1}, {"send_timeout": 0.0}, {"stall_timeout": float("nan")},
        {"ssl_certfile": "a.pem"}, {"api_keys": ("short",)}, {"api_processes": 0}, {"max_body_bytes": True},
    ],
)  # fmt: skip
def test_settings_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(PeltonError) as refused:
        ServerConfig(**wrong)
    assert "short" not in str(refused.value) or "api_keys" not in wrong


def test_certificates_that_are_none(tmp_path: Path) -> None:
    key, cert, locked = (str(tmp_path / name) for name in ("key.pem", "cert.pem", "locked.pem"))
    try:
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
             "-keyout", key, "-out", cert],
            check=True, capture_output=True,
        )  # fmt: skip
        subprocess.run(["openssl", "rsa", "-aes128", "-passout", "pass:1234", "-in", key, "-out", locked],
                       check=True, capture_output=True)  # fmt: skip
    except FileNotFoundError:
        pytest.skip("there is no openssl here")
    for certfile, keyfile in ((cert, str(tmp_path / "none.pem")), (key, key), (cert, cert), (cert, locked)):
        with pytest.raises(PeltonError, match="TLS"):
            Supervisor(ServerConfig(ssl_certfile=certfile, ssl_keyfile=keyfile, port=0), {"max_num_seqs": 1})


# The log.


class Lines:
    """What goes to the access log, as text and as JSON."""

    def __init__(self) -> None:
        self.text, self.json = io.StringIO(), io.StringIO()
        self.handlers = [logging.StreamHandler(self.text), logging.StreamHandler(self.json)]
        self.handlers[1].setFormatter(JsonFormatter())

    def clear(self) -> None:
        for stream in (self.text, self.json):
            stream.seek(0)
            stream.truncate()

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.json.getvalue().splitlines()]


@pytest.fixture
def lines() -> Iterator[Lines]:
    found = Lines()
    loggers = [access_log, logging.getLogger("pelton.server")]
    for logger in loggers:
        logger.setLevel(logging.INFO)
        for handler in found.handlers:
            logger.addHandler(handler)
    try:
        yield found
    finally:
        for logger in loggers:
            for handler in found.handlers:
                logger.removeHandler(handler)
            logger.setLevel(logging.NOTSET)


def test_the_access_log(lines: Lines) -> None:
    secret = "a secret of mine"
    chat = {"messages": [{"role": "user", "content": secret}], "max_tokens": 9}
    with serving(access_log=True) as server:
        lines.clear()  # while it was starting, it was not ready
        server.ask("/v1/chat/completions", chat, headers={"X-Request-Id": "its-id"})
        server.ask("/v1/completions", {"prompt": secret, "max_tokens": 9, "stream": True})
        server.ask("/v1/completions", {"prompt": secret, "temperature": -1})
        server.ask("/v1/completions", json.dumps({"prompt": secret}).encode()[:-1])
        server.ask("/v1/completions", {"prompt": secret, "logit_bias": {"a": secret}})
        for path in ("/health", "/ready", "/metrics", "/version", "/"):
            server.ask(path)
        server.ask("/a%0Ab")
        stream = Stream(server, {"prompt": secret, "n": 128, "max_tokens": 400, "stream": True})
        stream.leave()
        until(lambda: len(lines.rows) == 7)
    first, streamed, refused, broken, ill_typed, nowhere, left = lines.rows
    assert first["event"] == "request" and first["request_id"] == "its-id" and first["status"] == 200
    assert (first["method"], first["path"], first["client"]) == ("POST", "/v1/chat/completions", "127.0.0.1")
    assert first["prompt_tokens"] == len(secret) + 2 and first["output_tokens"] == 9
    assert 0 <= first["seconds"] < 60 and first["level"] == "INFO" and first["time"]
    assert streamed["output_tokens"] == 9
    assert "temperature" in refused["error"] and refused["status"] == broken["status"] == ill_typed["status"] == 400
    assert nowhere["status"] == 404 and left["status"] == 499
    texts = lines.text.getvalue().splitlines()
    assert len(texts) == 7, "a path cannot begin a line of its own"
    assert texts[0].startswith("127.0.0.1 POST /v1/chat/completions 200 ") and "output_tokens=9" in texts[0]
    assert secret not in lines.text.getvalue() + lines.json.getvalue()
    assert secret.upper() not in lines.text.getvalue() + lines.json.getvalue()


def test_texts_are_logged_when_asked_for(lines: Lines) -> None:
    with serving(access_log=True, log_prompts=True) as server:
        lines.clear()
        server.ask("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello you"}]})
        server.ask("/v1/completions", {"prompt": ["hello", [50, 51]]})
        until(lambda: len(lines.rows) == 2)
    assert lines.rows[0]["messages"] == [{"role": "user", "content": "hello you"}]
    assert lines.rows[1]["prompts"] == ["hello", [50, 51]]
    assert "hello you" in lines.text.getvalue()


# The end.


def test_a_server_that_ends_refuses_what_is_new_and_finishes_what_it_began() -> None:
    with serving(paced(0.01)) as server:
        gate = server.gate
        assert gate is not None
        running = Stream(server, LONG | {"max_tokens": 60})
        viewer = socket.create_connection(("127.0.0.1", server.port))
        viewer.sendall(b"GET /dashboard/events HTTP/1.1\r\nHost: x\r\n\r\n")
        assert running.head() == 200 and viewer.recv(100).startswith(b"HTTP/1.1 200")
        until(lambda: gate.num_active == 2)
        gate.draining = True
        for path in ("/v1/completions", "/v1/chat/completions", "/tokenize"):
            late = Stream(server, SHORT, path=path)
            assert late.head() == 503 and late.body()["error"]["code"] == "shutting_down"
            assert int(late.headers["retry-after"]) >= 1 and late.headers["connection"] == "close"
        assert server.ask("/ready").status == 503
        assert server.ask("/health").status == 200 and server.ask("/metrics").status == 200
        assert running.text() == ("ABCDEFGH" * 8)[:60]
        until(lambda: not gate.num_active, 2)  # the dashboard's viewer has not left
        viewer.close()


def test_a_head_that_does_not_end_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_HEAD_TIMEOUT", 0.2)
    whole = b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n"
    with serving() as server:
        for before in (b"", whole):  # of the first request of a connection, and of a later one
            with socket.create_connection(("127.0.0.1", server.port), timeout=5) as client:
                if before:
                    client.sendall(before)
                    while not client.recv(10_000).endswith(b"}"):
                        pass
                client.sendall(b"GET /version HTTP/1.1\r\nX-Slow: ")
                began = time.monotonic()
                with contextlib.suppress(ConnectionResetError):
                    assert client.recv(1) == b""
                assert time.monotonic() - began < 3
