"""The backbone's products of few activation rows, in the forms that were measured to be the fastest.

A product of few rows is bound by reading its weight, and which form reads it fastest differs from CPU to CPU. In 16
bits the weight first has a second merit where a machine shows it: a row comes out the same to the last bit however many
rows are computed beside it. Exact decoding lives on that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from river_compile.exporters.torch.forms import SHORT, by_loop, few_rows, single_row
from river_compile.exporters.torch.timing import GAIN, SMALL, Forms
from river_compile.passes.fx.graph import value_of
from river_compile.passes.fx.linear import Linear, find_linears
from river_compile.passes.fx.pieces import Piece

__all__ = ["lower_few_rows"]

WORTH = 0.25
"""What part more time passes may take so that a row comes out the same however many are computed beside it: then exact
decoding says what plain decoding says."""
_FEW = 4

_Alike = tuple[bool, torch.dtype, tuple[int, ...]]


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
    groups: dict[_Alike, dict[int, torch.Tensor]] = {}
    for _, linear in found:
        weight = parameters[linear.weight]
        groups.setdefault(_alike(linear, weight), {})[id(weight)] = weight
    alike = {key: list(weights.values()) for key, weights in groups.items()}
    steady = _is_worth_it({key: weights for key, weights in alike.items() if key[1] in SHORT}, forms)
    rewritten = 0
    for piece, linear in found:
        key = _alike(linear, parameters[linear.weight])
        single = _is_single(linear)
        kind, seconds = forms.of_float(alike[key], linear.transposed, 1 if single else rows or _FEW)
        form = "weight" if steady and key[1] in SHORT else _fastest(seconds)
        forms.choose(kind, seconds, form)
        if form != "linear":
            _rewrite(piece, linear, form, single)
            rewritten += 1
    return rewritten


def _is_worth_it(alike: Mapping[_Alike, Sequence[torch.Tensor]], forms: Forms) -> bool:
    """Whether the weight comes first in all products: by passes of one row, whatever a graph's are, since all graphs of
    a model take the same form."""
    seconds = {key: forms.of_float(weights, key[0], 1)[1] for key, weights in alike.items()}
    weight_first = sum(len(weights) * seconds[key]["weight"] for key, weights in alike.items())
    fastest = sum(len(weights) * min(seconds[key].values()) for key, weights in alike.items())
    return weight_first <= (1 + WORTH) * fastest and all(
        forms.are_steady(weights[0], key[0]) for key, weights in alike.items()
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


def _alike(linear: Linear, weight: torch.Tensor) -> _Alike:
    return linear.transposed, weight.dtype, tuple(weight.shape)


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
