"""Requests that may be anything."""

from __future__ import annotations

import json
import random
from typing import Any

__all__ = ["mutated"]


def mutated(rng: random.Random) -> bytes:
    """A request that may be anything but a reason to fail."""
    values: list[Any] = [None, -1, 0, 1, 2**70, 1.5, True, "", "w5", "\ud800", [], {}, [5], [[5, 6]], ["w5"], {"a": []}]
    values += [{"type": "text"}, [{"role": "user", "content": "w5"}], float("nan"), "w5 " * 400]
    fields = ["prompt", "messages", "max_tokens", "tau", "exact", "temperature", "top_p", "seed", "stop", "logprobs"]
    fields += ["n", "stream", "stream_options", "model", "top_logprobs", "tools", "wrong", "logit_bias"]
    body: dict[str, Any] = {"prompt": "w5 w6", "max_tokens": 3}
    for _ in range(rng.randrange(4)):
        body[rng.choice(fields)] = rng.choice(values)
    text = bytearray(json.dumps(body).encode())
    for _ in range(rng.choice((0, 0, 0, 1, 3))):
        text[rng.randrange(len(text))] = rng.randrange(256)
    return bytes(text)
