"""The river's linear layers as TensorRT takes them: a symmetric integer grid, dequantized before a plain product."""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs

from river_compile.errors import ConfigError
from river_compile.passes.onnx.graph import OnnxGraph
from river_compile.passes.onnx.grow_river import ProductShape
from river_compile.passes.onnx.twin import outer
from river_compile.passes.quantizer import QuantizedWeight

__all__ = ["OPSET", "DequantizedMatMul"]

OPSET = 21
"""The first with 4-bit integers and with blocks along an axis in DequantizeLinear."""

_INTEGERS = {4: np.dtype(ml_dtypes.int4), 8: np.dtype(np.int8)}


class DequantizedMatMul:
    """``DequantizeLinear`` on a signed integer weight [inputs, outputs], blocked along its inputs, then ``MatMul``.

    TensorRT fuses the two into one weight-only quantized product. It has no zero points.
    """

    def weights(self, graph: OnnxGraph, name: str, weight: QuantizedWeight, scales: np.dtype) -> Sequence[gs.Constant]:
        """Values in the integer type of their bits, scales [groups, outputs].

        Raises:
            ConfigError: the quantizer's grid is not symmetric.
        """
        zero = 1 << (weight.bits - 1)
        if (weight.zero_points != zero).any():
            raise ConfigError(
                "quantizer", "TensorRT dequantizes symmetric grids only; use 'rtn-symmetric' or 'gptq-symmetric'"
            )
        centred = (weight.values.astype(np.int16) - zero).reshape(weight.values.shape[0], -1)
        return (
            graph.add_weight(f"{name}.values", np.ascontiguousarray(centred.T).astype(_INTEGERS[weight.bits])),
            graph.add_weight(f"{name}.scales", np.ascontiguousarray(weight.scales.T).astype(scales)),
        )

    def product(
        self, activation: str, weight: Sequence[gs.Constant], shape: ProductShape, bias: str | None, output: gs.Variable
    ) -> Sequence[gs.Node]:
        values, scales = weight
        matrix = gs.Variable(f"{output.name}/dequantized", output.dtype)
        dequantize = gs.Node(
            "DequantizeLinear",
            f"{output.name}/DequantizeLinear",
            attrs={"axis": 0, "block_size": shape.group_size},
            inputs=[outer(values.name), outer(scales.name)],
            outputs=[matrix],
        )
        result = gs.Variable(f"{output.name}/product", output.dtype) if bias else output
        product = gs.Node(
            "MatMul", f"{output.name}/MatMul", inputs=[outer(activation), outer(matrix.name)], outputs=[result]
        )
        if bias is None:
            return [dequantize, product]
        add = gs.Node("Add", f"{output.name}/Add", inputs=[outer(result.name), outer(bias)], outputs=[output])
        return [dequantize, product, add]
