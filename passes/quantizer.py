"""The seam to quantizers: how a river weight is represented, apart from the algorithm that chooses its parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

__all__ = ["ActivationAware", "QuantizedWeight", "Quantizer", "fitting_group"]


@dataclass(frozen=True)
class QuantizedWeight:
    """A linear layer's weight on a grid of ``bits`` bits, in groups of ``group_size`` input channels.

    Fields:
        values: grid indices, uint8 [outputs, groups, group_size].
        scales: float32 [outputs, groups].
        zero_points: grid index of 0.0, uint8 [outputs, groups].
        bits: 4 or 8.
    """

    values: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray
    bits: int

    @property
    def group_size(self) -> int:
        return int(self.values.shape[2])

    @property
    def nbytes(self) -> int:
        """Bytes that the weight takes when packed: values and zero points in ``bits`` bits, scales in 16."""
        return (self.values.size + self.zero_points.size) * self.bits // 8 + self.scales.size * 2

    @staticmethod
    def side_by_side(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
        """One weight with the outputs of all parts, which lie on grids of one kind."""
        if len(parts) == 1:
            return parts[0]
        return QuantizedWeight(
            np.concatenate([part.values for part in parts]),
            np.concatenate([part.scales for part in parts]),
            np.concatenate([part.zero_points for part in parts]),
            parts[0].bits,
        )

    def dequantize(self) -> np.ndarray:
        """The weight that this stands for, float32 [inputs, outputs]."""
        centred = self.values.astype(np.float32) - self.zero_points[:, :, None].astype(np.float32)
        weight = centred * self.scales[:, :, None].astype(np.float32)
        return np.ascontiguousarray(weight.reshape(weight.shape[0], -1).T)


class Quantizer(Protocol):
    """Chooses the grid of a weight."""

    name: str

    def quantize(self, weight: np.ndarray, bits: int, group_size: int) -> QuantizedWeight:
        """Quantize a weight.

        Args:
            weight: float32 [inputs, outputs], in any order in memory, and not to be changed; ``group_size`` divides
                inputs.
        """
        ...


@runtime_checkable
class ActivationAware(Quantizer, Protocol):
    """A quantizer that knows what a weight is multiplied with.

    Its plain ``quantize`` raises ConfigError, so that no destination without tuning texts uses it unawares.
    """

    def quantize_for(self, moments: np.ndarray, weight: np.ndarray, bits: int, group_size: int) -> QuantizedWeight:
        """Quantize a weight, given the mean of x x^T over its inputs x, float32 [inputs, inputs]."""
        ...


def fitting_group(inputs: int, wanted: int) -> int | None:
    """The largest power of two from 16 up to ``wanted`` that divides ``inputs``; None if there is none."""
    while wanted >= 16:
        if inputs % wanted == 0:
            return wanted
        wanted //= 2
    return None
