"""LoRA adapters by model name, loaded and unloaded while the server runs."""

from __future__ import annotations

import os
import signal

from tests.helpers.http_stream import until
from tests.helpers.serving import Running, pelton_serve
from tests.test_lora import adapters

from .test_processes import of_kind


def said(server: Running, model: str) -> str:
    reply = server.ask("/v1/completions", {"model": model, "prompt": "Once upon", "max_tokens": 12, "temperature": 0})
    assert reply.status == 200, reply.body
    return str(reply.json["choices"][0]["text"])


def names(server: Running) -> list[str]:
    return [card["id"] for card in server.ask("/v1/models").json["data"]]


def test_adapters_come_and_go_and_outlive_an_engine() -> None:
    sql, poet = (str(adapters()[name][0]) for name in ("sql", "poet"))
    options = ("--lora", f"sql={sql}", "--max-loras", "2", "--max-lora-rank", "8", "--served-model-name", "base")
    with pelton_serve("--max-model-len", "256", "--no-access-log", *options) as server:
        assert names(server) == ["base", "sql"]
        assert server.ask("/v1/completions", {"model": "poet", "prompt": "a"}).status == 404
        load = {"lora_name": "poet", "lora_path": poet}
        assert server.ask("/v1/load_lora_adapter", load).status == 200
        until(lambda: names(server) == ["base", "sql", "poet"])
        answers = {name: said(server, name) for name in names(server)}
        assert len(set(answers.values())) == 3
        for wrong in (load, {"lora_name": "third", "lora_path": "/nowhere"}):
            reply = server.ask("/v1/load_lora_adapter", wrong)
            assert reply.status == 400 and reply.json["error"]["message"], wrong
        assert server.ask("/v1/unload_lora_adapter", {"lora_name": "sql"}).status == 200
        until(lambda: names(server) == ["base", "poet"])
        (engine,) = of_kind(server, "engine")
        os.kill(engine, signal.SIGKILL)
        until(lambda: server.ask("/ready").status == 503)
        server.wait_ready(20)
        until(lambda: names(server) == ["base", "poet"])
        assert said(server, "poet") == answers["poet"] and said(server, "base") == answers["base"]
