"""``pelton serve`` as processes: what dies, stalls or is told to end, and what its clients are told."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.helpers.http_stream import Stream, until
from tests.helpers.serving import Running, pelton_serve

FAKE = "tests.helpers.fake_serve"
LONG = {"prompt": "abcdefgh", "max_tokens": 4000, "stream": True}
SHORT = {"prompt": "ab", "max_tokens": 4}

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")


def children(pid: int) -> dict[int, str]:
    """The processes that one has started, and "engine" or "api"."""
    found = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if not entry.name.isdigit():
                continue
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            if parent == str(pid) and state != "Z":
                found[int(entry.name)] = "engine" if b"engine_process" in (entry / "cmdline").read_bytes() else "api"
    return found


def of_kind(server: Running, kind: str) -> list[int]:
    assert server.process is not None
    return sorted(pid for pid, name in children(server.process.pid).items() if name == kind)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def values(server: Running, name: str) -> dict[str, float]:
    """Of a metric, by engine."""
    text = server.ask("/metrics").body.decode()
    return {
        sample.labels.get("engine", ""): sample.value
        for family in text_string_to_metric_families(text) for sample in family.samples if sample.name == name
    }  # fmt: skip


def begin(server: Running, count: int) -> list[Any]:
    """Streams that have begun; what is left of their events."""
    streams = [Stream(server, LONG).events() for _ in range(count)]
    for events in streams:
        assert next(events)["choices"]
    return streams


def status(server: Running, path: str) -> int:
    try:
        return server.ask(path).status
    except OSError:
        return 0


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A process stands still meanwhile, unless somebody kills it."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


# One engine, one API process.


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("tmp")
    options = ("--stall-timeout", "2", "--drain-timeout", "5", "--max-num-seqs", "16")
    with pelton_serve(*options, module=FAKE, environment={"TMPDIR": str(folder)}) as running:
        yield running
    assert not list(folder.iterdir()), "temporary files are left"


def test_a_long_prompt_is_read_in_steps_that_hold_nobody_up_for_long(server: Running) -> None:
    until(lambda: "0" in values(server, "pelton:engine_steps_total"))
    before = values(server, "pelton:engine_steps_total")["0"]
    assert server.ask("/v1/completions", {"prompt": "x" * 624, "max_tokens": 1}).status == 200
    # 16 sequences and 192 tokens of prompts make a step.
    until(lambda: values(server, "pelton:engine_steps_total")["0"] == before + 3)


def test_an_engine_that_is_killed_is_started_again(server: Running) -> None:
    assert not server.stderr[-1].startswith("Traceback")
    streams = begin(server, 8)
    whole = Stream(server, LONG | {"stream": False})
    (engine,) = of_kind(server, "engine")
    # As if it had been killed while it was starting.
    (left_over,) = Path(f"/proc/{engine}/environ").read_text().split("TMPDIR=")[1].split("\0")[:1]
    (folder,) = Path(left_over).iterdir()
    with socket.socket(socket.AF_UNIX) as never:
        never.bind(str(folder / "engine-0.new"))
    os.kill(engine, signal.SIGKILL)
    for events in streams:
        *_, last = events
        assert last["error"]["code"] == "engine_unavailable", last
    assert whole.head() == 503 and "retry-after" in whole.headers
    assert server.ask("/ready").status == 503 and server.ask("/health").status == 503
    assert values(server, "pelton:num_requests_running") == {}, "nobody can know"
    reply = server.ask("/v1/completions", SHORT)
    assert reply.status == 503 and reply.json["error"]["code"] == "engine_unavailable" and reply.headers["retry-after"]
    server.wait_ready(20)
    assert server.ask("/v1/completions", SHORT).json["choices"][0]["text"] == "ABAB"
    assert server.ask("/health").status == 200
    until(lambda: values(server, "pelton:num_requests_running") == {"0": 0.0})
    assert any("engine 0 ended with status -9; it is started again" in line for line in server.stderr)


def test_an_engine_that_stalls_prints_its_stacks_and_is_started_again(server: Running) -> None:
    (engine,) = of_kind(server, "engine")
    (other,) = begin(server, 1)
    stuck = Stream(server, {"prompt": "HANG", "max_tokens": 4})
    waiting = Stream(server, LONG)
    until(lambda: server.ask("/health").status == 503, 10)
    message = server.ask("/health").json["error"]["message"]
    assert "no progress" in message or "no engine" in message
    assert stuck.head() == 503 and stuck.body()["error"]["code"] == "engine_unavailable"
    assert waiting.head() == 503
    *_, last = other
    assert last["error"]["code"] == "engine_unavailable"
    until(lambda: not is_alive(engine), 5)
    server.wait_ready(20)
    assert server.ask("/health").status == 200
    assert server.ask("/v1/completions", SHORT).status == 200
    log = "\n".join(server.stderr)
    assert re.search(r"pelton: no step for \d+ s; stacks of all threads follow", log)
    assert "fake_engine_process.py" in log and "in collect" in log, "where it hangs"
    assert "engine 0 ended with status 70" in log


def test_an_engine_that_is_stopped_is_killed(server: Running) -> None:
    (engine,) = of_kind(server, "engine")
    streams = begin(server, 2)
    with stopped(engine):
        for events in streams:
            *_, last = events
            assert last["error"]["code"] == "engine_unavailable"
        assert is_alive(engine), "its clients are told first"
        assert server.ask("/health").status == 503
        until(lambda: not is_alive(engine), 12)
    server.wait_ready(20)
    assert server.ask("/v1/completions", SHORT).json["choices"][0]["text"] == "ABAB"
    assert any("engine 0 has been silent for" in line for line in server.stderr)


def test_an_api_process_that_is_stopped_is_killed(server: Running) -> None:
    (api,) = of_kind(server, "api")
    with stopped(api):
        until(lambda: not is_alive(api), 12)
    server.wait_ready(20)
    assert server.ask("/v1/completions", SHORT).json["choices"][0]["text"] == "ABAB"
    assert any("API process 0 has been silent for" in line for line in server.stderr)


def test_an_api_process_that_is_killed_leaves_nothing_in_the_engine(server: Running) -> None:
    streams = begin(server, 4)
    (api,) = of_kind(server, "api")
    os.kill(api, signal.SIGKILL)
    for events in streams:
        with pytest.raises((OSError, ValueError)):  # cut off: nobody is there who could tell
            list(events)
    server.wait_ready(20)
    until(lambda: values(server, "pelton:num_requests_running") == {"0": 0.0})
    assert values(server, "pelton:kv_cache_usage_perc") == {"0": 0.0}
    assert server.ask("/v1/completions", SHORT).status == 200


_WATCH = """
import ctypes, threading
from types import SimpleNamespace
from pelton.server.engine_process import watch

