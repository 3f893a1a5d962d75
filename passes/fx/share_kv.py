"""Pass 3: make both twins of a layer write the same KV cache slots."""

from __future__ import annotations

from dataclasses import dataclass, field

from river_compile.passes.anatomy import Anatomy
from river_compile.passes.fx.graph import FxGraph
from river_compile.passes.fx.grow_river import Product, River, Twin
from river_compile.passes.fx.pieces import Piece, cut_piece

__all__ = ["Plan", "share_kv"]


@dataclass
class Plan:
    """The whole graph as pieces to run one after the other.

    Fields:
        prefix, suffix: what lies before the first and after the last decoder layer; None where there is nothing.
        layers: the backbone's piece of each layer.
        twins: the two pieces of each layer that has a river, by its index.
        exit_suffix: what takes the place of the suffix after an exit, if something does.
        exit_products: its quantized products, by the names of the values that they add to its inputs.
    """

    prefix: Piece | None
    layers: list[Piece]
    twins: dict[int, Twin]
    suffix: Piece | None
    exit_suffix: Piece | None = None
    exit_products: dict[tuple[str, ...], Product] = field(default_factory=dict)

    @property
    def pieces(self) -> list[Piece]:
        """The pieces of the backbone, in order."""
        return [piece for piece in (self.prefix, *self.layers, self.suffix) if piece is not None]

    @property
    def every_piece(self) -> list[Piece]:
        """The pieces of the backbone, and those of the river."""
        exit_suffix = [] if self.exit_suffix is None else [self.exit_suffix]
        return [*self.pieces, *(twin.river for twin in self.twins.values()), *exit_suffix]


def share_kv(graph: FxGraph, anatomy: Anatomy, river: River) -> Plan:
    """Put layers and twins in their place, so that whichever twin runs reads and writes the same values of the graph.

    Both pieces of a twin name their operands by the values of the whole graph: the cache they read and write, in place
    or as a new value, is one and the same (paper, section 3). There is no second cache.

    Requires: the river's twins belong to this very graph.
    Ensures: the pieces together have every node of the graph once; any twin may run in the place of any layer.
    """
    from river_compile.passes.fx.grow_river import layer_piece

    steps = {node.name: index for index, node in enumerate(graph.steps)}
    first = steps[anatomy.layers[0].nodes[0]]
    last = steps[anatomy.layers[-1].nodes[-1]] + 1
    layers = [
        river.twins[layer.index].backbone if layer.index in river.twins else layer_piece(graph, layer)
        for layer in anatomy.layers
    ]
    return Plan(_rest(graph, 0, first), layers, dict(river.twins), _rest(graph, last, len(graph.steps)))


def _rest(graph: FxGraph, begin: int, end: int) -> Piece | None:
    nodes = graph.steps[begin:end]
    inside = set(nodes)
    outputs = [node for node in nodes if any(user not in inside for user in node.users)]
    return cut_piece(graph, nodes, outputs) if nodes else None
