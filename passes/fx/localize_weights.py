"""Before the passes, where a model is spread over processes: let the graph read this process's shard of a weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from river_compile.passes.fx.graph import operation, value_of

__all__ = ["Localized", "localize_weights"]

# How Dynamo writes DTensor.to_local, by release of torch.
_TO_LOCAL = {"to_local", "prim_to_local"}


@dataclass(frozen=True)
class Localized:
    """A graph whose inputs are not one by one those of the graph that it was made of.

    Fields:
        module: the graph.
        order: for each of its inputs which of the original's it is.
        shards: names of the inputs that take this process's shard of a tensor instead of the tensor.
    """

    module: fx.GraphModule
    order: tuple[int, ...]
    shards: frozenset[str]


def localize_weights(module: fx.GraphModule, inputs: Sequence[Any]) -> Localized | None:
    """A copy of the graph in which each weight whose shard is read is an input that is this shard.

    So to the passes such a weight is like any other, as wide as this process holds of it: it is twinned and quantized
    for itself, and no quantization group crosses the boundary of a shard. Collectives stay where they are.

    Requires: nodes that carry their fake value.
    Ensures: the same function, and the module unchanged. None where no shard of a weight is read.
    """
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    spread = {
        node.name
        for node, value in zip(placeholders, inputs, strict=True)
        if isinstance(value, torch.nn.Parameter) and _shard_readers(node)
    }
    if not spread:
        return None
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.output(graph.graph_copy(module.graph, copies))
    order: list[int] = []
    shards: set[str] = set()
    for place, old in enumerate(placeholders):
        node, readers = copies[old], _shard_readers(copies[old]) if old.name in spread else []
        order.append(place)
        if not readers:
            continue
        if len(readers) < len(node.users):
            # Read whole as well: tied embeddings.
            with graph.inserting_after(node):
                node = graph.placeholder(f"{old.target}_shard")
            order.append(place)
        node.meta["example_value"] = value_of(readers[0])
        shards.add(node.name)
        for reader in readers:
            reader.replace_all_uses_with(node)
            graph.erase_node(reader)
    graph.lint()
    return Localized(fx.GraphModule(module, graph), tuple(order), frozenset(shards))


def _shard_readers(node: fx.Node) -> list[fx.Node]:
    """The nodes that take this process's shard of a tensor and nothing else."""
    return [
        user
        for user in node.users
        if user.op in ("call_method", "call_function")
        and operation(user) in _TO_LOCAL
        and user.args[:1] == (node,)
        and isinstance(value_of(user), torch.Tensor)
    ]
