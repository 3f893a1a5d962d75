"""torch.compile as a destination: compiled pieces, and the host that runs backbone layers, then the river.

One artifact serves every layer of the same form (regional compilation), and the host chooses before each layer.
"""

from __future__ import annotations

import dataclasses
import operator
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import fx

from river_compile.config import NEVER
from river_compile.exporters.torch import seam
from river_compile.exporters.torch.artifacts import Artifacts
from river_compile.exporters.torch.freshness import samples, traces
from river_compile.exporters.torch.graphs import Pass, Program, Recordings
from river_compile.exporters.torch.offload import check, let_go, offload
from river_compile.exporters.torch.paging import Paged
from river_compile.exporters.torch.ranks import Spread
from river_compile.exporters.torch.recorder import Recorder
from river_compile.exporters.torch.state import GraphFacts, State
from river_compile.exporters.torch.weights import Quantized
from river_compile.passes.anatomy import Anatomy
from river_compile.passes.fx.graph import FxGraph, value_of, written_inputs
from river_compile.passes.fx.grow_river import Product, Twin
from river_compile.passes.fx.insert_exits import similarity_name
from river_compile.passes.fx.pieces import Piece
from river_compile.passes.fx.share_kv import Plan

__all__ = ["LOOKS", "Dispatcher"]

LOOKS = 8
"""Decode passes from one look at samples of a weight to the next."""


@dataclass
class _Call:
    """A compiled piece in its place: where its operands are and where its results go in the list of all values;
    ``weights`` are the places of the parameters among its operands."""

    run: Callable[..., Any]
    operands: Callable[[list[Any]], tuple[Any, ...]]
    results: tuple[int, ...]
    weights: tuple[int, ...] = ()

    def __call__(self, values: list[Any]) -> None:
        for place, result in zip(self.results, self.run(*self.operands(values)), strict=True):
            values[place] = result


@dataclass
class _Segment:
    """Calls one after the other, and the places of what others read of theirs."""

    calls: tuple[Callable[[list[Any]], None], ...]
    results: tuple[int, ...]

    def __call__(self, values: list[Any]) -> None:
        for call in self.calls:
            call(values)


@dataclass
class _Layer:
    """A layer's two calls. ``similarity`` is the place of the similarity, None where no exit is decided."""

    backbone: _Call
    river: _Call | None = None
    similarity: int | None = None


@dataclass(frozen=True)
class _Served:
    """A model that the graph serves, and its river: what that was made of, and the operands by their places.

    Nothing of it is changed, so passes in several threads have one each. The weights are not kept alive.
    """

    state: State
    key: weakref.ref[torch.Tensor]
    others: tuple[weakref.ref[torch.Tensor], ...]
    epoch: int
    traces: tuple[Any, ...]
    samples: Sequence[torch.Tensor]
    sample_of: Sequence[Sequence[torch.Tensor]]
    operands: tuple[tuple[int, torch.Tensor], ...]
    program: Program
    paged: Paged
    recordings: Recordings | None
    recorded_river: int = 0


