"""Cutting KV caches back in ONNX Runtime, on the device they lie on: a small graph of slices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

__all__ = ["ELEMENTS", "IR_VERSION", "OPSET", "CacheForm", "Cutter"]

OPSET, IR_VERSION = 13, 8
ELEMENTS = {
    "tensor(float)": TensorProto.FLOAT,
    "tensor(float16)": TensorProto.FLOAT16,
    "tensor(bfloat16)": TensorProto.BFLOAT16,
}


@dataclass(frozen=True)
class CacheForm:
    """A growing cache: its type as ONNX Runtime names it, how many axes it has, and which one grows; 0 is the batch."""

    type: str
    rank: int
    axis: int


class Cutter:
    """Cuts caches that grow by concatenation.

    Args:
        forms: of each cache, by name.
        session: makes an inference session of a serialized model, on the caches' device.
    """

    def __init__(self, forms: Mapping[str, CacheForm], session: Callable[[bytes], Any]) -> None:
        self._forms, self._make = dict(forms), session
        self._sessions: dict[int, Any] = {}

    def cut(
        self, caches: Mapping[str, Any], spans: Sequence[tuple[int, int, int, int]], value: Callable[[np.ndarray], Any]
    ) -> dict[str, Any]:
        """Caches of the sequences that stay.

        Args:
            caches: values of the runtime, by name.
            spans: of each sequence that stays: its row, how many slots of padding it gets on the left, and the first
                and the last slot (exclusive) that it keeps.
            value: an array as a value of the runtime, on the host.
        """
        count = len(spans)
        if count not in self._sessions:
            self._sessions[count] = self._make(_model(self._forms, count).SerializeToString())
        session = self._sessions[count]
        numbers = {name: value(numbers) for name, numbers in _numbers(spans).items()}
        names = list(self._forms)
        return dict(
            zip(
                names,
                session.run_with_ort_values([f"{name}.cut" for name in names], {**caches, **numbers}),
                strict=True,
            )
        )


def _numbers(spans: Sequence[tuple[int, int, int, int]]) -> dict[str, np.ndarray]:
    found = {}
    for place, (row, filling, first, last) in enumerate(spans):
        # What fills up on the left is masked: any finite numbers do, such as the row's own first ones.
        bounds_of = {"fill": (row, 0, row + 1, filling), "keep": (row, first, row + 1, last)}
        for name, bounds in bounds_of.items() if len(spans) > 1 else [("keep", bounds_of["keep"])]:
            found[f"{name}.{place}.starts"] = np.array(bounds[:2], np.int64)
            found[f"{name}.{place}.ends"] = np.array(bounds[2:], np.int64)
    return found


def _model(forms: Mapping[str, CacheForm], count: int) -> onnx.ModelProto:
    nodes, inputs, outputs, axes = [], [], [], {}
    for place in range(count):
        for name in ("fill", "keep") if count > 1 else ("keep",):
            for end in ("starts", "ends"):
                inputs.append(helper.make_tensor_value_info(f"{name}.{place}.{end}", TensorProto.INT64, [2]))
    for name, form in forms.items():
        dims: list[int | str | None] = [None] * form.rank
        inputs.append(helper.make_tensor_value_info(name, ELEMENTS[form.type], dims))
        outputs.append(helper.make_tensor_value_info(f"{name}.cut", ELEMENTS[form.type], dims))
        axes[f"axes.{form.axis}"] = np.array([0, form.axis], np.int64)
        if count == 1:
            # A single sequence never gets padding: one copy instead of three.
            operands = [name, "keep.0.starts", "keep.0.ends", f"axes.{form.axis}"]
            nodes.append(helper.make_node("Slice", operands, [f"{name}.cut"]))
            continue
        rows = []
        for place in range(count):
            parts = [f"{name}.{place}.{part}" for part in ("fill", "keep")]
            for part in ("fill", "keep"):
                operands = [name, f"{part}.{place}.starts", f"{part}.{place}.ends", f"axes.{form.axis}"]
                nodes.append(helper.make_node("Slice", operands, [f"{name}.{place}.{part}"]))
            rows.append(f"{name}.{place}")
            nodes.append(helper.make_node("Concat", parts, [rows[-1]], axis=form.axis))
        nodes.append(helper.make_node("Concat", rows, [f"{name}.cut"], axis=0))
    constants = [onnx.numpy_helper.from_array(axis, name) for name, axis in axes.items()]
    graph = helper.make_graph(nodes, "cut", inputs, outputs, constants)
    opset = helper.make_opsetid("", OPSET)
    return helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION, producer_name="river-compile")
