"""What quantizing each linear layer costs, measured, and the bit widths that spend a budget best."""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from river_compile.config import FLOAT, RiverConfig
from river_compile.errors import ConfigError, InputError

if TYPE_CHECKING:
    from river_compile.exporters.onnx.swap import SwappableModel

__all__ = [
    "LinearCost",
    "Sensitivity",
    "choose_bits",
    "divergence",
    "measure_sensitivity",
    "sensitivity_of",
    "starts",
]

Bits = int | Literal["float"]

_LADDER: tuple[Bits, ...] = (4, 8, FLOAT)
# Four more bits make the grid 16 times as fine, and KL goes with the square of the error.
_FINER = 256.0
_PIECE = 64


@dataclass(frozen=True)
class LinearCost:
    """One linear layer: its name, decoder layer, number of weights, and KL(backbone || model) a token, in nats, when it
    alone is quantized."""

    name: str
    layer: int
    weights: int
    kl: float


@dataclass(frozen=True)
class Sensitivity:
    """The cost of every linear layer of the river alone.

    Fields:
        quantizer, bits, group_size: the grid that the costs were measured on.
        float_bits: bits of a weight that stays as it is.
        tokens: tokens that they were measured on.
        together: KL with all of them quantized at once.
        linears: in order.
        head: the LM head, beyond all of them; None where the model has none that can be quantized.
    """

    quantizer: str
    bits: int
    group_size: int
    float_bits: int
    tokens: int
    together: float
    linears: tuple[LinearCost, ...]
    head: LinearCost | None = None

    @property
    def by_layer(self) -> dict[int, float]:
        """Summed over the linear layers of each decoder layer."""
        sums: dict[int, float] = {}
        for linear in self.linears:
            sums[linear.layer] = sums.get(linear.layer, 0.0) + linear.kl
        return sums

    @property
    def by_role(self) -> dict[str, float]:
        """Summed over decoder layers, by the last part of the name."""
        sums: dict[str, float] = {}
        for linear in self.linears:
            role = linear.name.rpartition(".")[2]
            sums[role] = sums.get(role, 0.0) + linear.kl
        return sums

    def check(self, config: RiverConfig) -> None:
        """Raises ConfigError where the costs were measured on another grid than the config's."""
        if (self.quantizer, self.group_size) != (config.quantizer, config.group_size):
            raise ConfigError(
                "sensitivity",
                f"measured with {self.quantizer}, group size {self.group_size}, not {config.quantizer}, "
                f"group size {config.group_size}",
            )

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def load(cls, path: Path) -> Sensitivity:
        """Raises InputError where the file is none of `to_json`."""
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            fields["linears"] = tuple(LinearCost(**linear) for linear in fields["linears"])
            fields["head"] = LinearCost(**fields["head"]) if fields["head"] else None
            return cls(**fields)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(f"{path}: no sensitivity file: {' '.join(str(error).split())[:200]}") from error


def choose_bits(
    sensitivity: Sensitivity, *, avg_bits: float | None = None, max_kl: float | None = None
) -> dict[str, Bits]:
    """For each linear layer 4 bits, 8 bits or its float type, by greatest KL saved for a bit spent, until the budget.

    A budget of fidelity plans the LM head like the others, by its name; a budget of bits is the decoder layers' alone,
    and says nothing of the head. Costs are taken to add up, those of the layers scaled so that their sum is the
    measured cost of all together; 8 bits are taken to cost 1/256 of 4. What a plan really costs is for the caller to
    measure.

    Args:
        avg_bits: mean bits of a river weight, scales and zero points not counted.
        max_kl: KL a token that the plan may be expected to cost.

    Raises:
        ConfigError: neither or both are given, or the budget is out of reach.
    """
    if (avg_bits is None) == (max_kl is None):
        raise ConfigError("avg_bits", "give either avg_bits or max_kl")
    if avg_bits is not None and avg_bits < _LADDER[0]:  # type: ignore[operator]
        raise ConfigError("avg_bits", f"must be 4 or more, not {avg_bits}")
    if max_kl is not None and max_kl <= 0:
        raise ConfigError("max_kl", f"must be above 0, not {max_kl}")
    planned = list(sensitivity.linears)
    total = sum(linear.weights for linear in planned)
    scale = sensitivity.together / max(sum(linear.kl for linear in planned), 1e-30)
    costs = [linear.kl * scale for linear in planned]
    if max_kl is not None and sensitivity.head is not None:
        planned.append(sensitivity.head)
        costs.append(sensitivity.head.kl)
    chosen: dict[str, Bits] = {linear.name: _LADDER[0] for linear in planned}
    steps = [_step(index, linear, 0, sensitivity, costs[index]) for index, linear in enumerate(planned)]
    heapq.heapify(steps)
    spent, expected = 4.0 * total, sum(costs)
    while steps:
        if max_kl is not None and expected <= max_kl:
            break
        _, index, rung, saved, cost = heapq.heappop(steps)
        if avg_bits is not None and spent + cost > avg_bits * total + 1e-6:
            continue
        linear = planned[index]
        chosen[linear.name] = _LADDER[rung + 1]
        spent, expected = spent + cost, expected - saved
        if rung + 2 < len(_LADDER):
            heapq.heappush(steps, _step(index, linear, rung + 1, sensitivity, costs[index]))
    return chosen


