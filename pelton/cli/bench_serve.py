"""``pelton bench serve``: load on an OpenAI-compatible server, and what its users would see."""

from __future__ import annotations

import asyncio
import math
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import PeltonError
from . import options
from .bench_workload import requests

if TYPE_CHECKING:
    from ..bench.load_client import Control
    from ..bench.serving import Bench, Load, ServedModel, Tokenizer
    from ..bench.slo import FoundRate, Slo
    from ..bench.workloads import Workload
    from .bench_serve_output import Output
    from .bench_workload import Asked


@click.command(short_help="Load on an OpenAI-compatible server, and its latencies.")
@click.option("--base-url", default="http://127.0.0.1:8000", metavar="URL", help="Any OpenAI-compatible server: "
              "Pelton, vLLM, SGLang, llama-server, TGI ...")  # fmt: skip
@click.option("--endpoint", type=click.Choice(["completions", "chat"]), default="completions", help="chat: "
              "/v1/chat/completions, prompts as messages of a user.")  # fmt: skip
@click.option("--model", metavar="NAME", help="As the server calls it. Default: the first of its /v1/models.")
@click.option("--api-key", envvar="OPENAI_API_KEY", show_envvar=True, metavar="KEY", help="Sent as a bearer token.")
@click.option("--tokenizer", metavar="MODEL", help="A folder, .gguf file or hub id. It makes prompts of a known length "
              "and counts tokens where the server does not. Default: what the server serves, if it is a path or in the "
              "hub's cache of this machine; else the demo model's, with a note.")  # fmt: skip
@requests
@click.option("--request-rate", metavar="R[,R]", help="Open loop: requests per second on average, sent whether earlier "
              "ones are done or not. inf: all at once, the default. Several: a run for each.")  # fmt: skip
@click.option("--burstiness", type=float, default=1.0, help="Shape of the gamma distribution of the gaps: 1 is a "
              "Poisson process, below 1 comes in bursts, above 1 is more even.")  # fmt: skip
@click.option("--max-concurrency", metavar="N[,N]", help="Closed loop: so many requests on their way, and the next "
              "one when one ends. Several: a run for each.")  # fmt: skip
@click.option("--find-rate", is_flag=True, help="Search the highest rate that meets --slo: double or halve, then "
              "bisect. --request-rate is where it starts; default: what one request at a time would give.")  # fmt: skip
@click.option("--find-runs", type=int, default=10, metavar="N", help="Runs of --find-rate at most.")
@click.option("--slo", metavar="LIMITS", help="For goodput: ttft=500,tpot=50,e2e=2s, in ms unless there is a unit.")
@click.option("--slo-attainment", type=float, default=0.9, metavar="SHARE", help="Share of the requests that must meet "
              "--slo; those that fail do not.")  # fmt: skip
@click.option("--duration", type=float, metavar="S", help="Send nothing more after so many seconds; what is on its way "
              "may end. --max-concurrency repeats the requests until then.")  # fmt: skip
@click.option("--warmup", type=int, default=4, metavar="N", help="Short requests before the first run, not counted.")
@click.option("--timeout", type=float, default=600.0, metavar="S", help="Of a request, connecting included.")
@click.option("--ignore-eos/--no-ignore-eos", "ignore_eos", default=None, help="Ask for answers of exactly their "
              "length: ignore_eos and min_tokens in the request. A server that refuses them is asked without, with a "
              "note. Default: on for datasets, for --prompts as each line says.")  # fmt: skip
@click.option("--extra-body", metavar="JSON", help="Fields for every request, e.g. '{\"top_k\": 40}'.")
@click.option("--server-metrics/--no-server-metrics", default=True, help="Read /metrics before, after and every second "
              "in between: prefix hits, preemptions, use of the KV cache.")  # fmt: skip
@click.option("--scenario", type=click.Choice(["singlestream", "server", "offline"]), help="MLPerf's LoadGen sends the "
              "requests and gives the verdict.")  # fmt: skip
@click.option("--mlperf-min-duration", type=float, default=60.0, metavar="S", help="Official runs take 600 s.")
@click.option("--mlperf-min-queries", type=int, metavar="N", help="Default: LoadGen's own.")
@click.option("--mlperf-logs", type=click.Path(path_type=Path, file_okay=False), default=Path("mlperf_logs"),
              metavar="DIR", help="LoadGen's own log files.")  # fmt: skip
