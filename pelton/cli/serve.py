"""``pelton serve``: the model as a service."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from ..errors import PeltonError
from . import options

#: Fields of generation_config.json that are defaults of requests.
_GENERATION = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
#: Of a step, beside a token for each sequence. A larger step saves little on a CPU (weights are read less often), and
#: all streams stand still while it runs: benchmarks/results/serving-steps-amd-epyc.md.
PROMPT_TOKENS = 192
#: A GPU needs more to be busy; nobody has measured how many.
GPU_PROMPT_TOKENS = 2048


@click.command(short_help="Serve a model behind OpenAI's HTTP API.")
@options.model
@click.option(
    "--host",
    default="127.0.0.1",
    metavar="ADDRESS",
    help="0.0.0.0 to be reached from other machines: then think of --api-key.",
)
@click.option("--port", type=int, default=8000, help="0: any free one.")
@click.option(
    "--served-model-name",
    "names",
    multiple=True,
    metavar="NAME",
    help="What requests call the model; may be repeated. Default: MODEL.",
)
@options.max_num_seqs
@click.option(
    "--max-num-batched-tokens",
    type=int,
    metavar="N",
    help="Tokens of one step: fewer let streams flow more evenly beside long prompts, more read long prompts sooner. "
    f"Default: {PROMPT_TOKENS} more than --max-num-seqs, on GPUs {GPU_PROMPT_TOKENS}.",
)
@click.option(
    "--enable-prefix-caching/--no-enable-prefix-caching",
    default=True,
    help="Keep and find the KV of common beginnings.",
)
@click.option(
    "--kv-cache-memory",
    metavar="SIZE",
    help="Of the KV cache, as 2GiB or 500MiB. Default: room for --max-num-seqs, 4 GiB at most.",
)
@options.loading
@click.option(
    "--lora",
    multiple=True,
    metavar="[NAME=]DIR",
    help="A LoRA adapter that requests choose as their model; may be repeated.",
)
@click.option("--max-lora-rank", type=int, metavar="N", help="Room for adapters of this rank. Default: 64.")
@click.option(
    "--max-loras",
    type=int,
    metavar="N",
    help="Room for so many adapters, and let requests load and unload "
    "them from folders of this machine (POST /v1/load_lora_adapter).",
)
@click.option(
    "--api-key",
    "api_keys",
    multiple=True,
    envvar="PELTON_API_KEY",
    metavar="KEY",
    help="Requests need one of "
    "these keys; may be repeated. Others on this machine may see it in the list of processes: better set "
    "PELTON_API_KEY, or use --api-key-file.",
)
@click.option("--api-key-file", type=click.Path(dir_okay=False), metavar="FILE", help="One key a line.")
@click.option(
    "--ssl-certfile",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Serve HTTPS with this certificate chain (PEM).",
)
@click.option("--ssl-keyfile", type=click.Path(dir_okay=False), metavar="FILE", help="Its private key (PEM).")
@click.option(
    "--allow-origin",
    "origins",
    multiple=True,
    metavar="ORIGIN",
    help="Pages of this origin may ask (CORS); * for all; may be repeated.",
)
@click.option(
    "--max-queue", type=int, default=256, metavar="N", help="Requests that may wait; more are answered with 429."
)
@click.option("--max-body", default="16MiB", metavar="SIZE", help="Of one request.")
@click.option("--request-timeout", type=float, metavar="SECONDS", help="For an answer, unless its request says less.")
@click.option(
    "--send-timeout",
    type=float,
    default=60.0,
    metavar="SECONDS",
    help="That a client may leave what it was sent unread, or its own request unsent, before it is dropped.",
)
@click.option(
    "--drain-timeout",
    type=float,
    default=30.0,
    metavar="SECONDS",
    help="That answers have to finish after SIGTERM or Ctrl-C.",
)
@click.option(
    "--stall-timeout",
    type=float,
    default=120.0,
    metavar="SECONDS",
    help="Without a step, after which an engine prints its stacks, ends, and is started again.",
)
@click.option(
    "--slo",
    metavar="LIMITS",
    help="What counts as a good answer in metrics and dashboard: ttft=500ms,tpot=50ms,e2e=10s, one of them or more.",
)
@click.option(
    "--tool-call-parser",
    metavar="NAME",
    help="How the model writes tool calls: hermes, llama3_json, mistral, qwen3_coder, deepseek_v3 ... Default: as its "
    "chat template shows.",
)
@click.option(
    "--generation-config",
    type=click.Choice(["auto", "none"]),
    default="auto",
    help="Take temperature, top_p, "
    "top_k ... that requests leave out from the model's generation_config, or from OpenAI's defaults.",
)
@click.option(
    "--api-processes",
    type=int,
    default=1,
    metavar="N",
    help="Processes that speak HTTP. One streams some thirty thousand tokens a second.",
)
@click.option(
    "--replicas", type=int, default=1, metavar="N", help="Engines with the whole model each, which share the cores."
)
@click.option(
    "--otlp-traces-endpoint",
    "otlp_endpoint",
    metavar="URL",
    help="Send a trace of each request to this OpenTelemetry collector, as http://host:4318/v1/traces (extra otel).",
)
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text")
@click.option("--access-log/--no-access-log", default=True, help="A line for each request.")
@click.option("--log-prompts", is_flag=True, help="Write the texts of requests to the log. They are private otherwise.")
def serve(
    model: str,
    names: tuple[str, ...],
    lora: tuple[str, ...],
    max_lora_rank: int | None,
    max_loras: int | None,
    api_keys: tuple[str, ...],
    api_key_file: str | None,
    origins: tuple[str, ...],
    max_body: str,
    kv_cache_memory: str | None,
    slo: str | None,
    generation_config: str,
    max_num_seqs: int,
    max_num_batched_tokens: int | None,
    enable_prefix_caching: bool,
    engine: dict[str, Any],
    **server: Any,
) -> None:
    """Serve a model behind OpenAI's HTTP API, with a chat and a dashboard for the browser.

    Any OpenAI client works: its base URL is http://HOST:PORT/v1. The chat is at /, the dashboard at /dashboard,
    Prometheus metrics at /metrics, all endpoints at /openapi.json. Ctrl-C or SIGTERM lets answers finish.

    \b
    Examples:
      pelton serve
      pelton serve org/name --port 9000 --api-key-file keys.txt --host 0.0.0.0
      pelton serve model.gguf --max-num-seqs 128 --slo ttft=500ms,tpot=50ms
      curl localhost:8000/v1/chat/completions \\
           -d '{"messages": [{"role": "user", "content": "Hello!"}]}'
    """
    import asyncio

    from ..bench.slo import parse_limits
    from ..checkpoint import open_checkpoint, resolve_model
    from ..server.config import SLO, ServerConfig
    from ..server.logs import set_up_logging
    from ..server.supervisor import Supervisor
    from ..text.tool_formats import tool_format
    from .progress import packing_progress

    path = resolve_model(model)
    adapters = _adapters(lora, max_lora_rank, max_loras)
    config = ServerConfig(
        model=str(path),
        model_names=names or (model or path.stem,),
        api_keys=(*api_keys, *_keys(api_key_file)),
        allowed_origins=origins,
        max_body_bytes=size("max-body", max_body),
        slo=SLO() if slo is None else SLO(**parse_limits(slo)),
        sampling_defaults={} if generation_config == "none" else _defaults(open_checkpoint(path).generation),
        runtime_adapters=max_loras is not None,
        **server,
    )
    engine |= adapters.engine
    prompt_tokens = GPU_PROMPT_TOKENS if engine["device"] == "cuda" else PROMPT_TOKENS
    engine |= {
        "model": str(path),
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_seqs + prompt_tokens
        if max_num_batched_tokens is None
        else max_num_batched_tokens,
        "enable_prefix_caching": enable_prefix_caching,
        "kv_cache_memory": None if kv_cache_memory is None else size("kv-cache-memory", kv_cache_memory),
    }
    set_up_logging(config.log_format)
    if config.tool_call_parser is not None:
        tool_format(None, config.tool_call_parser)  # is there one of that name?

    def ready(port: int, seconds: float) -> None:
        host = f"[{config.host}]" if ":" in config.host else config.host
        where = f"{config.scheme}://{host}:{port}"
        click.echo(f"{config.model_names[0]} is served at {where} (ready after {seconds:.1f} s)", err=True)
        click.echo(f"chat {where}/   dashboard {where}/dashboard   API {where}/v1", err=True)

    with packing_progress() as progress:
        supervisor = Supervisor(config, engine, adapters.folders, on_progress=progress, on_ready=ready)
        asyncio.run(supervisor.run())


def _adapters(lora: tuple[str, ...], max_lora_rank: int | None, max_loras: int | None) -> options.Adapters:
    """What --lora and --max-loras ask for."""
    if max_loras is None:
        return options.adapters(lora, max_lora_rank)
    folders = options.adapters(lora, None).folders
    if len(folders) > max_loras:
        raise PeltonError(f"--max-loras is {max_loras} and --lora names {len(folders)}", "raise the first")
    room = {"enable_lora": True, "max_loras": max_loras, "max_lora_rank": max_lora_rank or 64}
    return options.Adapters(folders, room)


def _keys(file: str | None) -> list[str]:
    if file is None:
        return []
    try:
        keys = [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise PeltonError(f"{file} cannot be read ({error})", "give a file with one key a line") from None
    keys = [key for key in keys if key and not key.startswith("#")]
    if not keys:
        raise PeltonError(f"{file} has no keys", "write one key a line")
    return keys


def _defaults(generation: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint recommends; what is of no use, or out of range, is left out."""
    from ..config import SamplingParams
    from ..errors import RequestError

    found = {}
    for name in _GENERATION:
        value = generation.get(name)
        if value is None or (name == "temperature" and generation.get("do_sample") is False):
            continue
        try:
            SamplingParams(**{name: value})
        except RequestError:
            continue
        found[name] = value
    return found


_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}


def size(name: str, text: str) -> int:
    """Bytes of ``2GiB``, ``500MB`` or ``1048576``."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if found is None or found[2] not in _UNITS:
        raise PeltonError(f"--{name} is {text!r}", "write it as 2GiB, 500MiB or a number of bytes")
    return int(float(found[1]) * _UNITS[found[2]])
