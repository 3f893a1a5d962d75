"""The check after every pass: the graph is legal, and nothing that must stay has changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from river_compile.errors import PassError
from river_compile.passes.onnx.find_layers import Anatomy
from river_compile.passes.onnx.fit_opset import opset_problems
from river_compile.passes.onnx.flatten_tokens import ROWS_SUFFIX
from river_compile.passes.onnx.graph import OnnxGraph, reads

__all__ = ["Original", "verify"]


@dataclass(frozen=True)
class Original:
    """What a graph was before the first pass: its signature, and each node as a text that names no other node."""

    inputs: tuple[bytes, ...]
    outputs: tuple[bytes, ...]
    nodes: frozenset[str]

    @classmethod
    def of(cls, graph: OnnxGraph) -> Original:
        return cls(
            tuple(value.SerializeToString() for value in graph.inputs),
            tuple(value.SerializeToString() for value in graph.outputs),
            frozenset(_text(node, "") for node in graph.nodes),
        )


def verify(graph: OnnxGraph, original: Original, anatomy: Anatomy, passes: Sequence[str]) -> None:
    """Check a graph after a pass.

    Ensures: names of nodes and tensors are unique in the whole model and every tensor is made before it is read; the
    signature is the original one, plus additions at its end; every KV cache slot is written exactly once on every path;
    with the backbone branch taken everywhere the nodes that run are the original ones, operand for operand: tensors in
    rows count as themselves, and ``graph.restated`` names the nodes that were written otherwise; every operator is in
    the graph's opset, or was not when it came.

    Args:
        passes: the names of the passes that ran so far, the last one last.

    Raises:
        PassError: the graph is not legal; the error names the passes.
    """
    problem = (
        _scoping_problem(graph)
        or _signature_problem(graph, original)
        or _cache_problem(graph, anatomy)
        or _backbone_problem(graph, original)
        or next(iter(opset_problems(graph)), "")
    )
    if problem:
        raise PassError(tuple(passes), problem)


def _scoping_problem(graph: OnnxGraph) -> str:
    names: set[str] = set()
    tensors = set(graph.weights) | {value.name for value in graph.inputs}

    def walk(nodes: Sequence[gs.Node], known: set[str]) -> str:
        for node in nodes:
            if node.name in names:
                return f"two nodes are called {node.name!r}"
            names.add(node.name)
            for name in reads(node):
                if name not in known:
                    return f"node {node.name!r} reads {name!r} before it is made"
            for subgraph in node.subgraphs():
                inner = known | {tensor.name for tensor in subgraph.inputs}
                inner |= {t.name for n in subgraph.nodes for t in n.inputs if isinstance(t, gs.Constant)}
                problem = walk(subgraph.nodes, inner)
                if problem:
                    return problem
            for output in node.outputs:
                if output.name and output.name in tensors:
                    return f"tensor {output.name!r} is made twice"
                if output.name:
                    tensors.add(output.name)
                    known.add(output.name)
        return ""

    return walk(graph.nodes, set(tensors))


def _signature_problem(graph: OnnxGraph, original: Original) -> str:
    if tuple(value.SerializeToString() for value in graph.inputs) != original.inputs:
        return "the inputs changed"
    if tuple(value.SerializeToString() for value in graph.outputs) != original.outputs:
        return "the outputs changed"
    return ""


def _cache_problem(graph: OnnxGraph, anatomy: Anatomy) -> str:
    """Each present is made by one outer node; if that is a layer's If, each branch makes it by one node of its own."""
    for layer in anatomy.layers:
        for slot in layer.caches:
            writers = [node for node in graph.nodes if any(output.name == slot.present for output in node.outputs)]
            if len(writers) != 1:
                return f"cache slot {slot.present!r} of layer {layer.index} is written {len(writers)} times"
            place = next(i for i, output in enumerate(writers[0].outputs) if output.name == slot.present)
            for branch in writers[0].subgraphs():
                made = [o.name for node in branch.nodes for o in node.outputs]
                if made.count(branch.outputs[place].name) != 1:
                    return f"branch {branch.name!r} does not write cache slot {slot.present!r} itself"
    return ""


def _backbone_problem(graph: OnnxGraph, original: Original) -> str:
    found = set()
    for node in graph.nodes:
        if node.op == "If" and "else_branch" in node.attrs and node.name.startswith("river/"):
            branch = node.attrs["else_branch"]
            found |= {_text(inner, f"{branch.name}/") for inner in branch.nodes}
        else:
            found.add(_text(node, ""))
    missing = {text for text in original.nodes - found if text.partition(": ")[0] not in graph.restated}
    return f"the backbone lost {len(missing)} nodes, such as {min(missing)}" if missing else ""


def _text(node: gs.Node, prefix: str) -> str:
    """A node as text, without the prefix of its branch."""
    attributes = {k: v for k, v in node.attrs.items() if not isinstance(v, gs.Graph)}
    shown = sorted(
        f"{key}={value.name if isinstance(value, gs.Constant) else value}" for key, value in attributes.items()
    )
    operands = [tensor.name.removeprefix(prefix).removesuffix(ROWS_SUFFIX) for tensor in node.inputs]
    results = [tensor.name.removeprefix(prefix).removesuffix(ROWS_SUFFIX) for tensor in node.outputs]
    return f"{node.name.removeprefix(prefix)}: {results} = {node.domain or ''}.{node.op}{operands} {shown}"
