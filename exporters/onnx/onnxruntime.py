"""ONNX Runtime as a destination: ``MatMulNBits`` for the river's linear layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from river_compile.passes.onnx.graph import OnnxGraph
from river_compile.passes.onnx.grow_river import ProductShape
from river_compile.passes.onnx.twin import outer
from river_compile.passes.quantizer import QuantizedWeight

__all__ = ["DOMAIN", "INT8_ACCURACY", "MatMulNBits", "float_type", "operands"]

DOMAIN = "com.microsoft"

INT8_ACCURACY = 4


class MatMulNBits:
    """The river's linear layers as ``com.microsoft::MatMulNBits``.

    Args:
        activations: see `RiverConfig.activations`.
    """

    def __init__(self, activations: str) -> None:
        self._accuracy = {"accuracy_level": INT8_ACCURACY} if activations == "int8" else {}

    def weights(self, graph: OnnxGraph, name: str, weight: QuantizedWeight, like: gs.Constant) -> Sequence[gs.Constant]:
        return [
            graph.add_weight(f"{name}.{part}", values.astype(float_type(like)) if part == "scales" else values)
            for part, values in operands(weight).items()
        ]

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


def operands(weight: QuantizedWeight) -> dict[str, np.ndarray]:
    """What ``MatMulNBits`` takes for a weight, in its order: values, scales (float32 as yet) and zero points."""
    return {
        "values": _pack(weight.values, weight.bits),
        "scales": weight.scales,
        "zero_points": _pack(weight.zero_points, weight.bits),
    }


def _pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Grid indices as ``MatMulNBits`` takes them: at 4 bits two a byte, the low half first, along the last axis."""
    if bits != 4:
        return np.ascontiguousarray(values)
    if values.shape[-1] % 2:
        values = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, 1)])
    return np.ascontiguousarray(values[..., 0::2] | (values[..., 1::2] << 4))
