"""Messages of /dashboard/events as a server under changing load sends them: a small simulation, always the same."""

from __future__ import annotations

import math
import random
from typing import Any

BLOCKS = 480
SEATS = 8
STEP_S = 0.04


def messages(number: int, start: float = 1_790_000_000.0, window_s: float = 0.5) -> list[dict[str, Any]]:
    """`number` messages, one each `window_s`. Requests arrive in waves; eight of them run at once."""
    rng = random.Random(7)
    requests: list[dict[str, Any]] = []
    totals = {"stop": 0, "length": 0, "abort": 0, "error": 0}
    out: list[dict[str, Any]] = []
    now = start
    for tick in range(number):
        now = start + (tick + 1) * window_s
        wave = 0.9 + 0.8 * math.sin(tick / 18)
        for _ in range(int(rng.random() < wave * 0.6) + int(rng.random() < wave * 0.3)):
            requests.append(_request(len(requests), now - rng.random() * window_s, rng))
        running = [r for r in requests if r["scheduled"] is not None and r["finished"] is None]
        for waiting in [r for r in requests if r["scheduled"] is None]:
            if len(running) < SEATS:
                waiting["scheduled"] = max(waiting["arrived"] + 0.01, now - window_s)
                running.append(waiting)
        steps, ended, prompt_tokens, output_tokens = [], [], 0, 0
        for k in range(int(window_s / STEP_S)):
            t = now - window_s + (k + 1) * STEP_S
            prefill = decode = 0
            for r in [r for r in running if r["finished"] is None and r["scheduled"] <= t]:
                if r["first_token"] is None:
                    prefill += min(96, r["left"])
                    r["left"] -= 96
                    if r["left"] <= 0:
                        r["first_token"], r["output_tokens"] = t, 1
                else:
                    decode += 1
                    r["output_tokens"] += 1
                    if r["output_tokens"] >= r["goal"]:
                        r["finished"] = t
                        r["reason"] = rng.choices(list(totals), [20, 4, 2, 1])[0]
                        totals[r["reason"]] += 1
                        ended.append(r)
            prompt_tokens, output_tokens = prompt_tokens + prefill, output_tokens + decode
            if prefill + decode:
                steps.append({"t": t, "s": STEP_S * 0.93, "prefill": prefill, "decode": decode})
        open_ones = [r for r in requests if r["finished"] is None]
        active = sum(r["scheduled"] is not None for r in open_ones)
        used = min(
            BLOCKS, sum(2 + (r["prompt_tokens"] + r["output_tokens"]) // 16 for r in open_ones if r["scheduled"])
        )
        shared = min(16, used)
        cached = min(BLOCKS - used, 40 + tick)
        cells = "3" * shared + "2" * (used - shared) + "1" * cached
        cells = (
            "".join(rng.sample(cells.ljust(BLOCKS, "0"), BLOCKS))
            if tick % 4 == 0 or not out
            else out[-1]["kv_map"][0]["cells"]
        )
        busy = len(steps) * STEP_S / window_s
        slow = 1 + 0.5 * math.sin(tick / 18) + 0.1 * rng.random()
        out.append(
            {
                "time": now,
                "model": "tiny/Wheel-135M",
                "version": "0.1.0",
                "uptime_s": now - start + 4000,
                "replicas": [{"name": "0", "ready": True}, {"name": "1", "ready": tick > 10}],
                "prompt_tokens_per_s": prompt_tokens / window_s,
                "output_tokens_per_s": output_tokens / window_s,
                "requests_per_s": len(ended) / window_s,
                "running": active,
                "waiting": len(open_ones) - active,
                "max_num_seqs": SEATS,
                "kv_use": used / BLOCKS,
                "prefix_hit_rate": 0.37,
                "preemptions": tick // 60,
                "mbu": 0.61 * busy,
                "mfu": 0.083 * busy,
                "peak_bandwidth": 41.3e9,
                "peak_flops": 1.21e12,
                "busy": busy,
                "joules_per_token": None,
                "latency": {
                    "ttft_ms": {"p50": 140 * slow, "p90": 420 * slow, "p99": 1300 * slow},
                    "tpot_ms": {"p50": 40.5, "p90": 43 * slow, "p99": 55 * slow},
                    "itl_ms": {"p50": 39.9, "p90": 44.0, "p99": 97 * slow},
                    "e2e_ms": {"p50": 2400 * slow, "p90": 5100 * slow, "p99": 8200 * slow} if tick > 5 else None,
                },
                "finished": dict(totals),
                "rejected": 3,
                "goodput": {"slo": {"ttft_ms": 500.0, "tpot_ms": 60.0, "e2e_ms": None}, "fraction": 0.94},
                "steps": steps,
                "requests": [_public(r) for r in open_ones + ended],
                "kv_map": [
                    {"replica": "0", "num_blocks": BLOCKS, "block_size": 16, "blocks_per_cell": 1, "cells": cells},
                    {
                        "replica": "1",
                        "num_blocks": BLOCKS,
                        "block_size": 16,
                        "blocks_per_cell": 1,
                        "cells": cells[::-1],
                    },
                ],
                "ops": [
                    {"op": "linear", "seconds": 0.0291, "fraction": 0.74, "roof": 0.81},
                    {"op": "attention", "seconds": 0.0057, "fraction": 0.145, "roof": 0.58},
                    {"op": "rms_norm", "seconds": 0.0016, "fraction": 0.041, "roof": 0.33},
                    {"op": "rope", "seconds": 0.0012, "fraction": 0.031, "roof": 0.22},
                    {"op": "sample", "seconds": 0.0009, "fraction": 0.024, "roof": None},
                ],
            }
        )
    return out


def _request(number: int, arrived: float, rng: random.Random) -> dict[str, Any]:
    prompt = rng.choice([40, 90, 300, 700])
    return {
        "id": f"chatcmpl-{number:04d}",
        "replica": str(number % 2),
        "arrived": arrived,
        "scheduled": None,
        "first_token": None,
        "finished": None,
        "reason": None,
        "prompt_tokens": prompt,
        "cached_tokens": prompt // 3,
        "output_tokens": 0,
        "left": prompt - prompt // 3,
        "goal": rng.randint(15, 130),
    }


def _public(request: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in request.items() if key not in ("left", "goal")}
