"""Pass 2: give every decoder layer its quantized twin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import onnx_graphsurgeon as gs

from river_compile.config import RiverConfig
from river_compile.errors import LayersNotFound
from river_compile.passes.anatomy import Layer
from river_compile.passes.onnx.find_layers import Anatomy
from river_compile.passes.onnx.graph import OnnxGraph, Uses
from river_compile.passes.onnx.linear import QUANTIZED_OPS, Linear, find_linears
from river_compile.passes.onnx.twin import Twin, clone
from river_compile.passes.quantizer import QuantizedWeight, Quantizer

__all__ = ["LinearLowering", "River", "RiverLinear", "grow_river", "plan_river"]


class LinearLowering(Protocol):
    """How a destination writes a quantized linear layer."""

    def weights(self, graph: OnnxGraph, name: str, weight: QuantizedWeight, like: gs.Constant) -> Sequence[gs.Constant]:
        """Put the weight into the graph's outer scope, its scales in the float type of ``like``."""
        ...

    def nodes(
        self, linear: Linear, weight: Sequence[gs.Constant], bits: int, group_size: int, prefix: str
    ) -> Sequence[gs.Node]:
        """The nodes that compute ``linear`` in a river layer; names of nodes and inner tensors start with ``prefix``,
        operands and result are called as in the backbone."""
        ...


@dataclass(frozen=True)
class RiverLinear:
    """A linear layer of the river: its qualified name, its decoder layer, the root of its weight, and its grid.

    ``bits`` is None where it stays in the backbone's float type; then ``note`` says why. ``source`` is the backbone's
    linear layer.
    """

    name: str
    layer: int
    weight: str
    bits: int | None
    group_size: int | None
    nbytes: int
    note: str
    source: Linear


@dataclass
class River:
    """The river of a graph: a twin for each decoder layer that has one, by layer index, and what it is made of."""

    twins: dict[int, Twin] = field(default_factory=dict)
    linears: list[RiverLinear] = field(default_factory=list)
    kept: dict[int, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        weights = {linear.weight: linear.nbytes for linear in self.linears if linear.bits is not None}
        return sum(weights.values())

    @property
    def notes(self) -> list[str]:
        """What did not go as asked, a line each."""
        lines = [f"layer {index} stays backbone only: {why}" for index, why in sorted(self.kept.items())]
        return lines + [f"{linear.name}: {linear.note}" for linear in self.linears if linear.note]


def grow_river(
    graph: OnnxGraph,
    anatomy: Anatomy,
    config: RiverConfig,
    quantizer: Quantizer,
    lowering: LinearLowering,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> River:
    """Make the river: for every decoder layer a copy of its nodes in which each linear layer is quantized.

    Weights are read one at a time and not kept; a weight that several linear layers share is quantized once. Norms,
    embeddings and LM head stay as they are (paper, section 3).

    Requires: an anatomy of this very graph.
    Ensures: the nodes of the graph are unchanged; the outer scope has the river's weights.

    Raises:
        LayersNotFound: no layer has a linear layer that could be quantized.
        ConfigError: ``keep_layers`` names a layer that is not there.
    """
    river = plan_river(graph, anatomy, config)
    by_name = {node.name: node for node in graph.nodes}
    grown: dict[tuple[str, bool, int, int], Sequence[gs.Constant]] = {}
    planned: dict[int, list[RiverLinear]] = {}
    for linear in river.linears:
        planned.setdefault(linear.layer, []).append(linear)
    for done, (index, linears) in enumerate(planned.items()):
        progress(done, len(planned))
        nodes = [by_name[name] for name in anatomy.layers[index].nodes]
        replaced = {
            id(linear.source.node): _grow(graph, linear, quantizer, lowering, grown)
            for linear in linears
            if linear.bits is not None
        }
        body = [twin for node in nodes for twin in replaced.get(id(node), (node,))]
        river.twins[index] = Twin(
            anatomy.layers[index], clone(nodes, f"backbone.{index}/"), clone(body, f"river.{index}/")
        )
    progress(len(planned), len(planned))
    return river


def plan_river(graph: OnnxGraph, anatomy: Anatomy, config: RiverConfig) -> River:
    """Decide what the river will be made of, without reading a weight: its linear layers, and the layers left out.

    Raises: as `grow_river`.
    """
    uses = Uses(graph.nodes)
    by_name = {node.name: node for node in graph.nodes}
    kept = config.kept(len(anatomy.layers))
    river = River()
    for layer in anatomy.layers:
        nodes = [by_name[name] for name in layer.nodes]
        linears = find_linears(graph, uses, nodes, f"layers.{layer.index}")
        why = "asked for" if layer.index in kept else _why_not(nodes, linears)
        if why:
            river.kept[layer.index] = why
        else:
            river.linears += [_plan(linear, layer, config) for linear in linears]
    if not river.linears and len(kept) < len(anatomy.layers):
        raise LayersNotFound(f"no decoder layer can be given a river twin: {next(iter(river.kept.values()))}")
    return river


def _why_not(nodes: Sequence[gs.Node], linears: Sequence[Linear]) -> str:
    """Why a layer gets no twin; empty if it gets one."""
    if any(node.op in QUANTIZED_OPS for node in nodes):
        return "already quantized"
    return "" if linears else "it has no linear layer with a constant float weight"


def _plan(linear: Linear, layer: Layer, config: RiverConfig) -> RiverLinear:
    bits = config.bits_of(linear.name, linear.weight.name, f"layers.{layer.index}")
    group_size = _fitting_group(linear.inputs, config.group_size)
    if group_size is None:
        note = f"{linear.inputs} inputs are divided by no group size; the weight stays as it is"
        return RiverLinear(linear.name, layer.index, linear.weight.name, None, None, 0, note, linear)
    groups = linear.inputs // group_size * linear.outputs
    nbytes = (linear.inputs * linear.outputs + groups) * bits // 8 + groups * 2
    note = "" if group_size == config.group_size else f"group size {group_size}, as {config.group_size} does not divide"
    return RiverLinear(linear.name, layer.index, linear.weight.name, bits, group_size, nbytes, note, linear)


def _grow(
    graph: OnnxGraph,
    planned: RiverLinear,
    quantizer: Quantizer,
    lowering: LinearLowering,
    grown: dict[tuple[str, bool, int, int], Sequence[gs.Constant]],
) -> Sequence[gs.Node]:
    """Quantize one linear layer; the nodes that stand for it in the river."""
    linear, bits, group_size = planned.source, planned.bits, planned.group_size
    assert bits is not None and group_size is not None
    key = (linear.weight.name, linear.transposed, bits, group_size)
    if key not in grown:
        weight = quantizer.quantize(linear.matrix(graph), bits, group_size)
        name = f"river/{linear.weight.name}{'.T' if linear.transposed else ''}.q{bits}g{group_size}"
        grown[key] = lowering.weights(graph, name, weight, linear.weight)
    return lowering.nodes(linear, grown[key], bits, group_size, f"{linear.node.name}/")


def _fitting_group(inputs: int, wanted: int) -> int | None:
    """The largest power of two from 16 up to ``wanted`` that divides ``inputs``."""
    while wanted >= 16:
        if inputs % wanted == 0:
            return wanted
        wanted //= 2
    return None
