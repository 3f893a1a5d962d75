"""A Hugging Face model in PyTorch: compiled by Inductor as it is, quantized by torchao first, or with a river."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, StaticCache

from river_compile.exporters.onnx.kv_cache import cache_argument


class PyTorch:
    """The prompt is read in eager mode: the peers are compared in decoding, and each length would be a graph."""

    def __init__(self, model: Any, forward: Callable[..., Any], capacity: int, depths: Callable[[], list[int]]) -> None:
        self._model, self._forward, self._depths = model, forward, depths
        self._cache = StaticCache(config=model.config, max_cache_len=capacity)
        self._kept = {cache_argument(model): self._cache}

    @torch.no_grad()
    def _read(self, ids: list[int], *, alone: bool) -> int:
        """The choice after some tokens."""
        forward = self._forward if alone else self._model
        logits = forward(torch.tensor([ids]), use_cache=True, **self._kept).logits
        return int(logits[0, -1].argmax())

    def decode(self, prompt: list[int], tokens: int) -> tuple[list[int], float]:
        self._cache.reset()
        made = [self._read(prompt, alone=False)]
        started = time.perf_counter()
        while len(made) < tokens:
            made.append(self._read(made[-1:], alone=True))
        return made, time.perf_counter() - started

    def choices(self, ids: list[int], prompt: int) -> list[int]:
        self._cache.reset()
        first = self._read(ids[:prompt], alone=False)
        return [first, *(self._read([token], alone=True) for token in ids[prompt:])]

    def note(self) -> str:
        depths = self._depths()
        return f"mean exit depth {statistics.mean(depths):.1f}" if depths else ""


def load(
    model: str, threads: int, capacity: int, dtype: str = "bfloat16", how: str = "inductor", **options: Any
) -> PyTorch:
    """``how``: "inductor", "int4" (torchao) or "river", which ``options`` are for."""
    torch.set_num_threads(threads)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval().requires_grad_(False)
    if how == "river":
        return _with_river(loaded, capacity, options)
    if how == "int4":
        _four_bits(loaded)
    return PyTorch(loaded, torch.compile(loaded), capacity, list)


def _with_river(model: Any, capacity: int, options: dict[str, Any]) -> PyTorch:
    from river_compile import RiverBackend, RiverConfig

    backend = RiverBackend(RiverConfig(strict=True, **options))
    return PyTorch(
        model, torch.compile(model, backend=backend), capacity, lambda: list(backend.decode_depths.elements())
    )


def _four_bits(model: Any) -> None:
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import quantize_

    quantize_(model, PrototypeInt4WeightOnlyConfig(group_size=32))
