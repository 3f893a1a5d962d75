"""Pass 3: make both twins of a layer write the same KV cache slots."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from river_compile.passes.onnx.find_layers import Anatomy
from river_compile.passes.onnx.graph import OnnxGraph, toposorted
from river_compile.passes.onnx.grow_river import River
from river_compile.passes.onnx.twin import Twin

__all__ = ["MAX_DEPTH", "share_kv"]

MAX_DEPTH = "river.max_depth"


def share_kv(graph: OnnxGraph, anatomy: Anatomy, river: River, max_depth: int | None) -> dict[int, gs.Node]:
    """Put each layer and its twin into one ``If`` whose outputs are the layer's hidden state and KV cache.

    Both branches read the same past and yield the same present: one address, whoever writes it (paper, section 3). The
    condition is the depth limit only: layer i is taken from the river iff ``river.max_depth`` <= i. That limit is an
    overridable initializer, int64 [], with the number of layers as its default ("no limit").

    Requires: the river's twins belong to this very graph.
    Ensures: one If for each twin, by layer index, in the result; a kept layer's nodes are untouched; every name in the
    model is unique; the nodes are in topological order.
    """
    conditions = _depth_conditions(graph, len(anatomy.layers), max_depth)
    by_name = {node.name: node for node in graph.nodes}
    outputs_of = {output.name: output for node in graph.nodes for output in node.outputs}
    branches: dict[int, gs.Node] = {}
    replaced: set[int] = set()
    for index, twin in river.twins.items():
        for name in twin.layer.nodes:
            replaced.add(id(by_name[name]))
            by_name[name].inputs.clear()
            by_name[name].outputs.clear()
        branches[index] = gs.Node(
            "If",
            name=f"river/layer.{index}",
            attrs={
                "then_branch": _branch(graph, twin, twin.river, f"river.{index}/"),
                "else_branch": _branch(graph, twin, twin.backbone, f"backbone.{index}/"),
            },
            inputs=[conditions[index]],
            outputs=[outputs_of[name] for name in twin.layer.outputs],
        )
    rest = [node for node in graph.nodes if id(node) not in replaced]
    graph.surgeon.nodes = toposorted([*rest, *branches.values()])
    return branches


def _depth_conditions(graph: OnnxGraph, layers: int, max_depth: int | None) -> list[gs.Variable]:
    """For each layer a bool [1]: whether the depth limit puts it into the river. Two nodes for the whole model."""
    limit = graph.add_weight(MAX_DEPTH, np.array(layers if max_depth is None else max_depth, np.int64))
    graph.overridable.append(MAX_DEPTH)
    indices = graph.add_weight("river/layer_indices", np.arange(layers, dtype=np.int64))
    beyond = gs.Variable("river/beyond_limit", bool, [layers])
    conditions = [gs.Variable(f"river/beyond_limit.{index}", bool, [1]) for index in range(layers)]
    graph.nodes.append(gs.Node("LessOrEqual", "river/limit", inputs=[limit, indices], outputs=[beyond]))
    graph.nodes.append(
        gs.Node("Split", "river/limits", attrs={"axis": 0, "num_outputs": layers}, inputs=[beyond], outputs=conditions)
    )
    return conditions


def _branch(graph: OnnxGraph, twin: Twin, nodes: Sequence[gs.Node], prefix: str) -> gs.Graph:
    made = {output.name: output for node in nodes for output in node.outputs}
    return gs.Graph(
        nodes=list(nodes),
        outputs=[made[prefix + name] for name in twin.layer.outputs],
        name=prefix.rstrip("/"),
        opset=graph.surgeon.opset,
        import_domains=graph.surgeon.import_domains,
    )
