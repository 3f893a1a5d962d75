"""An engine that counts: for the protocol of `samples/side_by_side`."""

from __future__ import annotations

import sys
import time


class Counting:
    def __init__(self, step: int) -> None:
        self._step = step

    def decode(self, prompt: list[int], tokens: int) -> tuple[list[int], float]:
        print("libraries write what they like")
        if not prompt:
            raise ValueError("an empty\nprompt")
        if prompt == [13]:
            print("Fatal: out of luck", file=sys.stderr)
            sys.exit(3)
        if prompt == [14]:
            time.sleep(60)
        return [prompt[-1] + self._step * (place + 1) for place in range(tokens)], 0.5

    def choices(self, ids: list[int], prompt: int) -> list[int]:
        return [token + self._step for token in ids[prompt - 1 :]]

    def note(self) -> str:
        return f"in steps of {self._step}"


def load(model: str, threads: int, capacity: int, step: int = 1) -> Counting:
    assert (threads, capacity) == (1, 32)
    return Counting(step)
