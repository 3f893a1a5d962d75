"""Pass 5, of a runtime that is asked pass by pass: logits that nobody reads are not computed."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from river_compile.passes.onnx.find_layers import Anatomy
from river_compile.passes.onnx.flatten_tokens import ROWS_SUFFIX
from river_compile.passes.onnx.graph import OnnxGraph, reads, toposorted
from river_compile.passes.onnx.row_wise import ROWS, RowWise

__all__ = ["CUT", "LOGITS_FROM", "cut_logits"]

LOGITS_FROM = "river.logits_from"
_PRODUCTS = {"MatMul", "Gemm"}
_PREFIX = "river/logits_from/"
CUT = f"{_PREFIX}Slice"


def cut_logits(graph: OnnxGraph, anatomy: Anatomy) -> bool:
    """Make final norm and LM head compute logits from a token on that is settable per run.

    ``river.logits_from``, an overridable initializer, int64 [1], counts the tokens of a pass as Python does: 0, the
    default, gives logits for each; -1 for the last alone, all that a prompt needs.

    Requires: every node after the layers as `find_layers` saw it; so before `share_head`.
    Ensures: where it is left at its default the function is the same. Where what follows the layers does not compute
    row by row or makes anything but the logits, where the head reads the last layer itself (its twin would too), or
    where the signature tells the number of tokens, nothing is changed and False returned.
    """
    hidden = anatomy.layers[-1].hidden_out
    suffix, made = [], {hidden}
    for node in graph.nodes:
        if made.intersection(reads(node)):
            suffix.append(node)
            made.update(output.name for output in node.outputs)
    results = [value for value in graph.outputs if value.name in made]
    if len(results) != 1 or hidden == results[0].name or not _is_open(results[0]):
        return False
    if any(node.op in _PRODUCTS and hidden in reads(node) for node in suffix):
        return False
    tensors = dict(graph.weights) | {t.name: t for node in graph.nodes for t in [*node.inputs, *node.outputs]}
    shapes = {name: tensor.shape for name, tensor in tensors.items() if tensor.shape is not None}
    if RowWise({hidden: ROWS}, tensors, shapes, "", graph.folder).follow(suffix) is not None:
        return False
    start = graph.add_weight(LOGITS_FROM, np.zeros(1, np.int64))
    graph.overridable.append(LOGITS_FROM)
    end, axis = graph.integers(f"{_PREFIX}end", [np.iinfo(np.int64).max]), graph.integers(f"{_PREFIX}axis", [1])
    rows = gs.Variable(hidden + ROWS_SUFFIX, tensors[hidden].dtype)
    cut = gs.Node("Slice", CUT, inputs=[tensors[hidden], start, end, axis], outputs=[rows])
    for node in suffix:
        node.inputs = [rows if tensor.name == hidden else tensor for tensor in node.inputs]
    graph.surgeon.nodes = toposorted([*graph.nodes, cut])
    return True


def _is_open(logits: onnx.ValueInfoProto) -> bool:
    """Whether the signature leaves the number of tokens open: [batch, sequence, vocabulary]."""
    dims = logits.type.tensor_type.shape.dim
    return len(dims) == 3 and not dims[1].dim_value
