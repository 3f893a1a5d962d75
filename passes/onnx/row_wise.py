"""Which operators compute row by row: a token's result depends on that token alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs

from river_compile.passes.onnx.graph import OnnxGraph, constant_value

__all__ = ["OTHER", "ROWS", "TOKENS", "RowWise", "restate"]

ROWS, TOKENS, OTHER = "rows", "tokens", "other"
"""Layouts: [batch, sequence, width], or [tokens, width] as rows; [batch, sequence], or [tokens]; neither."""

_ELEMENTWISE = {"Abs", "Add", "And", "Cast", "Ceil", "Celu", "Clip", "Div", "Elu", "Equal", "Erf", "Exp", "Floor"}
_ELEMENTWISE |= {"Gelu", "Greater", "GreaterOrEqual", "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN"}
_ELEMENTWISE |= {"LeakyRelu", "Less", "LessOrEqual", "Log", "Max", "Min", "Mish", "Mul", "Neg", "Not", "Or", "Pow"}
_ELEMENTWISE |= {"Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Softplus", "Softsign", "Sqrt", "Sub", "Sum"}
_ELEMENTWISE |= {"Swish", "Tanh", "ThresholdedRelu", "Where", "Xor"}
_PRODUCTS = {"MatMul", "Gemm"}
_REDUCTIONS = {"ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "ReduceSumSquare"}
# Operators along one axis, with the axis that they take when none is given.
_ALONG = {"Concat": None, "LayerNormalization": -1, "LogSoftmax": -1, "LpNormalization": -1, "RMSNormalization": -1}
_ALONG |= {"Softmax": -1, "Split": 0}
_RANK = 3
_SLICE_AXES = 3
_LAST_AXIS = "rows/last_axis"
_LAST = (-1, _RANK - 1)


class RowWise:
    """Follows layouts through a branch.

    Args:
        outside: layouts of tensors of the outer scope; one that is missing is not known.
        tensors: the outer scope's tensors.
        shapes: shapes noted for the branch's tensors, by their name without ``prefix``.
        folder: where the weights' external data lies.
    """

    def __init__(
        self,
        outside: Mapping[str, str],
        tensors: Mapping[str, gs.Tensor],
        shapes: Mapping[str, Sequence[int | str | None]],
        prefix: str,
        folder: Path | None = None,
    ) -> None:
        self._outside, self._tensors, self._shapes = outside, tensors, shapes
        self._prefix, self._folder = prefix, folder
        self.made: dict[str, str] = {}

    def layout(self, name: str) -> str | None:
        return self.made.get(name, self._outside.get(name))

    def follow(self, nodes: Sequence[gs.Node]) -> str | None:
        """Give each tensor that the nodes make its layout; the name of the first node that is not row-wise, if any.

        Requires: nodes in topological order.
        """
        for node in nodes:
            layout = self._of(node)
            if layout is None:
                return str(node.name)
            self.made |= {output.name: layout for output in node.outputs if output.name}
        return None

    def _of(self, node: gs.Node) -> str | None:
        operands = [OTHER if isinstance(t, gs.Constant) else self.layout(t.name) for t in node.inputs if t.name]
        if None in operands or node.domain not in (None, "", "ai.onnx") or any(True for _ in node.subgraphs()):
            return None
        layouts = set(operands) - {OTHER}
        if not layouts:
            return OTHER
        if node.op in _ELEMENTWISE:
            return layouts.pop() if len(layouts) == 1 and self._broadcasts(node, operands, layouts) else None
        if node.op in _REDUCTIONS:
            return self._reduced(node, operands[0])
        return ROWS if layouts == {ROWS} and self._keeps(node, operands) else None

    def _keeps(self, node: gs.Node, operands: Sequence[str | None]) -> bool:
        if node.op in _PRODUCTS:
            return operands[0] == ROWS and ROWS not in operands[1:] and self._is_matrix(node)
        if node.op in _ALONG:
            if node.op == "Concat" and OTHER in operands:
                return False
            return node.attrs.get("axis", _ALONG[node.op]) in _LAST
        if node.op == "Slice":
            return len(node.inputs) > _SLICE_AXES and _along_last(self.values(node.inputs[_SLICE_AXES]))
        return node.op == "Reshape" and self._keeps_rows(node)

    def _broadcasts(self, node: gs.Node, operands: Sequence[str | None], layouts: Collection[str | None]) -> bool:
        """Whether what is neither rows nor tokens means the same beside rows: one width for all, or one number."""
        named = [tensor for tensor in node.inputs if tensor.name]
        for tensor, layout in zip(named, operands, strict=True):
            shape = self._tensors.get(tensor.name, tensor).shape
            if layout == OTHER and (
                shape is None or len(shape) > 1 or (TOKENS in layouts and list(shape) not in ([], [1]))
            ):
                return False
        return True

    def _is_matrix(self, node: gs.Node) -> bool:
        weight = self._tensors.get(node.inputs[1].name, node.inputs[1])
        return not node.attrs.get("transA") and (weight.shape is None or len(weight.shape) == 2)

    def _reduced(self, node: gs.Node, data: str | None) -> str | None:
        axes = node.attrs.get("axes")
        if len(node.inputs) > 1 and node.inputs[1].name:
            axes = self.values(node.inputs[1])
            if axes is None:
                return None
        keeps = node.attrs.get("keepdims", 1)
        if axes is None or not len(axes):
            # Of everything: the same number, of whatever shape it was.
            return OTHER if not keeps and not node.attrs.get("noop_with_empty_axes") else None
        if data != ROWS or not _along_last(axes):
            return None
        return ROWS if keeps else TOKENS

    def _keeps_rows(self, node: gs.Node) -> bool:
        """Whether a Reshape leaves each row as it is: the last dimension stays."""
        widths = []
        for tensor in (node.inputs[0], node.outputs[0]):
            shape = self._shapes.get(tensor.name.removeprefix(self._prefix))
            if shape is None and tensor.name in self._tensors:
                shape = self._tensors[tensor.name].shape
            widths.append(shape[-1] if shape else None)
        return widths[0] == widths[1] and isinstance(widths[0], int)

    def values(self, tensor: gs.Tensor) -> np.ndarray | None:
        """The values of a constant, or None."""
        known = self._tensors.get(tensor.name, tensor)
        return constant_value(known, self._folder) if isinstance(known, gs.Constant) else None


def restate(graph: OnnxGraph, node: gs.Node, plan: RowWise, prefix: str) -> None:
    """Let a node of a branch that was followed compute on rows: axes count from the end, reshapes of rows do nothing.

    Its name is noted in ``graph.restated`` if that changes it.
    """
    if all(plan.layout(tensor.name) in (None, OTHER) for tensor in node.inputs):
        return
    if node.op == "Reshape":
        node.op, node.attrs = "Identity", {}
        node.inputs.pop()
    elif node.op in _ALONG and node.attrs.get("axis") == _RANK - 1:
        node.attrs["axis"] = -1
    elif node.op in _REDUCTIONS and list(node.attrs.get("axes", ())) == [_RANK - 1]:
        node.attrs["axes"] = [-1]
    elif (place := _axes_operand(node)) is not None and (axes := plan.values(node.inputs[place])) is not None:
        if list(axes) != [_RANK - 1]:
            return
        node.inputs[place] = gs.Variable(graph.integers(_LAST_AXIS, [-1]).name)
    else:
        return
    graph.restated.add(node.name.removeprefix(prefix))


def _axes_operand(node: gs.Node) -> int | None:
    """Which operand of a node that was followed holds its axes."""
    place = _SLICE_AXES if node.op == "Slice" else 1
    has = (node.op == "Slice" or node.op in _REDUCTIONS) and len(node.inputs) > place and bool(node.inputs[place].name)
    return place if has else None


def _along_last(axes: Sequence[int] | np.ndarray | None) -> bool:
    return axes is not None and len(axes) == 1 and int(axes[0]) in _LAST
