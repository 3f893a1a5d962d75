"""``torch.compile(model, backend="river")``: a decoder with early exit, or plain Inductor where that cannot be."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from river_compile.compiled import MODELS, TUNED, combined, config_of, known_states
from river_compile.config import FLOAT, RiverConfig
from river_compile.errors import ConfigError, InputError, RiverError
from river_compile.exact_generate import exact
from river_compile.exporters.quantizers import quantizer, without_texts
from river_compile.exporters.torch import generate, hooked, offload, saved, seam
from river_compile.exporters.torch.artifacts import Artifacts
from river_compile.exporters.torch.attention import lower_attention
from river_compile.exporters.torch.dispatch import Dispatcher
from river_compile.exporters.torch.few_rows import lower_few_rows
from river_compile.exporters.torch.forms import MOST, SHORT
from river_compile.exporters.torch.linear import Lowering, lowering_for
from river_compile.exporters.torch.paying import river_time
from river_compile.exporters.torch.ranks import Ranks, Spread, ranks_of
from river_compile.exporters.torch.recorder import CudaRecorder, Recorder
from river_compile.exporters.torch.remembered import Remembered
from river_compile.exporters.torch.state import GraphFacts, State, calling_module
from river_compile.exporters.torch.timing import Choice, Forms
from river_compile.exporters.torch.weights import GraphWeights, Quantized, Store
from river_compile.passes.anatomy import Anatomy
from river_compile.passes.fx.find_layers import find_layers
from river_compile.passes.fx.graph import FxGraph, import_graph, value_of
from river_compile.passes.fx.grow_river import River, grow_river
from river_compile.passes.fx.insert_exits import insert_exits
from river_compile.passes.fx.localize_weights import localize_weights
from river_compile.passes.fx.share_head import share_head
from river_compile.passes.fx.share_kv import Plan, share_kv
from river_compile.passes.fx.verify import verify
from river_compile.statistics import Stats

__all__ = ["RiverBackend", "river"]

Compiled = Callable[..., Any]


class RiverBackend(State):
    """A backend for ``torch.compile``, and the state of what is compiled by it.

    Models compiled by one such object share settings and counts; each has a river of its own. Models compiled by the
    name "river" share nothing.

    Args:
        config: the settings; the defaults if None.
        lowering: how quantized weights are multiplied; the device's fastest if None.
        compiler: compiles a piece, or a whole graph that gets no river; Inductor if None.
        store: where river weights are held; backends that share one hold each weight once. One of its own if None,
            with what `tune` has made.
        recorder: makes, for a device, what records decode passes if ``cuda_graphs`` is set; CUDA graphs if None.
        state_of: the state of the model with some weights; this object's if None.
    """

    def __init__(
        self,
        config: RiverConfig | None = None,
        *,
        lowering: Lowering | None = None,
        compiler: Callable[[fx.GraphModule, Sequence[Any]], Compiled] | None = None,
        store: Store | None = None,
        recorder: Callable[[torch.device], Recorder] | None = None,
        state_of: Callable[[Sequence[torch.Tensor]], State] | None = None,
    ) -> None:
        super().__init__(config or RiverConfig(), store if store is not None else Store(TUNED))
        self._recorder, self._lowering, self._compiler = recorder, lowering, compiler
        self._artifacts = Artifacts(compiler or seam.compile_piece)
        self._compile_whole = compiler or seam.compile_whole
        self._forms = Forms(compiler or seam.compile_piece, _measured) if self.config.autotune else None
        self._state_of = state_of or self._own_state
        self._dumped = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> RiverBackend:
        """A backend like this one, for a copy of a model: nothing counted, with the settings of now."""
        copied = RiverBackend(
            self.config,
            lowering=self._lowering,
            compiler=self._compiler,
            store=self.store,
            recorder=self._recorder,
        )
        copied.tau, copied.tau_offsets, copied.max_depth = self.tau, self.tau_offsets, self.max_depth
        return copied

    def _own_state(self, parameters: Sequence[torch.Tensor]) -> State:
        MODELS.bind(parameters, self, calling_module())
        return self

    def __call__(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        """Compile one graph: with a river, or as plain Inductor does, warning once why.

        A user's mistake becomes a function that raises it, as Dynamo would wrap an error raised here.
        """
        started = time.perf_counter()
        dispatcher: Dispatcher | None = None
        ranks: Ranks | None = None
        problem: RiverError | None = None
        try:
            ranks = ranks_of(module.graph.nodes, inputs)
            dispatcher = self._with_river(module, inputs, ranks, started)
        except RiverError as error:
            problem = error
        except seam.dynamo_error():
            # How Dynamo starts its analysis anew.
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            problem = InputError(f"the passes failed with {reason}")
        if ranks is not None:
            problem = ranks.agree(problem, None if dispatcher is None else dispatcher.decisions)
        if isinstance(problem, ConfigError):
            return _raising(problem)
        if problem is not None:
            return self._fall_back(module, inputs, problem)
        assert dispatcher is not None
        return dispatcher

    @property
    def choices(self) -> tuple[Choice, ...]:
        """The products that were timed, and what was taken of each."""
        return () if self._forms is None else tuple(self._forms.choices.values())

    def stats(self) -> Stats:
        """What was compiled and done until now."""
        return combined([self])

    def _with_river(
        self, module: fx.GraphModule, inputs: Sequence[Any], ranks: Ranks | None, started: float
    ) -> Dispatcher:
        spread = None
        if ranks is not None:
            module, inputs, spread = _localized(module, inputs, ranks)
        graph, parameters = self._import(module, inputs)
        anatomy = find_layers(graph)
        verify(graph, anatomy, ["find_layers"])
        self._check(len(anatomy.layers))
        device, decode, rows = _place_of_work(graph, anatomy)
        lowering = self._lowering or lowering_for(device, None if self._forms is None else self._forms.prefers_int8)
        chosen = self.config.quantizer
        if self.config.saved_river is not None:
            chosen = saved.adopt(TUNED, parameters.values(), Path(self.config.saved_river), chosen)
        quantized = Quantized(self.store, lowering, quantizer(chosen), quantizer(without_texts(chosen)))
        weights = GraphWeights(quantized, parameters)
        shards = {name: seam.shard_of(parameter) for name, parameter in parameters.items()}
        # What each process measured would have them disagree on whether a prompt has a river.
        timed = self._forms if self._lowering is None and device.type == "cpu" and ranks is None else None
        grown, part = self._grow(graph, anatomy, weights, shards, timed)
        verify(graph, anatomy, ["find_layers", "grow_river"], grown)
        plan = share_kv(graph, anatomy, grown)
        verify(graph, anatomy, ["find_layers", "grow_river", "share_kv"], grown, plan)
        points = insert_exits(graph, anatomy, plan, self.config)
        verify(graph, anatomy, ["find_layers", "grow_river", "share_kv", "insert_exits"], grown, plan)
        share_head(graph, plan, self._head_config, weights)
        verify(graph, anatomy, ["find_layers", "grow_river", "share_kv", "insert_exits", "share_head"], grown, plan)
        self._lower(plan, shards, device, rows)
        if self.config.dump_dir is not None:
            _dump(self.config, graph, plan, self._dumped)
            self._dumped += 1
        notes = [*grown.notes]
        slow = decode and part is not None and part >= 1
        if slow and not self.config.exact:
            notes.append(
                f"exits are closed in passes of {rows} rows: the river's products take {part:.2f} times as long as the "
                "backbone's there"
            )
        recorder = self._recorder_for(device, notes, spread)
        if spread is not None and self.config.offloads:
            notes.append("offload_after has no effect on a model that is spread over processes")
        quantized_names = {linear.weight for linear in grown.linears if linear.bits is not None}
        places = (place for place, node in enumerate(graph.placeholders) if node.name in quantized_names)
        facts = GraphFacts(len(anatomy.layers), len(grown.twins), tuple(places), tuple(notes), self, ranks)
        dispatcher = Dispatcher(
            graph, anatomy, plan, points, quantized, self._state_of, facts, self._artifacts, recorder, spread, slow
        )
        facts.seconds = time.perf_counter() - started
        return dispatcher

    def _grow(
        self,
        graph: FxGraph,
        anatomy: Anatomy,
        weights: GraphWeights,
        parameters: Mapping[str, torch.Tensor],
        forms: Forms | None,
    ) -> tuple[River, float | None]:
        """The river of a graph, none of a prompt's that would not pay; and the time of its products as a part of that
        of the backbone's, where it is measured."""
        _, decode, rows = _place_of_work(graph, anatomy)
        wanted = decode or self.config.prefill == "river"
        known = weights.quantized.lowering.max_rows
        if not wanted:
            most = known if forms is None else MOST
            if self.config.prefill == "backbone" or not isinstance(rows, int) or rows > most:
                return River(), None
        grown = grow_river(graph, anatomy, self.config, weights)
        part = None
        if forms is not None and isinstance(rows, int):
            part = river_time(grown.twins.values(), parameters, forms, rows)
        pays = rows <= known if part is None else part < 1
        return (grown, part) if wanted or pays else (River(), None)

    def _lower(
        self, plan: Plan, parameters: Mapping[str, torch.Tensor], device: torch.device, rows: int | torch.SymInt
    ) -> None:
        """Write the backbone's operations as this machine runs them fastest, and if that costs little such that a row
        does not depend on how many are beside it."""
        if device.type != "cpu":
            return
        if self._forms is not None and (not isinstance(rows, int) or rows <= MOST):
            lower_few_rows(plan.every_piece, parameters, self._forms, rows if isinstance(rows, int) else None)
        if rows != 1 and any(value.dtype in SHORT for value in parameters.values()):
            for piece in plan.every_piece:
                lower_attention(piece)

    @property
    def _head_config(self) -> RiverConfig:
        """Where the river only drafts, its head may be rounded: eight bits are hardly ever refused."""
        drafts = self.config.exact and self.config.head_bits == FLOAT
        return dataclasses.replace(self.config, head_bits=8) if drafts else self.config

    def _check(self, layers: int) -> None:
        if self.config.kv_policy != "share":
            raise ConfigError(
                "kv_policy", f"this backend shares its KV cache; {self.config.kv_policy!r} is to compare with"
            )
        offsets = self.config.tau_offsets
        if offsets and len(offsets) != layers:
            raise ConfigError("tau_offsets", f"{len(offsets)} numbers for a stack of {layers} layers")

    def _import(self, module: fx.GraphModule, inputs: Sequence[Any]) -> tuple[FxGraph, Mapping[str, torch.Tensor]]:
        """The graph, and its parameters by name. No other input is kept: the caches would stay alive."""
        if hooked.is_hooked(calling_module()):
            raise InputError(
                "accelerate has hooks in this model (device_map, offload_folder), and no pass is one graph: call "
                "river_compile.offload(model, after=...) before it is compiled"
            )
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        parameters = {
            node.name: value
            for node, value in zip(placeholders, inputs, strict=True)
            if isinstance(value, torch.nn.Parameter)
        }
        if not parameters and any(isinstance(held, torch.nn.Parameter) for held in module.parameters()):
            raise InputError("the weights are frozen into the graph (torch._inductor.config.freezing is on)")
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters.values()):
            raise InputError("gradients are wanted (call the model under torch.no_grad)")
        offload.check(parameters.values())
        return import_graph(module, list(parameters)), parameters

    def _recorder_for(
        self, device: torch.device, notes: list[str], spread: Spread | None
    ) -> Callable[[], Recorder] | None:
        if not self.config.cuda_graphs:
            return None
        if spread is not None:
            notes.append("cuda_graphs has no effect on a model that is spread over processes")
            return None
        make = self._recorder
        if make is not None:
            return lambda: make(device)
        if device.type == "cuda":
            return lambda: CudaRecorder(device)
        notes.append(f"cuda_graphs has no effect on a {device.type} device")
        return None

    def _fall_back(self, module: fx.GraphModule, inputs: Sequence[Any], error: RiverError) -> Compiled:
        weights = _weights(inputs)
        if not weights and next(module.parameters(), None) is None:
            # Not the model itself but what is computed beside it, such as a mask.
            return self._compile_whole(module, inputs)
        if self.config.strict:
            return _raising(error)
        started = time.perf_counter()
        compiled = self._compile_whole(module, inputs)
        state = self._state_of(weights)
        state.note_inputs(inputs)
        state.seconds += time.perf_counter() - started
        why = str(error)
        if why not in state.fallbacks:
            warnings.warn(f"no exit river, compiled by plain Inductor: {why}", stacklevel=2)
        state.fallbacks[why] += 1
        return compiled