@click.option("--target-qps", type=float, default=1.0, metavar="R", help="MLPerf server: the rate; offline: the rate "
              "that is expected, which says how many samples there are.")  # fmt: skip
@click.option("--target-latency", type=float, metavar="MS", help="MLPerf server: limit of the whole answer. Those of "
              "first token and time per token are --slo ttft=,tpot=.")  # fmt: skip
@click.option("--label", metavar="NAME", help="Of the server in reports. Default: the model's name.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False), metavar="FILE", help="Write all figures, and all "
              "times of every request.")  # fmt: skip
@click.option("--html", "html_file", type=click.Path(dir_okay=False), metavar="FILE", help="Write a report: one page "
              "with tables and pictures, nothing in it is loaded from elsewhere.")  # fmt: skip
def serve(
    asked: Asked,
    *,
    json_file: str | None,
    html_file: str | None,
    **given: Any,
) -> None:
    """Send a workload to a server and report throughput, TTFT, TPOT, ITL, E2E, goodput, and every failure.

    An open loop (--request-rate) is what users do: they come when they come. A closed loop (--max-concurrency) is what
    batch jobs do, and the way to a server's throughput at a given load. Latencies are taken where the socket is read;
    the client measures how late it was itself and says so when its figures cannot be trusted.

    No request finds its own prompt of earlier in the server's prefix cache: every run sends other random tokens and
    another cache_salt, and a request that a run repeats (--duration, --scenario) has another one each time. A server
    that takes no cache_salt may know repeats, conversations and --prompts: look at "cached" in the report.

    Ctrl-C stops and keeps what was measured. docs/benchmarking.md has all definitions.

    \b
    Examples:
      pelton bench serve --request-rate 4 --slo ttft=500,tpot=50
      pelton bench serve --dataset sharegpt --num-prompts 500 --request-rate 1,2,4,8 --html rates.html
      pelton bench serve --max-concurrency 1,4,16,64 --json pelton.json --label Pelton
      pelton bench serve --base-url http://127.0.0.1:8080 --max-concurrency 1,4,16,64 --json other.json
      pelton bench compare pelton.json other.json --html both.html
      pelton bench serve --slo ttft=1s,tpot=80 --slo-attainment 0.99 --find-rate --num-prompts 300
      pelton bench serve --scenario server --target-qps 2 --slo ttft=2s,tpot=100 --mlperf-min-duration 600
    """
    from ..bench import serving_report
    from ..bench.serving import run_in_loop
    from .bench_serve_output import Output

    plan = Plan.of(asked, **given)
    write_json, write_html = options.writable(json_file), options.writable(html_file)
    if html_file is not None:
        serving_report.check_plots()
    output = Output(plan.label, write_json, write_html if html_file is not None else None)
    try:
        run_in_loop(lambda: _Session(plan, asked, output).run())
    finally:
        output.report()  # what was measured before Ctrl-C as well
    output.leave()


