"""What belongs to a compiled model, whichever graphs serve it: its settings, its counts, what was compiled for it.

Dynamo gives one compiled graph to all models of one form, so a graph asks at each pass whose it is. The weights tell: a
model is who has them. Where all weights were exchanged, the module tells whose forward method is running.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from river_compile.config import NEVER, RiverConfig
from river_compile.exporters.torch.paging import Gate
from river_compile.exporters.torch.ranks import Ranks
from river_compile.exporters.torch.weights import Store

__all__ = ["GraphFacts", "State", "States", "calling_module", "forced_exits"]

_forced: ContextVar[tuple[float | None, int | None] | None] = ContextVar("river_forced_exits", default=None)


@contextmanager
def forced_exits(tau: float | None, max_depth: int | None) -> Iterator[None]:
    """Exit settings for the passes within, in this thread or task alone; a tau of None is the model's own."""
    token = _forced.set((tau, max_depth))
    try:
        yield
    finally:
        _forced.reset(token)


@dataclass
class GraphFacts:
    """What a graph brings into the `State` of a model that it serves.

    Fields:
        layers, river_layers: decoder layers, and those with a twin.
        replaced: places, among the graph's inputs, of the parameters that the river has quantized.
        notes: what did not go as asked, a line each.
        compiler: what compiled the graph; it is asked for the model's other graphs too.
        ranks: the processes over which the model is spread, if it is.
        artifacts: ids of the compiled pieces.
        seconds: spent for it; told to the first model only.
    """

    layers: int
    river_layers: int
    replaced: tuple[int, ...]
    notes: tuple[str, ...]
    compiler: Any
    ranks: Ranks | None = None
    artifacts: frozenset[int] = frozenset()
    seconds: float = field(default=0.0, compare=False)


class State:
    """One model, compiled with one config.

    Fields:
        tau, tau_offsets, max_depth: may be changed at any time.
        decode_depths, prefill_depths: passes by exit depth.
        unrecorded: graphs that go on without recordings, by reason.
        exact: of exact decoding: rounds, tokens drafted and accepted, near ties, milliseconds drafting and verifying.
        ranks: the processes over which the model is spread; None if it is not, or no graph has told yet.
        unverified: whether weights may have been changed without a trace since their samples were last compared.
        gate: what its passes go through; None where no weights are moved.
    """

    def __init__(self, config: RiverConfig, store: Store) -> None:
        self.config, self.store = config, store
        self.tau: float = config.tau
        self.tau_offsets: tuple[float, ...] | None = config.tau_offsets
        self.max_depth: int | None = config.max_depth
        self.decode_depths: Counter[int] = Counter()
        self.prefill_depths: Counter[int] = Counter()
        self.unrecorded: Counter[str] = Counter()
        self.exact: Counter[str] = Counter()
        self.ranks: Ranks | None = None
        self.unverified = True
        self.gate = Gate() if config.offloads else None
        self.module: weakref.ref[torch.nn.Module] | None = None
        self.parameters: MutableMapping[torch.Tensor, None] = WeakTensorKeyDictionary()
        self.replaced: MutableMapping[torch.Tensor, None] = WeakTensorKeyDictionary()
        self.fallbacks: Counter[str] = Counter()
        self.notes: dict[str, None] = {}
        self.artifacts: set[int] = set()
        self.layers = self.river_layers = self.graphs = 0
        self.seconds = 0.0
        self.compiler: Any = None
        self._lock = threading.Lock()

    @property
    def is_forced(self) -> bool:
        """Whether the pass under way has exit settings of its own."""
        return _forced.get() is not None

    def exits(self) -> tuple[float, int | None, tuple[float, ...] | None]:
        """Threshold, limit on the exit depth and offsets of the pass under way.

        A model that decodes exactly has no exits but those of its drafts, whoever calls it.
        """
        forced = _forced.get()
        if forced is None:
            return (NEVER, None, None) if self.config.exact else (self.tau, self.max_depth, self.tau_offsets)
        tau, max_depth = forced
        if tau is not None and tau > 1:
            return tau, max_depth, None
        return self.tau if tau is None else tau, max_depth, self.tau_offsets

    def count(self, depth: int, decode: bool) -> None:
        """One more pass that left the backbone at a depth."""
        with self._lock:
            (self.decode_depths if decode else self.prefill_depths)[depth] += 1

    def serve(self, facts: GraphFacts) -> None:
        """Note a graph that serves the model from now on."""
        with self._lock:
            self.layers = facts.layers
            self.river_layers = max(self.river_layers, facts.river_layers)
            self.graphs += 1
            self.notes |= dict.fromkeys(facts.notes)
            self.artifacts |= facts.artifacts
            self.compiler, self.ranks = facts.compiler, facts.ranks
            self.seconds, facts.seconds = self.seconds + facts.seconds, 0.0

    def note_inputs(self, inputs: Sequence[Any], replaced: Iterable[int] = ()) -> None:
        """Note the parameters among a graph's inputs, and the places of those that the river has quantized."""
        for value in inputs:
            if isinstance(value, torch.nn.Parameter):
                self.parameters[value] = None
        for place in replaced:
            self.replaced[inputs[place]] = None


