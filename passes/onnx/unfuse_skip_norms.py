"""Take fused residual adds and norms apart, so that the hidden state between layers is a tensor of its own."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from river_compile.passes.onnx.graph import OnnxGraph

__all__ = ["unfuse_skip_norms"]

_NORMS = {
    "SkipSimplifiedLayerNormalization": "SimplifiedLayerNormalization",
    "SkipLayerNormalization": "LayerNormalization",
}
_SUM = 3


def unfuse_skip_norms(graph: OnnxGraph) -> int:
    """Replace contrib ``Skip(Simplified)LayerNormalization`` by ``Add`` and the norm; how many were replaced.

    Such a node belongs to two decoder layers at once: it ends one (the residual add) and begins the next (the norm).
    The runtime fuses again what lies within one layer.

    Requires: nodes in topological order.
    Ensures: the same function; scope and name in the file go to the norm, so that the new Add has none.
    """
    nodes: list[gs.Node] = []
    replaced = 0
    for node in graph.nodes:
        if node.op not in _NORMS or _needs_statistics(node):
            nodes.append(node)
            continue
        replaced += 1
        nodes += _parts(node, graph, f"residual_{replaced}")
    graph.surgeon.nodes = nodes
    return replaced


def _needs_statistics(node: gs.Node) -> bool:
    return any(output.name for output in node.outputs[1:_SUM])


def _parts(node: gs.Node, graph: OnnxGraph, name: str) -> list[gs.Node]:
    has_beta = node.op == "SkipLayerNormalization"
    inputs, outputs = list(node.inputs), list(node.outputs)
    gamma = inputs[2]
    beta = inputs[3] if has_beta and len(inputs) > 3 and inputs[3].name else None
    bias_at = 4 if has_beta else 3
    bias = inputs[bias_at] if len(inputs) > bias_at and inputs[bias_at].name else None
    attributes = {"epsilon": node.attrs.get("epsilon", 1e-12 if has_beta else 1e-6), "axis": -1}
    node.inputs.clear()
    node.outputs.clear()
    total = outputs[_SUM] if len(outputs) > _SUM and outputs[_SUM].name else None
    if total is None:
        total = gs.Variable(f"{outputs[0].name}/sum", outputs[0].dtype, outputs[0].shape)
    terms = inputs[:2]
    parts = []
    if bias is not None:
        with_bias = gs.Variable(f"{outputs[0].name}/biased", outputs[0].dtype, outputs[0].shape)
        parts.append(gs.Node("Add", f"{name}_bias", inputs=[terms[0], bias], outputs=[with_bias]))
        terms = [with_bias, terms[1]]
    parts.append(gs.Node("Add", name, inputs=terms, outputs=[total]))
    norm = gs.Node(
        _NORMS[node.op],
        node.name,
        attrs=attributes,
        inputs=[total, gamma, *([beta] if beta is not None else [])],
        outputs=[outputs[0]],
    )
    if id(node) in graph.scopes:
        graph.scopes[id(norm)] = graph.scopes[id(node)]
    if id(node) in graph.file_names:
        graph.file_names[id(norm)] = graph.file_names[id(node)]
    return [*parts, norm]
