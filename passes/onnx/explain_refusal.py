"""Why a model cannot be given a river, in words that say which file to take instead."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx
import onnx_graphsurgeon as gs

from river_compile.passes.anatomy import CacheSlot, Layer
from river_compile.passes.onnx.graph import OnnxGraph, Uses, reads
from river_compile.passes.onnx.linear import QUANTIZED_OPS, constant_root, quantized_by
from river_compile.passes.onnx.residual_stream import ancestors

__all__ = ["caches_elsewhere", "explain_no_layers", "explain_no_linears"]

_GENERATION = {"BeamSearch", "GreedySearch", "Sampling", "WhisperBeamSearch", "Loop", "Scan"}
_ATTENTION = {"Softmax", "Attention", "GroupQueryAttention", "MultiHeadAttention", "QAttention", "SparseAttention"}
_PRODUCTS = {*QUANTIZED_OPS, "Attention", "Einsum", "FusedMatMul", "Gemm", "MatMul"}
_INDEX_OPS = {"Cast", "Clip", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Where"}
_FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
_PLAIN = "decoder_with_past_model.onnx or model.onnx"
_NO_CACHE = "the model has no KV cache in its signature"
_CACHE_RANK = 4


def explain_no_layers(graph: OnnxGraph, caches: Sequence[CacheSlot]) -> str:
    """One line: why no decoder layers were found in a graph, and what to do about it.

    Args:
        caches: the cache slots that were found along its residual stream.
    """
    for rule in (_within_one_node, _stacked):
        if why := rule(graph):
            return why
    if not caches:
        return _no_cache(graph)
    if len(caches) > 1 and _attentions(graph.nodes) > 1:
        return (
            "the model has no chain of repeated decoder layers along one residual stream; of a model of several "
            "decoders, give the one to speed up as a file of its own"
        )
    return "the model has no chain of repeated decoder layers along a residual stream: it takes two layers at least"


def explain_no_linears(graph: OnnxGraph, uses: Uses, nodes: Sequence[gs.Node]) -> str:
    """Why a decoder layer of these nodes holds no linear layer that could be quantized."""
    if found := quantized_by(uses, nodes):
        return f"already quantized ({', '.join(sorted(found))}), so start from the float model"
    fed = {value.name for value in graph.inputs} - set(graph.overridable)
    for node in nodes:
        if node.op in ("MatMul", "Gemm") and (root := constant_root(uses, node.inputs[1])[0]).name in fed:
            return f"its weights are inputs without a value, such as {root.name!r}: store them in the model"
    return "it has no linear layer with a constant float weight"


def caches_elsewhere(graph: OnnxGraph, uses: Uses, layers: Sequence[Layer]) -> list[str]:
    """Outputs that hold caches as well, computed with weights, and not by the decoder layers: another decoder's."""
    written = {name for layer in layers for name in layer.outputs}
    found = []
    for value in graph.outputs:
        if _is_float(value) and _is_cache(value) and value.name not in written:
            above = ancestors(value.name, uses)
            if any(id(node) in above and node.op in _PRODUCTS for node in graph.nodes):
                found.append(value.name)
    return found


def _within_one_node(graph: OnnxGraph) -> str:
    """A generation loop, or an If on whether there is a past: most of the model lies within one node."""
    total = _count(graph.nodes)
    for node in graph.nodes:
        within = _count(inner for subgraph in node.subgraphs() for inner in subgraph.nodes)
        if 2 * within <= total:
            continue
        if node.op in _GENERATION:
            return (
                f"the decoder lies within a {node.op} node, a whole generation loop: take the decoder that was put in "
                f"there ({_PLAIN})"
            )
        if node.op == "If":
            return (
                f"a merged decoder: the model with a past and the one without are branches of one If on "
                f"{node.inputs[0].name!r}; take {_PLAIN} of an export that was not merged"
            )
    return ""


def _stacked(graph: OnnxGraph) -> str:
    """Fewer cache tensors than decoder layers."""
    pasts = [value for value in _given(graph) if _is_float(value) and _is_cache(value)]
    presents = [value for value in graph.outputs if _is_float(value) and _is_cache(value)]
    few = 0 < len(pasts) <= 2 and 0 < len(presents) <= 2
    if not few or _attentions(graph.nodes) <= len(pasts):
        return ""
    return (
        f"one cache tensor for all layers ({pasts[0].name!r} to {presents[0].name!r}): export the model with tensors "
        "of its own for each layer (past_key_values.0.key, ...)"
    )


def _no_cache(graph: OnnxGraph) -> str:
    given = _given(graph)
    caches = [value.name for value in graph.outputs if _is_float(value) and _is_cache(value)]
    if len(caches) > 1 and not any(_is_cache(value) for value in given):
        return (
            f"the model writes a KV cache ({caches[0]!r}, ...) and takes none, the prompt's half of a decoder: take "
            f"{_PLAIN} with past key values as inputs"
        )
    if not any(node.op in _PRODUCTS for node in graph.nodes):
        return f"{_NO_CACHE} and no linear layer: a piece of a model, such as its embeddings; give the decoder"
    floats = [value.name for value in given if _is_float(value)]
    if floats and not _embeds(graph):
        return (
            f"{_NO_CACHE}: no output continues one of its inputs. It takes {floats[0]!r} and no tokens, as an encoder "
            "of images or sound does; give the decoder of the same model"
        )
    return (
        f"{_NO_CACHE}: no output continues one of its inputs. It is an encoder, or a decoder to be exported again with "
        "past key values as inputs and outputs (optimum: --task text-generation-with-past)"
    )


def _embeds(graph: OnnxGraph) -> bool:
    """Whether an integer input chooses rows of a table."""
    chosen = {value.name for value in _given(graph) if not _is_float(value)}
    for node in graph.nodes:
        if node.op == "Gather" and isinstance(node.inputs[0], gs.Constant) and len(node.inputs[0].shape) == 2:
            if node.inputs[1].name in chosen:
                return True
        elif node.op in _INDEX_OPS and not chosen.isdisjoint(reads(node)):
            chosen.update(output.name for output in node.outputs)
    return False


def _given(graph: OnnxGraph) -> list[onnx.ValueInfoProto]:
    """The inputs without a default."""
    return [value for value in graph.inputs if value.name not in graph.overridable]


def _attentions(nodes: Sequence[gs.Node]) -> int:
    return sum(node.op in _ATTENTION for node in nodes)


def _count(nodes: Iterable[gs.Node]) -> int:
    return sum(1 + _count(inner for subgraph in node.subgraphs() for inner in subgraph.nodes) for node in nodes)


def _is_float(value: onnx.ValueInfoProto) -> bool:
    return value.type.tensor_type.elem_type in _FLOATS


def _is_cache(value: onnx.ValueInfoProto) -> bool:
    """Whether a tensor of the signature has the rank of a cache."""
    return len(value.type.tensor_type.shape.dim) >= _CACHE_RANK
