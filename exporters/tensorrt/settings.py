"""A river's settings (``river.tau``, ``river.max_depth``) as inputs of an engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

__all__ = ["make_inputs_ordinary"]

_AXES = "river/settings/axes"


def make_inputs_ordinary(proto: onnx.ModelProto) -> dict[str, Any]:
    """Take their defaults from inputs that have one, of which TensorRT would make constants, and give scalars the shape
    [1]: Triton knows no tensor without a size.

    Args:
        proto: it is changed by this call.

    Returns:
        The defaults, by name.
    """
    inputs = {value.name: value for value in proto.graph.input}
    defaults = {t.name: numpy_helper.to_array(t).tolist() for t in proto.graph.initializer if t.name in inputs}
    kept = [tensor for tensor in proto.graph.initializer if tensor.name not in inputs]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    scalars = {name: f"{name}/scalar" for name in defaults if not inputs[name].type.tensor_type.shape.dim}
    if scalars:
        _rename(proto.graph, scalars)
        for name in scalars:
            inputs[name].type.tensor_type.shape.dim.add(dim_value=1)
        nodes = [helper.make_node("Squeeze", [name, _AXES], [new], f"{name}/Squeeze") for name, new in scalars.items()]
        nodes += proto.graph.node
        del proto.graph.node[:]
        proto.graph.node.extend(nodes)
        proto.graph.initializer.append(numpy_helper.from_array(np.array([0], np.int64), _AXES))
    return defaults


def _rename(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    for node in graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = names.get(name, name)
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _rename(attribute.g, names)
