"""What the linear layers of an ONNX decoder are multiplied with, measured on texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from river_compile.errors import InputError
from river_compile.exporters.onnx import onnx_file
from river_compile.exporters.onnx.probe import Probe
from river_compile.passes.onnx.grow_river import RiverLinear

__all__ = ["Moments"]

_BUDGET = 1 << 30


class Moments(Mapping[str, np.ndarray]):
    """By the name of a linear layer's input tensor: the mean of x x^T over all tokens, float32 [inputs, inputs].

    They are measured when first asked for, those of as many neighbouring layers at once as 1 GB holds, and forgotten
    when others are: a decoder of any size passes through, a few layers at a time.

    Args:
        model: the plain ONNX file.
        linears: the river's linear layers, in order.
        ids: token ids of texts, int64 [tokens] each.
        progress: is told texts read and texts in all.

    Raises:
        InputError: there is no text.
    """

    def __init__(
        self,
        model: Path,
        linears: Sequence[RiverLinear],
        ids: Sequence[np.ndarray],
        progress: Callable[[int, int], None] = lambda done, total: None,
        budget: int = _BUDGET,
    ) -> None:
        if not ids:
            raise InputError("no tuning texts to run the model on")
        self._model, self._ids, self._progress, self._budget = model, ids, progress, budget
        self._widths = {linear.source.node.inputs[0].name: linear.source.inputs for linear in linears}
        self._held: dict[str, np.ndarray] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._widths)

    def __len__(self) -> int:
        return len(self._widths)

    def __getitem__(self, tensor: str) -> np.ndarray:
        if tensor not in self._held:
            self._held = {}
            self._held = self._measure(self._chunk(tensor))
        return self._held[tensor]

    def _chunk(self, first: str) -> list[str]:
        names = list(self._widths)
        chosen: list[str] = []
        size = 0
        for name in names[names.index(first) :]:
            size += 4 * self._widths[name] ** 2
            if chosen and size > self._budget:
                break
            chosen.append(name)
        return chosen

    def _measure(self, tensors: Sequence[str]) -> dict[str, np.ndarray]:
        probe = Probe(onnx_file.load(self._model), self._model.parent, tensors)
        sums = {name: np.zeros((self._widths[name],) * 2, np.float32) for name in tensors}
        tokens = 0
        for done, ids in enumerate(self._ids):
            self._progress(done, len(self._ids))
            for name, value in probe.read(ids).items():
                rows = value.reshape(-1, self._widths[name]).astype(np.float32)
                sums[name] += rows.T @ rows
            tokens += len(ids)
        self._progress(len(self._ids), len(self._ids))
        return {name: total / tokens for name, total in sums.items()}