def _localized(
    module: fx.GraphModule, inputs: Sequence[Any], ranks: Ranks
) -> tuple[fx.GraphModule, Sequence[Any], Spread]:
    """The graph of a model that is spread over processes, and its inputs, by the shards that this one holds."""
    local = localize_weights(module, inputs)
    if local is None:
        return module, inputs, Spread(ranks)
    return local.module, [inputs[place] for place in local.order], Spread(ranks, local.order, local.shards)


def _weights(inputs: Sequence[Any]) -> list[torch.nn.Parameter]:
    return [value for value in inputs if isinstance(value, torch.nn.Parameter)]


def _raising(error: RiverError) -> Compiled:
    def fail(*arguments: Any) -> Any:
        raise error

    return fail


def _place_of_work(graph: FxGraph, anatomy: Anatomy) -> tuple[torch.device, bool, int | torch.SymInt]:
    """The device, whether each sequence has one token only, and the rows of the hidden state."""
    state = next(value_of(node) for node in graph.steps if node.name == anatomy.layers[0].hidden_out)
    rows: int | torch.SymInt = math.prod(state.shape[:-1])
    return state.device, state.dim() == 3 and state.shape[1] == 1, rows


def _dump(config: RiverConfig, graph: FxGraph, plan: Plan, number: int) -> None:
    assert config.dump_dir is not None
    config.dump_dir.mkdir(parents=True, exist_ok=True)
    parts = [f"# the whole graph\n{graph.module.print_readable(print_output=False)}"]
    for piece in plan.pieces:
        parts.append(f"# {', '.join(piece.outputs)}\n{piece.module().print_readable(print_output=False)}")
    for index, twin in plan.twins.items():
        parts.append(f"# river of layer {index}\n{twin.river.module().print_readable(print_output=False)}")
    (config.dump_dir / f"graph_{number}.txt").write_text("\n\n".join(parts))


