"""Pass 5, where the LM head has a twin: a token that left the backbone takes the quantized head."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from river_compile.passes.onnx.graph import OnnxGraph, toposorted
from river_compile.passes.onnx.grow_river import River

__all__ = ["HEAD", "share_head"]

HEAD = "river/head"


def share_head(graph: OnnxGraph, river: River, branches: dict[int, gs.Node]) -> gs.Node:
    """Put the LM head and its twin into one ``If`` that goes the way of the last layer that has a twin.

    Requires: a river whose head has a twin; the Ifs of `share_kv`, after `insert_exits`.
    Ensures: a token that no layer's river touched gets the logits of the untouched model.
    """
    assert river.head is not None and river.head_twin is not None
    node = next(node for node in graph.nodes if node.name == river.head.source.node.name)
    (result,) = node.outputs
    stay, go = (_branch(graph, nodes, result.name) for nodes in river.head_twin)
    node.inputs.clear()
    node.outputs.clear()
    choice = gs.Node(
        "If",
        name=HEAD,
        attrs={"then_branch": go, "else_branch": stay},
        inputs=[branches[max(branches)].inputs[0]],
        outputs=[result],
    )
    graph.surgeon.nodes = toposorted([*(other for other in graph.nodes if other is not node), choice])
    return choice


def _branch(graph: OnnxGraph, nodes: list[gs.Node], result: str) -> gs.Graph:
    made = [output for node in nodes for output in node.outputs if output.name.endswith(f"/{result}")]
    return gs.Graph(
        nodes=nodes,
        outputs=made,
        name=nodes[0].name.split("/")[0],
        opset=graph.surgeon.opset,
        import_domains=graph.surgeon.import_domains,
    )
