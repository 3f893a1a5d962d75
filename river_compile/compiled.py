"""Models compiled by this backend: their settings, their counts, and weights that were tuned for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.weak import WeakTensorKeyDictionary

from river_compile.config import RiverConfig
from river_compile.errors import ConfigError, InputError
from river_compile.exporters.quantizers import quantizer
from river_compile.exporters.torch import generate, offload, seam
from river_compile.exporters.torch.ranks import ranks_of
from river_compile.exporters.torch.state import State, States
from river_compile.exporters.torch.timing import Choice
from river_compile.exporters.torch.tuning import Tuned, tune_weights
from river_compile.passes.quantizer import ActivationAware
from river_compile.statistics import Stats

__all__ = [
    "MODELS",
    "TUNED",
    "combined",
    "config_of",
    "known_states",
    "refresh",
    "reset_stats",
    "river_bits",
    "set_max_depth",
    "set_tau",
    "stats",
    "to_be_tuned",
    "tune",
    "tuned_digest",
]

TUNED = Tuned()
"""What `tune` has made, for all models."""

MODELS = States()
"""The states of all models compiled by this backend."""


def stats(model: torch.nn.Module) -> Stats:
    """Exit depths, compiled pieces, memory and fallbacks of a model compiled with ``backend="river"``.

    Raises:
        InputError: the model has not been compiled with it, or not been called since.
    """
    return combined(_latest_of(model))


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
    config = config or RiverConfig(quantizer="gptq")
    chosen = quantizer(config.quantizer)
    if not isinstance(chosen, ActivationAware):
        raise ConfigError("quantizer", f"{chosen.name!r} looks at weights alone and needs no tuning; 'gptq' does")
    model = to_be_tuned(model)
    bits = river_bits(model, config)
    return tune_weights(TUNED, model, bits, config.group_size, ids, chosen, progress)


def to_be_tuned(model: torch.nn.Module) -> torch.nn.Module:
    """The original of a model, compiled or not.

    Raises:
        InputError: it is in training mode or spread over processes.
    """
    model = getattr(model, "_orig_mod", model)
    if model.training:
        raise InputError("the model is in training mode; call model.eval()")
    if ranks_of((), model.parameters()) is not None:
        raise InputError("the model is spread over several processes; tune it in one")
    return model


def river_bits(model: torch.nn.Module, config: RiverConfig) -> MutableMapping[torch.Tensor, int]:
    """The bits that a config gives to the parameters of a model's decoder layers, where it gives any.

    Raises:
        LayersNotFound: the model has no decoder layers.
    """
    from river_compile.exporters.torch.stack import find_stack

    path, stack = find_stack(model)
    kept = config.kept(len(stack))
    bits: MutableMapping[torch.Tensor, int] = WeakTensorKeyDictionary()
    for name, parameter in stack.named_parameters():
        layer = int(name.partition(".")[0])
        wanted = config.bits_of(f"{path}.{name.rpartition('.')[0]}", f"layers.{layer}")
        if wanted is not None and layer not in kept:
            bits[parameter] = wanted
    return bits


def tuned_digest(model: torch.nn.Module) -> str:
    """A hash of the weights that were tuned for a model."""
    return TUNED.digest(model.parameters())


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
        TUNED.forget(weights)
        state.store.forget(weights)


def combined(states: Sequence[State]) -> Stats:
    """What was compiled for some states of one model, and done."""
    parameters: MutableMapping[torch.Tensor, None] = WeakTensorKeyDictionary()
    replaced: MutableMapping[torch.Tensor, None] = WeakTensorKeyDictionary()
    decode, prefill, fallbacks, exact = Counter[int](), Counter[int](), Counter[str](), Counter[str]()
    notes: dict[str, None] = {}
    choices: dict[str, Choice] = {}
    for state in states:
        if state.compiler is not None:
            choices |= {choice.product: choice for choice in state.compiler.choices}
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
        choices=tuple(choices.values()),
        offloaded_bytes=sum(parameter.nbytes for parameter in parameters if offload.find(parameter) is not None),
    )


def _states_of(model: torch.nn.Module) -> list[State]:
    states = known_states(model)
    if not states:
        raise InputError('the model was not compiled with backend="river", or not called since')
    return states


def known_states(model: torch.nn.Module) -> list[State]:
    """The states of a model; those with its options, if it is what torch.compile returned."""
    own = generate.backend_of(model)
    if isinstance(own, State):
        return [own]
    states = MODELS.of_model(model)
    options = generate.options_of(model)
    if options is None:
        return states
    config = RiverConfig.from_options(options)
    return [state for state in states if state.config == config]


def _latest_of(model: torch.nn.Module) -> list[State]:
    """The states of a model with one config; with the one that came last if it was compiled several times."""
    states = _states_of(model)
    return [state for state in states if state.config == states[-1].config]


def config_of(module: Any) -> RiverConfig:
    """What a module was compiled with, the defaults if it was not."""
    own = generate.backend_of(module)
    if isinstance(own, State):
        return own.config
    return RiverConfig.from_options(generate.options_of(module))
