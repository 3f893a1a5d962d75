"""The residual stream of an FX graph: the tensors that every path from the tokens to the logits goes through."""

from __future__ import annotations

import torch
from torch import fx

from river_compile.passes.fx.graph import FxGraph, operands, value_of

__all__ = ["find_streams"]


def find_streams(graph: FxGraph) -> list[list[fx.Node]]:
    """For every input that may be the tokens, the cuts of the stream that springs from it, in order: where one tensor
    alone carries all that becomes of the input on its way to the deepest result.

    Requires: nodes that carry their fake value.
    """
    sink = graph.deepest
    if sink is None:
        return []
    ancestors = _ancestors(sink)
    sources = [node for node in graph.placeholders if node.name not in graph.weights and _may_be_tokens(node)]
    return [_chain(graph, source, sink, ancestors) for source in sources]


def _may_be_tokens(node: fx.Node) -> bool:
    value = value_of(node)
    return isinstance(value, torch.Tensor) and 2 <= value.dim() <= 3 and value.dtype != torch.bool


def _ancestors(sink: fx.Node) -> set[fx.Node]:
    found = {sink}
    open_nodes = [sink]
    while open_nodes:
        for operand in operands(open_nodes.pop()):
            if operand not in found:
                found.add(operand)
                open_nodes.append(operand)
    return found


def _chain(graph: FxGraph, source: fx.Node, sink: fx.Node, ancestors: set[fx.Node]) -> list[fx.Node]:
    """All tensors that every path from source to sink passes; a tensor is one if at some moment it alone is alive."""
    on_path = {source}
    for node in graph.steps:
        if node in ancestors and any(operand in on_path for operand in operands(node)):
            on_path.add(node)
    path = [source, *(node for node in graph.steps if node in on_path)]
    last_read = {sink: len(path)}
    for index, node in enumerate(path):
        for operand in operands(node):
            if operand in on_path and operand is not sink:
                last_read[operand] = index
    cuts: list[fx.Node] = []
    alive: set[fx.Node] = set()
    for index, node in enumerate(path):
        alive = {known for known in alive if last_read[known] > index}
        if last_read.get(node, -1) > index:
            alive.add(node)
        if len(alive) == 1 and (only := next(iter(alive))) not in cuts[-1:]:
            cuts.append(only)
    return cuts
