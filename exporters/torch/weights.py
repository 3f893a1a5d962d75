"""River weights in torch: each held once, however many graphs use it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from river_compile.exporters.torch.linear import Lowering
from river_compile.exporters.torch.tuning import Tuned
from river_compile.exporters.torch.versions import versions
from river_compile.passes.fx.grow_river import Product
from river_compile.passes.quantizer import ActivationAware, QuantizedWeight, Quantizer

__all__ = ["GraphWeights", "Store"]


class Store:
    """River weights, each held once however many graphs use it, for as long as the parameters live.

    A weight that was changed in place or tuned anew since is quantized anew.

    Args:
        tuned: where activation-aware quantizers find their weights; without it they raise.
    """

    def __init__(self, tuned: Tuned | None = None) -> None:
        self._tuned = tuned
        self._held: MutableMapping[torch.Tensor, dict[Any, Any]] = WeakTensorKeyDictionary()

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
        state = versions(parameters)
        if self._tuned is not None and isinstance(chosen, ActivationAware):
            state += tuple(map(self._tuned.stamp, parameters))
        held = self._held.setdefault(parameters[0], {})
        if key not in held or held[key][0] != state or any(ref() is None for ref in held[key][1]):
            others = [weakref.ref(parameter) for parameter in parameters[1:]]
            held[key] = (state, others, _quantize(parameters, product, lowering, chosen, self._tuned))
        operands: tuple[torch.Tensor, ...] = held[key][2]
        return operands

    def nbytes(self, parameters: Sequence[torch.Tensor]) -> int:
        """Bytes held for some parameters."""
        entries = [entry for parameter in parameters for entry in self._held.get(parameter, {}).values()]
        return sum(tensor.nbytes for _, _, operands in entries for tensor in operands)


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
        weight = parameter.detach().to("cpu", torch.float32)
        matrix = weight.T if linear.transposed else weight
        parts.append(chosen.quantize(matrix.contiguous().numpy(), product.bits, product.group_size))
    first = parameters[0]
    return lowering.pack(QuantizedWeight.side_by_side(parts), first.dtype, first.device)


class GraphWeights:
    """The river weights of one graph: the store, seen by the names of the graph's values."""

    def __init__(self, store: Store, values: Mapping[str, Any], lowering: Lowering, chosen: Quantizer) -> None:
        self._store, self._values, self._lowering, self._quantizer = store, values, lowering, chosen

    @property
    def function(self) -> Callable[..., torch.Tensor]:
        return self._lowering.function

    def parameter(self, name: str) -> torch.Tensor:
        """The parameter that a value of the graph is."""
        found: torch.Tensor = self._values[name]
        return found

    def operands(self, product: Product) -> Sequence[torch.Tensor]:
        return self.of([self._values[linear.weight] for linear in product.linears], product)

    def of(self, parameters: Sequence[torch.Tensor], product: Product) -> Sequence[torch.Tensor]:
        """The operands of a product whose weights are these parameters now."""
        return self._store.get(parameters, product, self._lowering, self._quantizer)
