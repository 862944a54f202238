"""Everything that clients do to a server, at once, and what must hold all the same.

    python -m benchmarks.server_stress [--requests 2000] [--clients 256] [--fake] [--json FILE] [-- SERVE OPTIONS]

Starts ``pelton serve`` on the demo model (--fake: on an engine without a model) and sends it requests that end well,
are cancelled, malformed, too large, read slowly or not at all. Every prompt carries a mark that its answer must have,
because a grammar of its own demands it. Checked: every request is answered or cleanly refused, none gets what is
another's, no request and no KV block is left over, memory returns to where it was. Then an engine is killed under
load, and at last the server is told to end: what runs must end well, or with an error that says so.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .peers.__main__ import commit
from .peers.measure import machine

#: What a request does, and how often.
KINDS = {
    "stream": 50, "whole": 12, "cancelled": 10, "gone": 6, "half a body": 3, "malformed": 4, "too large": 2,
    "unknown field": 3, "unknown model": 2, "slow": 5, "asleep": 1, "deadline": 2,
}  # fmt: skip
#: Statuses that are a clean refusal of a good request.
REFUSED = (429, 503)


class WrongError(AssertionError):
    """Something that must not happen."""


@dataclass
class Answer:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    text: str = ""
    done: bool = False
    error: dict[str, Any] | None = None


async def ask(
    port: int,
    request_id: str,
    body: bytes,
    *,
    path: str = "/v1/completions",
    length: int | None = None,
    stop_after: int | None = None,
    pause: float = 0.0,
    receive_buffer: int = 1 << 16,
) -> Answer:
    """One request on a connection of its own. stop_after: leave after so many events; pause: seconds between reads."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=receive_buffer)
    answer = Answer()
    try:
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nX-Request-Id: {request_id}\r\nConnection: close\r\n"
            f"Content-Length: {len(body) if length is None else length}\r\n\r\n"
        )
        writer.write(head.encode())
        try:
            writer.write(body)
            await writer.drain()
        except ConnectionError:
            pass  # refused before all of it was sent: the answer is there
        if length is not None and length > len(body):
            return answer
        try:
            line = await reader.readline()
        except ConnectionError:
            return answer
        if not line:
            return answer
        answer.status = int(line.split()[1])
        while line := (await reader.readline()).strip():
            name, _, value = line.decode().partition(":")
            answer.headers[name.lower()] = value.strip()
        if "transfer-encoding" not in answer.headers:
            whole = await reader.readexactly(int(answer.headers["content-length"]))
            take(answer, json.loads(whole))
            answer.done = True
            return answer
        events = 0
        while size := int(await reader.readline() or b"0", 16):
            chunk = await reader.readexactly(size + 2)
            for event in chunk[:-2].split(b"\n\n"):
                if event.startswith(b"data: [DONE]"):
                    answer.done = True
                elif event:
                    take(answer, json.loads(event.removeprefix(b"data: ")))
                    events += 1
            if stop_after is not None and events >= stop_after:
                return answer
            if pause:
                await asyncio.sleep(pause)
        return answer
    except asyncio.IncompleteReadError:
        return answer  # cut off; ``done`` says so
    finally:
        writer.close()


def take(answer: Answer, message: dict[str, Any]) -> None:
    if "error" in message:
        answer.error = message["error"]
        return
    for choice in message["choices"]:
        answer.text += choice.get("text") or ""


def body_of(mark: str, tokens: int, fake: bool, **more: Any) -> bytes:
    fields: dict[str, Any] = {"prompt": f"{mark} ", "max_tokens": tokens, "temperature": 0.8} | more
    if fake:
        fields["ignore_eos"] = True
    else:
        fields["structured_outputs"] = {"regex": f"{mark}( [a-z]{{1,8}}){{1,60}}"}
    return json.dumps(fields).encode()


