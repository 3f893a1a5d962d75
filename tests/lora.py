"""LoRA pairs as graph inputs of an ONNX decoder, in the forms in which tools write them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

_STACK = 2


def with_lora(
    source: Path,
    target: Path,
    projections: Sequence[str],
    rank: int = 4,
    *,
    default: bool = True,
    stacked: bool = False,
    turned: bool = False,
    layers: Sequence[str] = ("layers.0", "layers.1", "layers.2"),
) -> dict[str, np.ndarray]:
    """Add to each product with a named projection's weight a low-rank term of weights that are inputs.

    Args:
        default: whether the inputs have defaults, of zeros.
        stacked: whether several adapters are stacked, [adapters, inputs, rank], one of which a further input selects.
        turned: whether the factors lie transposed, as PEFT keeps them, with a rank that the signature leaves open.

    Returns:
        Random weights for the inputs.
    """
    model = onnx.load(source)
    rng = np.random.default_rng(0)
    graph, feeds = model.graph, {}
    widths = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    kind = onnx.TensorProto.FLOAT
    if stacked:
        graph.input.append(helper.make_tensor_value_info("adapter", onnx.TensorProto.INT64, []))
        feeds["adapter"] = np.array(1)
    nodes = []
    for node in graph.node:
        nodes.append(node)
        place = f"{node.input[1] if len(node.input) > 1 else ''}|{node.name}"
        if node.op_type != "MatMul" or not any(p in place for p in projections) or not any(p in place for p in layers):
            continue
        inputs, outputs = widths[node.input[1]]
        result, node.output[0] = node.output[0], f"{node.output[0]}_base"
        name, factors = f"{node.output[0]}/lora", []
        for suffix, shape in (("A", [inputs, rank]), ("B", [rank, outputs])):
            factor = f"{name}_{suffix}"
            dims = shape[::-1] if turned else shape
            dims = [_STACK, *dims] if stacked else dims
            shown = ["rank" if turned and not default and size == rank else size for size in dims]
            graph.input.append(helper.make_tensor_value_info(factor, kind, shown))
            feeds[factor] = (rng.standard_normal(dims) * 0.3).astype(np.float32)
            if default:
                graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(dims, np.float32), factor))
            for wanted, op, operands, attributes in (
                (stacked, "Gather", ["adapter"], {"axis": 0}),
                (turned, "Transpose", [], {"perm": [1, 0]}),
            ):
                if wanted:
                    made = f"{factor}/{op}"
                    nodes.append(helper.make_node(op, [factor, *operands], [made], name=made, **attributes))
                    factor = made
            factors.append(factor)
        down, up = f"{name}/down", f"{name}/up"
        nodes.append(helper.make_node("MatMul", [node.input[0], factors[0]], [down], name=down))
        nodes.append(helper.make_node("MatMul", [down, factors[1]], [up], name=up))
        nodes.append(helper.make_node("Add", [node.output[0], up], [result], name=f"{name}/Add"))
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
    onnx.save(model, target)
    return feeds
