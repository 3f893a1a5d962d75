"""Joining KV caches in ONNX Runtime, on the device they lie on: sequences of two states side by side in one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from river_compile.runtime.cutting import ELEMENTS, IR_VERSION, OPSET, CacheForm

__all__ = ["Joiner"]

_BATCH = 0
_PARTS = ("first", "second")


class Joiner:
    """Joins caches that grow by concatenation.

    Args:
        forms: of each cache, by name.
        session: makes an inference session of a serialized model, on the caches' device.
    """

    def __init__(self, forms: Mapping[str, CacheForm], session: Callable[[bytes], Any]) -> None:
        self._names = list(forms)
        self._session = session(_model(forms).SerializeToString())

    def join(
        self,
        first: Mapping[str, Any],
        second: Mapping[str, Any],
        shapes: tuple[tuple[int, int], tuple[int, int]],
        value: Callable[[np.ndarray], Any],
    ) -> dict[str, Any]:
        """Caches of all sequences, those of the first before those of the second, the shorter filled on the left.

        Args:
            first, second: values of the runtime, by name.
            shapes: sequences and cached tokens of each.
            value: an array as a value of the runtime, on the host.
        """
        longest = max(length for _, length in shapes)
        feeds: dict[str, Any] = {}
        for part, caches, (rows, length) in zip(_PARTS, (first, second), shapes, strict=True):
            feeds |= {f"{name}.{part}": caches[name] for name in self._names}
            feeds[f"{part}.rows"] = value(np.zeros(rows, np.int64))
            feeds[f"{part}.fill"] = value(np.array([longest - length], np.int64))
        made = self._session.run_with_ort_values([f"{name}.joined" for name in self._names], feeds)
        return dict(zip(self._names, made, strict=True))


def _model(forms: Mapping[str, CacheForm]) -> onnx.ModelProto:
    """What fills up is masked, and any finite numbers do: those of the other cache, which is long enough."""
    nodes, inputs, outputs = [], [], []
    constants = {"zero": np.array([0], np.int64)}
    for part in _PARTS:
        inputs.append(helper.make_tensor_value_info(f"{part}.rows", TensorProto.INT64, [None]))
        inputs.append(helper.make_tensor_value_info(f"{part}.fill", TensorProto.INT64, [1]))
    for name, form in forms.items():
        dims: list[int | str | None] = [None] * form.rank
        constants[f"axis.{form.axis}"] = np.array([form.axis], np.int64)
        for part, other in zip(_PARTS, reversed(_PARTS), strict=True):
            inputs.append(helper.make_tensor_value_info(f"{name}.{part}", ELEMENTS[form.type], dims))
            slices = [f"{name}.{other}", "zero", f"{part}.fill", f"axis.{form.axis}"]
            nodes.append(helper.make_node("Slice", slices, [f"{name}.{part}.slots"]))
            rows = [f"{name}.{part}.slots", f"{part}.rows"]
            nodes.append(helper.make_node("Gather", rows, [f"{name}.{part}.filling"], axis=_BATCH))
            parts = [f"{name}.{part}.filling", f"{name}.{part}"]
            nodes.append(helper.make_node("Concat", parts, [f"{name}.{part}.filled"], axis=form.axis))
        filled = [f"{name}.{part}.filled" for part in _PARTS]
        nodes.append(helper.make_node("Concat", filled, [f"{name}.joined"], axis=_BATCH))
        outputs.append(helper.make_tensor_value_info(f"{name}.joined", ELEMENTS[form.type], dims))
    stored = [onnx.numpy_helper.from_array(number, name) for name, number in constants.items()]
    graph = helper.make_graph(nodes, "join", inputs, outputs, stored)
    opset = helper.make_opsetid("", OPSET)
    return helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION, producer_name="river-compile")
