"""A decoder of river layers alone, to draft with."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from onnxscript import optimizer

from river_compile.passes.onnx.cut_logits import CUT

__all__ = ["only_river", "take_branches"]

_OWN = "river."
_BRANCH = "river/"
_CONDITION = "river/condition"


def only_river(model: onnx.ModelProto) -> onnx.ModelProto:
    """What a river model computes at exit depth 0, without its backbone.

    Each ``If`` of a layer, and of the LM head, is replaced by its river branch. onnxscript's optimizer does that, once
    their conditions are a constant.

    Requires: a river model, its weights in it or outside.
    Ensures: the signature of the model that the river was made for, without what ``river.`` names; no weight is read or
    changed, and none is left that no node reads.
    """
    return take_branches(model, river=True)


def take_branches(model: onnx.ModelProto, *, river: bool) -> onnx.ModelProto:
    """A river model with one branch of each ``If`` in its place: every river branch, or every backbone's.

    Requires, ensures: as `only_river`.
    """
    read = ir.from_proto(model)
    graph = read.graph
    for values in (graph.inputs, graph.outputs):
        for value in [value for value in values if str(value.name).startswith(_OWN)]:
            values.remove(value)
    chosen = ir.tensor(np.array([river]), name=_CONDITION)
    condition = ir.Value(name=_CONDITION, const_value=chosen, type=ir.TensorType(ir.DataType.BOOL))
    graph.register_initializer(condition)
    for node in graph:
        if node.op_type == "If" and str(node.name).startswith(_BRANCH):
            node.replace_input_with(0, condition)
        elif node.name == CUT and (whole := node.inputs[0]) is not None:
            ir.convenience.replace_all_uses_with(node.outputs[0], whole)
            graph.remove(node, safe=True)
    optimizer.fold_constants(read, input_size_limit=0)
    # Branches that were not taken still count as readers of what they read, until the graph is read anew.
    bare = ir.from_proto(ir.to_proto(read))
    optimizer.remove_unused_nodes(bare)
    bare.metadata_props.clear()
    return ir.to_proto(bare)
