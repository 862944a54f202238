"""What the server itself costs: streams through HTTP from an engine without a model.

    python -m benchmarks.server_overhead [--streams 64] [--tokens 400] [--step 0.02] [--json FILE]

Tokens per second of one core is what the API process would stream if it had one for itself: tokens over its CPU
seconds. Added latency is the time from a token's step in the engine to its arrival in the client, both on the clock of
this machine; the client's own time to read a burst of all streams is in it. "bare" is what of that is not the server's:
the same client, and a process that does nothing but write the same bytes to the same number of sockets.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from pelton.checkpoint import resolve_model
from pelton.metrics import percentile
from pelton.server.config import ApiProcessConfig, ServerConfig
from pelton.server.supervisor import listen

from .peers.__main__ import commit
from .peers.measure import machine


class Client(asyncio.Protocol):
    """One stream: sends a request, notes when each token comes."""

    def __init__(self, name: str, tokens: int, path: str, done: asyncio.Future[None]) -> None:
        prompt = f"{name} "
        chat = path.startswith("/v1/chat")
        fields: dict[str, Any] = {"max_tokens": tokens, "stream": True, "ignore_eos": True}
        fields |= {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
        body = json.dumps(fields).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        self.request = head.encode() + body
        self.times: list[float] = []
        self.name = name
        self._done = done
        self._mark = b'"content":"' if chat else b'"text":"'
        self._empty = self._mark + b'"'

    def connection_made(self, transport: Any) -> None:
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        self.times += [now] * (data.count(self._mark) - data.count(self._empty))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._done.done():
            self._done.set_result(None)


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def load(port: int, streams: int, tokens: int, path: str) -> list[Client]:
    loop = asyncio.get_running_loop()
    clients, waiting = [], []
    for i in range(streams):
        done = loop.create_future()
        client = Client(f"mark {i:03}", tokens, path, done)
        await loop.create_connection(lambda client=client: client, "127.0.0.1", port)
        clients.append(client)
        waiting.append(done)
    await asyncio.gather(*waiting)
    return clients


def measure(streams: int, tokens: int, step: float, path: str) -> dict[str, Any]:
    import uvloop

    with tempfile.TemporaryDirectory() as folder:
        engine_socket, stamps = f"{folder}/engine", Path(folder) / "stamps"
        engine = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.fake_engine", engine_socket, str(step), str(stamps)],
            stdin=subprocess.PIPE,
        )
        listener = listen("127.0.0.1", 0)
        port = listener.getsockname()[1]
        read_end, write_end = os.pipe()
        api = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.fake_api_process", str(write_end), str(listener.fileno())],
            stdin=subprocess.PIPE, pass_fds=(write_end, listener.fileno()),
        )  # fmt: skip
        os.close(write_end)
        try:
            assert api.stdin is not None
            config = ServerConfig(model="", model_names=("fake",), access_log=False)
            api.stdin.write(msgspec.json.encode(ApiProcessConfig(config, [engine_socket])) + b"\n")
            api.stdin.flush()
            os.read(read_end, 100)  # it is ready
            time.sleep(1.0)
            uvloop.run(load(port, min(8, streams), 50, path))  # everything imported and warm
            stamps.write_text("")
            before, start = cpu_seconds(api.pid), time.monotonic()
            clients = uvloop.run(load(port, streams, tokens, path))
            seconds = time.monotonic() - start
            used = cpu_seconds(api.pid) - before
        finally:
            for process in (api, engine):
                assert process.stdin is not None
                process.stdin.close()
                process.wait(10)
        made = {}
        for line in stamps.read_text().replace("\0", "").splitlines():
            prompt, times = json.loads(line)
            made[prompt.strip()[-8:]] = times
    added = []
    for client in clients:
        times = made[client.name]
        assert len(times) == tokens, (len(times), tokens)
        got = client.times
        # The last letter of a test double's answer is held back, so that pieces are one token late: all are compared
        # with the token that they came with.
        count = min(len(got), len(times))
        added += [b - a for a, b in zip(times[-count:], got[-count:], strict=True)]
    total = streams * tokens
    return {
        "path": path, "streams": streams, "tokens_each": tokens, "step_ms": 1e3 * step,
        "tokens_per_second": total / seconds, "api_cpu_seconds": used, "tokens_per_second_per_core": total / used,
        "added_ms": {f"p{p}": 1e3 * percentile(added, p) for p in (50, 90, 99, 100)},
    }  # fmt: skip


_EVENT = b"data: %b\n\n" % msgspec.json.encode({
    "id": "chatcmpl-" + 32 * "0", "object": "chat.completion.chunk", "created": 1_700_000_000, "model": "fake",
    "choices": [{"index": 0, "delta": {"content": "A"}, "logprobs": None, "finish_reason": None}],
})  # fmt: skip


def write_only(listener_fd: int, streams: int, tokens: int, step: float) -> None:
    """A chunk to every stream, again and again; prints when."""
    with socket.socket(fileno=listener_fd) as listener:
        peers = [listener.accept()[0] for _ in range(streams)]
    for peer in peers:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer.recv(1 << 16)
    chunk, times, due = b"%x\r\n%b\r\n" % (len(_EVENT), _EVENT), [], time.monotonic()
    for _ in range(tokens):
        due += step
        time.sleep(max(0.0, due - time.monotonic()))
        times.append(time.monotonic())
        for peer in peers:
            os.write(peer.fileno(), chunk)
    print(json.dumps(times))


def measure_bare(streams: int, tokens: int, step: float) -> dict[str, Any]:
    import uvloop

    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        numbers = [str(value) for value in (listener.fileno(), streams, tokens, step)]
        writer = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.server_overhead", "--write-only", *numbers],
            pass_fds=(listener.fileno(),), stdout=subprocess.PIPE,
        )  # fmt: skip
        clients = uvloop.run(load(port, streams, tokens, "/v1/chat/completions"))
        output, _ = writer.communicate(timeout=10)
    times = json.loads(output)
    added = [b - a for client in clients for a, b in zip(times, client.times, strict=True)]
    return {
        "path": "bare", "streams": streams, "tokens_each": tokens, "step_ms": 1e3 * step,
        "added_ms": {f"p{p}": 1e3 * percentile(added, p) for p in (50, 90, 99, 100)},
    }  # fmt: skip


def main() -> None:
    if sys.argv[1:2] == ["--write-only"]:
        fd, streams, tokens, step = sys.argv[2:]
        return write_only(int(fd), int(streams), int(tokens), float(step))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--step", type=float, default=0.02, help="seconds")
    parser.add_argument("--json")
    args = parser.parse_args()
    resolve_model("")  # the demo model is there
    rows = [measure(args.streams, args.tokens, args.step, path) for path in ("/v1/completions", "/v1/chat/completions")]
    rows.append(measure_bare(args.streams, args.tokens, args.step))
    for row in rows:
        print(json.dumps(row))
    if args.json:
        result = {"commit": commit(), "machine": machine(), "rows": rows}
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
