"""torch's linear layers with quantized weights, and the store that holds each river weight once."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

from river_compile.errors import RiverError
from river_compile.passes.fx.grow_river import Product
from river_compile.passes.quantizer import ActivationAware, QuantizedWeight, Quantizer

if TYPE_CHECKING:
    from river_compile.exporters.torch_tuning import Tuned

__all__ = [
    "Dequantized",
    "GraphWeights",
    "Grid",
    "Int4Cpu",
    "Int4Cuda",
    "Lowering",
    "RoundToNearest",
    "Store",
    "lowering_for",
]

Grid = tuple[int, int]
"""Bits and group size."""


class RoundToNearest:
    """Round to nearest on an asymmetric grid with integer zero points; a grid always has 0.0 on it."""

    name = "rtn"

    def quantize(self, weight: np.ndarray, bits: int, group_size: int) -> QuantizedWeight:
        inputs, outputs = weight.shape
        groups = torch.from_numpy(weight).T.reshape(outputs, inputs // group_size, group_size)
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        top = 2**bits - 1
        scales = ((high - low) / top).clamp(min=torch.finfo(torch.float32).tiny)
        zero_points = (-low / scales).round().clamp(0, top)
        values = (groups / scales[..., None] + zero_points[..., None]).round().clamp(0, top)
        return QuantizedWeight(
            values.to(torch.uint8).numpy(), scales.numpy(), zero_points.to(torch.uint8).numpy(), bits
        )


def quantizer(name: str) -> Quantizer:
    """The quantizer of that name: this file's, or one of ONNX Runtime's.

    Raises:
        ConfigError: there is no such quantizer.
        MissingExtra: it needs a package that is not installed.
    """
    if name == RoundToNearest.name:
        return RoundToNearest()
    from river_compile.exporters import onnxruntime

    return onnxruntime.quantizer(name)


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

    8-bit weights are two 4-bit planes, their products added. Groups smaller than the kernel's least stay float.
    Measured on x86 with AVX-512: faster than bfloat16 up to 4 rows, even at 8, slower from 16 on.
    """

    name = "int4-cpu"
    max_rows = 4
    _row_multiple = 16

    def pack(self, weight: QuantizedWeight, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
        if weight.group_size < 32:
            return Dequantized().pack(weight, dtype, device)
        values, parameters = _planes(weight, self._row_multiple)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values.to(device), 1)
        return packed, parameters.to(device)

    @property
    def function(self) -> Callable[..., torch.Tensor]:
        return int4_cpu_product


def int4_cpu_product(
    activation: torch.Tensor,
    operands: Sequence[torch.Tensor],
    outputs: int,
    bits: int,
    group_size: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    return _int4_product(
        torch.ops.aten._weight_int4pack_mm_for_cpu, activation, operands, outputs, bits, group_size, bias
    )


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
        return int4_cuda_product


def int4_cuda_product(
    activation: torch.Tensor,
    operands: Sequence[torch.Tensor],
    outputs: int,
    bits: int,
    group_size: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    return _int4_product(torch.ops.aten._weight_int4pack_mm, activation, operands, outputs, bits, group_size, bias)


def _int4_product(
    kernel: Callable[..., torch.Tensor],
    activation: torch.Tensor,
    operands: Sequence[torch.Tensor],
    outputs: int,
    bits: int,
    group_size: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    if len(operands) == 1:
        return functional.linear(activation, operands[0], bias)
    rows = activation.reshape(-1, activation.shape[-1]).to(torch.bfloat16).contiguous()
    return _finish(kernel(rows, operands[0], group_size, operands[1]), activation, outputs, bits, bias)


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


def _finish(
    result: torch.Tensor, activation: torch.Tensor, outputs: int, bits: int, bias: torch.Tensor | None
) -> torch.Tensor:
    """From the kernel's rows to a linear layer's result: planes added, filling cut off, shape and type restored."""
    if bits == 8:
        half = result.shape[-1] // 2
        result = result[:, :half] + result[:, half:]
    result = result[:, :outputs].to(activation.dtype).reshape(*activation.shape[:-1], outputs)
    return result if bias is None else result + bias


def lowering_for(device: torch.device) -> Lowering:
    """The fastest lowering that a device has.

    Raises:
        RiverError: river layers cannot run on this device.
    """
    if device.type == "cpu" and hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        return Int4Cpu()
    if device.type == "cuda" and hasattr(torch.ops.aten, "_weight_int4pack_mm"):
        return Int4Cuda()
    raise RiverError(f"torch {torch.__version__} has no 4-bit linear layer for {device.type}")


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


def versions(parameters: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """A number for each tensor that grows when it is changed in place; a tensor made for inference has none."""
    return tuple(-1 if tensor.is_inference() else tensor._version for tensor in parameters)


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