class Dispatcher:
    """The compiled graph: prefix, layers, suffix, each layer by one of its twins.

    Called with the graph's inputs, it returns what the graph returns. Once the flag is set it stays set for this
    pass (paper, section 3). Layers without a twin always run on the backbone.

    It serves every model of its form, each with a `State` and a river of its own; passes may run in several threads at
    once. Each pass looks for traces of a change of the weights that the river stands for. The first decode pass after a
    prompt compares samples of all of them; on a CPU every `LOOKS`-th compares those of one, in turn. If there was a
    change, the river is quantized anew before it runs. Of offloaded weights the samples are those that the last pass
    over several tokens noted where it ran their layers: to look at them is to read them from the disk.

    Args:
        state_of: the state of the model that has these weights, those of the decoder layers in order.
        facts: what is told to each model's state; completed here.
        recorder: makes what records decode passes; None: nothing is recorded.
        spread: of a model that is spread over processes: they leave the backbone together.
        closed: the river is no faster than the backbone here: no similarity makes a pass exit unless the exit settings
            are the pass's own.
    """

    def __init__(
        self,
        graph: FxGraph,
        anatomy: Anatomy,
        plan: Plan,
        points: Sequence[int],
        weights: Quantized,
        state_of: Callable[[Sequence[torch.Tensor]], State],
        facts: GraphFacts,
        artifacts: Artifacts,
        recorder: Callable[[], Recorder] | None = None,
        spread: Spread | None = None,
        closed: bool = False,
    ) -> None:
        self._weights, self._points = weights, frozenset(points)
        self._parameters = graph.weights
        self._state_of, self._recorder = state_of, recorder
        self._closed = closed
        self._spread, self._ranks = spread, None if spread is None else spread.ranks
        self._places: dict[str, int] = {}
        inputs = graph.placeholders
        for node in inputs:
            self._place(node.name)
        self._inputs = len(inputs)
        self._shards = tuple(self._places[name] for name in (spread.shards if spread is not None else ()))
        self._constants = [
            (self._place(node.name), _constant(graph.module, node))
            for node in graph.module.graph.nodes
            if node.op == "get_attr" and node not in graph.steps
        ]
        state = next(value_of(node) for node in graph.steps if node.name == anatomy.layers[0].hidden_out)
        self._device = state.device
        self.is_decode = state.dim() < 3 or state.shape[1] == 1
        prefix = (self._call(plan.prefix, artifacts),) if plan.prefix else ()
        self._products: dict[tuple[int, ...], tuple[Product, tuple[int, ...]]] = {}
        self._layers = [
            self._layer(piece, plan.twins.get(index), index, artifacts) for index, piece in enumerate(plan.layers)
        ]
        suffix = (self._call(plan.suffix, artifacts),) if plan.suffix else ()
        exit_suffix = (self._call(plan.exit_suffix, artifacts),) if plan.exit_suffix else suffix
        self._place_products(plan.exit_products)
        self._output = graph.output.args[0]
        self._returned = _flat_places(self._output, self._places)
        self._blank: list[Any] = [None] * (len(self._places) - self._inputs)
        self._program = self._cut(graph, prefix, suffix, exit_suffix)
        members = [name for piece in plan.layers for name in piece.inputs if name in graph.weights]
        self._members = tuple(self._places[name] for name in dict.fromkeys(members))
        river = (places for _, places in self._products.values())
        self._river_weights = tuple(dict.fromkeys(place for places in river for place in places))
        self._weights_of = _getter(self._river_weights)
        layers = [call for layer in self._layers for call in (layer.backbone, layer.river) if call is not None]
        calls = [*prefix, *layers, *suffix, *(exit_suffix if plan.exit_suffix else ())]
        river_chain = [layer.river or layer.backbone for layer in self._layers]
        self._chains = (river_chain, [layer.backbone for layer in self._layers])
        self._only_backbones = _read_once(self._layers, calls)
        self._served: dict[int, _Served] = {}
        self._recordings: MutableMapping[State, Recordings | None] = weakref.WeakKeyDictionary()
        self._lock = threading.RLock()
        self._turn = count()
        facts.artifacts = frozenset(id(call.run) for call in calls)
        self._facts = facts

    @property
    def decisions(self) -> tuple[tuple[bool, bool], ...]:
        """Of each layer whether it has a twin, and whether a pass may leave the backbone after it."""
        return tuple((layer.river is not None, layer.similarity is not None) for layer in self._layers)

    def __call__(self, *arguments: Any) -> Any:
        if self._spread is None:
            return self._pass(arguments)
        try:
            return self._pass(self._spread.arguments(arguments))
        except Exception as error:
            raise self._spread.ranks.failure(error) from error

    def _pass(self, arguments: Sequence[Any]) -> Any:
        served = self._serve(arguments)
        values = [*arguments, *self._blank]
        for place in self._shards:
            values[place] = seam.shard_of(arguments[place])
        for place, constant in self._constants:
            values[place] = constant
        for place, operand in served.operands:
            values[place] = operand
        served.paged.check()
        recordings = served.recordings
        this = Pass(served.program, values) if recordings is None else recordings.begin(values, served.recorded_river)
        try:
            with served.state.gate or nullcontext():
                depth = self._run(this, served.state)
        finally:
            this.end()
        served.state.count(depth + sum(layer.river is None for layer in self._layers[depth:]), self.is_decode)
        if self._returned is not None:
            return tuple(None if place is None else values[place] for place in self._returned)
        return fx.map_arg(self._output, lambda node: values[self._places[node.name]])

    def _run(self, this: Pass, state: State) -> int:
        """Run the graph; after how many layers it went on in the river."""
        tau, limit, offsets = state.exits()
        if self._closed and not state.is_forced:
            tau, offsets = NEVER, None
        if self._ranks is not None:
            tau, limit, offsets = self._ranks.exits(len(self._layers), tau, limit, offsets)
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
                and self._similarity(this, depth - 1, threshold) > threshold
            ):
                break
        this.tail(depth)
        return depth

    def _similarity(self, this: Pass, index: int, threshold: float) -> float:
        """The similarity of a layer; the first process's, if there are others."""
        if self._ranks is None:
            return this.similarity(index)
        # Exits are off, in all of them: there is nothing to agree on.
        return self._ranks.first([this.similarity(index)])[0] if threshold <= 1 else 0.0

    def _serve(self, arguments: Sequence[Any]) -> _Served:
        """The model whose weights these are, with its river as the weights are now."""
        key = arguments[self._members[0]] if self._members else self
        weights = self._weights_of(arguments)
        served = self._served.get(id(key))
        known = served is not None and served.key() is key
        if served is None or not known:
            served = self._take_on(key, weights, arguments, None)
        state = served.state
        if not self.is_decode and not state.is_forced:
            state.unverified = True
        if not known:
            return served
        if served.epoch != self._weights.store.epoch or served.traces != traces(weights):
            return self._take_on(key, weights, arguments, served)
        if not self._verify(served, weights):
            return self._take_on(key, weights, arguments, served)
        return served

    def _verify(self, served: _Served, weights: Sequence[torch.Tensor]) -> bool:
        """Whether samples of the weights are what they were: of all if that is due, else of one in turn."""
        if not weights:
            return True
        weights = served.paged.in_memory(weights)
        if served.state.unverified:
            served.state.unverified = False
            return served.paged.is_unchanged() and all(map(torch.equal, samples(weights), served.samples))
        if self._device.type != "cpu" or not weights:
            # Reading them would wait for the device.
            return True
        passes = next(self._turn)
        if passes % LOOKS:
            return True
        turn = passes // LOOKS % len(weights)
        return all(map(torch.equal, samples([weights[turn]]), served.sample_of[turn]))

    def _take_on(
        self, key: Any, weights: Sequence[torch.Tensor], arguments: Sequence[Any], before: _Served | None
    ) -> _Served:
        """Serve a model that is new here, or whose weights were changed: quantize what they are now."""
        with self._lock:
            members = [arguments[i] for i in self._members]
            check(members)
            state = before.state if before is not None else self._state_of(members)
            if state not in self._recordings:
                state.serve(self._facts)
                recorded = self._recorder is not None and self.is_decode
                self._recordings[state] = self._new_recordings(state) if recorded else None
            state.note_inputs(arguments, self._facts.replaced)
            recordings = self._recordings[state]
            if recordings is not None:
                recordings.forget_tails()
            store = self._weights.store
            store.renew(weights)
            self._offload(state, weights, arguments)
            paged = Paged(self._chains, arguments, weights, notes=not self.is_decode)
            in_memory = paged.in_memory(weights)
            forget = _forgetter(self._served, id(key))
            served = _Served(
                state,
                weakref.ref(key, forget),
                tuple(weakref.ref(weight, forget) for weight in weights),
                store.epoch,
                traces(weights),
                samples(in_memory),
                [samples([weight]) for weight in in_memory],
                tuple(self._operands(arguments)),
                self._paging(paged) if paged else self._program,
                paged,
                None if paged else recordings,
                0 if recordings is None else recordings.river,
            )
            self._served[id(key)] = served
            # Whatever was read of them, to look or to quantize.
            let_go(members)
            return served

    def _offload(self, state: State, weights: Sequence[torch.Tensor], arguments: Sequence[Any]) -> None:
        """Move into a file what only the backbones of deep layers read, if the model's config says so; what is spread
        over processes stays."""
        if self._spread is not None or not weights or not state.config.offloads:
            return
        layers = [[arguments[i] for i in places] for places in self._only_backbones]
        sizes = [sum(arguments[i].nbytes for i in layer.backbone.weights) for layer in self._layers]
        assert state.gate is not None
        with state.gate.closed():
            moved = offload(state.config, layers, sizes, state.notes)
        if moved:
            self._weights.store.moved(weights)

    def _paging(self, paged: Paged) -> Program:
        heads, tails = (
            [_Segment(paged.calls(one.calls), one.results) for one in segments if isinstance(one, _Segment)]
            for segments in (self._program.heads, self._program.tails)
        )
        return dataclasses.replace(self._program, heads=heads, tails=tails)

    def _operands(self, arguments: Sequence[Any]) -> Iterator[tuple[int, torch.Tensor]]:
        """The river's operands and their places, for the weights among the arguments."""
        for places, (product, weights) in self._products.items():
            yield from zip(places, self._weights.of([arguments[i] for i in weights], product), strict=True)

    def _new_recordings(self, state: State) -> Recordings:
        assert self._recorder is not None
        return Recordings(self._program, self._recorder, self._device, state.unrecorded)

    def _cut(
        self, graph: FxGraph, prefix: tuple[_Call, ...], suffix: tuple[_Call, ...], exit_suffix: tuple[_Call, ...]
    ) -> Program:
        """The program; a piece that is compiled once stands in as many segments as there are ways to come to it."""
        count = len(self._layers)
        returned = tuple(dict.fromkeys(self._places[node.name] for node in graph.results))
        heads, tails = [], []
        for index, layer in enumerate(self._layers):
            calls = (*(prefix if index == 0 else ()), layer.backbone)
            heads.append(_Segment(calls, tuple(place for call in calls for place in call.results)))
        for depth in range(count + 1):
            river = [layer.river or layer.backbone for layer in self._layers[depth:]]
            calls = (*(prefix if depth == 0 else ()), *river, *(suffix if depth == count else exit_suffix))
            written = {place for call in calls for place in call.results}
            tails.append(_Segment(calls, tuple(place for place in returned if place in written)))
        written_names = written_inputs(graph)
        names = tuple(node.name for node in graph.placeholders)
        fixed = frozenset(i for i, name in enumerate(names) if name in written_names or name in graph.weights)
        return Program(heads, tails, [layer.similarity for layer in self._layers], returned, names, fixed)

    def _place(self, name: str) -> int:
        return self._places.setdefault(name, len(self._places))

    def _call(self, piece: Piece, artifacts: Artifacts) -> _Call:
        operands = [self._place(name) for name in piece.inputs]
        results = tuple(self._place(name) for name in piece.outputs)
        weights = tuple(self._place(name) for name in piece.inputs if name in self._parameters)
        return _Call(artifacts.compile(piece), _getter(operands), results, weights)

    def _layer(self, piece: Piece, twin: Twin | None, index: int, artifacts: Artifacts) -> _Layer:
        name = similarity_name(index)
        backbone = self._call(piece, artifacts)
        layer = _Layer(backbone, similarity=self._places[name] if index + 1 in self._points else None)
        if twin is None:
            return layer
        layer.river = self._call(twin.river, artifacts)
        self._place_products(twin.products)
        return layer

    def _place_products(self, products: Mapping[tuple[str, ...], Product]) -> None:
        """Note the river's products by the places of their operands, each with the places of its weights."""
        for names, product in products.items():
            parameters = tuple(self._places[linear.weight] for linear in product.linears)
            self._products[tuple(self._places[name] for name in names)] = (product, parameters)


def _read_once(layers: Sequence[_Layer], calls: Sequence[_Call]) -> list[list[int]]:
    """For each layer with a twin the places of the weights that nothing but its backbone reads."""
    read = Counter(place for call in calls for place in set(call.weights))
    own = ((layer.backbone.weights if layer.river else ()) for layer in layers)
    return [[place for place in places if read[place] == 1] for places in own]


def _forgetter(served: dict[int, _Served], key: int) -> Callable[[Any], None]:
    """What is called when one of a model's weights is gone."""
    return lambda _: served.pop(key, None)  # type: ignore[return-value]


def _getter(places: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
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
