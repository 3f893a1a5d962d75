"""Write what the passes add in the operators that the graph's opset has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from river_compile.passes.onnx.graph import OnnxGraph, bodies
from river_compile.passes.onnx.lower_flags import as_numbers

__all__ = ["fit_opset", "opset_problems"]

# ONNX Runtime has these in the standard domain whatever the opset, and its optimizer writes them so.
_OF_ONNX_RUNTIME = {"LayerNormalization", "SimplifiedLayerNormalization"}
_STANDARD = (None, "", "ai.onnx")


def fit_opset(graph: OnnxGraph) -> int:
    """Rewrite added nodes that the graph's opset does not have, in older operators; how many were rewritten.

    The one place that knows of opsets: passes write operators as the newest opset has them, and what an older one lacks
    is told by ONNX's own schemas. `opset_problems` tells what is left.

    Requires: passes note the type of each boolean tensor that they reduce.
    Ensures: the same function; nodes that the file itself had are untouched; the opset stays.
    """
    types = _types(graph)
    return sum(_fit(graph, nodes, types) for nodes in bodies(graph.nodes))


def opset_problems(graph: OnnxGraph) -> list[str]:
    """What the graph's opset does not have, subgraphs included, a text each that names operators and no nodes; without
    what the file had before the first pass."""
    types = _types(graph)
    found = [_problem(node, graph.surgeon.opset, types) for nodes in bodies(graph.nodes) for node in nodes]
    return sorted({problem for problem in found if problem} - graph.foreign)


def _types(graph: OnnxGraph) -> dict[str, str]:
    """The type of each tensor that has one noted, by name, as schemas write it: ``tensor(float)``."""
    tensors: list[gs.Tensor] = [*graph.surgeon.inputs, *graph.weights.values()]
    tensors += [output for nodes in bodies(graph.nodes) for node in nodes for output in node.outputs]
    return {tensor.name: _type(tensor.dtype) for tensor in tensors if tensor.name and tensor.dtype is not None}


@cache
def _type(dtype: Any) -> str:
    number = dtype if isinstance(dtype, int) else onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return f"tensor({onnx.TensorProto.DataType.Name(number).lower()})"


@dataclass(frozen=True)
class _Operator:
    """What a node may be by its schema: attributes, most operands and results, and their types; the last entry of
    ``inputs`` stands for all beyond if ``variadic`` says so."""

    attributes: frozenset[str]
    inputs: tuple[frozenset[str], ...]
    outputs: tuple[frozenset[str], ...]
    variadic: tuple[bool, bool]


@cache
def _operator(op: str, opset: int) -> _Operator | None:
    try:
        schema = onnx.defs.get_schema(op, opset, "")
    except onnx.defs.SchemaError:
        return None
    if schema.deprecated:
        return None
    many = onnx.defs.OpSchema.FormalParameterOption.Variadic
    return _Operator(
        frozenset(schema.attributes),
        tuple(frozenset(parameter.types) for parameter in schema.inputs),
        tuple(frozenset(parameter.types) for parameter in schema.outputs),
        (
            any(parameter.option == many for parameter in schema.inputs),
            any(parameter.option == many for parameter in schema.outputs),
        ),
    )


def _problem(node: gs.Node, opset: int, types: Mapping[str, str]) -> str:
    """Why the opset does not have a node as it is; empty if it has, or if the operator is none of ONNX's own."""
    if node.domain not in _STANDARD or not onnx.defs.has(node.op, ""):
        return ""
    operator = _operator(node.op, opset)
    if operator is None:
        return "" if node.op in _OF_ONNX_RUNTIME else f"opset {opset} has no {node.op}"
    unknown = sorted(set(node.attrs) - operator.attributes)
    if unknown:
        return f"{node.op} of opset {opset} has no attribute {unknown[0]}"
    sides = ((node.inputs, operator.inputs, "takes"), (node.outputs, operator.outputs, "gives"))
    for (tensors, allowed, verb), many in zip(sides, operator.variadic, strict=True):
        problem = _operand_problem(tensors, allowed, many, types)
        if problem:
            return f"{node.op} of opset {opset} {verb} no {problem}"
    return ""


def _operand_problem(
    tensors: Sequence[gs.Tensor], allowed: Sequence[frozenset[str]], many: bool, types: Mapping[str, str]
) -> str:
    for place, tensor in enumerate(tensors):
        if place >= len(allowed) and not many:
            return f"operand {place + 1}" if tensor.name else ""
        # An empty set is a type that nothing constrains.
        known = allowed[min(place, len(allowed) - 1)]
        if tensor.name in types and known and types[tensor.name] not in known:
            return types[tensor.name]
    return ""


def _fit(graph: OnnxGraph, nodes: list[gs.Node], types: dict[str, str]) -> int:
    rewritten = 0
    fitted: list[gs.Node] = []
    for node in nodes:
        problem = _problem(node, graph.surgeon.opset, types)
        parts = _older(graph, node) if problem and problem not in graph.foreign else None
        rewritten += parts is not None
        fitted += [node] if parts is None else parts
    nodes[:] = fitted
    return rewritten


def _older(graph: OnnxGraph, node: gs.Node) -> Sequence[gs.Node] | None:
    """The same in operators of an older opset; None if it is not known how."""
    if node.op == "Split" and len(node.inputs) == 1:
        # The number of outputs alone says how to split.
        node.attrs.pop("num_outputs", None)
        return [node]
    if node.op == "Shape":
        return _sliced_shape(graph, node)
    if node.op.startswith("Reduce") and len(node.inputs) > 1 and node.inputs[1].name in graph.weights:
        # The axes were an attribute.
        node.attrs["axes"] = graph.weights[node.inputs[1].name].values.reshape(-1).tolist()
        del node.inputs[1]
        return [node]
    if node.op in ("ReduceMin", "ReduceMax"):
        return as_numbers(node)
    return None


def _sliced_shape(graph: OnnxGraph, node: gs.Node) -> Sequence[gs.Node]:
    bounds = [node.attrs.pop("start", 0), node.attrs.pop("end", np.iinfo(np.int64).max)]
    result = node.outputs[0]
    whole = gs.Variable(f"{result.name}/whole", np.int64)
    node.outputs[0] = whole
    operands = [gs.Variable(graph.integers(f"river/bound.{bound}", [bound]).name) for bound in bounds]
    return [node, gs.Node("Slice", f"{node.name}/Slice", inputs=[whole, *operands], outputs=[result])]
