"""A server of OpenAI's API whose every delay, piece and fault is scripted, in a thread of its own."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Script:
    """What becomes of one request. Seconds; ``tokens`` None: max_tokens of the request.

    pieces: the bytes of the stream are written in pieces of so many, each for itself. newline: of the events.
    fault: "http:STATUS", "cut" (after half of the tokens), "empty", "hang" (no answer), "error" (an error in the
    stream), "json" (no stream). done: end with [DONE]. usage: "asked" (as stream_options say), "never".
    per_chunk: tokens of a chunk.
    """

    ttft: float = 0.0
    itl: float = 0.0
    tokens: int | None = None
    pieces: int | None = None
    newline: str = "\n"
    fault: str = ""
    done: bool = True
    usage: str = "asked"
    per_chunk: int = 1
    cached_tokens: int | None = None
    comments: bool = False


@dataclass
class Seen:
    """A request: when it came, how many others were there, its path and its body."""

    time: float
    in_flight: int
    path: str
    body: dict[str, Any]
    headers: dict[str, str]
    end: float = 0.0


@dataclass
class ScriptedServer:
    """Use as a context. script: of the number of a request and its body, or the same for all.

    serve_seconds: not None: one request after the other, each taking so long before its first token (D of M/D/1).
    refuses: fields of a body that are answered with 400, or with 500 if that is among them. key: the only one
    that is accepted. listed: of /v1/models, in place of the models.
    """

    script: Script | Callable[[int, dict[str, Any]], Script] = Script()
    serve_seconds: float | None = None
    refuses: tuple[str, ...] = ()
    models: tuple[str, ...] = ("scripted",)
    listed: list[Any] | None = None
    endpoints: tuple[str, ...] = ("/v1/completions", "/v1/chat/completions")
    key: str | None = None
    metrics: Callable[[], str] | None = None
    keep_alive: bool = True
    seen: list[Seen] = field(default_factory=list)
    max_in_flight: int = 0
    connections: int = 0

    def __enter__(self) -> ScriptedServer:
        self._ready = threading.Event()
        self._in_flight = 0
        self._free_at = 0.0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        """As a server that is killed: everything that is open breaks off."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(10)

    def _run(self) -> None:
        asyncio.run(self._main())

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0, backlog=1024)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        try:
            while await self._exchange(reader, writer) and self.keep_alive:
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort() if self._stop.is_set() else writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        now = time.monotonic()
        method, path, _ = head[0].split(" ")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
        raw = await reader.readexactly(int(headers.get("content-length", 0)))
        if self.key is not None and headers.get("authorization") != f"Bearer {self.key}":
            return self._plain(writer, 401, {"error": {"message": "bad key"}})
        if path == "/v1/models":
            return self._plain(writer, 200, {"data": self.listed or [{"id": name} for name in self.models]})
        if path == "/metrics" and self.metrics is not None:
            return self._plain(writer, 200, self.metrics())
        if path not in self.endpoints or method != "POST":
            return self._plain(writer, 404, {"detail": "Not Found"})
        body = json.loads(raw)
        if body["model"] not in self.models:
            return self._plain(writer, 404, {"error": {"message": f"The model `{body['model']}` does not exist."}})
        fields = {*body, "ids"} if isinstance(body.get("prompt"), list) else set(body)
        refused = [name for name in self.refuses if name in fields]
        if refused:
            status = 500 if "500" in self.refuses else 400
            return self._plain(writer, status, {"error": {"message": f"Unrecognized request argument: {refused[0]}"}})
        self._in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self._in_flight)
        seen = Seen(now, self._in_flight, path, body, headers)
        self.seen.append(seen)
        try:
            script = self.script if isinstance(self.script, Script) else self.script(len(self.seen) - 1, body)
            return await self._answer(writer, body, script, path.endswith("chat/completions"))
        finally:
            self._in_flight -= 1
            seen.end = time.monotonic()

    def _plain(self, writer: asyncio.StreamWriter, status: int, value: Any) -> bool:
        body = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        return True

    async def _answer(self, writer: asyncio.StreamWriter, body: dict[str, Any], script: Script, chat: bool) -> bool:
        if self.serve_seconds is not None:
            self._free_at = max(self._free_at, time.monotonic()) + self.serve_seconds
            await asyncio.sleep(self._free_at - time.monotonic())
        await asyncio.sleep(script.ttft if script.fault != "hang" else 3600)
        if script.fault.startswith("http:"):
            return self._plain(writer, int(script.fault[5:]), {"error": {"message": "as the script says"}})
        if script.fault == "json":
            return self._plain(writer, 200, {"choices": [{"text": "all at once", "finish_reason": "stop"}]})
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        asked = body.get("max_tokens", body.get("max_completion_tokens"))
        count = script.tokens if script.tokens is not None else asked
        if script.fault == "empty":
            count = 0
        if chat:
            opening = {"delta": {"role": "assistant", "content": ""}, "finish_reason": None}
            await self._event(writer, script, {"choices": [opening]})
        for start in range(0, count, script.per_chunk):
            if script.fault in ("cut", "error") and start >= count / 2:
                if script.fault == "cut":
                    writer.transport.abort()
                    return False
                await self._event(writer, script, {"error": {"message": "the engine died"}})
                break
            if start:
                await asyncio.sleep(script.itl)
            if script.comments:
                await self._raw(writer, script, f": ping{script.newline * 2}")
            text = " w" * min(script.per_chunk, count - start)
            choice = {"delta": {"content": text}} if chat else {"text": text}
            await self._event(writer, script, {"choices": [{**choice, "finish_reason": None}]})
        else:
            last = {"delta": {}} if chat else {"text": ""}
            await self._event(writer, script, {"choices": [{**last, "finish_reason": "length"}]})
            if script.usage == "asked" and body.get("stream_options", {}).get("include_usage"):
                usage: dict[str, Any] = {"prompt_tokens": 7, "completion_tokens": count}
                if script.cached_tokens is not None:
                    usage["prompt_tokens_details"] = {"cached_tokens": script.cached_tokens}
                await self._event(writer, script, {"choices": [], "usage": usage})
            if script.done:
                await self._raw(writer, script, f"data: [DONE]{script.newline * 2}")
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True

    async def _event(self, writer: asyncio.StreamWriter, script: Script, value: Any) -> None:
        await self._raw(writer, script, f"data: {json.dumps(value)}{script.newline * 2}")

    async def _raw(self, writer: asyncio.StreamWriter, script: Script, text: str) -> None:
        data = text.encode()
        size = script.pieces or len(data)
        for at in range(0, len(data), size):
            piece = data[at : at + size]
            writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            await writer.drain()
            if script.pieces:
                await asyncio.sleep(0)  # a write of its own
