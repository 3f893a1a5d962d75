"""Pass 2: give every decoder layer its quantized twin."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import fx

from river_compile.config import RiverConfig
from river_compile.errors import LayersNotFound
from river_compile.passes.anatomy import Anatomy, Layer
from river_compile.passes.fx.graph import FxGraph, value_of
from river_compile.passes.fx.linear import Linear, find_linears, module_name
from river_compile.passes.fx.pieces import Piece, cut_piece
from river_compile.passes.notes import notes_of
from river_compile.passes.quantizer import fitting_group

__all__ = ["Product", "River", "RiverLinear", "RiverWeights", "Twin", "grow_river", "layer_piece", "quantize_piece"]


_OUTSIDE = -1
"""The layer of what belongs to none."""


@dataclass(frozen=True)
class RiverLinear:
    """A linear layer of the river: its qualified name, its decoder layer, the value that is its weight, and its grid.

    ``bits`` is None where it stays in the backbone's float type; then ``note`` says why. ``transposed`` is whether the
    weight is [outputs, inputs].
    """

    name: str
    layer: int
    weight: str
    transposed: bool
    inputs: int
    outputs: int
    bits: int | None
    group_size: int | None
    note: str


@dataclass(frozen=True)
class Product:
    """Linear layers that multiply one activation on one grid, computed as one: a product costs a fixed time besides
    its bytes (query, key and value; gate and up)."""

    linears: tuple[RiverLinear, ...]

    @property
    def name(self) -> str:
        return "+".join(linear.weight for linear in self.linears)

    @property
    def inputs(self) -> int:
        return self.linears[0].inputs

    @property
    def outputs(self) -> int:
        return sum(linear.outputs for linear in self.linears)

    @property
    def bits(self) -> int:
        return self.linears[0].bits or 0

    @property
    def group_size(self) -> int:
        return self.linears[0].group_size or 0

    @property
    def is_outside(self) -> bool:
        """Whether it belongs to no decoder layer."""
        return self.linears[0].layer == _OUTSIDE


class RiverWeights(Protocol):
    """Quantized weights, and how a destination multiplies with them."""

    def operands(self, product: Product) -> Sequence[torch.Tensor]:
        """The tensors that stand for the product's weights, side by side."""
        ...

    @property
    def function(self) -> Callable[..., torch.Tensor]:
        """``function(activation, operands, outputs, bits, group_size, bias)``, traced by the compiler."""
        ...


@dataclass(frozen=True)
class Twin:
    """A decoder layer and its twin, both as pieces with the layer's outputs, and the river's products by the names of
    the values that they add to the river piece's inputs."""

    layer: Layer
    backbone: Piece
    river: Piece
    products: dict[tuple[str, ...], Product]


@dataclass
class River:
    """The river of a graph: a twin for each decoder layer that has one, by layer index, and what it is made of.

    Fields:
        kept: the layers without a twin, and why.
        partial: layers whose twin shares most weights with them, since linear layers hold the lesser part.
    """

    twins: dict[int, Twin] = field(default_factory=dict)
    linears: list[RiverLinear] = field(default_factory=list)
    kept: dict[int, str] = field(default_factory=dict)
    partial: list[int] = field(default_factory=list)

    @property
    def notes(self) -> list[str]:
        """What did not go as asked, a line each."""
        return notes_of(self.kept, self.partial, self.linears)


def grow_river(graph: FxGraph, anatomy: Anatomy, config: RiverConfig, weights: RiverWeights) -> River:
    """Make the river: for every decoder layer a copy of its nodes in which each linear layer is quantized.

    Norms, embeddings and LM head stay as they are (paper, section 3); `share_head` may give the head a twin.

    Requires: an anatomy of this very graph.
    Ensures: the graph is unchanged; a twin's two pieces yield the same values; the river piece reads none of the
    weights that it has quantized.

    Raises:
        LayersNotFound: no layer has a linear layer that could be quantized.
        ConfigError: ``keep_layers`` names a layer that is not there.
    """
    names = {node.name: name for node in graph.steps if (name := module_name(node))}
    kept = config.kept(len(anatomy.layers))
    river = River()
    for layer in anatomy.layers:
        backbone = layer_piece(graph, layer)
        body = layer_piece(graph, layer)
        linears = find_linears(body, graph.weights, names, f"layers.{layer.index}")
        planned = [(_plan(linear, layer.index, _bits(linear, layer, config), config), linear) for linear in linears]
        if layer.index in kept:
            river.kept[layer.index] = "asked for"
        elif all(plan.bits is None for plan, _ in planned):
            river.kept[layer.index] = "it has no linear layer with a float parameter that can be quantized"
        else:
            river.linears += [plan for plan, _ in planned]
            river.twins[layer.index] = Twin(layer, backbone, *_quantized(body, planned, weights))
            if _elements(graph, layer.weights) > 2 * sum(plan.inputs * plan.outputs for plan, _ in planned):
                river.partial.append(layer.index)
    if not river.twins and len(kept) < len(anatomy.layers):
        raise LayersNotFound(f"no decoder layer can be given a river twin: {next(iter(river.kept.values()))}")
    return river


def layer_piece(graph: FxGraph, layer: Layer) -> Piece:
    """A decoder layer as a piece that yields all that later nodes read of it."""
    names = set(layer.nodes)
    nodes = [node for node in graph.steps if node.name in names]
    inside = set(nodes)
    outputs = [node for node in nodes if any(user not in inside for user in node.users)]
    return cut_piece(graph, nodes, outputs)


