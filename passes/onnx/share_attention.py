"""Take out of a layer's branches what both do alike: cache update and attention."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import onnx_graphsurgeon as gs

from river_compile.passes.anatomy import Layer
from river_compile.passes.onnx.find_layers import Anatomy
from river_compile.passes.onnx.graph import OnnxGraph, reads, toposorted
from river_compile.passes.onnx.twin import outer

__all__ = ["share_attention"]

_BACKBONE, _RIVER = "else_branch", "then_branch"


def share_attention(graph: OnnxGraph, anatomy: Anatomy) -> None:
    """Split each layer's ``If`` at its KV cache: the products before it, then once for both twins what lies between,
    cache update and attention, then the products after it. What comes before the first product stands outside as well.

    Attention has no weights, so both branches hold the same nodes for it. Standing outside it is built once instead of
    twice, and the cache is written by one node whoever computed the new entries. TensorRT demands both: its attention
    and cache update layers may not stand in a conditional, the latter only between a network's input and output.

    Requires: the Ifs of `share_kv`, exits inserted.
    Ensures: the same function; at most two Ifs a layer, ``river/layer.N`` and ``river/layer.N.after``, of one
    condition; the nodes between have the names that they had in the source.
    """
    by_name = {node.name: node for node in graph.nodes}
    made: list[gs.Node] = []
    replaced: set[int] = set()
    for layer in anatomy.layers:
        branch = by_name.get(f"river/layer.{layer.index}")
        if branch is not None:
            replaced.add(id(branch))
            made += _split(branch, layer)
    rest = [node for node in graph.nodes if id(node) not in replaced]
    graph.surgeon.nodes = toposorted([*rest, *made])


@dataclass
class _Parts:
    """A branch in three parts: nodes up to the cache, nodes that both branches share, nodes after."""

    prefix: str
    before: list[gs.Node] = field(default_factory=list)
    shared: list[gs.Node] = field(default_factory=list)
    after: list[gs.Node] = field(default_factory=list)


def _split(branch: gs.Node, layer: Layer) -> list[gs.Node]:
    bodies = {side: branch.attrs[side] for side in (_BACKBONE, _RIVER)}
    common = _common(bodies, layer)
    pasts = {slot.past for slot in layer.caches}
    parts = {side: _part(body, common, pasts, f"{body.name}/") for side, body in bodies.items()}
    backbone = parts[_BACKBONE]
    assert _names(backbone) == _names(parts[_RIVER]), "the branches share different nodes"
    condition = branch.inputs[0]
    results = {output.name: output for output in branch.outputs}
    inner = {
        output.name: body_output for output, body_output in zip(branch.outputs, bodies[_BACKBONE].outputs, strict=True)
    }
    places = {side: dict(zip(results, body.outputs, strict=True)) for side, body in bodies.items()}
    branch.inputs.clear()
    branch.outputs.clear()

    first = _made(backbone.before)
    middle = _made(backbone.shared)
    read_later = {name for node in [*backbone.shared, *backbone.after] for name in reads(node)}
    handed_on = [name for name in first if name in read_later or any(t.name == name for t in inner.values())]
    outer_of = {tensor.name: name for name, tensor in inner.items()}
    crossing = {name: _base(name, backbone.prefix) for name in [*handed_on, *middle]}
    crossing |= {name: outer_of[name] for name in crossing if name in outer_of}

    nodes = []
    if backbone.before:
        outputs = [results.get(crossing[name]) or _like(first[name], crossing[name]) for name in handed_on]
        nodes.append(
            _if(branch.name, condition, parts, "before", [_base(n, backbone.prefix) for n in handed_on], outputs)
        )
    nodes += [_hoist(node, backbone.prefix, crossing, results) for node in backbone.shared]
    late = [name for name in results if inner[name].name not in first and inner[name].name not in middle]
    for part in parts.values():
        for node in part.before:
            _redirect(node, _moved(part, backbone, crossing, middle))
        for node in part.after:
            _redirect(node, _moved(part, backbone, crossing, crossing))
    if late:
        after = _if(f"{branch.name}.after", condition, parts, "after", [], [results[name] for name in late])
        for side in parts:
            after.attrs[side].outputs = [places[side][name] for name in late]
        nodes.append(after)
    return nodes


def _moved(part: _Parts, backbone: _Parts, crossing: dict[str, str], names: Iterable[str]) -> dict[str, str]:
    """What tensors of a branch, given by their names in the backbone's, are called outside."""
    return {part.prefix + _base(name, backbone.prefix): crossing[name] for name in names}


def _names(part: _Parts) -> set[str]:
    return {_base(node.name, part.prefix) for node in part.shared}