class Stress:
    """The load, and what was wrong with it."""

    def __init__(self, port: int, fake: bool, seed: int) -> None:
        self.port = port
        self.fake = fake
        self.random = random.Random(seed)
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []

    def check(self, good: bool, what: str) -> None:
        if not good:
            self.wrong.append(what)

    def check_text(self, mark: str, answer: Answer) -> None:
        said = answer.text.replace("-", " ") if self.fake else answer.text  # which has a dash for a space
        text = said.strip().lower()
        whole = f"{mark} " * (len(text) // (len(mark) + 1) + 1)
        fits = whole.startswith(text) if self.fake else text.startswith(mark[: len(text)])
        self.check(fits, f"{mark} was answered {text[:60]!r}")

    async def run(self, requests: int, clients: int) -> None:
        marks = iter(range(requests))

        async def client() -> None:
            for number in marks:
                kind = self.random.choices(list(KINDS), list(KINDS.values()))[0]
                try:
                    self.outcomes[f"{kind}: {await self.one(number, kind)}"] += 1
                except ConnectionError as error:
                    self.wrong.append(f"{kind} {number}: {type(error).__name__} {error}")

        await asyncio.gather(*(client() for _ in range(clients)))

    async def one(self, number: int, kind: str) -> str:
        mark = "mark " + "".join(chr(97 + int(d)) for d in f"{number:05}")
        rid = f"req-{number}"
        tokens = self.random.randint(4, 40)
        body = body_of(mark, tokens, self.fake, stream=kind != "whole")
        if kind in ("stream", "whole", "slow"):
            pause = self.random.uniform(0.05, 0.3) if kind == "slow" else 0.0
            answer = await ask(self.port, rid, body, pause=pause)
            return self.judge(mark, rid, answer)
        if kind == "cancelled":
            answer = await ask(self.port, rid, body, stop_after=self.random.randint(1, 5))
            self.check_text(mark, answer)
            return "left"
        if kind == "gone":
            task = asyncio.ensure_future(ask(self.port, rid, body))
            await asyncio.sleep(self.random.uniform(0.0, 0.5))
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return "left"
        if kind == "half a body":
            await ask(self.port, rid, body[: len(body) // 2], length=len(body))
            return "left"
        if kind == "asleep":  # more than the sockets' buffers hold, and nobody reads it
            await self.sleep(mark, rid)
            return "left"
        if kind == "malformed":
            return self.refused(await ask(self.port, rid, body[: -self.random.randint(1, 20)]), 400)
        if kind == "too large":
            return self.refused(await ask(self.port, rid, b"[" + b" " * (2 << 20)), 413)
        if kind == "unknown field":
            return self.refused(await ask(self.port, rid, body_of(mark, 4, self.fake, no_such_field=1)), 400)
        if kind == "deadline":
            answer = await ask(self.port, rid, body_of(mark, 400, True, timeout=0.05))
            self.check(answer.status in (200, 504, *REFUSED), f"{rid}: {answer.status} for a deadline")
            return str(answer.status)
        return self.refused(await ask(self.port, rid, body_of(mark, 4, self.fake, model="other")), 404)

    async def sleep(self, mark: str, rid: str) -> None:
        body = body_of(mark, 400, True, stream=True, logprobs=20)
        _, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1024)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Request-Id: {rid}\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await asyncio.sleep(4.0)
        writer.transport.abort()

    def judge(self, mark: str, rid: str, answer: Answer) -> str:
        if answer.status in REFUSED:
            self.check("retry-after" in answer.headers, f"{rid}: {answer.status} without Retry-After")
            self.check(answer.error is not None, f"{rid}: {answer.status} without an error object")
            return str(answer.status)
        self.check(answer.status == 200, f"{rid}: status {answer.status} {answer.error}")
        self.check(answer.headers.get("x-request-id") == rid, f"{rid}: its answer is for {answer.headers}")
        if answer.error is not None:
            return f"error {answer.error['code']}"
        self.check(answer.done, f"{rid}: cut off after {answer.text!r:.60}")
        self.check_text(mark, answer)
        return "answered"

    def refused(self, answer: Answer, status: int) -> str:
        good = answer.status == status or answer.status in REFUSED
        self.check(good and answer.error is not None, f"status {answer.status} in place of {status}: {answer.error}")
        return str(answer.status)


def start(fake: bool, options: list[str]) -> tuple[subprocess.Popen[bytes], int]:
    module = "tests.helpers.fake_serve" if fake else "pelton.cli.main"
    # A KV cache that is used up soon: its memory is taken when it is first written.
    common = [
        "serve",
        "--port",
        "0",
        "--max-body",
        "1MiB",
        "--no-access-log",
        "--send-timeout",
        "3",
        "--max-model-len",
        "2048",
        "--kv-cache-memory",
        "100MiB",
    ]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    server = subprocess.Popen(
        [sys.executable, "-m", module, *common, *options], stderr=subprocess.PIPE, env=environment
    )
    assert server.stderr is not None
    for raw in server.stderr:
        found = re.search(r"is served at http://127.0.0.1:(\d+)", raw.decode())
        if found:
            drain = __import__("threading").Thread(target=lambda: [sys.stderr.buffer.write(x) for x in server.stderr])
            drain.daemon = True
            drain.start()
            return server, int(found[1])
        sys.stderr.buffer.write(raw)
    raise SystemExit("the server did not start")


def children(pid: int) -> dict[str, int]:
    """Process ids by the module that they run."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "stat").read_text().rpartition(")")[2].split()[1] == str(pid):
                command = (entry / "cmdline").read_bytes().split(b"\0")
                found["engine" if any(b"engine" in part for part in command) else "api"] = int(entry.name)
        except OSError:
            continue
    return found


def memory(pid: int) -> float:
    """MiB that are the process's own."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return (
        sum(int(line.split()[1]) for line in text.splitlines() if line.startswith(("Private_Dirty", "Private_Clean")))
        / 1024
    )


async def get(port: int, path: str) -> tuple[int, str]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    data = (await reader.read()).decode()
    writer.close()
    return int(data.split()[1]), data.partition("\r\n\r\n")[2]


async def idle(port: int) -> dict[str, float]:
    """Wait until nothing runs; the engine's books then."""
    wanted = ("pelton:num_requests_running", "pelton:num_requests_waiting", "pelton:kv_cache_usage_perc",
              "pelton:api_active_requests")  # fmt: skip
    values: dict[str, float] = {}
    for _ in range(100):
        _, text = await get(port, "/metrics")
        values = {n: float(m[1]) for n in wanted if (m := re.search(rf"^{n}{{.*}} (\S+)$", text, re.M))}
        if len(values) == len(wanted) and not any(values.values()):
            return values
        await asyncio.sleep(0.2)
    return values


async def until_ready(port: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if (await get(port, "/ready"))[0] == 200:
                return True
        except (OSError, IndexError):
            pass
        await asyncio.sleep(0.05)
    return False


async def stress(args: argparse.Namespace, server: subprocess.Popen[bytes], port: int) -> dict[str, Any]:
    result: dict[str, Any] = {"requests": args.requests, "clients": args.clients, "fake": args.fake}
    load = Stress(port, args.fake, args.seed)
    await load.run(min(400, args.requests), args.clients)  # buffers grow to their size once
    await idle(port)
    pids = children(server.pid)
    before = {name: memory(pid) for name, pid in pids.items()}
    load.outcomes.clear()
    begun = time.monotonic()
    await load.run(args.requests, args.clients)
    result["seconds"] = time.monotonic() - begun
    left = await idle(port)
    load.check(not any(left.values()), f"left over: {left}")
    after = {name: memory(pid) for name, pid in pids.items()}
    result["memory_mib"] = {name: [before[name], after[name]] for name in pids}
    for name in pids:
        load.check(
            after[name] < 1.1 * before[name] + 16, f"{name} grew from {before[name]:.0f} to {after[name]:.0f} MiB"
        )
    result["outcomes"] = dict(sorted(load.outcomes.items()))

    async def many(count: int, tokens: int) -> list[Answer]:
        marks = ["mark " + "".join(chr(97 + int(d)) for d in f"{i:05}") for i in range(count)]
        bodies = [body_of(mark, tokens, args.fake, stream=True) for mark in marks]
        answers = await asyncio.gather(*(ask(port, f"r{i}", body) for i, body in enumerate(bodies)))
        for mark, answer in zip(marks, answers, strict=True):
            load.check_text(mark, answer)
        return list(answers)

    running = asyncio.ensure_future(many(64, 100))
    await asyncio.sleep(1.0)
    os.kill(pids["engine"], signal.SIGKILL)
    begun = time.monotonic()
    answers = await asyncio.wait_for(running, 30)
    result["killed"] = Counter(
        "answered" if a.done and a.error is None else f"{a.status} {(a.error or {}).get('code')}" for a in answers
    )
    load.check(all(a.error is not None or a.done for a in answers), "a stream was cut off without a word")
    load.check(await until_ready(port, 30), "the engine did not come back")
    result["back_after_s"] = time.monotonic() - begun
    load.check(all(a.done for a in await many(8, 10)), "no answers after the engine came back")

    running = asyncio.ensure_future(many(64, 60))
    await asyncio.sleep(0.7)
    begun = time.monotonic()
    server.send_signal(signal.SIGTERM)
    await asyncio.sleep(0.1)
    try:
        late = (await ask(port, "late", body_of("mark late", 4, args.fake))).status
    except ConnectionError:
        late = 0
    load.check(late in (0, 503), f"a new request was answered {late} while the server was ending")
    answers = await asyncio.wait_for(running, 60)
    result["drained"] = Counter("answered" if a.done and a.error is None else str(a.status) for a in answers)
    load.check(all((a.done and a.error is None) or a.status == 503 for a in answers), "a stream was cut off by SIGTERM")
    status = await asyncio.to_thread(server.wait, 60)
    result["drained_after_s"] = time.monotonic() - begun
    load.check(status == 0, f"exit status {status}")
    result["wrong"] = load.wrong
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=256)
    parser.add_argument("--fake", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json")
    parser.add_argument("options", nargs="*")
    args = parser.parse_args()
    server, port = start(args.fake, args.options)
    try:
        result = asyncio.run(stress(args, server, port))
    finally:
        if server.poll() is None:
            server.kill()
    result |= {"commit": commit(), "machine": machine()}
    print(json.dumps(result, indent=1))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(bool(result["wrong"]))


if __name__ == "__main__":
    main()
