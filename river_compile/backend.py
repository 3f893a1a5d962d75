"""``torch.compile(model, backend="river")``: a decoder with early exit, or plain Inductor where that cannot be."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.utils.weak import WeakTensorKeyDictionary

from river_compile.config import FLOAT, RiverConfig
from river_compile.errors import ConfigError, InputError, RiverError
from river_compile.exporters.quantizers import quantizer
from river_compile.exporters.torch import generate, seam
from river_compile.exporters.torch.dispatch import Artifacts, Dispatcher
from river_compile.exporters.torch.linear import Lowering, lowering_for
from river_compile.exporters.torch.recorder import CudaRecorder, Recorder
from river_compile.exporters.torch.single_row import lower_single_rows
from river_compile.exporters.torch.tuning import Tuned, tune_weights
from river_compile.exporters.torch.weights import GraphWeights, Store
from river_compile.passes.anatomy import Anatomy
from river_compile.passes.fx.find_layers import find_layers
from river_compile.passes.fx.graph import FxGraph, import_graph, value_of
from river_compile.passes.fx.grow_river import River, grow_river
from river_compile.passes.fx.insert_exits import insert_exits
from river_compile.passes.fx.share_kv import Plan, share_kv
from river_compile.passes.fx.verify import verify
from river_compile.passes.quantizer import ActivationAware
from river_compile.statistics import Stats

__all__ = ["RiverBackend", "reset_stats", "river", "set_max_depth", "set_tau", "stats", "tune", "tuned_digest"]

Compiled = Callable[..., Any]


class RiverBackend:
    """A backend for ``torch.compile``, with the state of the models compiled by it.

    Args:
        config: the settings; the defaults if None.
        lowering: how quantized weights are multiplied; the device's fastest if None.
        compiler: compiles a piece, or a whole graph that gets no river; Inductor if None.
        store: where river weights are held; backends that share one hold each weight once. One of its own if None,
            with what `tune` has made.
        recorder: makes, for a device, what records decode passes if ``cuda_graphs`` is set; CUDA graphs if None.
    """

    def __init__(
        self,
        config: RiverConfig | None = None,
        *,
        lowering: Lowering | None = None,
        compiler: Callable[[fx.GraphModule, Sequence[Any]], Compiled] | None = None,
        store: Store | None = None,
        recorder: Callable[[torch.device], Recorder] | None = None,
    ) -> None:
        self.config = config or RiverConfig()
        self.tau: float = self.config.tau
        self.tau_offsets: tuple[float, ...] | None = self.config.tau_offsets
        self.max_depth: int | None = self.config.max_depth
        self.decode_depths: Counter[int] = Counter()
        self.prefill_depths: Counter[int] = Counter()
        self.unrecorded: Counter[str] = Counter()
        self._recorder = recorder
        self._lowering = lowering
        self._artifacts = Artifacts(compiler or seam.compile_piece)
        self._compile_whole = compiler or seam.compile_whole
        self._store = store if store is not None else Store(_registry.tuned)
        self._parameters: MutableMapping[torch.Tensor, None] = WeakTensorKeyDictionary()
        self._replaced: MutableMapping[torch.Tensor, None] = WeakTensorKeyDictionary()
        self._fallbacks: Counter[str] = Counter()
        self._notes: dict[str, None] = {}
        self._layers = self._river_layers = self._graphs = 0
        self._seconds = 0.0

    def __call__(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        """Compile one graph: with a river, or as plain Inductor does, warning once why.

        A user's mistake becomes a function that raises it, as Dynamo would wrap an error raised here.
        """
        started = time.perf_counter()
        try:
            return self._with_river(module, inputs)
        except ConfigError as error:
            return _raising(error)
        except RiverError as error:
            return self._fall_back(module, inputs, error)
        except seam.dynamo_error():
            # How Dynamo starts its analysis anew.
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            return self._fall_back(module, inputs, InputError(f"the passes failed with {reason}"))
        finally:
            self._seconds += time.perf_counter() - started

    def stats(self) -> Stats:
        """What was compiled and done until now."""
        parameters = list(self._parameters.keys())
        return Stats(
            layers=self._layers,
            river_layers=self._river_layers,
            decode_depths=dict(sorted(self.decode_depths.items())),
            prefill_depths=dict(sorted(self.prefill_depths.items())),
            graphs=self._graphs,
            artifacts=len(self._artifacts),
            compile_seconds=self._seconds,
            backbone_bytes=sum(parameter.nbytes for parameter in parameters),
            replaced_bytes=sum(parameter.nbytes for parameter in list(self._replaced.keys())),
            river_bytes=self._store.nbytes(parameters),
            notes=(
                *self._notes,
                *(f"runs without CUDA graphs, {n} graphs: {why}" for why, n in self.unrecorded.items()),
            ),
            fallbacks=dict(self._fallbacks),
        )

    def owns(self, parameter: torch.Tensor) -> bool:
        """Whether a graph with this parameter was compiled by this backend."""
        return parameter in self._parameters

    def _with_river(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        graph, parameters = self._import(module, inputs)
        anatomy = find_layers(graph)
        verify(graph, anatomy, ["find_layers"])
        self._check(len(anatomy.layers))
        device, decode, rows = _place_of_work(graph, anatomy)
        lowering = self._lowering or lowering_for(device)
        weights = GraphWeights(self._store, parameters, lowering, quantizer(self.config.quantizer))
        grown = River()
        if decode or self._wants_river_prefill(rows, lowering):
            grown = grow_river(graph, anatomy, self.config, weights)
            verify(graph, anatomy, ["find_layers", "grow_river"], grown)
        plan = share_kv(graph, anatomy, grown)
        verify(graph, anatomy, ["find_layers", "grow_river", "share_kv"], grown, plan)
        points = insert_exits(graph, anatomy, plan, self.config)
        verify(graph, anatomy, ["find_layers", "grow_river", "share_kv", "insert_exits"], grown, plan)
        if device.type == "cpu" and rows == 1:
            for piece in (*plan.pieces, *(twin.river for twin in plan.twins.values())):
                lower_single_rows(piece, list(parameters))
        if self.config.dump_dir is not None:
            _dump(self.config, graph, plan, self._graphs)
        recorder = self._recorder_for(device)
        dispatcher = Dispatcher(graph, anatomy, plan, points, weights, self, self._artifacts, recorder)
        self._layers = len(anatomy.layers)
        self._river_layers = max(self._river_layers, len(grown.twins))
        self._graphs += 1
        for linear in grown.linears:
            if linear.bits is not None:
                self._replaced[parameters[linear.weight]] = None
        self._notes |= dict.fromkeys(grown.notes)
        return dispatcher

    def _check(self, layers: int) -> None:
        if self.config.kv_policy != "share":
            raise ConfigError(
                "kv_policy", f"this backend shares its KV cache; {self.config.kv_policy!r} is to compare with"
            )
        if self.config.head_bits != FLOAT:
            raise ConfigError("head_bits", "this backend leaves the LM head in the model's float type")
        if self.tau_offsets and len(self.tau_offsets) != layers:
            raise ConfigError("tau_offsets", f"{len(self.tau_offsets)} numbers for a stack of {layers} layers")

    def _import(self, module: fx.GraphModule, inputs: Sequence[Any]) -> tuple[FxGraph, Mapping[str, torch.Tensor]]:
        """The graph, and its parameters by name. No other input is kept: the caches would stay alive."""
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        parameters = {
            node.name: value
            for node, value in zip(placeholders, inputs, strict=True)
            if isinstance(value, torch.nn.Parameter)
        }
        for parameter in parameters.values():
            self._parameters[parameter] = None
        if not parameters and any(isinstance(held, torch.nn.Parameter) for held in module.parameters()):
            raise InputError("the weights are frozen into the graph (torch._inductor.config.freezing is on)")
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters.values()):
            raise InputError("gradients are wanted (call the model under torch.no_grad)")
        return import_graph(module, list(parameters)), parameters

    def _wants_river_prefill(self, rows: int | None, lowering: Lowering) -> bool:
        if self.config.prefill == "auto":
            return rows is not None and rows <= lowering.max_rows
        return self.config.prefill == "river"

    def _recorder_for(self, device: torch.device) -> Callable[[], Recorder] | None:
        if not self.config.cuda_graphs:
            return None
        make = self._recorder
        if make is not None:
            return lambda: make(device)
        if device.type == "cuda":
            return lambda: CudaRecorder(device)
        self._notes[f"cuda_graphs has no effect on a {device.type} device"] = None
        return None

    def _fall_back(self, module: fx.GraphModule, inputs: Sequence[Any], error: RiverError) -> Compiled:
        if self.config.strict:
            return _raising(error)
        why = str(error)
        if why not in self._fallbacks:
            warnings.warn(f"no exit river, compiled by plain Inductor: {why}", stacklevel=2)
        self._fallbacks[why] += 1
        return self._compile_whole(module, inputs)


def _raising(error: RiverError) -> Compiled:
    def fail(*arguments: Any) -> Any:
        raise error

    return fail


def _place_of_work(graph: FxGraph, anatomy: Anatomy) -> tuple[torch.device, bool, int | None]:
    """The device, whether each sequence has one token only, and the rows of the hidden state (None: not fixed)."""
    state = next(value_of(node) for node in graph.steps if node.name == anatomy.layers[0].hidden_out)
    sizes = state.shape[:-1]
    rows = None if any(isinstance(size, torch.SymInt) for size in sizes) else int(torch.Size(sizes).numel())
    return state.device, state.dim() == 3 and state.shape[1] == 1, rows


def _dump(config: RiverConfig, graph: FxGraph, plan: Plan, number: int) -> None:
    assert config.dump_dir is not None
    config.dump_dir.mkdir(parents=True, exist_ok=True)
    parts = [f"# the whole graph\n{graph.module.print_readable(print_output=False)}"]
    for piece in plan.pieces:
        parts.append(f"# {', '.join(piece.outputs)}\n{piece.module.print_readable(print_output=False)}")
    for index, twin in plan.twins.items():
        parts.append(f"# river of layer {index}\n{twin.river.module.print_readable(print_output=False)}")
    (config.dump_dir / f"graph_{number}.txt").write_text("\n\n".join(parts))


class _Registry:
    """The backends behind ``backend="river"``: one for each set of parameters and config, all over one store; and the
    weights that were tuned."""

    def __init__(self) -> None:
        self.tuned = Tuned()
        self.store = Store(self.tuned)
        self._of_parameter: MutableMapping[torch.Tensor, list[RiverBackend]] = WeakTensorKeyDictionary()

    def backend_for(self, inputs: Sequence[Any], config: RiverConfig) -> RiverBackend:
        parameters = [value for value in inputs if isinstance(value, torch.nn.Parameter)]
        known = [backend for parameter in parameters[:1] for backend in self._of_parameter.get(parameter, ())]
        backend = next((found for found in known if found.config == config), None)
        backend = backend or RiverBackend(config, store=self.store)
        for parameter in parameters:
            held = self._of_parameter.setdefault(parameter, [])
            if backend not in held:
                held.append(backend)
        return backend

    def backends_of(self, model: torch.nn.Module) -> list[RiverBackend]:
        found: dict[int, RiverBackend] = {}
        for parameter in model.parameters():
            for backend in self._of_parameter.get(parameter, ()):
                found[id(backend)] = backend
        return list(found.values())


_registry = _Registry()


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
    return _registry.backend_for(inputs, config)(module, inputs)


def stats(model: torch.nn.Module) -> Stats:
    """Exit depths, compiled pieces, memory and fallbacks of a model compiled with ``backend="river"``.

    Raises:
        InputError: the model has not been compiled with it, or not been called since.
    """
    return _backend_of(model).stats()


def reset_stats(model: torch.nn.Module) -> None:
    """Forget the exit depths counted so far: `stats` counts from now.

    Raises: as `stats`.
    """
    for backend in _backends_of(model):
        backend.decode_depths.clear()
        backend.prefill_depths.clear()


def set_tau(model: torch.nn.Module, tau: float) -> None:
    """Change the exit threshold of a compiled model; nothing is compiled anew.

    Raises:
        ConfigError: tau is no number from -1 up.
        InputError: as `stats`.
    """
    RiverConfig(tau=tau)
    for backend in _backends_of(model):
        backend.tau = tau


def set_max_depth(model: torch.nn.Module, max_depth: int | None) -> None:
    """Change the limit on the exit depth of a compiled model: 0 is all river, None no limit; nothing is compiled anew.

    Raises:
        ConfigError: the limit is no whole number from 0 up.
        InputError: as `stats`.
    """
    RiverConfig(max_depth=max_depth)
    for backend in _backends_of(model):
        backend.max_depth = max_depth


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
        InputError: the model has no decoder layers or is in training mode, or the texts cannot be used.
    """
    from river_compile.exporters.torch.stack import find_stack

    config = config or RiverConfig(quantizer="gptq")
    chosen = quantizer(config.quantizer)
    if not isinstance(chosen, ActivationAware):
        raise ConfigError("quantizer", f"{chosen.name!r} looks at weights alone and needs no tuning; 'gptq' does")
    model = getattr(model, "_orig_mod", model)
    if model.training:
        raise InputError("the model is in training mode; call model.eval()")
    path, stack = find_stack(model)
    kept = config.kept(len(stack))
    bits: MutableMapping[torch.Tensor, int] = WeakTensorKeyDictionary()
    for name, parameter in stack.named_parameters():
        layer = int(name.partition(".")[0])
        wanted = config.bits_of(f"{path}.{name.rpartition('.')[0]}", f"layers.{layer}")
        if wanted is not None and layer not in kept:
            bits[parameter] = wanted
    return tune_weights(_registry.tuned, model, bits, config.group_size, ids, chosen, progress)


def tuned_digest(model: torch.nn.Module) -> str:
    """A hash of the weights that were tuned for a model."""
    return _registry.tuned.digest(model.parameters())


def _backends_of(model: torch.nn.Module) -> list[RiverBackend]:
    own = generate.backend_of(model)
    if isinstance(own, RiverBackend):
        return [own]
    backends = _registry.backends_of(model)
    options = generate.options_of(model)
    if options is not None and len(backends) > 1:
        config = RiverConfig.from_options(options)
        backends = [backend for backend in backends if backend.config == config]
    if not backends:
        raise InputError('the model was not compiled with backend="river", or not called since')
    return backends


def _backend_of(model: torch.nn.Module) -> RiverBackend:
    """The one backend of a model; the one last made if it was compiled several times."""
    return _backends_of(model)[-1]


generate.install(lambda backend: backend is river or isinstance(backend, RiverBackend))