@dataclass(frozen=True)
class Plan:
    """The options, checked as far as that goes without the server."""

    base_url: str
    endpoint: str
    model: str | None
    api_key: str | None
    tokenizer: str | None
    loads: tuple[Load, ...]
    find_from: float | None
    find_rate: bool
    find_runs: int
    slo: Slo | None
    warmup: int
    timeout: float
    ignore_eos: bool | None
    extra_body: dict[str, Any]
    server_metrics: bool
    scenario: str | None
    mlperf_min_duration: float
    mlperf_min_queries: int | None
    mlperf_logs: Path
    target_qps: float
    target_latency: float | None
    label: str | None

    @classmethod
    def of(
        cls, asked: Asked, *, request_rate: str | None, burstiness: float, max_concurrency: str | None,
        duration: float | None, slo: str | None, slo_attainment: float, extra_body: str | None, **given: Any,
    ) -> Plan:  # fmt: skip
        from ..bench.mlperf import check_installed
        from ..bench.serving import Load, parse_extra_body
        from ..bench.slo import Slo
        from ..bench.workloads import Arrivals

        for name, value, least, most in (
            ("warmup", given["warmup"], 0, 1000),
            ("find-runs", given["find_runs"], 1, 100),
            ("mlperf-min-queries", given["mlperf_min_queries"], 1, 1 << 32),
        ):
            if value is not None and not least <= value <= most:
                raise PeltonError(f"--{name} is {value}", f"give a whole number from {least} to {most}")
        for name, seconds in (("timeout", given["timeout"]), ("duration", duration),
                              ("mlperf-min-duration", given["mlperf_min_duration"]),
                              ("target-qps", given["target_qps"]),
                              ("target-latency", given["target_latency"])):  # fmt: skip
            if seconds is not None and not 0 < seconds <= 1e6:
                raise PeltonError(f"--{name} is {seconds:g}", "give a number above 0")
        if request_rate is not None and max_concurrency is not None:
            raise PeltonError(
                "--request-rate is an open loop and --max-concurrency a closed one", "give one of them; a limit of the"
                " server's own is a matter of its settings",
            )  # fmt: skip
        limits = None if slo is None else Slo.parse(slo, slo_attainment)
        if given["find_rate"] and (limits is None or max_concurrency is not None or given["scenario"] is not None):
            raise PeltonError("--find-rate searches a rate that meets an SLO", "give --slo, no --max-concurrency and no"
                              " --scenario")  # fmt: skip
        if given["scenario"] is not None:
            check_installed()
        if given["scenario"] is not None and (request_rate or max_concurrency or duration):
            raise PeltonError("--scenario leaves arrivals to MLPerf's LoadGen", "give --target-qps and"
                              " --mlperf-min-duration")  # fmt: skip
        rates = _rates(request_rate)
        if given["find_rate"] and len(rates) > 1:
            raise PeltonError(f"--request-rate is {request_rate}", "--find-rate starts at one rate")
        if burstiness != 1.0 and request_rate is None and not given["find_rate"]:
            raise PeltonError("--burstiness is about arrivals, and all requests come at once", "add --request-rate")
        lasting = math.inf if duration is None else duration
        if duration is not None and request_rate is not None and math.isfinite(max(rates)):
            expected = max(rates) * duration
            asked.at_least(math.ceil(expected + 4 * math.sqrt(expected / min(1.0, burstiness))) + 1)
        if max_concurrency is not None:
            loads = [Load(concurrency=n, duration=lasting) for n in options.numbers("max-concurrency", max_concurrency)]
        else:
            loads = [Load(Arrivals(rate, burstiness, asked.spec.seed), duration=lasting) for rate in rates]
        return cls(
            loads=tuple(loads), slo=limits, extra_body=parse_extra_body(extra_body),
            find_from=rates[0] if request_rate is not None and math.isfinite(rates[0]) else None, **given,
        )  # fmt: skip


def _rates(text: str | None) -> list[float]:
    if text is None:
        return [math.inf]
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        rates = [math.nan]
    if not all(rate > 0 for rate in rates):
        raise PeltonError(
            f"--request-rate is {text!r}", "give requests per second above 0, or inf, with commas between"
        )
    return list(dict.fromkeys(rates))


