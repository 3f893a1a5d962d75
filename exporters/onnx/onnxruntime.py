"""ONNX Runtime as a destination: ``MatMulNBits`` for the river's linear layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from river_compile.passes.onnx.graph import OnnxGraph
from river_compile.passes.onnx.grow_river import ProductShape
from river_compile.passes.onnx.twin import outer
from river_compile.passes.quantizer import QuantizedWeight

__all__ = ["DOMAIN", "INT8_ACCURACY", "MatMulNBits", "operands"]

DOMAIN = "com.microsoft"

INT8_ACCURACY = 4


class MatMulNBits:
    """The river's linear layers as ``com.microsoft::MatMulNBits``.

    With int8 activations a float16 model's product is cast to float32 and back. ONNX Runtime's CPU would widen such a
    product itself where it lies between operators without float16 kernels, by a cast of the scales too, and int8
    kernels read scales that are constant only: within an ``If``, where nothing folds that cast, zeros come out. The
    casts here are right for every execution provider; a GPU is faster with "float" activations.

    Args:
        activations: see `RiverConfig.activations`.
    """

    def __init__(self, activations: str) -> None:
        self._int8 = activations == "int8"

    def weights(self, graph: OnnxGraph, name: str, weight: QuantizedWeight, scales: np.dtype) -> Sequence[gs.Constant]:
        return [
            graph.add_weight(f"{name}.{part}", values.astype(scales) if part == "scales" else values)
            for part, values in operands(weight).items()
        ]

    def product(
        self, activation: str, weight: Sequence[gs.Constant], shape: ProductShape, bias: str | None, output: gs.Variable
    ) -> Sequence[gs.Node]:
        computes = weight[1].dtype
        before: list[gs.Node] = []
        after: list[gs.Node] = []
        result = output
        if computes != shape.dtype:
            before.append(_cast(activation, gs.Variable(f"{output.name}/activation", computes)))
            activation = before[0].outputs[0].name
            if bias:
                before.append(_cast(bias, gs.Variable(f"{output.name}/bias", computes)))
                bias = before[1].outputs[0].name
            result = gs.Variable(f"{output.name}/product", computes)
            after.append(_cast(result.name, output))
        # g_idx, the operand before the bias, is not used.
        operands = [activation, *(constant.name for constant in weight), *(["", bias] if bias else [])]
        accuracy = {"accuracy_level": INT8_ACCURACY} if self._int8 and computes == np.float32 else {}
        node = gs.Node(
            "MatMulNBits",
            name=f"{output.name}/MatMulNBits",
            domain=DOMAIN,
            attrs={"K": shape.inputs, "N": shape.outputs, "bits": shape.bits, "block_size": shape.group_size}
            | accuracy,
            inputs=[outer(name) for name in operands],
            outputs=[result],
        )
        return [*before, node, *after]


def _cast(source: str, result: gs.Variable) -> gs.Node:
    to = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(result.dtype))
    return gs.Node("Cast", f"{result.name}/Cast", attrs={"to": to}, inputs=[outer(source)], outputs=[result])


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