def _common(bodies: dict[str, gs.Graph], layer: Layer) -> set[str]:
    """Names, without prefix, of the layer's nodes that both branches have: all but the linear layers of the river."""
    names = [
        {_base(node.name, f"{body.name}/"): node.op for node in body.nodes}
        for body in (bodies[_BACKBONE], bodies[_RIVER])
    ]
    return {name for name in layer.nodes if name in names[0] and names[0][name] == names[1].get(name)}


def _part(body: gs.Graph, common: set[str], pasts: set[str], prefix: str) -> _Parts:
    nodes: list[gs.Node] = toposorted(body.nodes)
    own = {id(node) for node in nodes if _base(node.name, prefix) not in common}
    cached = _descendants(nodes, pasts, ())
    after = _descendants(nodes, (), [node for node in nodes if id(node) in own and id(node) in cached])
    decision = f"{prefix}river/"
    after |= _descendants(nodes, (), [node for node in nodes if node.name.startswith(decision)])
    after |= _only_for(nodes, own, after)
    first = [node for node in nodes if id(node) in own and id(node) not in after]
    # What leads up to the first products, such as a norm, is done once as well.
    before = _ancestors(nodes, first) & _descendants(nodes, (), first)
    parts = _Parts(prefix)
    for node in nodes:
        place = parts.after if id(node) in after else parts.before if id(node) in before else parts.shared
        place.append(node)
    return parts


def _descendants(nodes: Sequence[gs.Node], names: Iterable[str], roots: Sequence[gs.Node]) -> set[int]:
    """Ids of the roots, and of all nodes that depend on them or on the named tensors."""
    reached, found = set(names), {id(node) for node in roots}
    for node in nodes:
        if id(node) in found or not reached.isdisjoint(reads(node)):
            found.add(id(node))
            reached.update(output.name for output in node.outputs)
    return found


def _ancestors(nodes: Sequence[gs.Node], roots: Sequence[gs.Node]) -> set[int]:
    """Ids of the roots, and of all nodes that they depend on."""
    found = {id(node) for node in roots}
    wanted = {name for node in roots for name in reads(node)}
    for node in reversed(nodes):
        if id(node) in found or any(output.name in wanted for output in node.outputs):
            found.add(id(node))
            wanted.update(reads(node))
    return found


def _only_for(nodes: Sequence[gs.Node], own: set[int], after: set[int]) -> set[int]:
    """Ids of the branch's own nodes that only nodes after the cache read: dequantizers of their weights."""
    readers: dict[str, set[int]] = {}
    for node in nodes:
        for name in reads(node):
            readers.setdefault(name, set()).add(id(node))
    found: set[int] = set()
    for node in reversed(nodes):
        users = {user for output in node.outputs for user in readers.get(output.name, ())}
        if id(node) in own and users and users <= after | found:
            found.add(id(node))
    return found


def _base(name: str, prefix: str) -> str:
    return name.removeprefix(prefix)


def _made(nodes: Sequence[gs.Node]) -> dict[str, gs.Variable]:
    return {output.name: output for node in nodes for output in node.outputs if output.name}


def _like(tensor: gs.Variable, name: str) -> gs.Variable:
    return gs.Variable(name, tensor.dtype, tensor.shape)


def _if(
    name: str,
    condition: gs.Tensor,
    parts: dict[str, _Parts],
    place: str,
    yields: Sequence[str],
    outputs: list[gs.Variable],
) -> gs.Node:
    branches = {}
    for side, part in parts.items():
        nodes = getattr(part, place)
        made = _made(nodes)
        branches[side] = gs.Graph(
            nodes=nodes,
            outputs=[made[part.prefix + base] for base in yields],
            name=part.prefix.rstrip("/"),
        )
    return gs.Node("If", name, attrs=branches, inputs=[condition], outputs=outputs)


def _hoist(node: gs.Node, prefix: str, crossing: dict[str, str], results: dict[str, gs.Variable]) -> gs.Node:
    """A node of the backbone branch, as it stands outside."""
    node.name = _base(node.name, prefix)
    _redirect(node, crossing)
    for index, output in enumerate(node.outputs):
        if output.name in crossing:
            target = crossing[output.name]
            node.outputs[index] = results.get(target) or _like(output, target)
    return node


def _redirect(node: gs.Node, names: dict[str, str]) -> None:
    """Let a node, and its subgraphs, read tensors of the outer scope by their names there."""
    for index, tensor in enumerate(node.inputs):
        if tensor.name in names:
            node.inputs[index] = outer(names[tensor.name])
    for subgraph in node.subgraphs():
        for inside in subgraph.nodes:
            _redirect(inside, names)
