"""Multiply an activation once with weights that stand side by side."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from river_compile.config import RiverConfig
from river_compile.passes.onnx.graph import OnnxGraph, Uses, toposorted
from river_compile.passes.onnx.linear import Linear, find_linears

__all__ = ["join_linears"]


def join_linears(graph: OnnxGraph, config: RiverConfig) -> int:
    """Make one ``MatMul`` and a ``Split`` of the MatMuls that multiply one activation with constant weights of one type
    (query, key and value; gate and up); how many were joined.

    A branch is compiled by itself, and what that costs grows with the products in it. Linear layers that get different
    bits in the river stay apart.

    Requires: nodes in topological order.
    Ensures: the same function, column for column. The joined node has the name and the scope of its first.
    """
    uses = Uses(graph.nodes)
    groups: dict[tuple[object, ...], list[Linear]] = {}
    for linear in find_linears(graph, uses, graph.nodes, ""):
        if linear.node.op == "MatMul" and linear.node.inputs[1].name in graph.weights:
            bits = config.bits_of(linear.name, linear.weight.name)
            groups.setdefault((linear.node.inputs[0].name, str(linear.weight.dtype), bits), []).append(linear)
    joined = 0
    for linears in groups.values():
        if len(linears) > 1:
            joined += len(linears)
            _join(graph, linears)
    graph.surgeon.nodes = toposorted(graph.nodes)
    return joined


def _join(graph: OnnxGraph, linears: list[Linear]) -> None:
    first = linears[0].node
    activation, results = first.inputs[0], [linear.node.outputs[0] for linear in linears]
    weight = graph.add_weight(
        "+".join(linear.weight.name for linear in linears),
        np.concatenate([graph.read(linear.weight) for linear in linears], axis=1),
    )
    widths = [linear.outputs for linear in linears]
    name = "joined/widths." + "+".join(map(str, widths))
    sizes = graph.integers(name, widths)
    shape = None if results[0].shape is None else [*results[0].shape[:-1], sum(widths)]
    together = gs.Variable(f"{first.name}/together", results[0].dtype, shape)
    product = gs.Node("MatMul", first.name, inputs=[activation, weight], outputs=[together])
    for linear in linears:
        linear.node.inputs.clear()
        linear.node.outputs.clear()
    split = gs.Node("Split", f"{first.name}/split", attrs={"axis": -1}, inputs=[together, sizes], outputs=results)
    gone = {id(linear.node) for linear in linears}
    if id(first) in graph.scopes:
        graph.scopes[id(product)] = graph.scopes[id(split)] = graph.scopes[id(first)]
    graph.surgeon.nodes = [node for node in graph.nodes if id(node) not in gone] + [product, split]
