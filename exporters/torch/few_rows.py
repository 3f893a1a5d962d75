"""The backbone's products of few activation rows, in the forms that were measured to be the fastest.

A product of few rows is bound by reading its weight, and which form reads it fastest differs from CPU to CPU. In 16
bits the weight first has a second merit where a machine shows it: a row comes out the same to the last bit however many
rows are computed beside it. Exact decoding lives on that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from river_compile.exporters.torch.forms import SHORT, by_loop, few_rows, single_row
from river_compile.exporters.torch.timing import GAIN, SMALL, Forms, Kind, alike
from river_compile.passes.fx.graph import value_of
from river_compile.passes.fx.linear import Linear, find_linears
from river_compile.passes.fx.pieces import Piece

__all__ = ["lower_few_rows"]

WORTH = 0.25
"""What part more time passes may take so that a row comes out the same however many are computed beside it: then exact
decoding says what plain decoding says."""
_FEW = 4


def lower_few_rows(
    pieces: Sequence[Piece], parameters: Mapping[str, torch.Tensor], forms: Forms, rows: int | None
) -> int:
    """Compute products of few rows in the form that was measured to be much the fastest; in 16 bits with the weight
    first if a row then comes out the same beside any others, and all of them together lose no more than `WORTH` by
    that.

    Args:
        parameters: the values that are parameters, by name.
        rows: of the pieces' activations, None where they have several numbers; the LM head may get one of them.

    Ensures: the same products up to the order of their sums. Returns how many were rewritten.
    """
    found = [(piece, linear) for piece in pieces for linear in _products(piece, parameters)]
    given = [(parameters[linear.weight], linear.transposed) for _, linear in found]
    weights = alike({id(weight): (weight, transposed) for weight, transposed in given}.values())
    steady = _is_worth_it({kind: some for kind, some in weights.items() if kind.dtype in SHORT}, forms)
    rewritten = 0
    for piece, linear in found:
        one = Kind.of(parameters[linear.weight], linear.transposed)
        single = _is_single(linear)
        kind = one if single else replace(one, rows=rows or _FEW)
        seconds = forms.of_float(kind, weights[one])
        form = "weight" if steady and kind.dtype in SHORT else _fastest(seconds)
        forms.choose(kind, seconds, form)
        if form != "linear":
            _rewrite(piece, linear, form, single)
            rewritten += 1
    return rewritten


def _is_worth_it(weights: Mapping[Kind, Sequence[torch.Tensor]], forms: Forms) -> bool:
    """Whether the weight comes first in all products: by passes of one row, whatever a graph's are, since all graphs of
    a model take the same form."""
    seconds = {kind: forms.of_float(kind, some) for kind, some in weights.items()}
    weight_first = sum(len(some) * seconds[kind]["weight"] for kind, some in weights.items())
    fastest = sum(len(some) * min(seconds[kind].values()) for kind, some in weights.items())
    return weight_first <= (1 + WORTH) * fastest and all(
        forms.are_steady(kind, some[0]) for kind, some in weights.items()
    )


def _fastest(seconds: Mapping[str, float]) -> str:
    best = min(seconds, key=lambda name: seconds[name])
    return best if seconds[best] <= GAIN * seconds["linear"] else "linear"


def _products(piece: Piece, parameters: Mapping[str, torch.Tensor]) -> list[Linear]:
    """Those that may be written otherwise: all in 16 bits, and large ones of one row in float32."""
    found = find_linears(piece, parameters, {}, "")
    return [one for one in found if value_of(one.node).dtype in SHORT or (_is_single(one) and _is_large(one))]


def _is_large(linear: Linear) -> bool:
    return value_of(linear.node).dtype == torch.float32 and linear.inputs * linear.outputs >= SMALL


def _is_single(linear: Linear) -> bool:
    return all(isinstance(size, int) and size == 1 for size in value_of(linear.activation).shape[:-1])


def _rewrite(piece: Piece, linear: Linear, form: str, single: bool) -> None:
    weight = piece.placeholders[linear.weight]
    function = by_loop if form == "loop" else single_row if single else few_rows
    with piece.graph.inserting_before(linear.node):
        if not linear.transposed:
            node = piece.graph.call_method("t", (weight,))
            node.meta["example_value"] = value_of(weight).t()
            weight = node
        result = piece.graph.call_function(function, (linear.activation, weight, linear.bias))
    result.meta = dict(linear.node.meta)
    linear.node.replace_all_uses_with(result)
    piece.graph.erase_node(linear.node)
