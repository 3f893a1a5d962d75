"""A river model without its backbone, to draft with, or without its river."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from onnxscript import optimizer

from river_compile.passes.onnx.cut_logits import CUT

__all__ = ["only_twin"]

_OWN = "river."
_BRANCH = "river/"
_CONDITION = "river/condition"


def only_twin(model: onnx.ModelProto, *, river: bool) -> onnx.ModelProto:
    """A river model with one of its twins alone: the river, as at exit depth 0, or the backbone.

    Each ``If`` of a layer, and of the LM head, is replaced by one of its branches. onnxscript's optimizer does that,
    once their conditions are a constant. In the backbone, what passes wrote otherwise before the river was grown stays
    so: fused residual adds and norms are apart (see `unfuse_skip_norms`), and quantized float16 products compute in
    float32 (see `widen_products`).

    Requires: a river model, its weights in it or outside.
    Ensures: the signature of the model that the river was made for, without what ``river.`` names; no weight is read or
    changed, and none is left that no node reads.
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
    # Branches that were not taken, or whose node is gone, still count as readers, until the graph is read anew: once
    # for those of layers, once for those of decisions.
    for _ in range(2):
        read = ir.from_proto(ir.to_proto(read))
        optimizer.remove_unused_nodes(read)
    read.metadata_props.clear()
    return ir.to_proto(read)
