"""Write attention in products and a softmax."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from river_compile.passes.onnx.graph import OnnxGraph

__all__ = ["lower_attention"]

_UNSUPPORTED = ("is_causal", "softcap", "qk_matmul_output_mode", "q_num_heads", "kv_num_heads", "softmax_precision")
_PREFIX = "attention/"
_RANK = 4


def lower_attention(graph: OnnxGraph) -> int:
    """Replace ``Attention`` by the products and the softmax that it stands for; how many were replaced.

    TensorRT's builder (TensorRT-RTX 1.7.1) ends with a segmentation fault, or finds no kernel, where its attention
    layers stand between the conditionals of a rewritten model; products and softmax it takes. Query heads that share a
    key head stay so: they are a dimension that keys are broadcast along, not copied.

    Requires: query, key and value [batch, heads, sequence, width] of known heads and width. Attention in another form
    (a cache of its own, a flag for causality) is left as it is.
    Ensures: the same function; masked scores get half the least number of their type, so that a row in which all is
    masked has no NaN.
    """
    replaced = 0
    nodes: list[gs.Node] = []
    biases: dict[tuple[str, str], gs.Variable] = {}
    for node in graph.nodes:
        if node.op != "Attention" or not _is_plain(node):
            nodes.append(node)
            continue
        replaced += 1
        nodes += _parts(graph, node, biases)
    graph.surgeon.nodes = nodes
    return replaced


def _is_plain(node: gs.Node) -> bool:
    shapes = [tensor.shape for tensor in node.inputs[:3]]
    known = all(s is not None and len(s) == 4 and isinstance(s[1], int) and isinstance(s[3], int) for s in shapes)
    more = any(tensor.name for tensor in [*node.inputs[4:], *node.outputs[1:]])
    return known and not more and not any(node.attrs.get(name) for name in _UNSUPPORTED)


def _parts(graph: OnnxGraph, node: gs.Node, biases: dict[tuple[str, str], gs.Variable]) -> Sequence[gs.Node]:
    query, key, value = node.inputs[:3]
    mask = node.inputs[3] if len(node.inputs) > 3 and node.inputs[3].name else None
    result = node.outputs[0]
    dtype, (heads, width) = query.dtype, (query.shape[1], query.shape[3])
    shared, tokens = heads // key.shape[1], query.shape[2]
    scale = node.attrs.get("scale", 1 / math.sqrt(width))
    parts: list[gs.Node] = []

    def add(
        op: str, suffix: str, inputs: Sequence[gs.Tensor], output: gs.Variable | None = None, **attrs: object
    ) -> gs.Variable:
        output = output or gs.Variable(f"{node.name}/{suffix}", dtype)
        parts.append(gs.Node(op, f"{node.name}/{op}.{suffix}", attrs=attrs, inputs=[*inputs], outputs=[output]))
        return output

    node.inputs.clear()
    node.outputs.clear()
    factor = _constant(graph, f"scale.{scale}.{_type_name(dtype)}", scale, dtype)
    # The query alone: a factor on the keys would make a copy of the whole cache in every pass.
    query = add("Mul", "query", [query, factor])
    axes = [0, 1, 3, 2]
    if shared > 1:
        length = _length(parts, tokens, mask, biases)
        split = _sizes(graph, parts, [0, heads // shared, shared], length, width, biases)
        group = _shape(graph, [2])
        query = add("Reshape", "grouped", [query, split])
        key, value = add("Unsqueeze", "keys", [key, group]), add("Unsqueeze", "values", [value, group])
        axes = [0, 1, 2, 4, 3]
    scores = add("MatMul", "scores", [query, add("Transpose", "turned", [key], perm=axes)])
    if mask is not None:
        bias = biases.get((mask.name, _type_name(dtype))) or _bias(graph, parts, mask, dtype)
        biases[mask.name, _type_name(dtype)] = bias
        if shared > 1:
            bias = _grouped_bias(graph, parts, bias, mask, biases)
        scores = add("Add", "masked", [scores, bias])
    weights = add("Softmax", "weights", [scores], axis=-1)
    if shared == 1:
        add("MatMul", "product", [weights, value], result)
    else:
        mixed = add("MatMul", "product", [weights, value])
        add("Reshape", "joined", [mixed, _sizes(graph, parts, [0, heads], length, width, biases)], result)
    return parts


def _bias(graph: OnnxGraph, parts: list[gs.Node], mask: gs.Tensor, dtype: object) -> gs.Tensor:
    """What is added to the scores: the mask itself, or for a boolean one 0 where it is true."""
    if mask.dtype not in (bool, np.bool_):
        return mask
    least = float(np.finfo(np.float16).min if _type_name(dtype) == "float16" else np.finfo(np.float32).min) / 2
    zero, masked = (
        _constant(graph, f"{n}.{_type_name(dtype)}", v, dtype) for n, v in (("kept", 0.0), ("least", least))
    )
    bias = gs.Variable(f"{_PREFIX}{mask.name}/{_type_name(dtype)}", dtype, mask.shape)
    parts.append(gs.Node("Where", f"{bias.name}/Where", inputs=[mask, zero, masked], outputs=[bias]))
    return bias


def _grouped_bias(
    graph: OnnxGraph, parts: list[gs.Node], bias: gs.Tensor, mask: gs.Tensor, biases: dict[tuple[str, str], gs.Variable]
) -> gs.Tensor:
    """The bias [batch, 1 or heads, sequence, keys] with a dimension for the query heads that share a key head.

    One bias for all heads is what causal masks are; one a head would have to be split like the query.
    """
    rank = len(mask.shape) if mask.shape is not None else 4
    if rank < 4:
        return bias
    found = biases.get((bias.name, "grouped"))
    if found is None:
        found = gs.Variable(f"{bias.name}/grouped", bias.dtype)
        axes = _shape(graph, [2])
        parts.append(gs.Node("Unsqueeze", f"{bias.name}/Unsqueeze", inputs=[bias, axes], outputs=[found]))
        biases[bias.name, "grouped"] = found
    return found


def _length(
    parts: list[gs.Node],
    tokens: int | str | None,
    mask: gs.Tensor | None,
    made: dict[tuple[str, str], gs.Variable],
) -> gs.Variable | None:
    """How many tokens the query has, int64 [1], as the mask tells it for all layers; None if it does not."""
    if mask is None or tokens is None or len(mask.shape or ()) != _RANK or mask.shape[2] != tokens:
        return None
    if (mask.name, "length") not in made:
        length = made[mask.name, "length"] = gs.Variable(f"{_PREFIX}{mask.name}/length", np.int64)
        parts.append(gs.Node("Shape", f"{length.name}/Shape", {"start": 2, "end": 3}, [mask], [length]))
    return made[mask.name, "length"]


def _sizes(
    graph: OnnxGraph,
    parts: list[gs.Node],
    front: Sequence[int],
    length: gs.Variable | None,
    width: int,
    made: dict[tuple[str, str], gs.Variable],
) -> gs.Tensor:
    """The shape [*front, length, width]. A length that is not said costs TensorRT's builder a derivation a layer."""
    if length is None:
        return _shape(graph, [*front, -1, width])
    name = f"{length.name}.{'.'.join(map(str, (*front, width)))}"
    if (name, "shape") not in made:
        shape = made[name, "shape"] = gs.Variable(name, np.int64)
        operands = [_shape(graph, front), length, _shape(graph, [width])]
        parts.append(gs.Node("Concat", f"{name}/Concat", {"axis": 0}, operands, [shape]))
    return made[name, "shape"]


def _shape(graph: OnnxGraph, sizes: Sequence[int]) -> gs.Constant:
    return graph.integers(f"{_PREFIX}shape.{'.'.join(map(str, sizes))}", sizes)


def _constant(graph: OnnxGraph, name: str, value: float, dtype: Any) -> gs.Constant:
    name = f"{_PREFIX}{name}"
    kind = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(dtype) if isinstance(dtype, int) else dtype)
    return graph.weights.get(name) or graph.add_weight(name, np.array(value).astype(kind))


def _type_name(dtype: Any) -> str:
    return str(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(dtype) if isinstance(dtype, int) else dtype))