def quantize_piece(
    graph: FxGraph, piece: Piece, bits: int, config: RiverConfig, weights: RiverWeights
) -> tuple[Piece, dict[tuple[str, ...], Product]] | None:
    """A piece outside the layers with its products quantized, and these by the names of the values that they add to
    its inputs; None if it has none that can be.

    Args:
        piece: it is consumed.
    """
    names = {node.name: name for node in graph.steps if (name := module_name(node))}
    linears = find_linears(piece, graph.weights, names, "lm_head")
    planned = [(_plan(linear, _OUTSIDE, bits, config), linear) for linear in linears]
    if all(plan.bits is None for plan, _ in planned):
        return None
    return _quantized(piece, planned, weights)


def _elements(graph: FxGraph, names: Collection[str]) -> int:
    """How many floats the weights of these names hold."""
    values = [value_of(node) for node in graph.placeholders if node.name in names]
    return sum(value.numel() for value in values if isinstance(value, torch.Tensor) and value.is_floating_point())


def _bits(linear: Linear, layer: Layer, config: RiverConfig) -> int | None:
    return config.bits_of(linear.name, linear.weight, f"layers.{layer.index}")


def _plan(linear: Linear, layer: int, bits: int | None, config: RiverConfig) -> RiverLinear:
    group_size = fitting_group(linear.inputs, config.group_size)
    note = ""
    if group_size is None:
        bits, note = None, f"{linear.inputs} inputs are divided by no group size; the weight stays as it is"
    elif group_size != config.group_size:
        note = f"group size {group_size}, as {config.group_size} does not divide"
    return RiverLinear(
        linear.name,
        layer,
        linear.weight,
        linear.transposed,
        linear.inputs,
        linear.outputs,
        bits,
        group_size,
        note,
    )


def _quantized(
    body: Piece, planned: Sequence[tuple[RiverLinear, Linear]], weights: RiverWeights
) -> tuple[Piece, dict[tuple[str, ...], Product]]:
    """``body``, a copy of the backbone's piece, with quantized products, and these by the inputs that they add."""
    groups: dict[tuple[Any, ...], list[tuple[RiverLinear, Linear]]] = {}
    for plan, linear in planned:
        if plan.bits is not None:
            key = (linear.activation, plan.bits, plan.group_size, linear.bias is None)
            groups.setdefault(key, []).append((plan, linear))
    inputs = list(body.inputs)
    products: dict[tuple[str, ...], Product] = {}
    operands_of: dict[tuple[str, ...], list[fx.Node]] = {}
    parts: dict[fx.Node, fx.Node] = {}
    for together in groups.values():
        product = Product(tuple(plan for plan, _ in together))
        operands = weights.operands(product)
        added = tuple(f"river/{product.name}/{place}" for place in range(len(operands)))
        if added not in products:
            operands_of[added] = [_add_placeholder(body.graph, tensor) for tensor in operands]
            inputs += added
            products[added] = product
        linears = [linear for _, linear in together]
        # A product that reads another's result reads what stands for it by now.
        activation = parts.get(linears[0].activation, linears[0].activation)
        parts |= _replace(body.graph, linears, activation, operands_of[added], product, weights.function)
    quantized = {linear.weight for product in products.values() for linear in product.linears}
    kept_inputs = [
        name
        for name, node in zip(inputs, _placeholders(body.graph), strict=True)
        if name not in quantized or _still_read(node)
    ]
    body.graph.lint()
    return Piece(body.graph, body.held, tuple(kept_inputs), body.outputs), products


def _placeholders(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def _add_placeholder(graph: fx.Graph, tensor: torch.Tensor) -> fx.Node:
    known = _placeholders(graph)
    with graph.inserting_after(known[-1]):
        node = graph.placeholder(f"river_{len(known)}")
    node.meta["example_value"] = tensor
    return node


def _replace(
    graph: fx.Graph,
    linears: Sequence[Linear],
    activation: fx.Node,
    operands: Sequence[fx.Node],
    product: Product,
    function: Callable[..., torch.Tensor],
) -> dict[fx.Node, fx.Node]:
    """Put one quantized product where the first of some linear layers is, and its parts where all of them are.

    Returns:
        The parts, by the nodes that they replace.
    """
    first = linears[0]
    widths = [linear.outputs for linear in linears]
    with graph.inserting_before(first.node):
        bias: fx.Node | None = first.bias
        if bias is not None and len(linears) > 1:
            bias = graph.call_function(torch.cat, ([linear.bias for linear in linears],))
        arguments = (activation, list(operands), sum(widths), product.bits, product.group_size, bias)
        joined = graph.call_function(function, arguments)
        joined.meta["example_value"] = value_of(first.node)
    start, parts = 0, {}
    for linear, width in zip(linears, widths, strict=True):
        part = joined
        if len(linears) > 1:
            with graph.inserting_after(joined):
                part = graph.call_function(torch.narrow, (joined, -1, start, width))
            part.meta = dict(linear.node.meta)
        start += width
        linear.node.replace_all_uses_with(part)
        graph.erase_node(linear.node)
        parts[linear.node] = part
    return parts


def _still_read(weight: fx.Node) -> bool:
    """Take out the placeholder of a weight that nobody reads, and transposes of it that nobody reads; whether it is
    still there."""
    for user in list(weight.users):
        if not user.users and user.op != "output":
            weight.graph.erase_node(user)
    if not weight.users:
        weight.graph.erase_node(weight)
        return False
    return True
