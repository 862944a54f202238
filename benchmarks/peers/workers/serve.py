"""The worker's side of the protocol: a JSON object per line on stdin, one per line back. Standard library only.

A worker is `serve(Engine)`, where an Engine has

    Engine(model, precision, threads, max_len, max_seqs)   loads; `settings` and `version` describe it
    generate(tokens, count)  -> (seconds to the first token, seconds of the `count` after it, all token ids)
    batch(prompts, count)    -> (seconds until all prompts have `count` tokens, number of tokens made)
    convert(source, destination, precision)                static; where the peer needs a format of its own
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any


def serve(engine_type: Any) -> None:
    # Whatever a library prints goes to stderr, so that it never lands between two replies.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    engine: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        op = request.pop("op")
        reply: dict[str, Any]
        try:
            if op == "load":
                engine = engine_type(**request)
                reply = {"version": engine.version, "settings": engine.settings}
            elif op == "convert":
                reply = {"note": engine_type.convert(**request) or ""}
            elif op == "generate":
                first, rest, tokens = engine.generate(**request)
                reply = {"first": first, "rest": rest, "tokens": [int(t) for t in tokens]}
            elif op == "batch":
                seconds, made = engine.batch(**request)
                reply = {"seconds": seconds, "tokens": made}
            elif op == "quit":
                reply = {}
            else:
                reply = dict(getattr(engine_type, op)(**request))
        except Exception as error:
            traceback.print_exc()
            text = str(error).strip()
            reply = {"error": f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"}
        replies.write(json.dumps(reply) + "\n")
        if op == "quit":
            # Some libraries hang or crash while the interpreter takes them down; all work is done.
            replies.flush()
            os._exit(0)