engine = SimpleNamespace(error=None, stalled=0.0)
if {dies}:
    engine.error = ValueError("a block is lost")
else:  # an extension that holds the interpreter's lock for ever
    threading.Timer(0.1, ctypes.PyDLL(None).sleep, (60,)).start()
watch(SimpleNamespace(engine=engine, send_states=lambda: None), 1.0, lambda: None, threading.Event())
"""


@pytest.mark.parametrize("dies", [True, False])
def test_an_engine_process_does_not_outlive_its_engine(dies: bool) -> None:
    code = _WATCH.format(dies=dies)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20)
    assert result.returncode == 1
    assert ("the engine died: ValueError('a block is lost')" if dies else "Timeout (") in result.stderr


# Two of each.


def test_two_of_each() -> None:
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(400, most), most))
    with pelton_serve("--api-processes", "2", "--replicas", "2", "--max-num-seqs", "16", module=FAKE) as server:
        until(lambda: len(values(server, "pelton:engine_steps_total")) == 2)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))
        assert len(of_kind(server, "api")) == len(of_kind(server, "engine")) == 2
        for api in of_kind(server, "api"):
            assert resource.prlimit(api, resource.RLIMIT_NOFILE) == (most, most), "as many clients as may be"
        for number in range(16):
            prompt = f"{number:02} is the beginning"
            assert server.ask("/v1/completions", {"prompt": prompt, "max_tokens": 2}).status == 200
        answered = until(
            lambda: (v := values(server, "pelton:generation_tokens_total")) and sum(v.values()) == 32 and v
        )
        assert min(answered.values()) >= 4, "requests spread"
        # Whichever API process answers: the metrics of both.
        for _ in range(6):
            assert values(server, "pelton:request_success_total") == {"": 16.0}
            assert values(server, "pelton:api_active_requests") == {"": 0.0}
        for _ in range(8):
            assert server.ask("/v1/completions", {"prompt": "x" * 70, "max_tokens": 2}).status == 200
        grown = until(lambda: (v := values(server, "pelton:generation_tokens_total")) and sum(v.values()) == 48 and v)
        assert sorted(grown[name] - answered[name] for name in grown) == [0, 16], "one beginning, one replica"

        # A replica dies: what it was answering fails, the other goes on.
        streams = [Stream(server, LONG | {"max_tokens": 150, "prompt": f"{n}"}).events() for n in range(12)]
        for events in streams:
            next(events)
        until(lambda: all(values(server, "pelton:num_requests_running").values()))
        victim = of_kind(server, "engine")[0]
        os.kill(victim, signal.SIGKILL)
        until(lambda: victim not in of_kind(server, "engine"))  # until then it may be sent requests, which are lost
        assert server.ask("/ready").status == 200 and server.ask("/health").status == 200
        for _ in range(4):
            assert server.ask("/v1/completions", SHORT).status == 200
        ends = [list(events)[-1] for events in streams]
        lost = [end for end in ends if end != "[DONE]"]
        assert 0 < len(lost) < len(ends)
        assert all(end["error"]["code"] == "engine_unavailable" for end in lost)

        # An API process dies: what it counted as active is not counted for ever.
        clients = [Stream(server, LONG) for _ in range(8)]
        begun = [client.events() for client in clients]
        for events in begun:
            next(events)
        assert values(server, "pelton:api_active_requests") == {"": 8.0}
        for api in of_kind(server, "api"):
            os.kill(api, signal.SIGKILL)
        for client in clients:
            client.leave()
        server.wait_ready(20)
        until(lambda: values(server, "pelton:api_active_requests").get("", 0.0) == 0.0)
        until(lambda: len(of_kind(server, "engine")) == 2, 20)
        until(lambda: len(values(server, "pelton:num_requests_running")) == 2, 20)
        until(lambda: not any(values(server, "pelton:num_requests_running").values()))


# The end.


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[str, str]:
    key, cert = str(tmp_path / "key.pem"), str(tmp_path / "cert.pem")
    try:
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
             "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert],
            check=True, capture_output=True,
        )  # fmt: skip
    except FileNotFoundError:
        pytest.skip("there is no openssl here")
    return cert, key


def test_sigterm_lets_streams_finish(tmp_path: Path) -> None:
    with pelton_serve("--drain-timeout", "20", module=FAKE, environment={"TMPDIR": str(tmp_path)}) as server:
        assert server.process is not None
        pids = list(children(server.process.pid))
        assert len(pids) == 2
        clients = [Stream(server, LONG | {"max_tokens": 150}) for _ in range(4)]
        begun = [client.events() for client in clients]
        for events in begun:
            next(events)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: status(server, "/ready") in (0, 503), 5)
        late = server.ask("/v1/completions", SHORT)
        assert late.status == 503 and late.headers["retry-after"]
        for events in begun:
            *pieces, done = events
            assert done == "[DONE]" and pieces[-1]["choices"][0]["finish_reason"] == "length"
        assert server.process.wait(10) == 0
        assert not any(map(is_alive, pids)) and not list(tmp_path.iterdir())
        assert "Traceback" not in "\n".join(server.stderr)


def test_https_with_keys_from_a_file_and_a_second_sigterm(tmp_path: Path, certificate: tuple[str, str]) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# ours\n\nfirst-key-in-a-file\nother-key-in-a-file\n")
    command = [sys.executable, "-m", FAKE, "serve", "--port", "0", "--api-key-file", str(keys), "--log-format", "json",
               "--ssl-certfile", certificate[0], "--ssl-keyfile", certificate[1]]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines: list[str] = []
    try:
        while not (found := re.search(r"is served at https://127.0.0.1:(\d+)", lines[-1] if lines else "")):
            lines.append(process.stderr.readline())
            assert lines[-1], lines
        reader = threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True)
        reader.start()
        context = ssl.create_default_context(cafile=certificate[0])

        def ask(path: str, key: str = "", body: dict[str, Any] | None = None) -> tuple[socket.socket, bytes]:
            raw = socket.create_connection(("127.0.0.1", int(found[1])), timeout=20)
            secure = context.wrap_socket(raw, server_hostname="127.0.0.1")
            data = json.dumps(body).encode() if body else b""
            head = (
                f"{'POST' if body else 'GET'} {path} HTTP/1.1\r\nHost: x\r\nX-Api-Key: {key}\r\nX-Request-Id: tls\r\n"
            )
            secure.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
            return secure, secure.recv(4096)

        until(lambda: ask("/ready")[1].startswith(b"HTTP/1.1 200"))
        assert ask("/v1/models")[1].startswith(b"HTTP/1.1 401")
        assert ask("/v1/models", "no-key-in-the-file")[1].startswith(b"HTTP/1.1 401")
        for key in ("first-key-in-a-file", "other-key-in-a-file"):
            assert ask("/v1/models", key)[1].startswith(b"HTTP/1.1 200")
        with socket.create_connection(("127.0.0.1", int(found[1]))) as plain:  # no TLS
            plain.sendall(b"GET /health HTTP/1.1\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                assert not plain.recv(100).startswith(b"HTTP")
        streaming, _ = ask("/v1/completions", "first-key-in-a-file", LONG)
        pids = list(children(process.pid))
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert process.poll() is None, "the stream may finish"
        process.send_signal(signal.SIGTERM)
        process.wait(10)
        assert time.monotonic() - began < 5
        until(lambda: not any(map(is_alive, pids)), 5)
        streaming.close()
        reader.join(5)
        rows = [json.loads(line) for line in lines if line.startswith("{")]
        asked = [row for row in rows if row["event"] == "request"]
        assert {row["status"] for row in asked} >= {200, 401} and all(row["request_id"] == "tls" for row in asked)
        assert "key-in-" not in "".join(lines)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def test_nothing_outlives_a_supervisor_that_is_killed() -> None:
    with pelton_serve("--drain-timeout", "1", module=FAKE) as server:
        assert server.process is not None
        pids = list(children(server.process.pid))
        assert len(pids) == 2
        begin(server, 2)
        os.kill(server.process.pid, signal.SIGKILL)
        until(lambda: not any(map(is_alive, pids)), 10)


# What cannot start.


def failed_start(*options: str, module: str = FAKE, temporary: Path) -> str:
    """Its one line."""
    command = [sys.executable, "-m", module, "serve", "--port", "0", *options]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env=os.environ | {"TMPDIR": str(temporary)}
    )
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    (line,) = result.stderr.strip().splitlines()
    assert not list(temporary.iterdir()), "temporary files are left"
    return line


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    assert "nowhere" in failed_start("--", str(tmp_path / "nowhere.gguf"), temporary=tmp_path)


def test_a_model_that_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "tmp").mkdir()
    model = tmp_path / "models" / "damaged.gguf"
    model.write_bytes(b"GGUF" + bytes(range(200)))
    assert "damaged.gguf" in failed_start(str(model), temporary=tmp_path / "tmp")


@pytest.mark.parametrize("limits", ["ttft=0", "ttft=1s,ttft=2s", "itl=5"])
def test_objectives_are_those_of_the_load_client(tmp_path: Path, limits: str) -> None:
    assert f"--slo is {limits!r}" in failed_start("--slo", limits, temporary=tmp_path)


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = failed_start("--port", str(port), temporary=tmp_path)
    assert str(port) in line and "in use" in line


def test_memory_that_does_not_suffice(tmp_path: Path) -> None:
    line = failed_start("--kv-cache-memory", "100000GiB", module="pelton.cli.main", temporary=tmp_path)
    assert "memory" in line or "KV" in line, line
