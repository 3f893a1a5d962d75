"""torch's linear layers with quantized weights: a lowering for each device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch.nn import functional

from river_compile.errors import RiverError
from river_compile.passes.quantizer import QuantizedWeight

__all__ = [
    "Dequantized",
    "Int4Cpu",
    "Int4Cuda",
    "Lowering",
    "int4_operands",
    "int4_rows",
    "int8_operands",
    "int8_rows",
    "lowering_for",
]

SLIGHT = 0.02
"""What a second rounding may change a group by, as a part of its norm; 4 bits change it by some 0.08."""
MOSTLY = 0.9
"""The part of the groups that it may not change by more: by the norm of all, one large number would hide the others."""
_BLOCK = 4096


class Lowering(Protocol):
    """How a device multiplies with quantized weights.

    ``max_rows`` is the most rows of an activation for which it is known to be faster than the float product.
    """

    name: str
    max_rows: int

    def pack(self, weight: QuantizedWeight, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
        """The operands that stand for a weight in a model of type ``dtype``."""
        ...

    @property
    def function(self) -> Callable[..., torch.Tensor]:
        """``function(activation, operands, outputs, bits, group_size, bias)``."""
        ...


class Dequantized:
    """Float products with the dequantized weight: no faster than the backbone, and the judge of the other lowerings.

    It serves where a device has no kernel as well.
    """

    name = "dequantized"
    max_rows = 1 << 30

    def pack(self, weight: QuantizedWeight, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
        return (torch.from_numpy(weight.dequantize().T.copy()).to(device, dtype),)

    @property
    def function(self) -> Callable[..., torch.Tensor]:
        return dequantized_product


def dequantized_product(
    activation: torch.Tensor,
    operands: Sequence[torch.Tensor],
    outputs: int,
    bits: int,
    group_size: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    return functional.linear(activation, operands[0], bias)


class Int4Cpu:
    """torch's own CPU kernel for 4-bit weights. It computes with bfloat16 activations whatever the model's type.

    8-bit weights are two 4-bit planes, their products added; or torch's kernel for 8-bit weights, which has one scale
    an output, where that is faster and the second rounding is slight. Groups smaller than the kernel's least stay
    float. ``max_rows`` is of x86 with AVX-512: faster than bfloat16 up to 4 rows, even at 8, slower from 16 on.

    Args:
        prefers_int8: whether the kernel for 8-bit weights is so much faster for a weight, of a model of a type; never
            if None.
    """

    name = "int4-cpu"
    max_rows = 4

    def __init__(self, prefers_int8: Callable[[QuantizedWeight, torch.dtype], bool] | None = None) -> None:
        self._prefers_int8 = prefers_int8
        if prefers_int8 is not None:
            self.name = "int4-cpu, timed"

    def pack(self, weight: QuantizedWeight, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
        if weight.group_size < 32:
            return Dequantized().pack(weight, dtype, device)
        if weight.bits == 8 and self._prefers_int8 is not None and self._prefers_int8(weight, dtype):
            operands, close = int8_operands(weight)
            if close >= MOSTLY:
                return tuple(operand.to(device) for operand in operands)
        packed, parameters = int4_operands(weight)
        return packed.to(device), parameters.to(device)

    @property
    def function(self) -> Callable[..., torch.Tensor]:
        return packed_product


def int4_operands(weight: QuantizedWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight as torch's CPU kernel for 4 bits takes it, and scale and middle of each group."""
    values, parameters = _planes(weight, 16)
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1), parameters


def int8_operands(weight: QuantizedWeight) -> tuple[tuple[torch.Tensor, ...], float]:
    """A weight rounded a second time, to 8 bits with one scale an output, as `int8_rows` takes it: int8 [outputs,
    inputs], scales float32 [outputs], and ones bfloat16 [outputs]; and the part of its groups that this changes by
    `SLIGHT` at most."""
    values, scales, close = [], [], 0
    for start in range(0, len(weight.values), _BLOCK):
        rows = slice(start, start + _BLOCK)
        part = QuantizedWeight(weight.values[rows], weight.scales[rows], weight.zero_points[rows], weight.bits)
        exact = torch.from_numpy(part.dequantize().T)
        scale = exact.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
        rounded = (exact / scale[:, None]).round()
        error = (rounded * scale[:, None] - exact).reshape(part.values.shape).norm(dim=-1)
        close += int((error <= SLIGHT * exact.reshape(part.values.shape).norm(dim=-1)).sum())
        values.append(rounded.to(torch.int8))
        scales.append(scale)
    ones = torch.ones(len(weight.values), dtype=torch.bfloat16)
    return (torch.cat(values).contiguous(), torch.cat(scales), ones), close / weight.scales.size