class States:
    """The states of all models, by config, found by their weights or by their modules."""

    def __init__(self) -> None:
        self._of_parameter: MutableMapping[torch.Tensor, list[State]] = WeakTensorKeyDictionary()
        self._of_module: MutableMapping[torch.nn.Module, list[State]] = weakref.WeakKeyDictionary()
        self._lock = threading.RLock()

    def of(self, parameters: Sequence[torch.Tensor], config: RiverConfig, store: Store) -> State:
        """The state of the model that has these weights, the decoder layers' first: found, or a new one.

        Requires: the model's forward method is running, or there is none.
        """
        with self._lock:
            module = calling_module()
            found = self._known(parameters[:1], config)
            found = found or self._known_by_module(parameters, module, config) or State(config, store)
            self.bind(parameters, found, module)
            return found

    def known(self, parameters: Sequence[torch.Tensor], config: RiverConfig) -> State | None:
        """The state that some parameters have got."""
        with self._lock:
            return self._known(parameters, config)

    def bind(self, parameters: Iterable[torch.Tensor], state: State, module: torch.nn.Module | None = None) -> None:
        """Let a state be found by these parameters, and by this module."""
        with self._lock:
            for parameter in parameters:
                _add(self._of_parameter.setdefault(parameter, []), state)
            if module is not None:
                _add(self._of_module.setdefault(module, []), state)
                if state.module is None:
                    state.module = weakref.ref(module)

    def of_model(self, model: torch.nn.Module) -> list[State]:
        """All states of a model, of its parts, and of its weights, in the order in which they came."""
        found: list[State] = []
        with self._lock:
            for parameter in model.parameters():
                for state in self._of_parameter.get(parameter, ()):
                    _add(found, state)
            for module in model.modules():
                for state in self._of_module.get(module, ()):
                    _add(found, state)
        return found

    def _known(self, parameters: Iterable[torch.Tensor], config: RiverConfig) -> State | None:
        for parameter in parameters:
            for state in self._of_parameter.get(parameter, ()):
                if state.config == config:
                    return state
        return None

    def _known_by_module(
        self, parameters: Sequence[torch.Tensor], module: torch.nn.Module | None, config: RiverConfig
    ) -> State | None:
        """The state of a model whose weights were exchanged, some of them or all."""
        some = self._known(parameters, config)
        if some is not None and (module is None or some.module is None or some.module() in (module, None)):
            return some
        if module is None:
            return None
        here = list(module.parameters())
        for state in self._of_module.get(module, ()):
            # A module may hold several models: those that still have their weights are others.
            if state.config == config and not any(parameter in state.replaced for parameter in here):
                return state
        return None


def calling_module() -> torch.nn.Module | None:
    """The innermost module whose method is running, decorated or not."""
    frame = sys._getframe(1)
    while frame is not None:
        names = frame.f_locals
        arguments = names.get("args")
        first = arguments[0] if isinstance(arguments, tuple) and arguments else None
        for found in (names.get("self"), first):
            if isinstance(found, torch.nn.Module):
                return found
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _add(states: list[State], state: State) -> None:
    if not any(known is state for known in states):
        states.append(state)
