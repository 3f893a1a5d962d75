"""A GGUF file in llama.cpp, by cyllama, which has it in its wheels."""

from __future__ import annotations

import time

from cyllama.llama import llama_cpp


class LlamaCpp:
    def __init__(self, model: str, threads: int, capacity: int) -> None:
        llama_cpp.disable_logging()
        settings = llama_cpp.LlamaContextParams()
        settings.n_ctx = settings.n_batch = capacity
        settings.n_threads = settings.n_threads_batch = threads
        self._model = llama_cpp.LlamaModel(model, llama_cpp.LlamaModelParams(), verbose=False)
        self._context = llama_cpp.LlamaContext(self._model, settings, verbose=False)
        self._greedy = llama_cpp.LlamaSampler(llama_cpp.LlamaSamplerChainParams())
        self._greedy.add_greedy()

    def _read(self, ids: list[int], place: int) -> int:
        """The choice after tokens at a place of the sequence and behind."""
        self._context.decode(llama_cpp.llama_batch_get_one(ids, place))
        return int(self._greedy.sample(self._context, -1))

    def decode(self, prompt: list[int], tokens: int) -> tuple[list[int], float]:
        self._context.kv_cache_clear()
        made = [self._read(prompt, 0)]
        started = time.perf_counter()
        while len(made) < tokens:
            made.append(self._read(made[-1:], len(prompt) + len(made) - 1))
        return made, time.perf_counter() - started

    def choices(self, ids: list[int], prompt: int) -> list[int]:
        self._context.kv_cache_clear()
        first = self._read(ids[:prompt], 0)
        return [first, *(self._read(ids[place : place + 1], place) for place in range(prompt, len(ids)))]

    def note(self) -> str:
        return ""


def load(model: str, threads: int, capacity: int) -> LlamaCpp:
    return LlamaCpp(model, threads, capacity)
