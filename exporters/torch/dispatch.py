"""torch.compile as a destination: compiled pieces, and the host that runs backbone layers, then the river.

One artifact serves every layer of the same form (regional compilation), and the host chooses before each layer.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import fx

from river_compile.exporters.torch import seam
from river_compile.exporters.torch.graphs import Pass, Program, Recordings
from river_compile.exporters.torch.recorder import Recorder
from river_compile.exporters.torch.versions import versions
from river_compile.exporters.torch.weights import GraphWeights
from river_compile.passes.anatomy import Anatomy
from river_compile.passes.fx.graph import FxGraph, value_of, written_inputs
from river_compile.passes.fx.grow_river import Product, Twin
from river_compile.passes.fx.insert_exits import similarity_name
from river_compile.passes.fx.pieces import Piece, Symbols, signature
from river_compile.passes.fx.share_kv import Plan

__all__ = ["Artifacts", "Controls", "Dispatcher"]


class Controls(Protocol):
    """What can be changed while a compiled model runs, and what it counts."""

    tau: float
    tau_offsets: tuple[float, ...] | None
    max_depth: int | None
    decode_depths: Counter[int]
    prefill_depths: Counter[int]
    unrecorded: Counter[str]


@dataclass
class _Artifact:
    """A compiled piece, and the guards on its symbolic sizes (by their new names) under which it holds."""

    run: Callable[..., Any]
    guards: list[Any]


class Artifacts:
    """Compiled pieces by their signature: two of one form are compiled once, within a graph and across graphs."""

    def __init__(self, compiler: Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]) -> None:
        self._compiler = compiler
        self._held: dict[str, list[_Artifact]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._held.values()))

    def compile(self, piece: Piece) -> Callable[..., Any]:
        """The compiled piece: operands in, a sequence of its outputs out.

        Requires: a compilation by Dynamo under way, to whose trace the piece's values belong.
        """
        symbols = Symbols(seam.describe_symbol)
        known = self._held.setdefault(f"{seam.describe_modes()}\n{signature(piece, symbols)}", [])
        old_names = {name: symbol for symbol, name in symbols.names.items()}
        for artifact in known:
            if all(seam.holds(_renamed(guard, old_names)) for guard in artifact.guards):
                return artifact.run
        values = [seam.as_it_is_now(value_of(node)) for node in piece.placeholders.values()]
        with seam.guards_since() as guards:
            run = self._compiler(piece.module, values)
        mine = [guard for guard in guards if guard.free_symbols <= symbols.names.keys()]
        known.append(_Artifact(run, [_renamed(guard, symbols.names) for guard in mine]))
        return run


def _renamed(expression: Any, names: dict[Any, Any]) -> Any:
    import sympy

    return expression.xreplace(
        {
            symbol: sympy.Symbol(name) if isinstance(name := names[_key(symbol, names)], str) else name
            for symbol in expression.free_symbols
        }
    )


def _key(symbol: Any, names: dict[Any, Any]) -> Any:
    return symbol if symbol in names else str(symbol)


@dataclass
class _Call:
    """A compiled piece in its place: where its operands are and where its results go in the list of all values."""

    run: Callable[..., Any]
    operands: Callable[[list[Any]], tuple[Any, ...]]
    results: tuple[int, ...]


@dataclass
class _Segment:
    """Calls one after the other, and the places of what others read of theirs."""

    calls: tuple[_Call, ...]
    results: tuple[int, ...]

    def __call__(self, values: list[Any]) -> None:
        for call in self.calls:
            for place, result in zip(call.results, call.run(*call.operands(values)), strict=True):
                values[place] = result


@dataclass
class _Layer:
    """A layer's two calls. ``parameters`` are the places of the weights that the river piece stands for, with what was
    there when it was quantized; ``similarity`` is the place of the similarity, None where no exit is decided."""

    backbone: _Call
    river: _Call | None = None
    similarity: int | None = None
    parameters: tuple[int, ...] = ()
    expected: tuple[torch.Tensor, ...] = ()
    state: tuple[int, ...] = ()
    products: dict[tuple[int, ...], tuple[Product, tuple[int, ...]]] = field(default_factory=dict)


class Dispatcher:
    """The compiled graph: prefix, layers, suffix, each layer by one of its twins.

    Called with the graph's inputs, it returns what the graph returns. Once the flag is set it stays set for this
    pass (paper, section 3). Layers without a twin always run on the backbone.

    Args:
        recorder: makes what records decode passes; None: nothing is recorded.
    """

    def __init__(
        self,
        graph: FxGraph,
        anatomy: Anatomy,
        plan: Plan,
        points: Sequence[int],
        weights: GraphWeights,
        controls: Controls,
        artifacts: Artifacts,
        recorder: Callable[[], Recorder] | None = None,
    ) -> None:
        self._controls, self._weights, self._points = controls, weights, frozenset(points)
        self._places: dict[str, int] = {}
        inputs = graph.placeholders
        for node in inputs:
            self._place(node.name)
        self._inputs = len(inputs)
        self._constants = [
            (self._place(node.name), _constant(graph.module, node))
            for node in graph.module.graph.nodes
            if node.op == "get_attr" and node not in graph.steps
        ]
        state = next(value_of(node) for node in graph.steps if node.name == anatomy.layers[0].hidden_out)
        self.is_decode = state.dim() < 3 or state.shape[1] == 1
        prefix = (self._call(plan.prefix, artifacts),) if plan.prefix else ()
        self._layers = [
            self._layer(piece, plan.twins.get(index), index, artifacts) for index, piece in enumerate(plan.layers)
        ]
        suffix = (self._call(plan.suffix, artifacts),) if plan.suffix else ()
        self._output = graph.output.args[0]
        self._returned = _flat_places(self._output, self._places)
        self._blank: list[Any] = [None] * (len(self._places) - self._inputs)
        self._own = [(place, operand) for place, operand in self._river_operands()]
        self._program = self._cut(graph, prefix, suffix)
        self._recordings: Recordings | None = None
        if recorder is not None and self.is_decode:
            self._recordings = Recordings(self._program, recorder, state.device, controls.unrecorded)

    def __call__(self, *arguments: Any) -> Any:
        values = [*arguments, *self._blank]
        for place, constant in self._constants:
            values[place] = constant
        for place, operand in self._own:
            values[place] = operand
        this = Pass(self._program, values) if self._recordings is None else self._recordings.begin(values)
        depth = self._run(this)
        depths = self._controls.decode_depths if self.is_decode else self._controls.prefill_depths
        depths[depth + sum(layer.river is None for layer in self._layers[depth:])] += 1
        if self._returned is not None:
            return tuple(None if place is None else values[place] for place in self._returned)
        return fx.map_arg(self._output, lambda node: values[self._places[node.name]])

    def _run(self, this: Pass) -> int:
        """Run the graph; after how many layers it went on in the river."""
        tau, limit = self._controls.tau, self._controls.max_depth
        offsets = self._controls.tau_offsets
        limit = len(self._layers) if limit is None else min(limit, len(self._layers))
        depth = 0
        while depth < limit:
            this.head(depth)
            depth += 1
            threshold = tau + (offsets[depth - 1] if offsets else 0.0)
            # Where the next layer is the river's anyway, waiting for the similarity would be for nothing.
            if (
                depth < limit
                and self._layers[depth - 1].similarity is not None
                and this.similarity(depth - 1) > threshold
            ):
                break
        for layer in self._layers[depth:]:
            if layer.river is not None and not _unchanged(layer, this.values):
                self._refresh(layer, this.values)
        this.tail(depth)
        return depth

    def _cut(self, graph: FxGraph, prefix: tuple[_Call, ...], suffix: tuple[_Call, ...]) -> Program:
        """The program; a piece that is compiled once stands in as many segments as there are ways to come to it."""
        count = len(self._layers)
        returned = tuple(dict.fromkeys(self._places[node.name] for node in graph.results))
        heads, tails = [], []
        for index, layer in enumerate(self._layers):
            calls = (*(prefix if index == 0 else ()), layer.backbone)
            heads.append(_Segment(calls, tuple(place for call in calls for place in call.results)))
        for depth in range(count + 1):
            river = [layer.river or layer.backbone for layer in self._layers[depth:]]
            calls = (*(prefix if depth == 0 else ()), *river, *suffix)
            written = {place for call in calls for place in call.results}
            tails.append(_Segment(calls, tuple(place for place in returned if place in written)))
        written_names = written_inputs(graph)
        names = tuple(node.name for node in graph.placeholders)
        fixed = frozenset(i for i, name in enumerate(names) if name in written_names or name in graph.weights)
        return Program(heads, tails, [layer.similarity for layer in self._layers], returned, names, fixed)

    def _refresh(self, layer: _Layer, values: list[Any]) -> None:
        """Quantize the weights that the model has now: they were exchanged or changed since."""
        for places, (product, parameters) in layer.products.items():
            operands = self._weights.of([values[place] for place in parameters], product)
            for place, operand in zip(places, operands, strict=True):
                values[place] = operand
        layer.expected = tuple(values[place] for place in layer.parameters)
        layer.state = versions(layer.expected)
        fresh = {place: values[place] for places in layer.products for place in places}
        self._own = [(place, fresh.get(place, operand)) for place, operand in self._own]
        if self._recordings is not None:
            self._recordings.forget_tails()

    def _place(self, name: str) -> int:
        return self._places.setdefault(name, len(self._places))

    def _call(self, piece: Piece, artifacts: Artifacts) -> _Call:
        operands = [self._place(name) for name in piece.inputs]
        results = tuple(self._place(name) for name in piece.outputs)
        return _Call(artifacts.compile(piece), _getter(operands), results)

    def _layer(self, piece: Piece, twin: Twin | None, index: int, artifacts: Artifacts) -> _Layer:
        name = similarity_name(index)
        backbone = self._call(piece, artifacts)
        layer = _Layer(backbone, similarity=self._places[name] if index + 1 in self._points else None)
        if twin is None:
            return layer
        layer.river = self._call(twin.river, artifacts)
        for names, product in twin.products.items():
            parameters = tuple(self._places[linear.weight] for linear in product.linears)
            layer.products[tuple(self._places[name] for name in names)] = (product, parameters)
            layer.parameters += parameters
            layer.expected += tuple(self._weights.parameter(linear.weight) for linear in product.linears)
        layer.state = versions(layer.expected)
        return layer

    def _river_operands(self) -> list[tuple[int, torch.Tensor]]:
        found = []
        for layer in self._layers:
            for places, (product, _) in layer.products.items():
                found += list(zip(places, self._weights.operands(product), strict=True))
        return found


def _unchanged(layer: _Layer, values: list[Any]) -> bool:
    """Whether the weights are those that the river was made of."""
    for place, expected in zip(layer.parameters, layer.expected, strict=True):
        if values[place] is not expected:
            return False
    return versions(layer.expected) == layer.state


def _getter(places: Sequence[int]) -> Callable[[list[Any]], tuple[Any, ...]]:
    if len(places) >= 2:
        return operator.itemgetter(*places)
    return lambda values: tuple(values[place] for place in places)


def _flat_places(output: Any, places: dict[str, int]) -> tuple[int | None, ...] | None:
    """Where each result is, if the graph returns a plain sequence of values."""
    if isinstance(output, (tuple, list)) and all(isinstance(item, fx.Node) or item is None for item in output):
        return tuple(None if item is None else places[item.name] for item in output)
    return None


def _constant(module: torch.nn.Module, node: fx.Node) -> Any:
    found: Any = module
    for part in str(node.target).split("."):
        found = getattr(found, part)
    return found
