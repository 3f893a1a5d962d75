"""A GGUF file in llama.cpp, by llama-cpp-python."""

from __future__ import annotations

import itertools
import time

from llama_cpp import Llama

_GREEDY = {"temp": 0.0, "top_k": 1, "repeat_penalty": 1.0}


class LlamaCpp:
    def __init__(self, model: str, threads: int, capacity: int) -> None:
        counts = {"n_ctx": capacity, "n_threads": threads, "n_threads_batch": threads}
        self._model = Llama(model, verbose=False, **counts)

    def decode(self, prompt: list[int], tokens: int) -> tuple[list[int], float]:
        times, made = [], []
        self._model.reset()
        for token in itertools.islice(self._model.generate(prompt, **_GREEDY), tokens):
            times.append(time.perf_counter())
            made.append(token)
        return made, times[-1] - times[0]

    def choices(self, ids: list[int], prompt: int) -> list[int]:
        self._model.reset()
        chosen = []
        for part in [ids[:prompt], *([token] for token in ids[prompt:])]:
            self._model.eval(part)
            chosen.append(self._model.sample(**_GREEDY))
        return chosen

    def note(self) -> str:
        return ""


def load(model: str, threads: int, capacity: int) -> LlamaCpp:
    return LlamaCpp(model, threads, capacity)
