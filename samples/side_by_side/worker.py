"""A peer in a process of its own: one JSON request a line comes in, one JSON answer a line goes out.

    python -m side_by_side.worker

The first request says what to load; see `Worker` for the others. It needs nothing but the peer's own packages.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_WORDS = 160


def resident_bytes() -> int | None:
    """Memory of this process that is in use now, weights mapped from a file included; None where that is not told."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def answer(engine: Any, request: dict[str, Any]) -> dict[str, Any]:
    """What an engine says to a request."""
    match request["do"]:
        case "decode":
            tokens, seconds = engine.decode(request["prompt"], request["tokens"])
            return {"tokens": [int(token) for token in tokens], "seconds": seconds}
        case "choose":
            return {"choices": [int(token) for token in engine.choices(request["ids"], request["prompt"])]}
        case "status":
            return {"resident": resident_bytes(), "note": engine.note()}
        case _:
            raise ValueError(f"no such request: {request['do']}")


def _in_few_words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:_WORDS]


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answer each request on standard input by a line on standard output, an error by its few words."""
    # Libraries print what they like: answers go where standard output was, and that goes where errors go.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            found = answer(json.loads(line))
        except Exception as error:
            import traceback

            traceback.print_exc()
            found = {"error": _in_few_words(error)}
        channel.write(json.dumps(found) + "\n")
        channel.flush()


def main() -> None:
    engine: Any = None

    def loaded_or_answered(request: dict[str, Any]) -> dict[str, Any]:
        nonlocal engine
        if request["do"] != "load":
            return answer(engine, request)
        module = importlib.import_module(request["engine"])
        engine = module.load(request["model"], request["threads"], request["capacity"], **request["settings"])
        return {}

    serve(loaded_or_answered)


if __name__ == "__main__":
    main()
