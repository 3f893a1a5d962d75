"""A decoder layer and its twin, as the two branches that they become."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_graphsurgeon as gs

from river_compile.passes.anatomy import Layer

__all__ = ["Twin", "clone", "outer"]


@dataclass
class Twin:
    """The two bodies of a decoder layer. All that a body makes is called after its branch; all that it only reads is
    read from the outer scope, by name."""

    layer: Layer
    backbone: list[gs.Node]
    river: list[gs.Node]


def outer(name: str) -> gs.Variable:
    """A reference, in a branch, to a tensor of the outer scope: by name alone, so that no weight is copied."""
    return gs.Variable(name)


def clone(nodes: Sequence[gs.Node], prefix: str) -> list[gs.Node]:
    """Copies of nodes, their names and the names of all that they make prefixed; they share nothing with the graph."""
    made = {output.name for node in nodes for output in node.outputs if output.name}
    return _clone(nodes, prefix, {name: gs.Variable(prefix + name) for name in made})


def _clone(nodes: Sequence[gs.Node], prefix: str, renamed: dict[str, gs.Variable]) -> list[gs.Node]:
    for node in nodes:
        for output in node.outputs:
            if output.name in renamed:
                renamed[output.name].dtype, renamed[output.name].shape = output.dtype, output.shape

    def reference(tensor: gs.Tensor) -> gs.Variable:
        return renamed[tensor.name] if tensor.name in renamed else outer(tensor.name)

    def attribute(value: Any) -> Any:
        return _clone_subgraph(value, prefix, renamed) if isinstance(value, gs.Graph) else value

    return [
        gs.Node(
            op=node.op,
            name=prefix + node.name,
            attrs={key: attribute(value) for key, value in node.attrs.items()},
            inputs=[reference(tensor) for tensor in node.inputs],
            outputs=[reference(tensor) for tensor in node.outputs],
            domain=node.domain,
        )
        for node in nodes
    ]


def _clone_subgraph(graph: gs.Graph, prefix: str, renamed: dict[str, gs.Variable]) -> gs.Graph:
    inside = [tensor for node in graph.nodes for tensor in node.outputs if tensor.name] + list(graph.inputs)
    scope = renamed | {tensor.name: gs.Variable(prefix + tensor.name, tensor.dtype, tensor.shape) for tensor in inside}
    local = {t.name: t for node in graph.nodes for t in node.inputs if isinstance(t, gs.Constant)}
    copy = gs.Graph(
        nodes=_clone(graph.nodes, prefix, scope),
        inputs=[scope[tensor.name] for tensor in graph.inputs],
        outputs=[scope.get(tensor.name, tensor) for tensor in graph.outputs],
        name=prefix + (graph.name or ""),
        opset=graph.opset,
        import_domains=graph.import_domains,
    )
    for node in copy.nodes:
        for index, tensor in enumerate(node.inputs):
            if tensor.name in local and tensor.name not in scope:
                node.inputs[index] = local[tensor.name]
    return copy
