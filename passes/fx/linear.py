"""Linear layers in an FX graph: a product with a parameter, in the forms that model code writes."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import fx

from river_compile.passes.fx.graph import operation, value_of
from river_compile.passes.fx.pieces import Piece

__all__ = ["FORMS", "Linear", "find_linears"]

FORMS: dict[str, tuple[int, int, int | None, bool]] = {
    "linear": (0, 1, 2, True),
    "addmm": (1, 2, 0, False),
    "mm": (0, 1, None, False),
    "matmul": (0, 1, None, False),
}
"""Operation -> places of activation, weight and bias, and whether the weight is [outputs, inputs]."""

_FLOATS = {torch.float32, torch.float16, torch.bfloat16}
_ROOT = re.compile(r"^L(\[[^\]]*\]|__self__)*\.?")


@dataclass(frozen=True)
class Linear:
    """One linear layer, ``y = x @ W (+ bias)``, in a piece.

    Fields:
        node: the operation.
        name: the qualified name of the module it comes from, or one made of its place.
        activation, bias: operands in the piece.
        weight: the value in the whole graph that W is, or is the transpose of.
        transposed: whether that value is [outputs, inputs].
        inputs, outputs: widths.
    """

    node: fx.Node
    name: str
    activation: fx.Node
    weight: str
    transposed: bool
    bias: fx.Node | None
    inputs: int
    outputs: int


def find_linears(piece: Piece, weights: Collection[str], names: dict[str, str], layer: str) -> list[Linear]:
    """The linear layers of a piece, in order.

    Args:
        weights: names of the values that are parameters.
        names: module names by the names of nodes; ``layer`` names the decoder layer where a node has none.
    """
    known = {node: name for name, node in piece.placeholders.items() if name in weights}
    found: list[Linear] = []
    for node in piece.graph.nodes:
        linear = _as_linear(node, known, names.get(node.name, f"{layer}.linear.{len(found)}"))
        if linear is not None:
            found.append(linear)
    return found


def module_name(node: fx.Node) -> str | None:
    """The qualified name of the innermost module that a node of the whole graph comes from."""
    paths = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    return _ROOT.sub("", paths[-1]) if paths else None


def _as_linear(node: fx.Node, known: dict[fx.Node, str], name: str) -> Linear | None:
    if node.op not in ("call_function", "call_method") or operation(node) not in FORMS:
        return None
    of_activation, of_weight, of_bias, transposed = FORMS[operation(node)]
    arguments = list(node.args) + [node.kwargs[key] for key in ("weight", "mat2", "other") if key in node.kwargs]
    if len(arguments) <= of_weight or node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("beta", 1) != 1:
        return None
    weight, activation = arguments[of_weight], arguments[of_activation]
    while isinstance(weight, fx.Node) and weight not in known and _is_transpose(weight):
        weight, transposed = weight.args[0], not transposed
    if not isinstance(weight, fx.Node) or weight not in known or not isinstance(activation, fx.Node):
        return None
    value = value_of(weight)
    # The product with a weight that is spread over processes is torch's own affair.
    if value.dim() != 2 or value.dtype not in _FLOATS or hasattr(value, "device_mesh"):
        return None
    bias = node.kwargs.get("bias")
    if bias is None and of_bias is not None and len(arguments) > of_bias:
        bias = arguments[of_bias]
    if bias is not None and not isinstance(bias, fx.Node):
        return None
    rows, columns = (int(size) for size in value.shape)
    inputs, outputs = (columns, rows) if transposed else (rows, columns)
    return Linear(node, name, activation, known[weight], transposed, bias, inputs, outputs)


def _is_transpose(node: fx.Node) -> bool:
    name = operation(node)
    if name == "getattr":
        return node.args[1] in ("T", "mT")
    value = value_of(node)
    return name in ("t", "transpose", "permute") and isinstance(value, torch.Tensor) and value.dim() == 2
