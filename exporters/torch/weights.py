"""River weights in torch: each held once, however many graphs use it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from river_compile.exporters.torch import seam
from river_compile.exporters.torch.freshness import samples, versions
from river_compile.exporters.torch.linear import Lowering
from river_compile.exporters.torch.offload import let_go
from river_compile.exporters.torch.tuning import Tuned
from river_compile.passes.fx.grow_river import Product
from river_compile.passes.quantizer import ActivationAware, QuantizedWeight, Quantizer

__all__ = ["GraphWeights", "Quantized", "Store"]


class Store:
    """River weights, each held once however many graphs use it, for as long as the parameters live.

    A weight that was changed or tuned anew since is quantized anew.

    Args:
        tuned: where activation-aware quantizers find their weights; without it they raise.
    """

    def __init__(self, tuned: Tuned | None = None) -> None:
        self._tuned = tuned
        self._held: MutableMapping[torch.Tensor, dict[Any, _Entry]] = WeakTensorKeyDictionary()
        self._lock = threading.RLock()
        self.epoch = 0
        """Grows when weights are forgotten: whoever holds some asks anew."""

    def get(
        self, parameters: Sequence[torch.Tensor], product: Product, lowering: Lowering, chosen: Quantizer
    ) -> tuple[torch.Tensor, ...]:
        """The operands of a product with these parameters, made on first use.

        Raises:
            ConfigError: the quantizer is activation-aware, and a parameter was not tuned.
        """
        layout = tuple(linear.transposed for linear in product.linears)
        key = (
            tuple(map(id, parameters[1:])),
            layout,
            product.bits,
            product.group_size,
            lowering.name,
            chosen.name,
        )
        with self._lock:
            state = _state(parameters)
            stamps: tuple[int, ...] = ()
            if self._tuned is not None and isinstance(chosen, ActivationAware):
                stamps = tuple(map(self._tuned.stamp, parameters))
            held = self._held.setdefault(parameters[0], {})
            if key not in held or (held[key].state, held[key].stamps) != (state, stamps) or held[key].others is None:
                refs = tuple(weakref.ref(parameter) for parameter in parameters[1:])
                operands = _quantize(parameters, product, lowering, chosen, self._tuned)
                held[key] = _Entry(state, stamps, refs, operands)
            return held[key].operands

    def renew(self, parameters: Iterable[torch.Tensor]) -> None:
        """Forget what was made of parameters that were changed since.

        Where a change left no trace but in samples, all is forgotten: it may have spared the samples of another weight.
        """
        parameters = list(parameters)
        with self._lock:
            for parameter in parameters:
                entries = self._held.get(parameter, {})
                for key, entry in list(entries.items()):
                    now = None if entry.others is None else _state([parameter, *entry.others])
                    if now is not None and now != entry.state and now[:2] == entry.state[:2]:
                        self.forget(parameters)
                        return
                    if now != entry.state:
                        del entries[key]
                        self.epoch += 1

    def moved(self, parameters: Iterable[torch.Tensor]) -> None:
        """Go on with what was made of parameters that lie elsewhere now, their numbers unchanged.

        Requires: `renew`, before they were moved.
        """
        with self._lock:
            for parameter in parameters:
                entries = self._held.get(parameter, {})
                for key, entry in list(entries.items()):
                    if entry.others is not None:
                        entries[key] = replace(entry, state=_state([parameter, *entry.others]))
            self.epoch += 1

    def forget(self, parameters: Iterable[torch.Tensor]) -> None:
        """Forget all that was made of some parameters."""
        with self._lock:
            for parameter in parameters:
                self._held.pop(parameter, None)
            self.epoch += 1

    def nbytes(self, parameters: Sequence[torch.Tensor]) -> int:
        """Bytes held for some parameters."""
        with self._lock:
            entries = [entry for parameter in parameters for entry in self._held.get(parameter, {}).values()]
        return sum(tensor.nbytes for entry in entries for tensor in entry.operands)


@dataclass(frozen=True)
class _Entry:
    """What was made of some parameters, and what they were; ``refs`` are all but the first."""

    state: Any
    stamps: tuple[int, ...]
    refs: tuple[weakref.ref[torch.Tensor], ...]
    operands: tuple[torch.Tensor, ...]

    @property
    def others(self) -> list[torch.Tensor] | None:
        """The parameters but the first; None if one is gone."""
        found = [ref() for ref in self.refs]
        alive = [parameter for parameter in found if parameter is not None]
        return alive if len(alive) == len(found) else None


def _state(parameters: Sequence[torch.Tensor]) -> Any:
    places = tuple((p.device, p.dtype, p.data_ptr()) for p in parameters)
    return versions(parameters), places, [sample.numpy().tobytes() for sample in samples(parameters)]


def _quantize(
    parameters: Sequence[torch.Tensor],
    product: Product,
    lowering: Lowering,
    chosen: Quantizer,
    tuned: Tuned | None,
) -> tuple[torch.Tensor, ...]:
    parts = []
    for parameter, linear in zip(parameters, product.linears, strict=True):
        if tuned is not None and isinstance(chosen, ActivationAware):
            grid = (product.bits, product.group_size)
            parts.append(tuned.find(parameter, chosen.name, linear.transposed, grid))
            continue
        weight = seam.shard_of(parameter).detach().to("cpu", torch.float32)
        matrix = weight.T if linear.transposed else weight
        parts.append(chosen.quantize(matrix.numpy(), product.bits, product.group_size))
        let_go([parameter])
    first = parameters[0]
    return lowering.pack(QuantizedWeight.side_by_side(parts), first.dtype, first.device)


class Quantized:
    """The store, for one way to quantize and one lowering.

    Args:
        chosen: for the decoder layers.
        outside: for what lies behind them, the LM head: no texts are read for it.
    """

    def __init__(self, store: Store, lowering: Lowering, chosen: Quantizer, outside: Quantizer) -> None:
        self.store, self.lowering, self._quantizer, self._outside = store, lowering, chosen, outside

    def of(self, parameters: Sequence[torch.Tensor], product: Product) -> Sequence[torch.Tensor]:
        """The operands of a product whose weights are these parameters now."""
        chosen = self._outside if product.is_outside else self._quantizer
        return self.store.get(parameters, product, self.lowering, chosen)


class GraphWeights:
    """The river weights of one graph while it is compiled, by the names of the graph's values."""

    def __init__(self, quantized: Quantized, values: Mapping[str, Any]) -> None:
        self.quantized, self._values = quantized, values

    @property
    def function(self) -> Callable[..., torch.Tensor]:
        return self.quantized.lowering.function

    def operands(self, product: Product) -> Sequence[torch.Tensor]:
        return self.quantized.of([self._values[linear.weight] for linear in product.linears], product)
