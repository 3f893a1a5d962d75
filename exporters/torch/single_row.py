"""Products of one activation row, written so that Inductor makes a loop over the weight of them."""

from __future__ import annotations

from collections.abc import Collection

import torch

from river_compile.passes.fx.graph import value_of
from river_compile.passes.fx.linear import find_linears
from river_compile.passes.fx.pieces import Piece

__all__ = ["lower_single_rows"]


def lower_single_rows(piece: Piece, weights: Collection[str]) -> int:
    """Replace a piece's bfloat16 products of one row by sums that are accumulated in float32.

    A product of one row is bound by reading its weight, and torch's CPU library, made for many rows, reads bfloat16
    at a half of the speed of the loop that Inductor generates, or less. It does not pay for other types, for more
    rows, or for a weight that is [inputs, outputs]; these stay.

    Args:
        weights: names of the values that are parameters.

    Requires: the piece runs on a CPU.
    Ensures: the same product up to the order of its sum. Returns how many were replaced.
    """
    replaced = 0
    for linear in find_linears(piece, weights, {}, ""):
        rows = value_of(linear.activation).shape[:-1]
        if not linear.transposed or value_of(linear.node).dtype != torch.bfloat16 or any(size != 1 for size in rows):
            continue
        weight = piece.placeholders[linear.weight]
        with piece.graph.inserting_before(linear.node):
            result = piece.graph.call_function(single_row_product, (linear.activation, weight, linear.bias))
        result.meta = dict(linear.node.meta)
        linear.node.replace_all_uses_with(result)
        piece.graph.erase_node(linear.node)
        replaced += 1
    return replaced


def single_row_product(activation: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """activation [..., inputs] @ weight [outputs, inputs].T + bias, accumulated in float32."""
    result = (activation.float().unsqueeze(-2) * weight.float()).sum(-1)
    if bias is not None:
        result = result + bias.float()
    return result.to(activation.dtype)
