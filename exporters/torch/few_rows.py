"""Products of few activation rows in 16-bit types: how torch computes them, chosen by measurement.

A product of few rows is bound by reading its weight, and which form reads it fastest differs from CPU to CPU: torch's
linear layer ("linear"); for one row a sum that Inductor makes a loop over the weight of ("loop"); or a product with the
weight first and at least two columns ("weight"). The last has a second merit: a row comes out the same to the last bit
however many rows are computed beside it. Exact decoding lives on that.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.nn import functional

from river_compile.exporters.torch import seam
from river_compile.passes.fx.graph import value_of
from river_compile.passes.fx.linear import Linear, find_linears
from river_compile.passes.fx.pieces import Piece

__all__ = ["COLUMNS", "MOST", "Forms", "Times", "by_loop", "by_weight", "few_rows", "lower_few_rows", "single_row"]

MOST = 16
"""Rows up to which a product counts as one of few rows."""
COLUMNS = {"cpu": 2}
"""By device, how many columns a product with the weight first has at least; `MOST` elsewhere, since a GPU's library
takes another kernel for each number."""
WORTH = 0.25
"""What part more time passes may take so that a row comes out the same however many are computed beside it: then exact
decoding says what plain decoding says."""

_FEW = 4
_ROUNDS, _TIMED, _JOINED, _SECONDS = 3, 12, 4, 0.05


@dataclass(frozen=True)
class Times:
    """Seconds of a product by form: of one row, and of `_FEW` rows."""

    single: Mapping[str, float]
    few: Mapping[str, float]


class Forms:
    """Measures the forms of a product on this machine, once for each type and shape.

    Args:
        compiler: compiles a piece, for the loop.
        known: what was measured, by type, shape and threads; read and added to.
    """

    def __init__(
        self, compiler: Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]], known: MutableMapping[str, Times]
    ) -> None:
        self._compiler, self._known = compiler, known

    def times(self, weights: Sequence[torch.Tensor], transposed: bool) -> Times:
        """Of products with these weights, which have one type and shape.

        Args:
            transposed: whether a weight is [outputs, inputs].
        """
        key = f"{weights[0].dtype} {tuple(weights[0].shape)} {transposed} {torch.get_num_threads()}"
        if key not in self._known:
            self._known[key] = self._measure([(w if transposed else w.t()).detach() for w in weights[:_TIMED]])
        return self._known[key]

    def _measure(self, weights: Sequence[torch.Tensor]) -> Times:
        inputs, columns = weights[0].shape[1], COLUMNS.get(weights[0].device.type, MOST)
        row, rows, same = (weights[0].new_ones((count, inputs)) for count in (1, _FEW, columns))
        together = [weights[first : first + _JOINED] for first in range(0, len(weights), _JOINED)]
        looped = [part for part in together if len(part) == len(together[0])]
        loop = self._loop(row, looped[0])
        single = {
            "linear": _each(lambda weight: functional.linear(row, weight), together),
            "loop": [lambda part=part: loop(row, *part) for part in looped],  # type: ignore[misc]
            "weight": _each(lambda weight: torch.mm(weight, same.t()), together),
        }
        few = {
            "linear": _each(lambda weight: functional.linear(rows, weight), together),
            "weight": _each(lambda weight: torch.mm(weight, rows.t()), together),
        }
        of_one = 1 / len(together[0])
        return Times(*({name: of_one * t for name, t in _times(forms).items()} for forms in (single, few)))

    def _loop(self, row: torch.Tensor, weights: Sequence[torch.Tensor]) -> Callable[..., Any]:
        """Several products in one piece, as a layer has them: calling a piece costs as well."""
        graph = fx.Graph()
        activation, *operands = (graph.placeholder(f"operand_{place}") for place in range(len(weights) + 1))
        graph.output(tuple(graph.call_function(by_loop, (activation, operand, None)) for operand in operands))
        return self._compiler(fx.GraphModule({}, graph), [row, *weights])


def _each(form: Callable[[torch.Tensor], Any], together: Sequence[Sequence[torch.Tensor]]) -> list[Callable[[], Any]]:
    return [lambda part=part: [form(weight) for weight in part] for part in together]  # type: ignore[misc]


def _times(forms: Mapping[str, Sequence[Callable[[], Any]]]) -> dict[str, float]:
    """Seconds of a call by form, the least of some rounds in which they take turns."""
    found = dict.fromkeys(forms, float("inf"))
    with torch.no_grad():
        for calls in forms.values():
            calls[0]()
        for _ in range(_ROUNDS):
            for name, calls in forms.items():
                started, done = time.perf_counter(), 0
                while not done or (done < len(calls) and time.perf_counter() - started < _SECONDS):
                    calls[done]()
                    done += 1
                found[name] = min(found[name], (time.perf_counter() - started) / done)
    return found


def lower_few_rows(
    pieces: Sequence[Piece], parameters: Mapping[str, torch.Tensor], rows: int | None, forms: Forms
) -> int:
    """Compute the 16-bit products of few rows in the form that was measured to be the fastest; with the weight first
    if all of them together lose no more than `WORTH` by that.

    Args:
        parameters: the values that are parameters, by name.
        rows: of the activations; None where a graph serves several numbers.

    Ensures: the same products up to the order of their sums. Returns how many were rewritten.
    """
    if rows is not None and rows > MOST:
        return 0
    found = [(piece, linear) for piece in pieces for linear in _products(piece, parameters)]
    alike: dict[Any, dict[int, torch.Tensor]] = {}
    for _, linear in found:
        weight = parameters[linear.weight]
        alike.setdefault(_kind(linear, weight), {})[id(weight)] = weight
    times = {kind: forms.times(list(weights.values()), kind[0]) for kind, weights in alike.items()}
    # By passes of one row, whatever this graph's are: all graphs of a model take the same form.
    weight_first = sum(len(weights) * times[kind].single["weight"] for kind, weights in alike.items())
    fastest = sum(len(weights) * min(times[kind].single.values()) for kind, weights in alike.items())
    rewritten = 0
    for piece, linear in found:
        single = _is_single(linear, rows)
        kind = _kind(linear, parameters[linear.weight])
        measured = times[kind].single if single else times[kind].few
        form = "weight" if weight_first <= (1 + WORTH) * fastest else min(measured, key=lambda name: measured[name])
        if form != "linear":
            _rewrite(piece, linear, form, single)
            rewritten += 1
    return rewritten


def _products(piece: Piece, parameters: Collection[str]) -> list[Linear]:
    found = find_linears(piece, parameters, {}, "")
    return [one for one in found if value_of(one.node).dtype in (torch.bfloat16, torch.float16)]


def _kind(linear: Linear, weight: torch.Tensor) -> tuple[bool, torch.dtype, tuple[int, ...]]:
    return linear.transposed, weight.dtype, tuple(weight.shape)


def _is_single(linear: Linear, rows: int | None) -> bool:
    """The LM head may get the last row only."""
    return rows == 1 or all(isinstance(size, int) and size == 1 for size in value_of(linear.activation).shape[:-1])


def _rewrite(piece: Piece, linear: Linear, name: str, single: bool) -> None:
    weight = piece.placeholders[linear.weight]
    columns = COLUMNS.get(value_of(weight).device.type, MOST)
    function = single_row if single else few_rows
    form = (name, columns) if single else (columns,)
    with piece.graph.inserting_before(linear.node):
        if not linear.transposed:
            node = piece.graph.call_method("t", (weight,))
            node.meta["example_value"] = value_of(weight).t()
            weight = node
        result = piece.graph.call_function(function, (linear.activation, weight, linear.bias, *form))
    result.meta = dict(linear.node.meta)
    linear.node.replace_all_uses_with(result)
    piece.graph.erase_node(linear.node)


def single_row(
    activation: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, form: str, columns: int
) -> torch.Tensor:
    """activation [..., inputs] of one row @ weight [outputs, inputs].T + bias."""
    if form == "loop":
        return by_loop(activation, weight, bias)
    same = activation.reshape(1, -1).expand(columns, -1).contiguous()
    result = (weight @ same.t())[:, 0].reshape(*activation.shape[:-1], weight.shape[0])
    return result if bias is None else result + bias


def few_rows(activation: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, columns: int) -> torch.Tensor:
    """activation [..., inputs] @ weight [outputs, inputs].T + bias; the weight first where rows are few."""
    result: torch.Tensor = torch.ops.river_compile.few_rows(activation, weight, columns)
    return result if bias is None else result + bias


def by_loop(activation: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The product of one row, accumulated in float32, as a sum that Inductor makes a loop over the weight of."""
    result = (activation.float().unsqueeze(-2) * weight.float()).sum(-1)
    if bias is not None:
        result = result + bias.float()
    return result.to(activation.dtype)


def by_weight(activation: torch.Tensor, weight: torch.Tensor, columns: int) -> torch.Tensor:
    """The product with the weight first: [outputs, inputs] @ [inputs, rows], rows filled up to ``columns``.

    One column alone is rounded otherwise than several; from two on (on a CPU) each column is as it would be beside any
    others.
    """
    shape = activation.shape
    rows = activation.reshape(-1, shape[-1])
    count = rows.shape[0]
    if count < columns:
        rows = torch.cat([rows, rows[-1:].expand(columns - count, -1)])
    result = torch.mm(weight, rows.t())
    if count < columns:
        result = result[:, :count]
    return result.t().contiguous().view(*shape[:-1], weight.shape[0])


def _few_rows(activation: torch.Tensor, weight: torch.Tensor, columns: int) -> torch.Tensor:
    if math.prod(activation.shape[:-1]) > MOST:
        return functional.linear(activation, weight)
    return by_weight(activation, weight, columns)


# Which form it is depends on the number of rows, and one graph serves several numbers.
seam.define_operator(
    "few_rows(Tensor activation, Tensor weight, int columns) -> Tensor",
    _few_rows,
    lambda activation, weight, columns: activation.new_empty((*activation.shape[:-1], weight.shape[0])),
)
