"""Linear layers in an ONNX graph: a product with a constant matrix, in the forms that exporters write."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from river_compile.passes.onnx.graph import OnnxGraph, Uses

__all__ = ["QUANTIZED_OPS", "Linear", "constant_root", "find_linears", "float_type", "quantized_by"]

QUANTIZED_OPS = {"MatMulNBits", "MatMulInteger", "QLinearMatMul", "DynamicQuantizeMatMul", "MatMulBnb4"}
QUANTIZED_OPS |= {"MatMulFpQ4", "MatMulInteger16", "MatMulIntegerToFloat", "QAttention", "QGemm", "QMoE"}
QUANTIZED_OPS |= {"QOrderedMatMul"}

_NARROW = {"int8": 8, "uint8": 8, "int4": 4, "uint4": 4, "int2": 2, "uint2": 2, "float8": 8, "float4": 4}
_FLOATS = {"float32", "float16", "bfloat16"}


@dataclass(frozen=True)
class Linear:
    """One linear layer, ``y = x @ W (+ bias)``.

    Fields:
        node: the MatMul or Gemm.
        name: the qualified name of the module it comes from, or one made of its place.
        weight: the constant at the root of W.
        transposed: whether the constant is W's transpose, [outputs, inputs].
        dtype: the float type of x, W and y; the constant's, unless casts lie between.
        bias: the name of the bias operand (Gemm only).
    """

    node: gs.Node
    name: str
    weight: gs.Constant
    transposed: bool
    dtype: np.dtype
    bias: str | None = None

    @property
    def inputs(self) -> int:
        return int(self.weight.shape[1 if self.transposed else 0])

    @property
    def outputs(self) -> int:
        return int(self.weight.shape[0 if self.transposed else 1])

    @property
    def float_bits(self) -> int:
        """Bits of a weight as it is."""
        return float_type(self.weight.dtype).itemsize * 8

    def matrix(self, graph: OnnxGraph) -> np.ndarray:
        """W, float32 [inputs, outputs], in either order in memory, read from the file now and not kept."""
        values = graph.read(self.weight)
        # What lies within the model cannot be written to.
        values = values.astype(np.float32, copy=not values.flags.writeable)
        return values.T if self.transposed else values


def find_linears(graph: OnnxGraph, uses: Uses, nodes: Sequence[gs.Node], layer: str) -> list[Linear]:
    """The linear layers among ``nodes``, in order. ``layer`` names the decoder layer where a node has no scope.

    A weight that a run may replace makes none.
    """
    found: list[Linear] = []
    for node in nodes:
        linear = _as_linear(graph, uses, node, f"{layer}.linear.{len(found)}")
        if linear is not None:
            found.append(linear)
    return found


def _as_linear(graph: OnnxGraph, uses: Uses, node: gs.Node, fallback: str) -> Linear | None:
    if node.domain not in (None, "", "ai.onnx") or node.op not in ("MatMul", "Gemm"):
        return None
    root, transposed, dtype = constant_root(uses, node.inputs[1])
    if not isinstance(root, gs.Constant) or dtype is None or len(root.shape) != 2:
        return None
    if root.name in graph.replaceable or not {str(float_type(root.dtype)), str(dtype)} <= _FLOATS:
        return None
    bias = None
    if node.op == "Gemm":
        if node.attrs.get("transA", 0) or node.attrs.get("alpha", 1.0) != 1.0 or node.attrs.get("beta", 1.0) != 1.0:
            return None
        transposed ^= bool(node.attrs.get("transB", 0))
        bias = node.inputs[2].name if len(node.inputs) > 2 and node.inputs[2].name else None
    return Linear(node, _name(graph, node) or fallback, root, transposed, dtype, bias)


def float_type(dtype: Any) -> np.dtype:
    """A type as numpy has it, bfloat16 included, which onnx-graphsurgeon gives as ONNX's number."""
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(dtype) if isinstance(dtype, int) else dtype)


def constant_root(uses: Uses, tensor: gs.Tensor) -> tuple[gs.Tensor, bool, np.dtype | None]:
    """What a tensor is, seen through transposes, casts and identities, a constant if it is a weight; whether it is
    transposed; the type that the last of the casts leaves, if known."""
    transposed, dtype = False, None
    while not isinstance(tensor, gs.Constant):
        node = uses.producer.get(tensor.name)
        if node is None or node.op not in ("Transpose", "Cast", "Identity"):
            break
        if node.op == "Transpose":
            transposed = not transposed
        if node.op == "Cast" and dtype is None:
            dtype = float_type(node.attrs["to"])
        tensor = node.inputs[0]
    return tensor, transposed, dtype or (float_type(tensor.dtype) if isinstance(tensor, gs.Constant) else None)


def quantized_by(uses: Uses, nodes: Sequence[gs.Node]) -> dict[str, int]:
    """The operators, among ``nodes`` or on the way to their weights, by which linear layers are quantized already, and
    how many bytes of weights they read."""
    found: dict[str, int] = {}
    for node in nodes:
        if node.op in QUANTIZED_OPS:
            found[node.op] = found.get(node.op, 0) + sum(map(_packed_bytes, node.inputs))
        elif node.op in ("MatMul", "Gemm", "FusedMatMul"):
            for op, size in _dequantizers(uses, node.inputs[1]).items():
                found[op] = found.get(op, 0) + size
    return found


def _dequantizers(uses: Uses, weight: gs.Tensor) -> dict[str, int]:
    """The operators that first read the integers that a weight is made of; none if it is made of anything else."""
    found: dict[str, int] = {}
    open_tensors = [weight]
    seen: set[str] = set()
    while open_tensors:
        tensor = open_tensors.pop()
        if isinstance(tensor, gs.Constant) or tensor.name in seen:
            continue
        node = uses.producer.get(tensor.name)
        if node is None:
            return {}
        seen.add(tensor.name)
        open_tensors += [operand for operand in node.inputs if operand.name]
        if size := sum(map(_packed_bytes, node.inputs)):
            found[node.op] = found.get(node.op, 0) + size
    return found


def _packed_bytes(tensor: gs.Tensor) -> int:
    """Size of a constant that holds a matrix of narrow numbers; 0 for any other tensor."""
    if not isinstance(tensor, gs.Constant) or len(tensor.shape) < 2:
        return 0
    kind = str(float_type(tensor.dtype))
    bits = next((bits for name, bits in _NARROW.items() if kind.startswith(name)), 0)
    return int(math.prod(tensor.shape) * bits // 8)


def _name(graph: OnnxGraph, node: gs.Node) -> str:
    scopes = graph.scopes.get(id(node), ())
    if len(scopes) > 1:
        return scopes[-2]
    path = node.name.strip("/").split("/")
    return ".".join(path[:-1])
