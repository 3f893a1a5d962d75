"""``torch.compile(model, backend="river")``: a decoder with early exit, or plain Inductor where that cannot be."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.utils.weak import WeakTensorKeyDictionary

from river_compile.config import FLOAT, RiverConfig
from river_compile.errors import ConfigError, InputError, RiverError
from river_compile.exporters.quantizers import quantizer
from river_compile.exporters.torch import generate, hooked, offload, saved, seam
from river_compile.exporters.torch.attention import lower_attention
from river_compile.exporters.torch.dispatch import Artifacts, Dispatcher
from river_compile.exporters.torch.few_rows import MOST, SHORT, Forms, lower_few_rows
from river_compile.exporters.torch.linear import Lowering, lowering_for
from river_compile.exporters.torch.ranks import Ranks, Spread, ranks_of
from river_compile.exporters.torch.recorder import CudaRecorder, Recorder
from river_compile.exporters.torch.remembered import Remembered
from river_compile.exporters.torch.state import GraphFacts, State, States, calling_module, forced_exits
from river_compile.exporters.torch.tuning import Tuned, tune_weights
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
from river_compile.passes.quantizer import ActivationAware
from river_compile.runtime.exact import Drafting, Experience
from river_compile.runtime.steps import Step
from river_compile.statistics import Stats

__all__ = [
    "RiverBackend",
    "refresh",
    "reset_stats",
    "river",
    "set_max_depth",
    "set_tau",
    "stats",
    "tune",
    "tuned_digest",
    "tuned_weights",
]

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
        super().__init__(config or RiverConfig(), store if store is not None else Store(_tuned))
        self._recorder, self._lowering, self._compiler = recorder, lowering, compiler
        self._artifacts = Artifacts(compiler or seam.compile_piece)
        self._compile_whole = compiler or seam.compile_whole
        self._forms = Forms(compiler or seam.compile_piece, _measured)
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
        _states.bind(parameters, self, calling_module())
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

    def stats(self) -> Stats:
        """What was compiled and done until now."""
        return _stats([self])

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
        lowering = self._lowering or lowering_for(device)
        chosen = self.config.quantizer
        if self.config.saved_river is not None:
            chosen = saved.adopt(_tuned, parameters.values(), Path(self.config.saved_river), chosen)
        quantized = Quantized(self.store, lowering, quantizer(chosen))
        weights = GraphWeights(quantized, parameters)
        grown = River()
        if decode or self._wants_river_prefill(rows, lowering):
            grown = grow_river(graph, anatomy, self.config, weights)
            verify(graph, anatomy, ["find_layers", "grow_river"], grown)
        plan = share_kv(graph, anatomy, grown)
        verify(graph, anatomy, ["find_layers", "grow_river", "share_kv"], grown, plan)
        points = insert_exits(graph, anatomy, plan, self.config)
        verify(graph, anatomy, ["find_layers", "grow_river", "share_kv", "insert_exits"], grown, plan)
        share_head(graph, plan, self._head_config, weights)
        verify(graph, anatomy, ["find_layers", "grow_river", "share_kv", "insert_exits", "share_head"], grown, plan)
        shards = {name: seam.shard_of(parameter) for name, parameter in parameters.items()}
        self._lower(plan, shards, device, rows)
        if self.config.dump_dir is not None:
            _dump(self.config, graph, plan, self._dumped)
            self._dumped += 1
        notes = [*grown.notes]
        recorder = self._recorder_for(device, notes, spread)
        if spread is not None and self.config.offloads:
            notes.append("offload_after has no effect on a model that is spread over processes")
        quantized_names = {linear.weight for linear in grown.linears if linear.bits is not None}
        places = (place for place, node in enumerate(graph.placeholders) if node.name in quantized_names)
        facts = GraphFacts(len(anatomy.layers), len(grown.twins), tuple(places), tuple(notes), self, ranks)
        dispatcher = Dispatcher(
            graph, anatomy, plan, points, quantized, self._state_of, facts, self._artifacts, recorder, spread
        )
        facts.seconds = time.perf_counter() - started
        return dispatcher

    def _lower(
        self, plan: Plan, parameters: Mapping[str, torch.Tensor], device: torch.device, rows: int | torch.SymInt
    ) -> None:
        """Write the backbone's operations as this machine runs them fastest, and if that costs little such that a row
        does not depend on how many are beside it."""
        if device.type != "cpu" or not any(value.dtype in SHORT for value in parameters.values()):
            return
        if not isinstance(rows, int) or rows <= MOST:
            lower_few_rows(plan.every_piece, parameters, self._forms)
        if rows != 1:
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

    def _wants_river_prefill(self, rows: int | torch.SymInt, lowering: Lowering) -> bool:
        if self.config.prefill == "auto":
            return isinstance(rows, int) and rows <= lowering.max_rows
        return self.config.prefill == "river"

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
        if self.config.strict:
            return _raising(error)
        started = time.perf_counter()
        compiled = self._compile_whole(module, inputs)
        state = self._state_of([value for value in inputs if isinstance(value, torch.nn.Parameter)])
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
_tuned = Tuned()
_store = Store(_tuned)
_states = States()


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
    parameters = [value for value in inputs if isinstance(value, torch.nn.Parameter)]
    known = _states.known(parameters, config)
    compiler = known.compiler if known is not None else None
    if compiler is None:
        compiler = RiverBackend(config, store=_store, state_of=lambda weights: _states.of(weights, config, _store))
    return compiler(module, inputs)  # type: ignore[no-any-return]


def stats(model: torch.nn.Module) -> Stats:
    """Exit depths, compiled pieces, memory and fallbacks of a model compiled with ``backend="river"``.

    Raises:
        InputError: the model has not been compiled with it, or not been called since.
    """
    return _stats(_latest_of(model))


def reset_stats(model: torch.nn.Module) -> None:
    """Forget the exit depths counted so far: `stats` counts from now.

    Raises: as `stats`.
    """
    for state in _states_of(model):
        state.decode_depths.clear()
        state.prefill_depths.clear()
        state.exact.clear()


def set_tau(model: torch.nn.Module, tau: float) -> None:
    """Change the exit threshold of a compiled model; nothing is compiled anew.

    Raises:
        ConfigError: tau is no number from -1 up.
        InputError: as `stats`.
    """
    RiverConfig(tau=tau)
    for state in _states_of(model):
        state.tau = tau


def set_max_depth(model: torch.nn.Module, max_depth: int | None) -> None:
    """Change the limit on the exit depth of a compiled model: 0 is all river, None no limit; nothing is compiled anew.

    Raises:
        ConfigError: the limit is no whole number from 0 up.
        InputError: as `stats`.
    """
    RiverConfig(max_depth=max_depth)
    for state in _states_of(model):
        state.max_depth = max_depth


def tune(
    model: torch.nn.Module,
    ids: Sequence[np.ndarray | torch.Tensor],
    config: RiverConfig | None = None,
    *,
    progress: Callable[[str, int, int], None] = lambda step, done, total: None,
) -> int:
    """Quantize a model's decoder layers for the inputs that they meet on texts, for a river whose quantizer wants it.

    The model itself stays as it is. The river weights are kept with its parameters, a byte for each weight, and every
    compilation with this quantizer and grid takes them from there; graphs compiled before stay as they are.

    Args:
        model: a causal language model of transformers in eval mode; one compiled already is run as the original.
        ids: token ids of texts, int64 [tokens] each: none that a threshold is calibrated or a figure reported on.
        config: its quantizer, bits and group size; ``quantizer="gptq"`` if None.
        progress: is told the step, what is done and how much there is.

    Returns:
        How many weights were quantized.

    Raises:
        ConfigError: the quantizer needs no tuning, or there is no such quantizer.
        InputError: the model has no decoder layers, is in training mode or spread over processes, or the texts cannot
            be used.
    """
    from river_compile.exporters.torch.stack import find_stack

    config = config or RiverConfig(quantizer="gptq")
    chosen = quantizer(config.quantizer)
    if not isinstance(chosen, ActivationAware):
        raise ConfigError("quantizer", f"{chosen.name!r} looks at weights alone and needs no tuning; 'gptq' does")
    model = getattr(model, "_orig_mod", model)
    if model.training:
        raise InputError("the model is in training mode; call model.eval()")
    if ranks_of((), model.parameters()) is not None:
        raise InputError("the model is spread over several processes; tune it in one")
    path, stack = find_stack(model)
    kept = config.kept(len(stack))
    bits: MutableMapping[torch.Tensor, int] = WeakTensorKeyDictionary()
    for name, parameter in stack.named_parameters():
        layer = int(name.partition(".")[0])
        wanted = config.bits_of(f"{path}.{name.rpartition('.')[0]}", f"layers.{layer}")
        if wanted is not None and layer not in kept:
            bits[parameter] = wanted
    return tune_weights(_tuned, model, bits, config.group_size, ids, chosen, progress)


def tuned_digest(model: torch.nn.Module) -> str:
    """A hash of the weights that were tuned for a model."""
    return _tuned.digest(model.parameters())


def tuned_weights() -> Tuned:
    """Where the weights that `tune` makes are held, for all models."""
    return _tuned


def refresh(model: torch.nn.Module) -> None:
    """Have the river of a compiled model made anew from its weights before its next pass.

    A river follows its model's weights by itself where a change leaves a trace: another parameter, a change in place
    that autograd counts, another address (``load_state_dict``, optimizers, ``p.data = x``). Writes through ``.data``,
    by fused optimizers and by what merges adapters leave none: they are seen by samples of every weight, at the first
    decode pass after a prompt and, on a CPU, of one weight in turn at every eighth pass. Call this after such a write
    in the middle of a generation, or after one that changes few numbers of a weight. Samples of offloaded weights are
    those that the last prompt noted where it ran their layers: after a prompt that left the backbone before, call this.

    Weights that were tuned count as changed: call `tune` again, after this.

    Raises: as `stats`.
    """
    for state in _states_of(model):
        weights = [*state.replaced.keys(), *model.parameters()]
        _tuned.forget(weights)
        state.store.forget(weights)


def _stats(states: Sequence[State]) -> Stats:
    """What was compiled for some states of one model, and done."""
    parameters: MutableMapping[torch.Tensor, None] = WeakTensorKeyDictionary()
    replaced: MutableMapping[torch.Tensor, None] = WeakTensorKeyDictionary()
    decode, prefill, fallbacks, exact = Counter[int](), Counter[int](), Counter[str](), Counter[str]()
    notes: dict[str, None] = {}
    for state in states:
        for parameter in list(state.parameters.keys()):
            parameters[parameter] = None
        for parameter in list(state.replaced.keys()):
            replaced[parameter] = None
        decode += state.decode_depths
        prefill += state.prefill_depths
        fallbacks += state.fallbacks
        # Addition would drop what is 0.
        exact.update(state.exact)
        notes |= state.notes
        unrecorded = (f"runs without CUDA graphs, {n} graphs: {why}" for why, n in state.unrecorded.items())
        notes |= dict.fromkeys(unrecorded)
    return Stats(
        layers=max(state.layers for state in states),
        river_layers=max(state.river_layers for state in states),
        decode_depths=dict(sorted(decode.items())),
        prefill_depths=dict(sorted(prefill.items())),
        graphs=sum(state.graphs for state in states),
        artifacts=len(set().union(*(state.artifacts for state in states))),
        compile_seconds=sum(state.seconds for state in states),
        backbone_bytes=sum(seam.shard_of(parameter).nbytes for parameter in parameters),
        replaced_bytes=sum(seam.shard_of(parameter).nbytes for parameter in replaced),
        river_bytes=states[-1].store.nbytes(list(parameters.keys())),
        notes=tuple(notes),
        fallbacks=dict(fallbacks),
        exact=dict(exact),
        offloaded_bytes=sum(parameter.nbytes for parameter in parameters if offload.find(parameter) is not None),
    )


def _states_of(model: torch.nn.Module) -> list[State]:
    states = _known_states(model)
    if not states:
        raise InputError('the model was not compiled with backend="river", or not called since')
    return states


def _known_states(model: torch.nn.Module) -> list[State]:
    """The states of a model; those with its options, if it is what torch.compile returned."""
    own = generate.backend_of(model)
    if isinstance(own, RiverBackend):
        return [own]
    states = _states.of_model(model)
    options = generate.options_of(model)
    if options is None:
        return states
    config = RiverConfig.from_options(options)
    return [state for state in states if state.config == config]


def _latest_of(model: torch.nn.Module) -> list[State]:
    """The states of a model with one config; with the one that came last if it was compiled several times."""
    states = _states_of(model)
    return [state for state in states if state.config == states[-1].config]


def exact(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    generation_config: Any = None,
    *,
    streamer: Any = None,
    lookup: bool | None = None,
    **model_arguments: Any,
) -> Any:
    """Exact decoding, for ``model.generate(..., custom_generate=river_compile.exact)``.

    The river drafts, and the backbone verifies: greedy tokens are the backbone's, sampled ones are distributed as the
    backbone's. A model that is not compiled with this backend, or has no river, drafts from the text itself alone.

    Args:
        model, input_ids, logits_processor, stopping_criteria, generation_config, model_arguments: as ``generate`` gives
            them.
        streamer: gets tokens as they are verified; ``generate`` itself does not hand its own on, so give it by
            ``functools.partial``. With ``options={"exact": True}`` it is handed on.
        lookup: whether tokens of the text are drafts where it repeats; None: as the config says.

    Raises:
        ConfigError: beam search, no KV cache, or a cache that cannot be cut back.
    """
    from river_compile.runtime.hf_exact import generate_exactly

    model_arguments.pop("synced_gpus", None)
    under_way = generate.under_way()
    compiled = model if under_way is None else under_way
    states = _known_states(compiled)
    config = states[-1].config if states else _config_of(compiled)
    tau, max_depth = (states[-1].tau, states[-1].max_depth) if states else (config.tau, config.max_depth)
    shaped = max_depth is not None or tau != RiverConfig.tau
    wants_logits = generation_config.output_logits or generation_config.output_scores

    # Known when the first passes have run, and looked up once: it reads all parameters' names.
    compiled_with = functools.cache(lambda: _known_states(compiled)[-1:])

    def note(step: Step) -> None:
        for state in compiled_with():
            state.exact["rounds"] += 1
            state.exact["drafted"] += step.drafted
            state.exact["accepted"] += step.accepted
            state.exact["near_ties"] += step.near_ties
            state.exact["drafting"] += round(1e3 * step.draft_seconds)
            state.exact["verifying"] += round(1e3 * step.verify_seconds)

    # Draft lengths follow what passes cost; processes that run one model draft as the first one's clock says.
    ranks = functools.cache(
        lambda: next((s.ranks for s in compiled_with() if s.ranks), None) or ranks_of((), model.parameters())
    )

    def clock() -> float:
        now, them = time.perf_counter(), ranks()
        return now if them is None else them.first([now])[0]

    drafting = Drafting(
        tau=tau if shaped else None,
        max_depth=max_depth if shaped else 0,
        lookup=config.lookup if lookup is None else lookup,
        keep_logits=bool(wants_logits and generation_config.return_dict_in_generate),
    )
    with seam.many_graphs():
        made = generate_exactly(
            model,
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            model_arguments,
            exits=forced_exits,
            has_river=lambda: any(state.river_layers for state in _known_states(compiled)),
            experience=lambda: _experience_of(compiled),
            drafting=drafting,
            streamer=streamer,
            on_step=note,
            clock=clock,
        )
    if not generation_config.do_sample:
        _tell_if_plain(compiled, len(input_ids))
    return made


def _tell_if_plain(model: torch.nn.Module, batch: int) -> None:
    """Say it once where nothing was drafted, since the tokens could not be promised."""
    experience, dtype = _experience_of(model), getattr(model, "dtype", torch.float32)
    if dtype not in SHORT or (batch == 1 and not experience.tie):
        return
    why = f"decoded plainly: in {dtype} passes of several tokens round otherwise than passes of one here"
    if not experience.tie:
        why = f"decoded plainly: in {dtype} the sequences of a batch would move against each other, and round otherwise"
    for state in _known_states(model)[-1:]:
        if why not in state.notes:
            state.notes[why] = None
            warnings.warn(f"exact: {why}", stacklevel=3)


def _config_of(module: Any) -> RiverConfig:
    """What a module was compiled with, the defaults if it was not."""
    own = generate.backend_of(module)
    if isinstance(own, RiverBackend):
        return own.config
    return RiverConfig.from_options(generate.options_of(module))


_experiences: MutableMapping[State, Experience] = weakref.WeakKeyDictionary()


def _experience_of(model: torch.nn.Module) -> Experience:
    states = _known_states(model)
    return _experiences.setdefault(states[-1], Experience()) if states else Experience()


def _prepare(module: Any, name: str, settings: dict[str, Any]) -> None:
    """Let ``generate`` of a model compiled with ``exact`` decode exactly; take over from accelerate one that is to be
    offloaded."""
    config = _config_of(module)
    if config.offloads and hooked.is_hooked(module._orig_mod):
        hooked.take_over(module._orig_mod, config)
    if name == "generate" and config.exact and settings.get("custom_generate") is None:
        settings["custom_generate"] = functools.partial(exact, streamer=settings.pop("streamer", None))


generate.install(lambda backend: backend is river or isinstance(backend, RiverBackend), _known_states, _prepare)
