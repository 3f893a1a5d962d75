"""ONNX Runtime as a destination: its quantizer, and ``MatMulNBits`` for the river's linear layers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import onnx_graphsurgeon as gs

from river_compile.errors import ConfigError, MissingExtra
from river_compile.exporters.quantizers import Gptq, Hqq, KQuant, LeastSquares
from river_compile.passes.onnx.graph import OnnxGraph
from river_compile.passes.onnx.grow_river import ProductShape
from river_compile.passes.onnx.twin import outer
from river_compile.passes.quantizer import QuantizedWeight, Quantizer

__all__ = ["DOMAIN", "INT8_ACCURACY", "QUANTIZERS", "MatMulNBits", "RoundToNearest", "pack", "quantizer"]

DOMAIN = "com.microsoft"

INT8_ACCURACY = 4


class RoundToNearest:
    """Round to nearest by onnxruntime's own quantizer.

    Args:
        symmetric: zero lies in the middle of the grid; otherwise each group has an integer zero point of its own.
    """

    def __init__(self, symmetric: bool = False) -> None:
        self.name = "rtn-symmetric" if symmetric else "rtn"
        self._symmetric = symmetric
        try:
            with _root_logger_untouched():
                from onnxruntime.quantization import matmul_nbits_quantizer as ort
        except ImportError as error:
            raise MissingExtra("onnxruntime", "cpu", "quantizing the river") from error
        self._ort = ort

    def quantize(self, weight: np.ndarray, bits: int, group_size: int) -> QuantizedWeight:
        config = self._ort.DefaultWeightOnlyQuantConfig(block_size=group_size, is_symmetric=self._symmetric, bits=bits)
        packed, scales, zero_points = self._ort.DefaultWeightOnlyQuantizer(config).qbits_block_quant(weight)
        outputs, groups = packed.shape[:2]
        values = packed if bits == 8 else _unpack(packed)
        scales = scales.reshape(outputs, groups).astype(np.float32)
        if self._symmetric:
            zero_points = np.full((outputs, groups), 1 << (bits - 1), np.uint8)
            if bits == 8:
                values, scales = _positive(values, scales)
        else:
            zero_points = zero_points if bits == 8 else _unpack(zero_points)[:, :groups]
        return QuantizedWeight(values, scales, zero_points, bits)


@contextmanager
def _root_logger_untouched() -> Iterator[None]:
    """onnxruntime's quantizer configures the root logger when it is imported, which is the application's to do."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


QUANTIZERS: dict[str, Callable[[], Quantizer]] = {
    "rtn": RoundToNearest,
    "rtn-symmetric": lambda: RoundToNearest(symmetric=True),
    "lsq": LeastSquares,
    "kquant": KQuant,
    "hqq": Hqq,
    "gptq": Gptq,
    "gptq-symmetric": lambda: Gptq(symmetric=True),
}


def quantizer(name: str) -> Quantizer:
    """The quantizer of that name.

    Raises:
        ConfigError: ONNX Runtime has no such quantizer here.
        MissingExtra: onnxruntime is not installed.
    """
    if name not in QUANTIZERS:
        raise ConfigError("quantizer", f"{name!r} is none of {', '.join(QUANTIZERS)}")
    return QUANTIZERS[name]()


class MatMulNBits:
    """The river's linear layers as ``com.microsoft::MatMulNBits``.

    Args:
        activations: see `RiverConfig.activations`.
    """

    def __init__(self, activations: str) -> None:
        self._accuracy = {"accuracy_level": INT8_ACCURACY} if activations == "int8" else {}

    def weights(self, graph: OnnxGraph, name: str, weight: QuantizedWeight, like: gs.Constant) -> Sequence[gs.Constant]:
        return (
            graph.add_weight(f"{name}.values", pack(weight.values, weight.bits)),
            graph.add_weight(f"{name}.scales", weight.scales.astype(float_type(like))),
            graph.add_weight(f"{name}.zero_points", pack(weight.zero_points, weight.bits)),
        )

    def product(
        self, activation: str, weight: Sequence[gs.Constant], shape: ProductShape, bias: str | None, output: gs.Variable
    ) -> Sequence[gs.Node]:
        # g_idx, the operand before the bias, is not used.
        operands = [activation, *(constant.name for constant in weight), *(["", bias] if bias else [])]
        node = gs.Node(
            "MatMulNBits",
            name=f"{output.name}/MatMulNBits",
            domain=DOMAIN,
            attrs={
                "K": shape.inputs,
                "N": shape.outputs,
                "bits": shape.bits,
                "block_size": shape.group_size,
                **self._accuracy,
            },
            inputs=[outer(name) for name in operands],
            outputs=[output],
        )
        return [node]


def float_type(constant: gs.Constant) -> np.dtype:
    """The float type of a weight, bfloat16 included, which onnx-graphsurgeon gives as a number."""
    import onnx

    dtype = constant.dtype
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(dtype) if isinstance(dtype, int) else dtype)


def _positive(values: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """8-bit values and scales with the sign of negative scales moved into the values, of which -128 becomes 127."""
    flipped = np.minimum(256 - values.astype(np.int16), 255).astype(np.uint8)
    return np.where(scales[:, :, None] < 0, flipped, values), np.where(scales == 0, 1, np.abs(scales))


def _unpack(packed: np.ndarray) -> np.ndarray:
    """Two 4-bit numbers a byte, the low half first, along the last axis."""
    return np.stack([packed & 0xF, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Grid indices as ``MatMulNBits`` takes them: at 4 bits two a byte, the low half first, along the last axis."""
    if bits != 4:
        return np.ascontiguousarray(values)
    if values.shape[-1] % 2:
        values = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, 1)])
    return np.ascontiguousarray(values[..., 0::2] | (values[..., 1::2] << 4))