class _Session:
    """From the first connection to the last figure, in the event loop."""

    def __init__(self, plan: Plan, asked: Asked, output: Output) -> None:
        self._plan, self._asked, self._output = plan, asked, output

    async def run(self) -> None:
        from ..bench import openai_api, serving
        from ..bench.http_client import HttpClient
        from ..bench.load_client import Control

        plan = self._plan
        headers = {"Authorization": f"Bearer {plan.api_key}"} if plan.api_key else {}
        client, control = HttpClient(plan.base_url, headers), Control()
        try:
            model = serving.choose_model(await serving.served_models(client), plan.model, client.base_url)
            tokenizer, where, notes = _tokenizer(plan.tokenizer, model)
            api = openai_api.Api(plan.endpoint, model.name, extra_body=plan.extra_body)
            target = serving.Target(client, api, plan.timeout, tokenizer, notes=notes)
            workload = self._workload(model, tokenizer)
            prompts = serving.Prompts(workload, tokenizer, serving.plain_ids(tokenizer))
            openai_api.check_sendable(workload.requests)
            seconds = await target.probe(lambda api: prompts.of_run(0, api, 1)[0])
            bench = serving.Bench(target, prompts, control, plan.server_metrics, self._output.on_record)
            self._output.begin(bench, workload, plan, where)
            # Until here Ctrl-C is Python's: nothing is measured, and a workload is made without a look at the loop.
            with suppress(NotImplementedError, RuntimeError, ValueError):  # not the main thread, or Windows
                asyncio.get_running_loop().add_signal_handler(signal.SIGINT, _interrupt, control)
            if plan.scenario is not None:
                await self._mlperf(bench)
                return
            with self._output.working():
                await bench.warm_up(plan.warmup)
                if plan.find_rate:
                    self._output.found = await self._find(bench, seconds)
                else:
                    await bench.sweep(plan.loads)
        finally:
            with suppress(NotImplementedError, RuntimeError, ValueError):
                asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)  # a loop that is closed would keep it
            client.close()

    def _workload(self, model: ServedModel, tokenizer: Tokenizer) -> Workload:
        from ..bench import serving

        if model.max_model_len is None and self._asked.is_unbounded:
            raise PeltonError(
                "a line of --prompts has no max_tokens, and the server does not say how long a context it has",
                "give max_tokens, or --output-len",
            )
        workload = self._asked.make(
            vocab_size=len(serving.plain_ids(tokenizer)), tokenizer=tokenizer,
            max_model_len=model.max_model_len or 1 << 20,
        )  # fmt: skip
        return serving.prepare_requests(workload, self._plan.ignore_eos)

    async def _find(self, bench: Bench, seconds: float) -> FoundRate:
        """From the rate that one request at a time would have, unless another was asked for."""
        from ..bench.serving import Load
        from ..bench.slo import FoundRate
        from ..bench.workloads import Arrivals

        plan = self._plan
        assert plan.slo is not None
        start = plan.find_from
        if start is None:
            alone = await bench.measure(Load(concurrency=1, duration=max(2.0, 4 * seconds)))
            bench.measured.clear()
            ok = alone.run.ok
            if bench.control.reason is not None:
                return FoundRate(None, None, (), plan.slo.attainment, "it was stopped")
            if not ok:
                why = alone.run.records[0].message
                raise PeltonError(f"no request of the first run was answered ({why})", "see the server's log")
            start = len(ok) / alone.run.seconds
        load = replace(plan.loads[0], arrivals=replace(plan.loads[0].arrivals or Arrivals(), rate=start))
        return await bench.find_rate(plan.slo, start, load, max_runs=plan.find_runs, precision=0.05)

    async def _mlperf(self, bench: Bench) -> None:
        from ..bench import mlperf

        plan = self._plan
        assert plan.scenario is not None
        settings = mlperf.MlperfSettings(
            plan.scenario, plan.mlperf_min_duration, plan.mlperf_min_queries, plan.target_qps,
            None if plan.target_latency is None else plan.target_latency / 1e3, plan.slo, plan.mlperf_logs,
            seed=self._asked.spec.seed,
        )  # fmt: skip
        with self._output.working():
            await bench.warm_up(plan.warmup)
            self._output.mlperf = await bench.mlperf(settings)


def _interrupt(control: Control) -> None:
    if control.reason is not None:  # a second time: at once
        raise KeyboardInterrupt
    control.stop("Ctrl-C", interrupted=True)
    print("stopping; Ctrl-C again to leave at once", file=sys.stderr)


def _tokenizer(asked: str | None, model: ServedModel) -> tuple[Tokenizer, str, list[str]]:
    """The tokenizer, what it is of, and notes.

    Raises:
        PeltonError: none can be had; the message names the remedy.
    """
    from .bench_tokenizer import cached_folder, read_tokenizer

    if asked is not None:
        return read_tokenizer(asked), asked, []
    for name in (model.root, model.name):
        folder = cached_folder(name)
        if folder is not None:
            with suppress(PeltonError):
                return read_tokenizer(str(folder)), str(name), []
    try:
        tokenizer = read_tokenizer("")
    except PeltonError:
        raise PeltonError(
            f"the tokenizer of {model.name} is not on this machine", "give --tokenizer, a folder, .gguf file or hub id"
        ) from None
    return tokenizer, "demo model", [
        f"prompts are made with the demo model's tokenizer: that of {model.name} is not here (--tokenizer)"
    ]  # fmt: skip
