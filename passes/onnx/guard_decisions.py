"""Where no similarity can lie above the threshold, none is computed."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from river_compile.passes.onnx.find_layers import Anatomy
from river_compile.passes.onnx.graph import OnnxGraph, toposorted
from river_compile.passes.onnx.insert_exits import TAU, THRESHOLDS
from river_compile.passes.onnx.twin import outer

__all__ = ["guard_decisions"]

_PREFIX = "river/decides/"
_FLOAT32 = np.dtype(np.float32)


def guard_decisions(graph: OnnxGraph, anatomy: Anatomy) -> int:
    """Put each exit decision into an ``If`` of its own, taken where a threshold is 1 or less; how many there are.

    A decision is some ten small operators a layer, 3% of a small model's pass. With exits off, as exact decoding
    verifies its drafts, all of them are for nothing.

    Requires: the decisions of `insert_exits`.
    Ensures: the same branches, but for similarities that rounding puts above 1, which no threshold above 1 lets exit.
    """
    condition = gs.Variable(f"{_PREFIX}LessOrEqual", bool)
    by_name = {node.name: node for node in graph.nodes}
    branches = [by_name.get(f"river/layer.{layer.index}") for layer in anatomy.layers]
    guarded = sum(_guard(branch.attrs["else_branch"], condition.name) for branch in branches if branch is not None)
    if guarded:
        nodes = _compare(graph, by_name.get(THRESHOLDS), condition)
        graph.surgeon.nodes = toposorted([*graph.nodes, *nodes])
    return guarded


def _compare(graph: OnnxGraph, thresholds: gs.Node | None, condition: gs.Variable) -> list[gs.Node]:
    """Whether the least threshold is 1 or less: of one for all layers, or of theirs."""
    nodes = []
    least: gs.Tensor = graph.weights[TAU]
    if thresholds is not None:
        least = gs.Variable(f"{_PREFIX}ReduceMin", _FLOAT32)
        nodes.append(gs.Node("ReduceMin", least.name, {"keepdims": 0}, inputs=[thresholds.inputs[0]], outputs=[least]))
    one = graph.add_weight(f"{_PREFIX}one", np.array(1.0, np.float32))
    return [*nodes, gs.Node("LessOrEqual", condition.name, inputs=[least, one], outputs=[condition])]


def _guard(stay: gs.Graph, condition: str) -> bool:
    """Guard the decision of a backbone branch, if it takes one."""
    prefix = f"{stay.name}/river/"
    decision = [node for node in stay.nodes if node.name.startswith(prefix)]
    if not decision or decision[-1].op != "Or":
        return False
    beyond, flag = decision[-1].inputs[1].name, decision[-1].outputs[0]
    made = {output.name for node in decision for output in node.outputs}
    for node in decision:
        node.inputs = [tensor if tensor.name in made else outer(tensor.name) for tensor in node.inputs]
    kept, decided = gs.Variable(f"{prefix}kept", bool, [1]), gs.Variable(f"{prefix}decided", bool, [1])
    keep = gs.Node("Identity", kept.name, inputs=[outer(beyond)], outputs=[kept])
    branches = {
        "then_branch": gs.Graph(nodes=decision, outputs=[flag], name=f"{prefix}decision"),
        "else_branch": gs.Graph(nodes=[keep], outputs=[kept], name=f"{prefix}no_decision"),
    }
    guard = gs.Node("If", decided.name, branches, inputs=[outer(condition)], outputs=[decided])
    stay.nodes = [*(node for node in stay.nodes if not node.name.startswith(prefix)), guard]
    stay.outputs = [decided if output is flag else output for output in stay.outputs]
    return True
