"""Activation-aware quantization of a torch model: what its weights are multiplied with on texts, and the results.

A product with a parameter is recognised by the operation that computes it, as the passes recognise it in a graph: any
module that is a linear layer counts, whatever its class.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from river_compile.errors import ConfigError, InputError
from river_compile.exporters.torch.freshness import samples, versions
from river_compile.passes.fx.linear import FORMS
from river_compile.passes.quantizer import ActivationAware, QuantizedWeight, fitting_group

__all__ = ["Tuned", "tune_weights"]

_BUDGET = 1 << 30
_SCANNED_TOKENS = 16
_COMPARED = 1 << 14

Progress = Callable[[str, int, int], None]
Grid = tuple[int, int]
"""Bits and group size."""


class Tuned:
    """Quantized weights by the parameter that they stand for, for as long as it lives: a byte a weight.

    A weight that was changed since counts as not tuned.
    """

    def __init__(self) -> None:
        self._held: MutableMapping[torch.Tensor, dict[Any, tuple[Any, int, QuantizedWeight]]] = (
            WeakTensorKeyDictionary()
        )
        self._kept = 0

    def keep(self, parameter: torch.Tensor, quantizer: str, transposed: bool, weight: QuantizedWeight) -> None:
        """Hold a weight, in place of one of the same quantizer and grid.

        Args:
            transposed: whether the parameter is [outputs, inputs].
        """
        self._kept += 1
        key = (quantizer, transposed, weight.bits, weight.group_size)
        self._held.setdefault(parameter, {})[key] = (_state(parameter), self._kept, weight)

    def forget(self, parameters: Iterable[torch.Tensor]) -> None:
        """Let some parameters count as changed."""
        for parameter in parameters:
            for key, (_, kept, weight) in self._held.get(parameter, {}).items():
                self._held[parameter][key] = (None, kept, weight)

    def find(self, parameter: torch.Tensor, quantizer: str, transposed: bool, grid: Grid) -> QuantizedWeight:
        """The weight of a parameter.

        Raises:
            ConfigError: it was not tuned for this quantizer and grid, or was changed since.
        """
        held = self._held.get(parameter, {})
        found = held.get((quantizer, transposed, *grid))
        if found is not None and found[0] == _state(parameter):
            return found[2]
        bits, group_size = grid
        why = f"no weights were tuned for {bits} bits in groups of {group_size}"
        if found is not None:
            why = "the weights were changed since they were tuned"
        raise ConfigError(
            "quantizer", f"{quantizer!r} knows its inputs: call river_compile.tune(model, ids, config) first ({why})"
        )

    def stamp(self, parameter: torch.Tensor) -> int:
        """A number that grows when the parameter is tuned anew; 0 before."""
        return max((number for _, number, _ in self._held.get(parameter, {}).values()), default=0)

    def of(self, parameter: torch.Tensor) -> Iterator[tuple[str, bool, QuantizedWeight]]:
        """What is held for a parameter as it is now: quantizer, whether it is [outputs, inputs], and the weight."""
        for (quantizer, transposed, *_), (state, _, weight) in self._held.get(parameter, {}).items():
            if state == _state(parameter):
                yield quantizer, transposed, weight

    def digest(self, parameters: Iterable[torch.Tensor]) -> str:
        """A hash of what is held for some parameters."""
        digest = hashlib.sha256()
        for place, parameter in enumerate(parameters):
            for key, (_, _, weight) in sorted(self._held.get(parameter, {}).items()):
                digest.update(repr((place, key)).encode())
                for array in (weight.values, weight.scales, weight.zero_points):
                    digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def _state(parameter: torch.Tensor) -> Any:
    """What the parameter is now, wherever it lies."""
    return versions([parameter]), [sample.numpy().tobytes() for sample in samples([parameter], _COMPARED)]


@dataclass(frozen=True)
class _Product:
    """A parameter that is multiplied with an activation. ``activation`` is equal for those that share it."""

    parameter: torch.Tensor
    transposed: bool
    inputs: int
    activation: Any


def tune_weights(
    tuned: Tuned,
    model: torch.nn.Module,
    bits: Mapping[torch.Tensor, int],
    group_size: int,
    ids: Sequence[np.ndarray | torch.Tensor],
    quantizer: ActivationAware,
    progress: Progress = lambda step, done, total: None,
    budget: int = _BUDGET,
) -> int:
    """Quantize the weights of a model's linear layers for the inputs that they meet on texts.

    The model reads the texts as often as it takes to hold the second moments of the inputs, those of as many
    neighbouring layers at once as ``budget`` bytes hold.

    Args:
        tuned: gets the weights.
        model: takes ``input_ids``, int64 [1, tokens]; run without gradients, and unchanged.
        bits: of each parameter in question. Those that no text is multiplied with, and those whose inputs no group
            size divides, stay as they are.
        group_size: of the grids; smaller where it does not divide the inputs.
        ids: token ids of texts, int64 [tokens] each.
        progress: is told the step, what is done and how much there is.

    Returns:
        How many weights were quantized.

    Raises:
        InputError: there is no text, one is no row of token ids, or the model's activations are not finite.
    """
    texts = [_as_ids(text) for text in ids]
    if not texts:
        raise InputError("no tuning texts to run the model on")
    products = _scan(model, texts[0][:_SCANNED_TOKENS], bits)
    planned = [
        (product, (bits[product.parameter], fitting))
        for product in products
        if (fitting := fitting_group(product.inputs, group_size)) is not None
    ]
    done = 0
    for chunk in _chunks(planned, budget):
        moments = _measure(model, [product for product, _ in chunk], texts, progress)
        for product, grid in chunk:
            progress("quantize", done, len(planned))
            weight = product.parameter.detach().to("cpu", torch.float32)
            matrix = (weight.T if product.transposed else weight).numpy()
            found = quantizer.quantize_for(moments[product.activation], matrix, *grid)
            tuned.keep(product.parameter, quantizer.name, product.transposed, found)
            done += 1
    progress("quantize", done, done)
    return done


def _as_ids(text: np.ndarray | torch.Tensor) -> torch.Tensor:
    found = torch.as_tensor(text)
    if found.dim() != 1 or found.is_floating_point() or not len(found):
        raise InputError(f"a tuning text is a row of token ids, not {tuple(found.shape)} of {found.dtype}")
    return found.to(torch.int64)


def _scan(model: torch.nn.Module, ids: torch.Tensor, wanted: Mapping[torch.Tensor, Any]) -> list[_Product]:
    """The products in order, each parameter once."""
    found: dict[int, _Product] = {}
    # Held, so that no address is used twice.
    activations = []

    def note(parameter: torch.Tensor, activation: torch.Tensor, transposed: bool) -> None:
        activations.append(activation)
        key = (activation.data_ptr(), activation.numel(), *versions([activation]))
        inputs = activation.shape[-1]
        found.setdefault(id(parameter), _Product(parameter, transposed, inputs, key))

    with _watching(wanted, note):
        _read(model, ids)
    return list(found.values())


def _chunks(planned: Sequence[tuple[_Product, Grid]], budget: int) -> Iterator[list[tuple[_Product, Grid]]]:
    chunk: list[tuple[_Product, Grid]] = []
    held: dict[Any, int] = {}
    for product, grid in planned:
        size = 4 * product.inputs**2
        if chunk and product.activation not in held and sum(held.values()) + size > budget:
            yield chunk
            chunk, held = [], {}
        chunk.append((product, grid))
        held[product.activation] = size
    if chunk:
        yield chunk


def _measure(
    model: torch.nn.Module, products: Sequence[_Product], texts: Sequence[torch.Tensor], progress: Progress
) -> dict[Any, np.ndarray]:
    """By activation the mean of x x^T over all tokens, float32 [inputs, inputs]."""
    leaders = {product.activation: product for product in reversed(products)}
    wanted = WeakTensorKeyDictionary({product.parameter: key for key, product in leaders.items()})
    sums: dict[Any, torch.Tensor] = {}
    rows = dict.fromkeys(leaders, 0)

    def add(parameter: torch.Tensor, activation: torch.Tensor, transposed: bool) -> None:
        key = wanted[parameter]
        seen = activation.reshape(-1, activation.shape[-1]).float()
        moment = seen.T @ seen
        sums[key] = sums[key].add_(moment) if key in sums else moment
        rows[key] += len(seen)

    for number, ids in enumerate(texts):
        progress("read tuning texts", number, len(texts))
        with _watching(wanted, add):
            _read(model, ids)
    progress("read tuning texts", len(texts), len(texts))
    found = {key: (total / rows[key]).cpu().numpy() for key, total in sums.items()}
    if not all(np.isfinite(moment).all() for moment in found.values()):
        raise InputError("the model's activations on the tuning texts are not finite")
    return found


def _read(model: torch.nn.Module, ids: torch.Tensor) -> None:
    device = next(model.parameters()).device
    with torch.no_grad():
        model(input_ids=ids[None].to(device), use_cache=False)


class _Watch(TorchFunctionMode):
    """Tells of each product with one of some parameters, or with the transpose of one."""

    def __init__(
        self, wanted: Mapping[torch.Tensor, Any], tell: Callable[[torch.Tensor, torch.Tensor, bool], None]
    ) -> None:
        super().__init__()
        self._wanted, self._tell = wanted, tell

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        form = FORMS.get(getattr(function, "__name__", ""))
        if form is not None:
            arguments = [*args, *(kwargs[key] for key in ("weight", "mat2", "other") if key in kwargs)]
            self._look_at(arguments, *form)
        return function(*args, **kwargs)

    def _look_at(
        self, arguments: Sequence[Any], of_activation: int, of_weight: int, of_bias: int | None, transposed: bool
    ) -> None:
        if len(arguments) <= max(of_activation, of_weight):
            return
        weight, activation = arguments[of_weight], arguments[of_activation]
        if not isinstance(weight, torch.Tensor) or not isinstance(activation, torch.Tensor) or weight.dim() != 2:
            return
        if weight in self._wanted:
            self._tell(weight, activation, transposed)
        elif weight._base is not None and weight._base in self._wanted:
            base = weight._base
            if base.dim() == 2 and weight.stride() == base.stride()[::-1] and weight.shape == base.shape[::-1]:
                self._tell(base, activation, not transposed)


@contextmanager
def _watching(
    wanted: Mapping[torch.Tensor, Any], tell: Callable[[torch.Tensor, torch.Tensor, bool], None]
) -> Iterator[None]:
    # Within, the products of the moments are computed: they are with no parameter, so nothing is told of them.
    with _Watch(wanted, tell):
        yield
