"""For ONNX Runtime: products that are quantized already, with int8 activations, in a form that is right in a branch."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from river_compile.passes.onnx.graph import OnnxGraph

__all__ = ["widen_products"]

_INT8_ACCURACY = 4
_SCALES = 2
_FLOAT16 = np.dtype(np.float16)


def widen_products(graph: OnnxGraph) -> int:
    """Let float16 ``MatMulNBits`` with int8 activations compute between casts, with float32 scales.

    A layer of which a part is quantized becomes a branch with that part as it is, and there ONNX Runtime's CPU makes
    zeros of such products (see `river_compile.exporters.onnx.onnxruntime.MatMulNBits`).

    Ensures: every tensor but those within the products is what it was. Returns the number of products changed.
    """
    nodes: list[gs.Node] = []
    changed = 0
    for node in graph.nodes:
        if node.op != "MatMulNBits" or node.attrs.get("accuracy_level") != _INT8_ACCURACY or not _is_half(node):
            nodes.append(node)
            continue
        changed += 1
        before = []
        for place, tensor in enumerate(node.inputs):
            if isinstance(tensor, gs.Constant):
                if tensor.dtype == _FLOAT16:
                    node.inputs[place] = _widened(graph, tensor)
            elif tensor.name:
                wide = gs.Variable(f"{node.name}/wide.{place}", np.float32, tensor.shape)
                before.append(_cast(graph, node, f"{wide.name}/Cast", tensor, wide))
                node.inputs[place] = wide
        result = node.outputs[0]
        wide = gs.Variable(f"{node.name}/wide", np.float32, result.shape)
        node.outputs[0] = wide
        nodes += [*before, node, _cast(graph, node, f"{wide.name}/Cast", wide, result)]
    graph.surgeon.nodes = nodes
    return changed


def _is_half(node: gs.Node) -> bool:
    scales = node.inputs[_SCALES]
    return isinstance(scales, gs.Constant) and scales.dtype == _FLOAT16


def _widened(graph: OnnxGraph, constant: gs.Constant) -> gs.Constant:
    name = f"{constant.name}/wide"
    return graph.weights.get(name) or graph.add_weight(name, graph.read(constant).astype(np.float32))


def _cast(graph: OnnxGraph, beside: gs.Node, name: str, source: gs.Tensor, result: gs.Variable) -> gs.Node:
    """A cast that counts as part of the same module."""
    wide = result.name.startswith(f"{beside.name}/wide")
    to = onnx.TensorProto.FLOAT if wide else onnx.TensorProto.FLOAT16
    node = gs.Node("Cast", name, attrs={"to": to}, inputs=[source], outputs=[result])
    if id(beside) in graph.scopes:
        graph.scopes[id(node)] = graph.scopes[id(beside)]
    if id(beside) in graph.file_names:
        graph.file_names[id(node)] = graph.file_names[id(beside)]
    return node
