"""A folder of optimum-intel, in OpenVINO GenAI; its logits, which GenAI does not tell, by OpenVINO itself."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai


class OpenVino:
    def __init__(self, model: str, threads: int) -> None:
        self._model, self._device = Path(model), {"INFERENCE_NUM_THREADS": threads}
        self._pipeline = openvino_genai.LLMPipeline(model, "CPU", **self._device)

    def decode(self, prompt: list[int], tokens: int) -> tuple[list[int], float]:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = tokens, True, False
        found = self._pipeline.generate(openvino.Tensor(np.array([prompt], np.int64)), config)
        # GenAI's own clock, milliseconds: a token that is handed out one by one waits for Python.
        measured = found.perf_metrics
        seconds = (measured.get_generate_duration().mean - measured.get_ttft().mean) / 1000
        return list(found.tokens[0]), seconds

    @cached_property
    def _request(self) -> Any:
        return (
            openvino.Core()
            .compile_model(self._model / "openvino_model.xml", "CPU", self._device)
            .create_infer_request()
        )

    def choices(self, ids: list[int], prompt: int) -> list[int]:
        self._request.reset_state()
        chosen = []
        for start, end in [(0, prompt), *((place, place + 1) for place in range(prompt, len(ids)))]:
            inputs = {
                "input_ids": np.array([ids[start:end]], np.int64),
                "attention_mask": np.ones((1, end), np.int64),
                "position_ids": np.arange(start, end, dtype=np.int64)[None],
                "beam_idx": np.zeros(1, np.int32),
            }
            logits = self._request.infer(inputs)["logits"]
            chosen.append(int(logits[0, -1].argmax()))
        return chosen

    def note(self) -> str:
        return ""


def load(model: str, threads: int, capacity: int) -> OpenVino:
    return OpenVino(model, threads)
