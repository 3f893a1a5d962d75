"""Products of few activation rows in 16-bit types: how torch computes them, chosen by measurement.

A product of few rows is bound by reading its weight, and which form reads it fastest differs from CPU to CPU: torch's
linear layer ("linear"); for one row a sum that Inductor makes a loop over the weight of ("loop"); or a product with the
weight first and at least two columns ("weight"). The last has a second merit where a machine shows it: a row comes out
the same to the last bit however many rows are computed beside it. Exact decoding lives on that.
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

__all__ = ["MOST", "SHORT", "Forms", "Times", "by_loop", "few_rows", "is_steady", "lower_few_rows", "single_row"]

SHORT = (torch.bfloat16, torch.float16)
"""Types in which the order of a sum shows in later tokens."""
MOST = 16
"""Rows up to which a product counts as one of few rows."""
WORTH = 0.25
"""What part more time passes may take so that a row comes out the same however many are computed beside it: then exact
decoding says what plain decoding says."""

_FEW = 4
_ROUNDS, _TIMED, _JOINED = 4, 12, 4
_COMPARED = 2**17


@dataclass(frozen=True)
class Times:
    """Seconds of a product by form: of one row, and of `_FEW` rows; whether a row comes out the same to the last bit
    however many are beside it, with the weight first."""

    single: Mapping[str, float]
    few: Mapping[str, float]
    steady: bool


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
        inputs = weights[0].shape[1]
        row, rows, same = (weights[0].new_ones((count, inputs)) for count in (1, _FEW, 2))
        together = [weights[first : first + _JOINED] for first in range(0, len(weights), _JOINED)]
        looped = [part for part in together if len(part) == len(together[0])]
        loop = self._loop(row, looped[0])
        single: dict[str, Sequence[Callable[[], Any]]] = {
            "linear": _each(lambda weight: functional.linear(row, weight), together),
            "loop": [lambda part=part: loop(row, *part) for part in looped],  # type: ignore[misc]
            "weight": _each(lambda weight: torch.mm(weight, same.t()), together),
        }
        few: dict[str, Sequence[Callable[[], Any]]] = {
            "linear": _each(lambda weight: functional.linear(rows, weight), together),
            "weight": _each(lambda weight: torch.mm(weight, rows.t()), together),
        }
        of_one = 1 / len(together[0])
        of_single, of_few = ({name: of_one * t for name, t in _times(forms).items()} for forms in (single, few))
        return Times(of_single, of_few, steady=is_steady(weights[0]))

    def _loop(self, row: torch.Tensor, weights: Sequence[torch.Tensor]) -> Callable[..., Any]:
        """Several products in one piece, as a layer has them: calling a piece costs as well."""
        graph = fx.Graph()
        activation, *operands = (graph.placeholder(f"operand_{place}") for place in range(len(weights) + 1))
        graph.output(tuple(graph.call_function(by_loop, (activation, operand, None)) for operand in operands))
        return self._compiler(fx.GraphModule({}, graph), [row, *weights])


def is_steady(weight: torch.Tensor) -> bool:
    """Whether a row comes out the same to the last bit however many rows, up to `MOST`, are beside it.

    Kernels choose their blocks by the shape, so this is asked of each shape, and of so many numbers that blocks which
    differ show: most sums round to the same 16 bits in any order.
    """
    generator = torch.Generator().manual_seed(0)
    outputs, inputs = weight.shape
    compared = 0
    with torch.no_grad():
        while compared < _COMPARED:
            rows = torch.randn(MOST, inputs, generator=generator).to(weight.dtype)
            alone = torch.cat([single_row(row[None], weight, None) for row in rows])
            for count in range(2, MOST + 1):
                if not torch.equal(few_rows(rows[:count], weight, None), alone[:count]):
                    return False
                compared += count * outputs
    return True


def _each(form: Callable[[torch.Tensor], Any], together: Sequence[Sequence[torch.Tensor]]) -> list[Callable[[], Any]]:
    return [lambda part=part: [form(weight) for weight in part] for part in together]  # type: ignore[misc]


def _times(forms: Mapping[str, Sequence[Callable[[], Any]]]) -> dict[str, float]:
    """Seconds of a call by form, the least of many short ones in which the forms take turns: what no other process had
    a share in."""
    found = dict.fromkeys(forms, float("inf"))
    with torch.no_grad():
        for calls in forms.values():
            calls[0]()
        for turn in range(_ROUNDS * max(map(len, forms.values()))):
            for name, calls in forms.items():
                started = time.perf_counter()
                calls[turn % len(calls)]()
                found[name] = min(found[name], time.perf_counter() - started)
    return found


def lower_few_rows(pieces: Sequence[Piece], parameters: Mapping[str, torch.Tensor], forms: Forms) -> int:
    """Compute the 16-bit products of few rows in the form that was measured to be the fastest; with the weight first
    if a row then comes out the same beside any others, and all of them together lose no more than `WORTH` by that.

    Args:
        parameters: the values that are parameters, by name.

    Requires: the pieces serve activations of at most `MOST` rows, or of several numbers of rows.
    Ensures: the same products up to the order of their sums. Returns how many were rewritten.
    """
    found = [(piece, linear) for piece in pieces for linear in _products(piece, parameters)]
    alike: dict[Any, dict[int, torch.Tensor]] = {}
    for _, linear in found:
        weight = parameters[linear.weight]
        alike.setdefault(_kind(linear, weight), {})[id(weight)] = weight
    times = {kind: forms.times(list(weights.values()), kind[0]) for kind, weights in alike.items()}
    # By passes of one row, whatever this graph's are: all graphs of a model take the same form.
    weight_first = sum(len(weights) * times[kind].single["weight"] for kind, weights in alike.items())
    fastest = sum(len(weights) * min(times[kind].single.values()) for kind, weights in alike.items())
    steady = all(one.steady for one in times.values()) and weight_first <= (1 + WORTH) * fastest
    rewritten = 0
    for piece, linear in found:
        single = _is_single(linear)
        kind = _kind(linear, parameters[linear.weight])
        measured = times[kind].single if single else times[kind].few
        form = "weight" if steady else min(measured, key=lambda name: measured[name])
        if form != "linear":
            _rewrite(piece, linear, form, single)
            rewritten += 1
    return rewritten


def _products(piece: Piece, parameters: Collection[str]) -> list[Linear]:
    found = find_linears(piece, parameters, {}, "")
    return [one for one in found if value_of(one.node).dtype in SHORT]


def _kind(linear: Linear, weight: torch.Tensor) -> tuple[bool, torch.dtype, tuple[int, ...]]:
    return linear.transposed, weight.dtype, tuple(weight.shape)


def _is_single(linear: Linear) -> bool:
    """Whether it multiplies one row; the LM head may get the last one of several."""
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


def by_loop(activation: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """activation [..., inputs] of one row @ weight [outputs, inputs].T + bias, accumulated in float32, as a sum that
    Inductor makes a loop over the weight of."""
    result = (activation.float().unsqueeze(-2) * weight.float()).sum(-1)
    if bias is not None:
        result = result + bias.float()
    return result.to(activation.dtype)


def single_row(activation: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """As `few_rows`, for one row: it is computed twice, since one column alone is rounded otherwise than several."""
    pair = activation.reshape(1, -1).expand(2, -1).contiguous()
    result = torch.mm(weight, pair.t())[:, 0].reshape(*activation.shape[:-1], weight.shape[0])
    return result if bias is None else result + bias


def few_rows(activation: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """activation [..., inputs] of several rows @ weight [outputs, inputs].T + bias, as weight @ activation.T unless the
    rows are more than `MOST`."""
    result: torch.Tensor = torch.ops.river_compile.few_rows(activation, weight)
    return result if bias is None else result + bias


def _few_rows(activation: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if math.prod(activation.shape[:-1]) > MOST:
        return functional.linear(activation, weight)
    rows = activation.reshape(-1, activation.shape[-1])
    return torch.mm(weight, rows.t()).t().contiguous().view(*activation.shape[:-1], weight.shape[0])


# As one operator: a graph may serve few rows and many, and a compiler that sees the transposed result reads it in
# another order, and rounds what follows in another way.
seam.define_operator(
    "few_rows(Tensor activation, Tensor weight) -> Tensor",
    _few_rows,
    lambda activation, weight: activation.new_empty((*activation.shape[:-1], weight.shape[0])),
)
