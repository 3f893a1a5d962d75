"""Write reductions of flags in numbers, for runtimes whose reductions take numbers only (TensorRT)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from river_compile.passes.onnx.find_layers import Anatomy
from river_compile.passes.onnx.graph import OnnxGraph, bodies

__all__ = ["as_numbers", "lower_flags"]

_REDUCTIONS = {"ReduceMin", "ReduceMax"}


def lower_flags(graph: OnnxGraph, anatomy: Anatomy) -> int:
    """Replace ``ReduceMin`` and ``ReduceMax`` of booleans by that of int32 between two casts; how many were replaced.

    Requires: every boolean tensor that is reduced has its type noted (those of `insert_exits` do).
    Ensures: the same function; new names start with the name of the node replaced.
    """
    return sum(_lower(nodes) for nodes in bodies(graph.nodes))


def _lower(nodes: list[gs.Node]) -> int:
    lowered = [part for node in nodes for part in (as_numbers(node) if _reduces_flags(node) else [node])]
    replaced = (len(lowered) - len(nodes)) // 2
    nodes[:] = lowered
    return replaced


def _reduces_flags(node: gs.Node) -> bool:
    return node.op in _REDUCTIONS and node.inputs[0].dtype in (bool, np.bool_)


def as_numbers(node: gs.Node) -> Sequence[gs.Node]:
    """A reduction of booleans as one of int32 between two casts; the node itself is the one in the middle."""
    flags, result = node.inputs[0], node.outputs[0]
    numbers = gs.Variable(f"{node.name}/numbers", np.int32)
    reduced = gs.Variable(f"{node.name}/reduced", np.int32)
    node.inputs[0], node.outputs[0] = numbers, reduced
    before = gs.Node(
        "Cast", f"{node.name}/number", attrs={"to": onnx.TensorProto.INT32}, inputs=[flags], outputs=[numbers]
    )
    after = gs.Node(
        "Cast", f"{node.name}/flag", attrs={"to": onnx.TensorProto.BOOL}, inputs=[reduced], outputs=[result]
    )
    return [before, node, after]
