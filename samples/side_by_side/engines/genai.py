"""A folder of ONNX Runtime GenAI's builder."""

from __future__ import annotations

import json
import time

import numpy as np
import onnxruntime_genai


class GenAI:
    def __init__(self, model: str, threads: int, capacity: int) -> None:
        config = onnxruntime_genai.Config(model)
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self._model, self._capacity = onnxruntime_genai.Model(config), capacity

    def _generator(self, length: int) -> onnxruntime_genai.Generator:
        settings = onnxruntime_genai.GeneratorParams(self._model)
        # No text ends early.
        settings.set_search_options(max_length=length, min_length=length, do_sample=False)
        return onnxruntime_genai.Generator(self._model, settings)

    def decode(self, prompt: list[int], tokens: int) -> tuple[list[int], float]:
        generator = self._generator(len(prompt) + tokens)
        generator.append_tokens(np.array([prompt], np.int32))
        generator.generate_next_token()
        started = time.perf_counter()
        for _ in range(tokens - 1):
            generator.generate_next_token()
        seconds = time.perf_counter() - started
        return list(generator.get_sequence(0))[len(prompt) :], seconds

    def choices(self, ids: list[int], prompt: int) -> list[int]:
        generator = self._generator(self._capacity)
        chosen = []
        for part in [ids[:prompt], *([token] for token in ids[prompt:])]:
            generator.append_tokens(np.array([part], np.int32))
            chosen.append(int(np.asarray(generator.get_logits())[0, -1].argmax()))
        return chosen

    def note(self) -> str:
        return ""


def load(model: str, threads: int, capacity: int) -> GenAI:
    return GenAI(model, threads, capacity)
