"""A weight quantized some outputs at a time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from river_compile.passes.quantizer import QuantizedWeight

__all__ = ["in_blocks"]

_BLOCK = 1 << 19
"""Weights in a block: what is made of them meanwhile, some times as many bytes, stays near the cores."""


def in_blocks(
    weight: np.ndarray, group_size: int, quantize: Callable[[torch.Tensor], QuantizedWeight]
) -> QuantizedWeight:
    """Quantize a weight whose outputs do not depend on each other.

    Args:
        weight: float32 [inputs, outputs], in any order in memory; ``group_size`` divides inputs.
        quantize: of some outputs, float32 [outputs, groups, group_size], contiguous; it may change them.
    """
    inputs, outputs = weight.shape
    rows, step = torch.from_numpy(weight).T, max(_BLOCK // inputs, 1)
    blocks = (rows[first : first + step] for first in range(0, outputs, step))
    copies = (block.clone(memory_format=torch.contiguous_format) for block in blocks)
    return QuantizedWeight.side_by_side([quantize(block.reshape(len(block), -1, group_size)) for block in copies])
