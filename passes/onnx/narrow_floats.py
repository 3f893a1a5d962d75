"""Bring a float32 decoder into a 16-bit float type."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from river_compile.errors import InputError
from river_compile.passes.onnx.graph import OnnxGraph, toposorted

__all__ = ["FLOATS", "narrow_floats"]

FLOATS: dict[str, int] = {
    "float32": onnx.TensorProto.FLOAT,
    "float16": onnx.TensorProto.FLOAT16,
    "bfloat16": onnx.TensorProto.BFLOAT16,
}

_NOT_FLOAT = {"Shape", "Size", "ArgMax", "ArgMin", "NonZero", "And", "Or", "Not", "IsNaN", "IsInf"}
_NOT_FLOAT |= {"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"}


def narrow_floats(graph: OnnxGraph, dtype: str) -> int:
    """Compute, and keep weights and KV cache, in ``dtype`` instead of float32; how many nodes were changed.

    What becomes narrow is the residual stream with all that hangs on it: every float that depends on a weight matrix or
    on the cache. What depends on token positions and masks alone (rotary angles, causal masks) stays in float32 up to
    where the stream reads it, since 16 bits do not tell long positions apart.

    Requires: nodes in topological order; no subgraphs.
    Ensures: float32 inputs of three or more dimensions (the cache) and all float32 outputs that depend on the stream
    have the new type. Weights are read and converted now; a value outside the type's range is cut to it.

    Raises:
        InputError: the model has subgraphs.
    """
    if any(True for node in graph.nodes for _ in node.subgraphs()):
        raise InputError("a model with branches or loops of its own cannot be brought into another float type")
    kind = FLOATS[dtype]
    _note_types(graph)
    stream = _stream(graph)
    casts: dict[str, gs.Node] = {}
    constants: dict[str, gs.Constant] = {}
    changed = 0
    for node in graph.nodes:
        if not any(output.name in stream for output in node.outputs):
            continue
        changed += 1
        if node.op == "Cast" and node.attrs.get("to") == onnx.TensorProto.FLOAT:
            node.attrs["to"] = kind
            continue
        for index, tensor in enumerate(node.inputs):
            if isinstance(tensor, gs.Constant):
                if tensor.dtype == np.float32:
                    node.inputs[index] = _narrow_constant(graph, tensor, kind, constants)
            elif tensor.name not in stream and tensor.dtype == np.float32:
                node.inputs[index] = _cast(tensor, kind, casts)
    graph.surgeon.nodes = toposorted([*graph.nodes, *casts.values()])
    _retype(graph, stream, kind)
    return changed


def _note_types(graph: OnnxGraph) -> None:
    """Note float32 as the type of each tensor that has it and for which the exporter noted none."""
    for node in graph.nodes:
        if node.op not in _NOT_FLOAT and node.op != "Cast" and any(t.dtype == np.float32 for t in node.inputs):
            for output in node.outputs:
                if output.dtype is None:
                    output.dtype = np.dtype(np.float32)


def _stream(graph: OnnxGraph) -> set[str]:
    """Names of the float32 tensors that depend on a weight matrix or on the cache."""
    stream = {
        value.name
        for value in graph.inputs
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT and len(value.type.tensor_type.shape.dim) >= 3
    }
    for node in graph.nodes:
        if node.op in _NOT_FLOAT or (node.op == "Cast" and node.attrs.get("to") != onnx.TensorProto.FLOAT):
            continue
        if any(tensor.name in stream or _is_matrix(tensor) for tensor in node.inputs):
            stream.update(output.name for output in node.outputs if output.name and output.dtype == np.float32)
    return stream


def _is_matrix(tensor: gs.Tensor) -> bool:
    """Whether it is a float32 weight with two dimensions or more; a vector, in whatever rank, is none."""
    return isinstance(tensor, gs.Constant) and tensor.dtype == np.float32 and sum(size > 1 for size in tensor.shape) > 1


def _narrow_constant(graph: OnnxGraph, wide: gs.Constant, kind: int, made: dict[str, gs.Constant]) -> gs.Constant:
    if wide.name not in made:
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind))
        limit = float(np.finfo(np.float16).max) if dtype == np.float16 else np.inf
        values = np.asarray(np.clip(graph.read(wide), -limit, limit)).astype(dtype)
        made[wide.name] = graph.add_weight(f"{wide.name}/{dtype}", values)
    return made[wide.name]


def _cast(wide: gs.Tensor, kind: int, casts: dict[str, gs.Node]) -> gs.Variable:
    if wide.name not in casts:
        narrow = gs.Variable(f"{wide.name}/narrow", kind, wide.shape)
        casts[wide.name] = gs.Node("Cast", f"{wide.name}/Cast", attrs={"to": kind}, inputs=[wide], outputs=[narrow])
    result: gs.Variable = casts[wide.name].outputs[0]
    return result


def _retype(graph: OnnxGraph, stream: set[str], kind: int) -> None:
    values: Sequence[onnx.ValueInfoProto] = [*graph.inputs, *graph.outputs]
    for value in values:
        if value.name in stream and value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            value.type.tensor_type.elem_type = kind
    dtype = np.dtype(np.float16) if kind == onnx.TensorProto.FLOAT16 else kind
    tensors = [*graph.surgeon.inputs, *(output for node in graph.nodes for output in node.outputs)]
    for tensor in tensors:
        if tensor.name in stream or tensor.name.endswith("/narrow"):
            tensor.dtype = dtype
