"""The check after every pass: the pieces are the graph, and every cache slot is written once on every path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from river_compile.errors import PassError
from river_compile.passes.anatomy import Anatomy, Layer
from river_compile.passes.fx.graph import FxGraph, bound_symbols, symbols_of, value_of, written_roots
from river_compile.passes.fx.grow_river import River
from river_compile.passes.fx.pieces import Piece
from river_compile.passes.fx.share_kv import Plan

__all__ = ["verify"]


def verify(
    graph: FxGraph,
    anatomy: Anatomy,
    passes: Sequence[str],
    river: River | None = None,
    plan: Plan | None = None,
) -> None:
    """Check what a pass has left.

    Ensures: the layers are consecutive runs of the graph's nodes; a twin yields the values that its layer yields, and
    either of them writes every cache slot of the layer exactly once; the pieces of the backbone have every node of the
    graph exactly once and in order, and every value is made before it is read on every path; each symbolic size of the
    graph's inputs that a piece needs is bound by one of its operands.

    Args:
        passes: the names of the passes that ran so far, the last one last.

    Raises:
        PassError: something of this is not so; the error names the passes.
    """
    problem = _layer_problem(graph, anatomy)
    if river is not None:
        problem = problem or _twin_problem(river)
    if plan is not None:
        problem = problem or _plan_problem(graph, plan)
    if problem:
        raise PassError(tuple(passes), problem)


def _layer_problem(graph: FxGraph, anatomy: Anatomy) -> str:
    names = [node.name for node in graph.steps]
    start = names.index(anatomy.layers[0].nodes[0])
    for layer in anatomy.layers:
        end = start + len(layer.nodes)
        if tuple(names[start:end]) != layer.nodes:
            return f"layer {layer.index} is no run of consecutive nodes"
        start = end
    for before, after in zip(anatomy.layers, anatomy.layers[1:], strict=False):
        if before.hidden_out != after.hidden_in:
            return f"layer {after.index} does not read what layer {before.index} hands on"
    return ""


def _twin_problem(river: River) -> str:
    for twin in river.twins.values():
        if twin.river.outputs != twin.backbone.outputs:
            return f"the river's layer {twin.layer.index} yields other values than the backbone's"
        foreign = set(twin.river.inputs) - set(twin.backbone.inputs) - {n for names in twin.products for n in names}
        if foreign:
            return f"the river's layer {twin.layer.index} reads {min(foreign)}, which its backbone does not"
        for piece in (twin.backbone, twin.river):
            problem = _cache_problem(twin.layer, piece)
            if problem:
                return problem
    return ""


def _cache_problem(layer: Layer, piece: Piece) -> str:
    """A slot is written once if one node changes its memory, or one node makes its new value."""
    names = {node: name for name, node in piece.placeholders.items()}
    written = [names.get(root, root.name) for node in piece.graph.nodes for root in written_roots(node)]
    for slot in layer.caches:
        made = [name for name in piece.outputs if name == slot.present]
        if written.count(slot.past) + (len(made) if slot.past not in written else 0) != 1:
            return f"cache slot {slot.present!r} of layer {layer.index} is not written exactly once"
    return ""


def _plan_problem(graph: FxGraph, plan: Plan) -> str:
    of_graph = [node.name for node in graph.steps]
    own = set(of_graph) - {node.name for node in graph.placeholders}
    found = [node.name for piece in plan.pieces for node in piece.graph.nodes if node.name in own]
    missing = set(of_graph) - set(found)
    if missing:
        return f"the backbone lost {len(missing)} nodes, such as {min(missing)}"
    made = {node.name for node in graph.module.graph.nodes} - set(of_graph)
    for piece in plan.pieces:
        unknown = [name for name in piece.inputs if name not in made]
        if unknown:
            return f"{unknown[0]} is read before it is made"
        made |= set(piece.outputs)
    lost = [node.name for node in graph.results if node.name not in made]
    if lost:
        return f"the result {lost[0]} is not made"
    known = {symbol for node in graph.placeholders for symbol in symbols_of(value_of(node))}
    if plan.exit_suffix is not None and (plan.suffix is None or plan.exit_suffix.outputs != plan.suffix.outputs):
        return "what takes the suffix's place after an exit yields other values"
    unbound = [(symbol, piece) for piece in plan.every_piece for symbol in _unbound(piece, known)]
    return f"the size {unbound[0][0]} is bound by no operand of {unbound[0][1].outputs[0]}" if unbound else ""


def _unbound(piece: Piece, known: set[Any]) -> list[Any]:
    """Sizes that a piece needs and cannot know: those of the graph's inputs, and of its operands. Others, such as how
    many elements are not zero, it makes itself."""
    operands = [value_of(node) for node in piece.placeholders.values()]
    bound = {symbol for value in operands for symbol in bound_symbols(value)}
    inside = [value_of(node) for node in piece.graph.nodes if node.op != "placeholder"]
    needed = dict.fromkeys(symbol for value in operands for symbol in symbols_of(value))
    needed |= dict.fromkeys(symbol for value in inside for symbol in symbols_of(value) if symbol in known)
    return [symbol for symbol in needed if symbol not in bound]