class Int4Cuda:
    """torch's own CUDA kernel for 4-bit weights (tinygemm), bfloat16 activations, compute capability 8.0 and later.

    Written to torch's documentation of the operators; it has not been run on a GPU yet.
    """

    name = "int4-cuda"
    max_rows = 16
    _row_multiple = 8
    _tiles = 8

    def pack(self, weight: QuantizedWeight, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
        inputs = weight.values.shape[1] * weight.group_size
        if weight.group_size < 32 or inputs % (self._tiles * 16):
            return Dequantized().pack(weight, dtype, device)
        values, parameters = _planes(weight, self._row_multiple)
        pairs = (values[:, ::2] << 4 | values[:, 1::2]).to(torch.uint8).to(device)
        packed = torch.ops.aten._convert_weight_to_int4pack(pairs, self._tiles)
        return packed, parameters.to(device)

    @property
    def function(self) -> Callable[..., torch.Tensor]:
        return packed_product


def packed_product(
    activation: torch.Tensor,
    operands: Sequence[torch.Tensor],
    outputs: int,
    bits: int,
    group_size: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """By the kernel that the operands are packed for."""
    if len(operands) == 1:
        return functional.linear(activation, operands[0], bias)
    rows = activation.reshape(-1, activation.shape[-1]).to(torch.bfloat16).contiguous()
    if operands[0].dtype == torch.int8:
        result = int8_rows(rows, operands) * operands[1]
    else:
        result = int4_rows(rows, operands, group_size)
        if bits == 8:
            half = result.shape[-1] // 2
            result = result[:, :half] + result[:, half:]
    result = result[:, :outputs].to(activation.dtype).reshape(*activation.shape[:-1], outputs)
    return result if bias is None else result + bias


def int4_rows(rows: torch.Tensor, operands: Sequence[torch.Tensor], group_size: int) -> torch.Tensor:
    """torch's kernel on rows, bfloat16 [rows, inputs]: bfloat16 [rows, outputs of all planes, filled up]."""
    on_cpu = rows.device.type == "cpu"
    kernel = torch.ops.aten._weight_int4pack_mm_for_cpu if on_cpu else torch.ops.aten._weight_int4pack_mm
    result: torch.Tensor = kernel(rows, operands[0], group_size, operands[1])
    return result


def int8_rows(rows: torch.Tensor, operands: Sequence[torch.Tensor]) -> torch.Tensor:
    """torch's kernel on rows, bfloat16 [rows, inputs]: bfloat16 [rows, outputs], to be multiplied by the scales. The
    kernel's own scales would be bfloat16, off by one part in 256 for all of an output: it is given ones, as an operand,
    since Inductor has no lowering for ones made on the way."""
    values, _, ones = operands
    result: torch.Tensor = torch.ops.aten._weight_int8pack_mm(rows, values, ones)
    return result


def _planes(weight: QuantizedWeight, row_multiple: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight as torch's 4-bit kernels take it: grid indices, int32 [rows, inputs], and for each group scale and
    middle, bfloat16 [groups, rows, 2], that stand for ``(index - 8) * scale + middle``.

    8 bits are two planes of rows one after the other: ``index = 16 * high + low``. Rows are filled up with zeros.
    """
    values = torch.from_numpy(weight.values).to(torch.int32)
    scales, zeros = torch.from_numpy(weight.scales), torch.from_numpy(weight.zero_points).to(torch.int32)
    outputs = values.shape[0]
    filled = -outputs % row_multiple
    planes = [(values, scales, zeros)]
    if weight.bits == 8:
        planes = [(values >> 4, scales * 16, zeros >> 4), (values & 15, scales, zeros & 15)]
    rows, parameters = [], []
    for indices, step, zero in planes:
        middle = (8 - zero) * step
        rows.append(functional.pad(indices.reshape(outputs, -1), (0, 0, 0, filled)))
        parameters.append(functional.pad(torch.stack([step, middle], -1), (0, 0, 0, 0, 0, filled)))
    joined = torch.cat(parameters).transpose(0, 1).contiguous()
    return torch.cat(rows).contiguous(), joined.to(torch.bfloat16)


def lowering_for(
    device: torch.device, prefers_int8: Callable[[QuantizedWeight, torch.dtype], bool] | None = None
) -> Lowering:
    """The fastest lowering that a device has.

    Args:
        prefers_int8: as `Int4Cpu` takes it.

    Raises:
        RiverError: river layers cannot run on this device.
    """
    if device.type == "cpu" and hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        return Int4Cpu(prefers_int8)
    if device.type == "cuda" and hasattr(torch.ops.aten, "_weight_int4pack_mm"):
        return Int4Cuda()
    raise RiverError(f"torch {torch.__version__} has no 4-bit linear layer for {device.type}")
