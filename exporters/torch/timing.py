"""How long a product takes on this machine, in each form that it could have: timed once for each kind, and kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.nn import functional

from river_compile.exporters.torch.forms import MOST, SHORT, by_loop, few_rows, is_steady, single_row
from river_compile.exporters.torch.linear import int4_operands, int4_rows, int8_operands, int8_rows
from river_compile.passes.quantizer import QuantizedWeight

__all__ = ["GAIN", "SMALL", "Choice", "Forms", "Kind", "alike"]

SMALL = 2**16
"""Numbers of a weight below which a product is not bound by reading it, and takes the form of the fixed table."""
GAIN = 0.75
"""What part of the fixed table's time another form may take at most where only speed speaks for it: on a shared machine
two times of the same product differ by a fifth, and some forms cost more within a graph than alone."""

_ROUNDS, _TIMED, _JOINED = 6, 12, 4
_LARGEST = 2**24
_CACHE = 2**27


@dataclass(frozen=True)
class Kind:
    """Products that take the same time: ``rows`` of activations [rows, inputs] by a weight with ``outputs``.

    ``bits`` is None where the weight is the backbone's; ``transposed`` is whether it is [outputs, inputs].
    """

    rows: int
    inputs: int
    outputs: int
    dtype: torch.dtype
    bits: int | None = None
    group_size: int | None = None
    transposed: bool = True

    @classmethod
    def of(cls, weight: torch.Tensor, transposed: bool) -> Kind:
        """Products of one row with a weight of the backbone."""
        outputs, inputs = weight.shape if transposed else reversed(weight.shape)
        return cls(1, inputs, outputs, weight.dtype, transposed=transposed)

    def __str__(self) -> str:
        weight = "float" if self.bits is None else f"{self.bits} bits, groups of {self.group_size}"
        order = "" if self.transposed else ", [inputs, outputs]"
        return f"{self.rows} x {self.inputs} -> {self.outputs}, {_name(self.dtype)}, {weight}{order}"


def alike(weights: Iterable[tuple[torch.Tensor, bool]]) -> dict[Kind, list[torch.Tensor]]:
    """The backbone's weights by the kind of their products of one row; with each is given whether it is [outputs,
    inputs]."""
    found: dict[Kind, list[torch.Tensor]] = {}
    for weight, transposed in weights:
        found.setdefault(Kind.of(weight, transposed), []).append(weight)
    return found


@dataclass(frozen=True)
class Choice:
    """What kind a product is, the form that was taken, and its seconds by form."""

    product: str
    taken: str
    seconds: Mapping[str, float]


class Forms:
    """Times the forms of products on this machine.

    The float ones are "linear", torch's own; "loop", a sum that Inductor makes a loop over the weight of, for one row;
    and in 16 bits "weight", with the weight first. Those with quantized weights are "int4", torch's 4-bit kernel, for
    8 bits by two planes; and for 8 bits "int8", torch's kernel with one scale an output.

    Args:
        compiler: compiles a piece, for the loop.
        known: seconds by form, by kind and threads; read and added to.
    """

    def __init__(
        self,
        compiler: Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]],
        known: MutableMapping[str, Mapping[str, float]],
    ) -> None:
        self._compiler, self._known = compiler, known
        self.choices: dict[Kind, Choice] = {}

    def of_float(self, kind: Kind, weights: Sequence[torch.Tensor]) -> Mapping[str, float]:
        """Seconds of a product with weights of the backbone, which are all of this kind."""
        return self._found(kind, lambda: self._time_float(kind, weights[:_TIMED]))

    def of_river(self, kind: Kind) -> Mapping[str, float]:
        """Seconds of a product with a quantized weight."""
        return self._found(kind, lambda: _time_quantized(kind))

    def taken(self, kind: Kind) -> str:
        """The form of a product with a quantized weight, which has the same operands whatever the number of rows.

        One scale an output is a second rounding: it must be worth that, for one row.
        """
        if kind.bits != 8 or kind.inputs * kind.outputs < SMALL:
            return "int4"
        seconds = self.of_river(replace(kind, rows=1))
        return "int8" if seconds["int8"] < GAIN * seconds["int4"] else "int4"

    def prefers_int8(self, weight: QuantizedWeight, dtype: torch.dtype) -> bool:
        """Whether a weight with 8 bits, of a model of a type, is to have one scale an output."""
        outputs, groups, group_size = weight.values.shape
        return self.taken(Kind(1, groups * group_size, outputs, dtype, weight.bits, group_size)) == "int8"

    def are_steady(self, kind: Kind, weight: torch.Tensor) -> bool:
        """Whether `is_steady` holds of weights of a kind."""
        key = f"steady: {kind}"
        return bool(self._found(key, lambda: {"steady": float(is_steady(_ready(kind, weight)))})["steady"])

    def choose(self, kind: Kind, seconds: Mapping[str, float], taken: str) -> None:
        """Note what is taken of a kind."""
        self.choices[kind] = Choice(str(kind), taken, seconds)

    def _found(self, kind: Kind | str, measure: Callable[[], Mapping[str, float]]) -> Mapping[str, float]:
        key = f"{kind}, {torch.get_num_threads()} threads"
        if key not in self._known:
            self._known[key] = measure()
        return self._known[key]

    def _time_float(self, kind: Kind, weights: Sequence[torch.Tensor]) -> dict[str, float]:
        given = torch.ones((kind.rows, kind.inputs), dtype=kind.dtype)
        ready = [_ready(kind, weight) for weight in weights]
        together = [ready[start : start + _JOINED] for start in range(0, len(ready), _JOINED)]
        forms = {"linear": _each(lambda weight: functional.linear(given, weight), together)}
        if kind.rows == 1 and (kind.dtype in SHORT or kind.inputs * kind.outputs >= SMALL):
            looped = [part for part in together if len(part) == len(together[0])]
            loop = self._loop(given, looped[0])
            forms["loop"] = [lambda part=part: loop(given, *part) for part in looped]  # type: ignore[misc]
        if kind.rows <= MOST and kind.dtype in SHORT:
            weight_first = single_row if kind.rows == 1 else few_rows
            forms["weight"] = _each(lambda weight: weight_first(given, weight, None), together)
        return {name: seconds / len(together[0]) for name, seconds in _times(forms).items()}

    def _loop(self, row: torch.Tensor, weights: Sequence[torch.Tensor]) -> Callable[..., Any]:
        """Several products in one piece, as a layer has them: calling a piece costs as well."""
        graph = fx.Graph()
        activation, *operands = (graph.placeholder(f"operand_{place}") for place in range(len(weights) + 1))
        graph.output(tuple(graph.call_function(by_loop, (activation, operand, None)) for operand in operands))
        return self._compiler(fx.GraphModule({}, graph), [row, *weights])


def _ready(kind: Kind, weight: torch.Tensor) -> torch.Tensor:
    return (weight if kind.transposed else weight.t()).detach()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).rpartition(".")[2]


def _time_quantized(kind: Kind) -> dict[str, float]:
    """Of weights that are random, and of a large one only some outputs."""
    assert kind.bits is not None and kind.group_size is not None
    outputs = min(kind.outputs, max(_LARGEST // kind.inputs, 1))
    copies = max(min(_TIMED, _LARGEST // (outputs * kind.inputs)), 1)
    generator = np.random.default_rng(0)
    shape = (outputs, kind.inputs // kind.group_size, kind.group_size)
    weights = [
        QuantizedWeight(
            generator.integers(0, 2**kind.bits, shape, dtype=np.uint8),
            np.full(shape[:2], 0.01, np.float32),
            np.full(shape[:2], 2 ** (kind.bits - 1), np.uint8),
            kind.bits,
        )
        for _ in range(copies)
    ]
    rows = torch.ones((kind.rows, kind.inputs), dtype=torch.bfloat16)
    group_size = kind.group_size
    packed = [int4_operands(weight) for weight in weights]
    forms: dict[str, Sequence[Callable[[], Any]]] = {
        "int4": _each(lambda operands: int4_rows(rows, operands, group_size), [[one] for one in packed])
    }
    if kind.bits == 8:
        rounded = [int8_operands(weight)[0] for weight in weights]
        forms["int8"] = _each(lambda operands: int8_rows(rows, operands), [[one] for one in rounded])
    return {name: seconds * kind.outputs / outputs for name, seconds in _times(forms).items()}


def _each(form: Callable[[Any], Any], together: Sequence[Sequence[Any]]) -> list[Callable[[], Any]]:
    return [lambda part=part: [form(weight) for weight in part] for part in together]  # type: ignore[misc]


def _times(forms: Mapping[str, Sequence[Callable[[], Any]]]) -> dict[str, float]:
    """Seconds of a call by form, the least of several rounds in which the forms take turns: what no other process had a
    share in. As in a pass, the weights come from memory, and one product follows the other."""
    found = dict.fromkeys(forms, float("inf"))
    cache = torch.zeros(_CACHE // 4)
    with torch.no_grad():
        for calls in forms.values():
            calls[0]()
        for _ in range(_ROUNDS):
            for name, calls in forms.items():
                cache.add_(1)
                started = time.perf_counter()
                for call in calls:
                    call()
                found[name] = min(found[name], (time.perf_counter() - started) / len(calls))
    return found
