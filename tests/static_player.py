"""Feeds a model whose KV cache is a buffer of fixed length, written in place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator

from tests.oracle import Player, present

_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(bfloat16)": ml_dtypes.bfloat16}

UNTOUCHED = 77.0
"""What buffers hold where nothing was written yet: reading it by mistake would show."""


@dataclass(frozen=True)
class _Value:
    name: str
    shape: list[int | str]
    type: str


class ReferenceSession:
    """The ONNX project's reference implementation in the place of a session: it has bfloat16, which ONNX Runtime's CPU
    kernels have not."""

    def __init__(self, path: Path) -> None:
        model = onnx.load(path)
        self._evaluator = ReferenceEvaluator(model)
        self._inputs, self._outputs = ([_value(v) for v in part] for part in (model.graph.input, model.graph.output))

    def get_inputs(self) -> list[_Value]:
        return self._inputs

    def get_outputs(self) -> list[_Value]:
        return self._outputs

    def run(self, names: None, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        return self._evaluator.run(names, feeds)


def _value(value: onnx.ValueInfoProto) -> _Value:
    kind = value.type.tensor_type
    names = {TensorProto.BFLOAT16: "bfloat16", TensorProto.FLOAT16: "float16", TensorProto.FLOAT: "float"}
    dims = [dim.dim_param or dim.dim_value for dim in kind.shape.dim]
    return _Value(value.name, dims, f"tensor({names.get(kind.elem_type, 'int64')})")


@dataclass
class StaticPlayer(Player):
    """For static caches; settings are ordinary inputs, so both are always fed."""

    session: ort.InferenceSession | ReferenceSession
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        self.mask = np.zeros((self.batch, 0), np.int64)
        self.caches = {}
        for value in self.session.get_inputs():
            if len(value.shape) == 4:
                dtype = _DTYPES[value.type]
                length = value.shape[2] if isinstance(value.shape[2], int) else 0
                shape = (self.batch, value.shape[1], length, value.shape[3])
                self.caches[value.name] = np.full(shape, UNTOUCHED, dtype)

    def step(
        self, ids: np.ndarray, mask: np.ndarray | None = None, using: Any = None, **river: Any
    ) -> dict[str, np.ndarray]:
        """All outputs of one pass, by name; of a static cache the filled part."""
        runner = using or self.session
        settings = {**self.settings, **river}
        wanted = {value.name for value in runner.get_inputs()}
        outputs = self.run(
            runner, ids, mask, {name: value for name, value in settings.items() if f"river.{name}" in wanted}
        )
        total = self.mask.shape[1]
        for past, buffer in self.caches.items():
            name = present(past)
            if buffer.shape[2] == outputs[name].shape[2] and buffer.shape[2]:
                assert (outputs[name][:, :, total:] == UNTOUCHED).all(), f"{name} was written beyond its end"
            self.caches[past] = outputs[name]
            outputs[name] = outputs[name][:, :, :total]
        return outputs
