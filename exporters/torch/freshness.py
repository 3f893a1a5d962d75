"""Whether weights are still what they were.

What is looked at, from the cheapest on: which object it is, torch's counter of changes in place, the address; and
samples of the content, for what leaves no other trace: writes through ``.data``, fused optimizers. A change that spares
every sample is not seen.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch

from river_compile.exporters.torch import seam

__all__ = ["samples", "traces", "versions"]

SPREAD = 64
"""About as many numbers of each tensor are in a sample. A change of all weights is seen whatever the number."""
_COUNTER = operator.attrgetter("_version")
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def versions(tensors: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """A number for each tensor that grows when autograd sees it changed in place; a tensor made for inference has
    none."""
    try:
        return tuple(map(_COUNTER, tensors))
    except RuntimeError:
        return tuple(-1 if tensor.is_inference() else tensor._version for tensor in tensors)


def traces(tensors: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    """What differs where a tensor is another object, was changed in place or moved; 0.1 microseconds each."""
    return (*map(id, tensors), *versions(tensors), *map(torch.Tensor.data_ptr, tensors))


def samples(tensors: Sequence[torch.Tensor], spread: int = SPREAD) -> list[torch.Tensor]:
    """Numbers from all over each tensor, or this process's shard of it, as integers of the same bits, on the CPU."""
    parts: dict[torch.device, list[torch.Tensor]] = {}
    with torch.no_grad():
        for tensor in tensors:
            parts.setdefault(tensor.device, []).append(_spread(tensor, spread))
        return [torch.cat(part).cpu() for part in parts.values()]


def _spread(tensor: torch.Tensor, spread: int) -> torch.Tensor:
    bits = seam.shard_of(tensor).detach().view(_BITS[tensor.element_size()])
    count = bits.numel()
    # Odd and a little less than even parts, so that it walks through the columns as well.
    step = max(int(count / spread * 0.97), 1) | 1
    if not bits.is_contiguous():
        return bits.reshape(-1)[::step]
    return bits.as_strided((-(-count // step),), (step,))
