"""The river in torch: every linear layer's 4-bit twin."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from river_compile.config import RiverConfig
from river_compile.exporters.torch.stack import twin_of
from river_compile.passes.quantizer import QuantizedWeight, Quantizer

__all__ = ["Int4Linear", "grow_river", "river_linear"]

_GRID_CENTRE = 8
_KERNEL_ROWS = 16


class Int4Linear(nn.Module):
    """A 4-bit linear layer on torch's CPU kernel, which takes bfloat16 activations.

    The kernel's own grid has its zero at 8 and a float offset a group, so an integer zero point z becomes the offset
    ``(8 - z) * scale``, in bfloat16.

    Requires: `fits` of the weight.
    """

    def __init__(self, weight: QuantizedWeight, bias: torch.Tensor | None) -> None:
        super().__init__()
        outputs, _, self.group_size = weight.values.shape
        values = torch.from_numpy(weight.values.reshape(outputs, -1).astype(np.int32))
        offsets = (_GRID_CENTRE - weight.zero_points.astype(np.float32)) * weight.scales
        grid = torch.from_numpy(np.stack([weight.scales, offsets], axis=-1)).transpose(0, 1)
        self.register_buffer("packed", torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1))
        self.register_buffer("grid", grid.contiguous().to(torch.bfloat16))
        self.outputs = outputs
        self.added = bias

    @staticmethod
    def fits(weight: QuantizedWeight, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether the kernel takes this weight and these activations."""
        return (
            weight.bits == 4
            and dtype == torch.bfloat16
            and device.type == "cpu"
            and weight.values.shape[0] % _KERNEL_ROWS == 0
        )

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        rows = states.reshape(-1, states.shape[-1])
        result: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.packed, self.group_size, self.grid)
        product = result.view(*states.shape[:-1], self.outputs)
        return product if self.added is None else product + self.added


def river_linear(linear: nn.Module, bits: int, group_size: int, quantizer: Quantizer) -> tuple[nn.Module | None, bool]:
    """The river twin of a linear layer, and whether it runs on quantized weights.

    Where the kernel does not take it (another type than bfloat16, 8 bits), the twin holds the dequantized weights: the
    same function, at the backbone's speed. None where the group size does not divide the input channels.
    """
    stored = linear.get_parameter("weight")
    transposed = isinstance(linear, nn.Linear)
    weight = (stored.T if transposed else stored).detach().float().numpy()
    if weight.shape[0] % group_size:
        return None, False
    quantized = quantizer.quantize(weight, bits, group_size)
    bias: torch.Tensor | None = getattr(linear, "bias", None)
    if Int4Linear.fits(quantized, stored.dtype, stored.device):
        return Int4Linear(quantized, bias), True
    inputs, outputs = weight.shape
    twin = nn.Linear(inputs, outputs, bias=False, dtype=stored.dtype)
    twin.weight = nn.Parameter(torch.from_numpy(quantized.dequantize().T.copy()).to(stored), requires_grad=False)
    twin.bias = bias  # type: ignore[assignment]
    return twin, False


def grow_river(
    layers: nn.ModuleList,
    path: str,
    config: RiverConfig,
    quantizer: Quantizer,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[nn.Module | None], list[str]]:
    """For every decoder layer its river layer, or None where the config keeps the backbone; and notes, a line each.

    Args:
        path: the qualified name of the list of layers.
        progress: is told layers done and layers in all.
    """
    kept = config.kept(len(layers))
    river: list[nn.Module | None] = []
    whole, slow = [], 0
    for index, layer in enumerate(layers):
        name = f"{path}.{index}"
        if index in kept:
            river.append(None)
            continue

        def replace(inner: str, linear: nn.Module, name: str = name) -> nn.Module | None:
            nonlocal slow
            bits = config.bits_of(f"{name}.{inner}", f"{path.rpartition('.')[2]}.{name.rpartition('.')[2]}")
            if bits is None:
                return None
            twin, packed = river_linear(linear, bits, config.group_size, quantizer)
            if twin is None:
                whole.append(f"{name}.{inner}")
            slow += twin is not None and not packed
            return twin

        river.append(twin_of(layer, replace))
        progress(index + 1, len(layers))
    notes = [f"{name}: the group size does not divide its input; stays as it is" for name in whole]
    if slow:
        notes.append(f"{slow} river products run on dequantized weights: no kernel here, so no speed from them")
    return river, notes
