"""Pass 4: let each token leave the backbone where its hidden state stops turning."""

from __future__ import annotations

import torch
from torch import fx

from river_compile.config import RiverConfig
from river_compile.passes.anatomy import Anatomy, Layer
from river_compile.passes.fx.graph import FxGraph, value_of
from river_compile.passes.fx.pieces import Piece
from river_compile.passes.fx.share_kv import Plan

__all__ = ["insert_exits", "similarity", "similarity_name"]

_MASK = "attention_mask"


def insert_exits(graph: FxGraph, anatomy: Anatomy, plan: Plan, config: RiverConfig) -> tuple[int, ...]:
    """Make each layer's backbone piece yield the state transition similarity as well.

    The similarity (paper, section 3) is the cosine between a layer's input and output, in fp32 whatever the model's
    type; the least of all tokens of all sequences, float32 []. One that is NaN makes the least NaN, which is above
    nothing. Padding tokens have no say where the model has an ``attention_mask`` [batch, past + sequence]. River pieces
    stay as they are: the river costs no decision. Layers after which no exit is decided yield it too, so that one
    compiled piece serves all layers: it costs less than a piece of their own.

    Requires: the plan that `share_kv` made of this graph.
    Ensures: the pieces compute what they did. Returns the depths at which an exit may be decided.
    """
    points = tuple(depth for depth in config.exit_points(len(anatomy.layers)) if depth - 1 in plan.twins)
    mask = _mask(graph, anatomy.layers[0])
    for index in plan.twins if points else ():
        plan.layers[index] = _with_similarity(plan.layers[index], anatomy.layers[index], mask)
    return points


def similarity_name(index: int) -> str:
    """The name of the value that is the similarity of layer ``index``."""
    return f"river/similarity.{index}"


def similarity(before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The least cosine between states [..., width] over all tokens that are no padding, float32 []."""
    before, after = before.float(), after.float()
    cosine = (before * after).sum(-1) * ((before * before).sum(-1) * (after * after).sum(-1)).rsqrt()
    if mask is not None:
        cosine = torch.where(mask[:, -cosine.shape[1] :] != 0, cosine, torch.inf)
    # Without its dimensions the minimum does not convert to ONNX.
    return cosine.amin(dim=tuple(range(cosine.dim())))


def _mask(graph: FxGraph, layer: Layer) -> fx.Node | None:
    """The padding mask, where the graph has one and more than one token a sequence."""
    state = next(value_of(node) for node in graph.steps if node.name == layer.hidden_out)
    if state.dim() != 3 or state.shape[1] == 1:
        return None
    for node in graph.placeholders:
        value = value_of(node)
        if _MASK in node.name and isinstance(value, torch.Tensor) and value.dim() == 2:
            return node
    return None


def _with_similarity(piece: Piece, layer: Layer, mask: fx.Node | None) -> Piece:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(piece.graph, copies)
    for old, new in copies.items():
        new.meta = dict(old.meta)
    inputs = piece.inputs
    padding: fx.Node | None = None
    if mask is not None:
        named = piece.placeholders.get(mask.name)
        if named is not None:
            padding = copies[named]
        else:
            with graph.inserting_after(copies[list(piece.placeholders.values())[-1]]):
                padding = graph.placeholder(mask.name)
            padding.meta = {"example_value": value_of(mask)}
            inputs = (*inputs, mask.name)
    before = copies[piece.placeholders[layer.hidden_in]]
    after = copies[piece.results[layer.hidden_out]]
    least = graph.call_function(similarity, (before, after, padding))
    graph.output((*(copies[node] for node in piece.results.values()), least))
    graph.lint()
    return Piece(graph, piece.held, inputs, (*piece.outputs, similarity_name(layer.index)))