_measured = Remembered()
_store = Store(TUNED)


def river(
    module: fx.GraphModule, inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, mode: str | None = None
) -> Compiled:
    """The backend named "river", found by torch through the entry point group ``torch_dynamo_backends``.

    Args:
        options: the fields of `RiverConfig`.
        mode: only the default one is known.

    A wrong option is a ConfigError, raised by the compiled model's first call.
    """
    try:
        if mode not in (None, "default"):
            raise ConfigError("mode", f"the river backend knows only the default mode, not {mode!r}")
        config = RiverConfig.from_options(options)
    except ConfigError as error:
        return _raising(error)
    parameters = _weights(inputs)
    known = MODELS.known(parameters, config)
    compiler = known.compiler if known is not None else None
    if compiler is None:
        compiler = RiverBackend(config, store=_store, state_of=lambda weights: MODELS.of(weights, config, _store))
    return compiler(module, inputs)  # type: ignore[no-any-return]


def _prepare(module: Any, name: str, settings: dict[str, Any]) -> None:
    """Let ``generate`` of a model compiled with ``exact`` decode exactly; take over from accelerate one that is to be
    offloaded."""
    config = config_of(module)
    if config.offloads and hooked.is_hooked(module._orig_mod):
        hooked.take_over(module._orig_mod, config)
    if name == "generate" and config.exact and settings.get("custom_generate") is None:
        settings["custom_generate"] = functools.partial(exact, streamer=settings.pop("streamer", None))


generate.install(lambda backend: backend is river or isinstance(backend, RiverBackend), known_states, _prepare)
