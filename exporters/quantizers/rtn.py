"""Round to nearest, for every destination: no library that all of them have offers it as grid indices.

onnxruntime's has the same asymmetric grid, but torch's backend runs without onnxruntime.
"""

from __future__ import annotations

import numpy as np
import torch

from river_compile.exporters.quantizers.blocks import in_blocks
from river_compile.passes.quantizer import QuantizedWeight

__all__ = ["RoundToNearest"]


class RoundToNearest:
    """Round to nearest; 0.0 always lies on the grid.

    Args:
        symmetric: zero lies in the middle of the grid, whose longer half, at 4 bits the negative one, points at each
            group's largest weight (so scales may be negative); otherwise each group has its own integer zero point.
    """

    def __init__(self, symmetric: bool = False) -> None:
        self.name = "rtn-symmetric" if symmetric else "rtn"
        self._symmetric = symmetric

    def quantize(self, weight: np.ndarray, bits: int, group_size: int) -> QuantizedWeight:
        top = 2**bits - 1

        def rounded(groups: torch.Tensor) -> QuantizedWeight:
            scales, zero_points = _symmetric(groups, bits) if self._symmetric else _asymmetric(groups, top)
            values = (groups / scales[..., None]).add_(zero_points[..., None]).round_().clamp_(0, top)
            return QuantizedWeight(
                values.to(torch.uint8).numpy(), scales.numpy(), zero_points.to(torch.uint8).numpy(), bits
            )

        return in_blocks(weight, group_size, rounded)


def _asymmetric(groups: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = ((high - low) / top).clamp(min=torch.finfo(torch.float32).tiny)
    return scales, (-low / scales).round().clamp(0, top)


def _symmetric(groups: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    middle = 1 << (bits - 1)
    extremes = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0]
    # At 8 bits the one code more is worth less than scales of one sign, which every runtime takes.
    scales = -extremes / middle if bits == 4 else extremes.abs() / middle
    return torch.where(scales == 0, 1.0, scales), torch.full_like(scales, middle)
