"""Pelton beside llama.cpp, OpenVINO GenAI, vLLM, transformers, ONNX Runtime GenAI and CTranslate2.

Every engine runs in its own virtual environment and process, with its best settings for this machine, on the same
prompts; engines take turns in every round, so that drift of the machine hits all of them. Figures are medians over
rounds, ratios are medians of the rounds' ratios. The first call installs the engines and makes the models under
--work, which takes a while and about 20 GB; later calls only measure. Use an otherwise idle machine.

Writes a JSON file per model under benchmarks/results/, with the tables beside it as Markdown.

Examples:
  python -m benchmarks.peers --quick --models smollm2            # does everything work here?
  python -m benchmarks.peers --models smollm2 llama-1b           # the tables of README.md
  python -m benchmarks.peers --peers llama_cpp --workloads 512 8 --rounds 7
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from .catalogue import MODELS, PEERS, workloads
from .measure import ROOT, Options, machine, measure_model
from .report import markdown

RESULTS = ROOT / "benchmarks" / "results"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--models", nargs="+", choices=list(MODELS), default=["smollm2", "llama-1b"], metavar="MODEL",
                      help=f"of {', '.join(MODELS)}; default: smollm2 llama-1b")  # fmt: skip
    made.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS), metavar="PEER",
                      help=f"of {', '.join(PEERS)}; Pelton always takes part; default: all")  # fmt: skip
    made.add_argument("--bits", nargs="+", type=int, choices=(16, 8, 4), help="weight sizes; default: all of them")
    made.add_argument("--workloads", nargs="+", metavar="W", choices=("512", "2048", "8", "32", "64"),
                      help="512 2048 (prompt of one sequence), 8 32 64 (sequences together); default: all")  # fmt: skip
    made.add_argument("--rounds", type=_positive, help="of one sequence; default: 5")
    made.add_argument("--batch-rounds", type=_positive, help="of many sequences; default: 2")
    made.add_argument("--cold-rounds", type=_positive, help="of process starts; default: 3")
    made.add_argument("--threads", type=_positive, default=len(os.sched_getaffinity(0)), help="default: all cores")
    made.add_argument("--work", type=Path, default=Path.home() / ".cache" / "pelton-peers",
                      help="environments, models and logs; default: ~/.cache/pelton-peers")  # fmt: skip
    made.add_argument(
        "--quick", action="store_true", help="tiny workloads of its own, one round: shows that engines work"
    )
    made.add_argument("--output", type=Path, metavar="FOLDER", help="default: benchmarks/results, with --quick: WORK")
    return made


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    work = args.work.expanduser().resolve()
    work.mkdir(parents=True, exist_ok=True)
    quick = 1 if args.quick else 0
    options = Options(
        work=work,
        threads=args.threads,
        rounds=args.rounds or quick or 5,
        batch_rounds=args.batch_rounds or quick or 2,
        cold_rounds=args.cold_rounds or quick or 3,
        workloads=workloads(None if args.quick else args.workloads, args.quick),
    )
    peers = [peer for name, peer in PEERS.items() if name in {"pelton", *args.peers}]
    begin = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # workers that wait are stopped: they must be ended
    if os.getloadavg()[0] > 0.5 and not args.quick:
        print(f"warning: the load is {os.getloadavg()[0]:.1f} before the first engine starts: figures will be low",
              file=sys.stderr)  # fmt: skip

    def say(text: str) -> None:
        print(f"[{time.monotonic() - begin:6.0f} s] {text}", file=sys.stderr, flush=True)

    common: dict[str, Any] = {
        "command": "python -m benchmarks.peers " + " ".join(shown_arguments(arguments or sys.argv[1:])),
        "date": date.today().isoformat(),
        **commit(),
        "machine": machine(),
        "threads": args.threads,
        "python": platform.python_version(),
        "rounds": {"one sequence": options.rounds, "batches": options.batch_rounds, "starts": options.cold_rounds},
        "quick": args.quick,
    }
    folder: Path = args.output or (work if args.quick else RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    for name in args.models:
        model = MODELS[name]
        if args.bits:
            model = replace(model, bits=tuple(b for b in model.bits if b in args.bits))
        say(model.title)
        start = time.monotonic()
        measured = measure_model(model, peers, options, say)
        if measured["peaks"]:
            common["machine"] |= {k: measured["peaks"][0][k] for k in ("cpu", "isa")}
        minutes = round((time.monotonic() - start) / 60, 1)
        results = private({**common, "minutes": minutes, "models": {name: measured}}, work)
        cpu = re.sub(r"[^a-z0-9]+", "-", str(common["machine"].get("cpu", "cpu")).lower()).strip("-")
        output = folder / f"peers-{cpu}-{name}.json"  # one per model: long runs are made one by one
        output.write_text(json.dumps(results, indent=1) + "\n")
        text = markdown(results)
        output.with_suffix(".md").write_text(text)
        print(text)
        print(output)
    return 0


def shown_arguments(arguments: list[str]) -> list[str]:
    """Without the folders of this machine."""
    shown: list[str] = []
    skip = False
    for argument in arguments:
        if not skip and not argument.startswith(("--work=", "--output=")) and argument not in ("--work", "--output"):
            shown.append(argument)
        skip = argument in ("--work", "--output")
    return shown


def private(value: Any, work: Path) -> Any:
    """The same without paths of this machine: reasons and settings may quote them."""
    if isinstance(value, dict):
        return {k: private(v, work) for k, v in value.items()}
    if isinstance(value, list):
        return [private(v, work) for v in value]
    if isinstance(value, str):
        for path, name in ((work, "WORK"), (ROOT, "."), (Path(sys.prefix), "VENV"), (Path.home(), "~")):
            value = value.replace(str(path), name)
    return value


def commit() -> dict[str, Any]:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    return {"commit": git("rev-parse", "--short", "HEAD"), "uncommitted_changes": bool(git("status", "--porcelain"))}


if __name__ == "__main__":
    sys.exit(main())
