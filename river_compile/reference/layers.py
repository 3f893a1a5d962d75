"""What stands in a model's list of decoder layers in the place of a layer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from river_compile.exporters.torch.stack import is_linear, twin_of
from river_compile.reference.cache import KeysWritten, RiverCache
from river_compile.reference.policies import Call

__all__ = ["Probe", "Slot", "keys_only"]


class _StandIn(nn.Module):
    """Is called as the layer was, and can be asked for whatever the layer has."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
        parameters = inspect.signature(layer.forward).parameters
        self._names = [name for name, parameter in parameters.items() if parameter.kind in kinds][1:]

    def _by_name(self, args: tuple[Any, ...], kwargs: Call) -> Call:
        return kwargs | dict(zip(self._names, args, strict=False)) if args else kwargs

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)


class Slot(_StandIn):
    """Hands each call of its layer to ``run``: the layer's index, the hidden state, all other arguments by name."""

    def __init__(self, layer: nn.Module, index: int, run: Callable[[int, torch.Tensor, Call], Any]) -> None:
        super().__init__(layer)
        self._index, self._run = index, run

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._run(self._index, hidden, self._by_name(args, kwargs))


class Probe(_StandIn):
    """Runs its layer and notes the call, and whether the layer returns a tuple."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self.wraps = False
        self.hidden: torch.Tensor | None = None
        self.call: Call = {}

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.hidden, self.call = hidden, self._by_name(args, kwargs)
        result = self.layer(hidden, **self.call)
        self.wraps = isinstance(result, tuple)
        return result


class _Idle(nn.Module):
    """A linear layer whose result nobody needs: zeros of the right shape, for no work."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        weight: torch.Tensor = linear.get_parameter("weight")
        outputs = weight.shape[0 if isinstance(linear, nn.Linear) else 1]
        self.register_buffer("zeros", torch.zeros(1, 1, outputs, dtype=weight.dtype), persistent=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.get_buffer("zeros").expand(*states.shape[:-1], -1)


def keys_only(probe: Probe, layers: int) -> nn.Module:
    """A layer's form without the products that its keys and values do not depend on, found by leaving each one out.

    One product that makes queries, keys and values at once stays whole.
    """
    layer = probe.layer
    products: dict[str, None] = {}
    hooks = [
        module.register_forward_hook(lambda *_, name=name: products.setdefault(name))
        for name, module in layer.named_modules()
        if is_linear(module)
    ]
    expected = _written(layer, probe, layers)
    for hook in hooks:
        hook.remove()

    def without(names: set[str]) -> nn.Module:
        return twin_of(layer, lambda name, linear: _Idle(linear) if name in names else None)

    idle = {name for name in products if all(map(torch.equal, expected, _written(without({name}), probe, layers)))}
    return without(idle)


def _written(layer: nn.Module, probe: Probe, layers: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and values that a layer writes when called as the probe was."""
    cache = RiverCache(layers, 1)
    for slot in cache.slots:
        slot.stop_when_written = True
    call = {name: cache if isinstance(value, RiverCache) else value for name, value in probe.call.items()}
    try:
        with torch.inference_mode():
            layer(probe.hidden, **call)
    except KeysWritten:
        pass
    slot = next(slot for slot in cache.slots if slot.seen)
    assert slot.keys is not None and slot.values is not None
    return slot.keys, slot.values
