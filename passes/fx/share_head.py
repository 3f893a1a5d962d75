"""Pass 5, where the LM head has a twin: a token that left the backbone takes the quantized head."""

from __future__ import annotations

import copy

from torch import fx

from river_compile.config import FLOAT, RiverConfig
from river_compile.passes.fx.graph import FxGraph
from river_compile.passes.fx.grow_river import RiverWeights, quantize_piece
from river_compile.passes.fx.pieces import Piece
from river_compile.passes.fx.share_kv import Plan

__all__ = ["share_head"]


def share_head(graph: FxGraph, plan: Plan, config: RiverConfig, weights: RiverWeights) -> bool:
    """Give what lies behind the decoder layers a twin whose products, the LM head, are quantized to ``head_bits``.

    Requires: the plan that `share_kv` made of this graph, with a river.
    Ensures: the pieces of the backbone are unchanged; the twin yields the suffix's values. Returns whether there is
    one: not where the config leaves the head as it is, or where it is no product with a parameter.
    """
    if config.head_bits == FLOAT or plan.suffix is None or not plan.twins:
        return False
    made = quantize_piece(graph, _copied(plan.suffix), config.head_bits, config, weights)
    if made is None:
        return False
    plan.exit_suffix, plan.exit_products = made
    return True


def _copied(piece: Piece) -> Piece:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(piece.graph, copies))
    for old, new in copies.items():
        new.meta = copy.copy(old.meta)
    graph.lint()
    return Piece(graph, piece.held, piece.inputs, piece.outputs)