def _step(
    index: int, linear: LinearCost, rung: int, sensitivity: Sensitivity, kl: float
) -> tuple[float, int, int, float, float]:
    """One rung up: (-KL saved per bit, linear layer, rung, KL saved, bits spent)."""
    costs = (kl, kl / _FINER, 0.0)
    widths = (4, 8, sensitivity.float_bits)
    saved, cost = costs[rung] - costs[rung + 1], float((widths[rung + 1] - widths[rung]) * linear.weights)
    return -saved / cost, index, rung, saved, cost


def measure_sensitivity(
    model: str | Path,
    config: RiverConfig,
    ids: Sequence[np.ndarray],
    *,
    tokens: int = 256,
    progress: Callable[[str, int, int], None] | None = None,
) -> Sensitivity:
    """Quantize each linear layer of the river alone, to 4 bits, and measure what that does to the model's predictions.

    Args:
        model: a plain ONNX decoder.
        config: its quantizer, group size and kept layers are used; its bits are not.
        ids: token ids of tuning texts; an activation-aware quantizer sees all of them, the measurement their starts.
        tokens: how many tokens to measure on.

    Raises:
        InputError: the model cannot be used, or the texts have fewer than 64 tokens.
    """
    from river_compile.exporters.onnx.swap import SwappableModel

    progress = progress or (lambda step, done, total: None)
    plain = replace(config, bits=4, bits_for=(), head_bits=4)
    swappable = SwappableModel(Path(model), plain, ids, lambda done, total: progress("read tuning texts", done, total))
    return sensitivity_of(swappable, config.group_size, ids, tokens=tokens, progress=progress)


def sensitivity_of(
    swappable: SwappableModel,
    group_size: int,
    ids: Sequence[np.ndarray],
    *,
    tokens: int,
    progress: Callable[[str, int, int], None],
) -> Sensitivity:
    """`measure_sensitivity` of a model that is loaded already."""
    batch = starts(ids, tokens)
    reference = swappable.logits(batch)
    costs: list[LinearCost] = []
    everything: dict[str, np.ndarray] = {}
    for done, linear in enumerate(swappable.linears):
        progress("measure sensitivity", done, len(swappable.linears) + 1)
        changed = swappable.quantized(linear, 4)
        costs.append(
            LinearCost(
                linear.name, linear.layer, linear.weights, divergence(reference, swappable.logits(batch, changed))
            )
        )
        everything |= changed
    together = divergence(reference, swappable.logits(batch, everything))
    head = swappable.head
    if head is not None:
        cost = divergence(reference, swappable.logits(batch, swappable.quantized(head, 4)))
        head_cost = LinearCost(head.name, head.layer, head.weights, cost)
    progress("measure sensitivity", 1, 1)
    return Sensitivity(
        swappable.quantizer,
        4,
        group_size,
        swappable.float_bits,
        batch.size,
        together,
        tuple(costs),
        head_cost if head is not None else None,
    )


def starts(ids: Sequence[np.ndarray], tokens: int) -> np.ndarray:
    """Starts of texts, all of one length, spread over the texts: int64 [pieces, 64]."""
    long_enough = [text for text in ids if len(text) >= _PIECE]
    if not long_enough:
        raise InputError(f"no tuning text has {_PIECE} tokens")
    count = min(len(long_enough), max(1, tokens // _PIECE))
    spread = np.linspace(0, len(long_enough) - 1, count).round().astype(int)
    return np.stack([long_enough[index][:_PIECE] for index in spread])


def divergence(reference: np.ndarray, logits: np.ndarray) -> float:
    """Mean KL a token of float32 [batch, tokens, vocabulary]."""
    total = 0.0
    for row, other in zip(reference, logits, strict=True):
        first, second = (rows - np.logaddexp.reduce(rows, axis=-1, keepdims=True) for rows in (row, other))
        total += float((np.exp(first) * (first - second)).sum(axis=-1, dtype=np.float64).mean())
    return max(total / len(reference), 0.0)
