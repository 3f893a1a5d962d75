"""An ONNX model in ONNX Runtime, with a river or without, through this package's runtime."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np

from river_compile.config import NEVER
from river_compile.runtime import OnnxDecoder


class Onnx:
    def __init__(self, model: str, threads: int, exact: bool, exits: dict[str, Any]) -> None:
        self._decoder = OnnxDecoder(model, threads=threads)
        self._exact, self._exits = exact, exits
        self._depths: list[int] = []
        self._drafts = [0, 0]

    def decode(self, prompt: list[int], tokens: int) -> tuple[list[int], float]:
        times: list[float] = []
        found = self._decoder.generate(
            [prompt],
            tokens,
            exact=self._exact,
            on_step=lambda step: times.append(time.perf_counter()),
            **self._exits,
        )
        self._depths += found.exit_depths
        self._drafts = [self._drafts[0] + found.accepted, self._drafts[1] + found.drafted]
        return found.tokens[0], times[-1] - times[0]

    def choices(self, ids: list[int], prompt: int) -> list[int]:
        # In exact mode the river decides nothing: what counts is the original layers' choice.
        exits = {"tau": NEVER} if self._exact else self._exits
        state = self._decoder.start(1)
        chosen = []
        for part in [ids[:prompt], *([token] for token in ids[prompt:])]:
            logits, _ = self._decoder.forward(np.array([part]), state, **exits)
            chosen.append(int(logits[0, -1].argmax()))
        return chosen

    def note(self) -> str:
        if self._exact:
            return f"{self._drafts[0] / max(self._drafts[1], 1):.0%} of {self._drafts[1]} drafts accepted"
        return f"mean exit depth {statistics.mean(self._depths):.1f}" if self._depths else ""


def load(model: str, threads: int, capacity: int, exact: bool = False, **exits: Any) -> Onnx:
    """``exits``: ``tau`` and ``max_depth`` of a river."""
    return Onnx(model, threads, exact, exits)
