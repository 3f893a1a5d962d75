"""Pass 2: give every decoder layer its quantized twin."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import onnx_graphsurgeon as gs

from river_compile.config import FLOAT, RiverConfig
from river_compile.errors import LayersNotFound
from river_compile.passes.notes import notes_of, ranges, some
from river_compile.passes.onnx.explain_refusal import caches_elsewhere, explain_no_linears
from river_compile.passes.onnx.find_layers import Anatomy
from river_compile.passes.onnx.graph import OnnxGraph, Uses, reads
from river_compile.passes.onnx.linear import Linear, find_linears, float_type, quantized_by
from river_compile.passes.onnx.twin import Twin, clone, outer
from river_compile.passes.quantizer import ActivationAware, QuantizedWeight, Quantizer, fitting_group

__all__ = ["LinearLowering", "ProductShape", "River", "RiverLinear", "grow_river", "plan_river", "quantize"]

_WORTH_A_TWIN = 4


class LinearLowering(Protocol):
    """How a destination writes a product with a quantized weight."""

    def weights(self, graph: OnnxGraph, name: str, weight: QuantizedWeight, scales: np.dtype) -> Sequence[gs.Constant]:
        """Put the weight into the graph's outer scope, its scales in the type ``scales``."""
        ...

    def product(
        self, activation: str, weight: Sequence[gs.Constant], shape: ProductShape, bias: str | None, output: gs.Variable
    ) -> Sequence[gs.Node]:
        """The nodes that compute ``output = activation @ weight (+ bias)`` in the type of the weight's scales; their
        names, and those of all that they make in between, start with the name of ``output``."""
        ...


@dataclass(frozen=True)
class ProductShape:
    """Width and float type of activation and result, and the grid of the weight between them."""

    inputs: int
    outputs: int
    bits: int
    group_size: int
    dtype: np.dtype


@dataclass(frozen=True)
class RiverLinear:
    """A linear layer of the river: its qualified name, its decoder layer, the root of its weight, and its grid. The LM
    head counts as one layer more than there are.

    ``bits`` is None where it stays in the backbone's float type, as asked for, or for a reason that ``note`` gives.
    ``source`` is the backbone's linear layer, ``computes`` the float type that the river's has inside.
    """

    name: str
    layer: int
    weight: str
    bits: int | None
    group_size: int | None
    nbytes: int
    note: str
    source: Linear
    computes: np.dtype


@dataclass
class River:
    """The river of a graph.

    Fields:
        twins: by layer index, for each decoder layer that has one.
        linears: what the river is made of.
        head: the LM head, if the model has one that can be quantized; it has a twin iff its ``bits`` are not None.
        head_twin: the two bodies of the head, the backbone's and the river's.
        kept: by layer index, why a layer has no twin.
        unused: patterns of the config's ``bits_for`` that match no linear layer.
        partial: layers whose twin shares most weights with them, since linear layers hold the lesser part.
        elsewhere: outputs that hold caches as well, and that none of the decoder layers writes.
        mixed: layers some of whose linear layers are quantized already, by the operators that do it.
    """

    twins: dict[int, Twin] = field(default_factory=dict)
    linears: list[RiverLinear] = field(default_factory=list)
    head: RiverLinear | None = None
    head_twin: tuple[list[gs.Node], list[gs.Node]] | None = None
    kept: dict[int, str] = field(default_factory=dict)
    partial: list[int] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    mixed: dict[str, list[int]] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)

    @property
    def planned(self) -> list[RiverLinear]:
        """The linear layers of the twins, and last the LM head if it has one."""
        return [*self.linears, *([self.head] if self.head is not None and self.head.bits is not None else [])]

    @property
    def quantized(self) -> list[RiverLinear]:
        """Those of the planned linear layers whose weight is quantized."""
        return [linear for linear in self.planned if linear.bits is not None]

    @property
    def nbytes(self) -> int:
        return sum({linear.weight: linear.nbytes for linear in self.quantized}.values())

    @property
    def average_bits(self) -> float:
        """Mean bits of a decoder layer's weight, scales and zero points not counted; one that stays float counts with
        its own bits."""
        sizes = {
            linear.weight: (linear.source.inputs * linear.source.outputs, linear.bits or linear.source.float_bits)
            for linear in self.linears
        }
        total = sum(size for size, _ in sizes.values())
        return sum(size * bits for size, bits in sizes.values()) / total if total else float("nan")

    @property
    def notes(self) -> list[str]:
        """What did not go as asked, a line each."""
        lines = notes_of(self.kept, self.partial, self.linears)
        if self.elsewhere:
            names = some(self.elsewhere, "caches")
            lines.append(f"no layer of the one decoder that has a river writes: {names}")
        for found, layers in self.mixed.items():
            lines.append(f"already quantized in part ({found}), which stays as it is: layers {ranges(layers)}")
        return lines + [f"bits for {pattern!r}: it matches no linear layer" for pattern in self.unused]


def grow_river(
    graph: OnnxGraph,
    anatomy: Anatomy,
    config: RiverConfig,
    quantizer: Quantizer,
    lowering: LinearLowering,
    progress: Callable[[int, int], None] = lambda done, total: None,
    moments: Mapping[str, np.ndarray] | None = None,
) -> River:
    """Make the river: for every decoder layer a copy of its nodes in which each linear layer is quantized.

    Weights are read one at a time and not kept; a weight that several linear layers share is quantized once. Norms and
    embeddings stay as they are, and the LM head unless the config has ``head_bits`` (paper, section 3: it stays).

    Args:
        moments: for an activation-aware quantizer, by the name of a linear layer's input tensor the mean of x x^T.

    Requires: an anatomy of this very graph.
    Ensures: the nodes of the graph are unchanged; the outer scope has the river's weights.

    Raises:
        LayersNotFound: no layer has a linear layer that could be quantized.
        ConfigError: ``keep_layers`` names a layer that is not there.
    """
    river = plan_river(graph, anatomy, config)
    by_name = {node.name: node for node in graph.nodes}
    grown: dict[str, Sequence[gs.Constant]] = {}
    planned: dict[int, list[RiverLinear]] = {}
    for linear in river.linears:
        planned.setdefault(linear.layer, []).append(linear)
    for done, (index, linears) in enumerate(planned.items()):
        progress(done, len(planned))
        nodes = [by_name[name] for name in anatomy.layers[index].nodes]
        replaced: dict[int, Sequence[gs.Node]] = {}
        for together in _together(linears):
            first, *others = (id(linear.source.node) for linear in together)
            replaced |= {first: _grow(graph, together, quantizer, lowering, grown, moments)} | dict.fromkeys(others, ())
        body = [twin for node in nodes for twin in replaced.get(id(node), (node,))]
        river.twins[index] = Twin(
            anatomy.layers[index], clone(nodes, f"backbone.{index}/"), clone(body, f"river.{index}/")
        )
    if river.head is not None and river.head.bits is not None:
        product = _grow(graph, [river.head], quantizer, lowering, grown, moments)
        river.head_twin = clone([river.head.source.node], "backbone.head/"), clone(product, "river.head/")
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
        if layer.index in kept:
            river.kept[layer.index] = "asked for"
        elif not linears or _is_quantized(found := quantized_by(uses, nodes), linears):
            river.kept[layer.index] = explain_no_linears(graph, uses, nodes)
        else:
            if found:
                river.mixed.setdefault(", ".join(sorted(found)), []).append(layer.index)
            for linear in linears:
                bits = config.bits_of(*_names(linear, layer.index))
                river.linears.append(_plan(linear, layer.index, config, bits))
            if _elements(graph, layer.weights) > 2 * sum(linear.inputs * linear.outputs for linear in linears):
                river.partial.append(layer.index)
    if not river.linears and len(kept) < len(anatomy.layers):
        why = next(why for index, why in river.kept.items() if index not in kept)
        raise LayersNotFound(f"no decoder layer can be given a river twin: {why}")
    river.elsewhere = caches_elsewhere(graph, uses, anatomy.layers)
    names = {name for linear in river.linears for name in _names(linear.source, linear.layer)}
    for pattern, _ in config.bits_for:
        if not fnmatch.filter(names, pattern):
            river.unused.append(pattern)
    head = _find_head(graph, uses, anatomy)
    if head is not None:
        bits = None if config.head_bits == FLOAT else config.head_bits
        river.head = _plan(head, len(anatomy.layers), config, bits)
    return river


def _names(linear: Linear, layer: int) -> tuple[str, str, str]:
    """What a pattern may call a linear layer."""
    return linear.name, linear.weight.name, f"layers.{layer}"


def _find_head(graph: OnnxGraph, uses: Uses, anatomy: Anatomy) -> Linear | None:
    """The largest linear layer that depends on what the last decoder layer hands on."""
    after = {anatomy.layers[-1].hidden_out}
    inside = {name for layer in anatomy.layers for name in layer.nodes}
    nodes = []
    for node in graph.nodes:
        if node.name not in inside and not after.isdisjoint(reads(node)):
            nodes.append(node)
            after.update(output.name for output in node.outputs)
    linears = find_linears(graph, uses, nodes, "lm_head")
    return max(linears, key=lambda linear: linear.inputs * linear.outputs, default=None)


def _is_quantized(found: Mapping[str, int], linears: Sequence[Linear]) -> bool:
    """Whether so little of a layer's weights is float that a twin would save no time worth having."""
    floats = sum(linear.inputs * linear.outputs * linear.float_bits // 8 for linear in linears)
    return floats * _WORTH_A_TWIN < sum(found.values())


def _elements(graph: OnnxGraph, weights: Sequence[str]) -> int:
    """How many floats the weights hold."""
    found = [graph.weights[name] for name in weights]
    return sum(math.prod(weight.shape) for weight in found if "float" in str(float_type(weight.dtype)))


def _plan(linear: Linear, layer: int, config: RiverConfig, bits: int | None) -> RiverLinear:
    group_size = fitting_group(linear.inputs, config.group_size)
    if bits is None:
        return RiverLinear(linear.name, layer, linear.weight.name, None, None, 0, "", linear, linear.dtype)
    if group_size is None:
        note = f"{linear.inputs} inputs are divided by no group size; the weight stays as it is"
        return RiverLinear(linear.name, layer, linear.weight.name, None, None, 0, note, linear, linear.dtype)
    # A CPU that quantizes activations does so from float32; it has no bfloat16 in the first place.
    wide = config.activations == "int8" and linear.dtype == np.float16
    computes = np.dtype(np.float32) if wide else linear.dtype
    groups = linear.inputs // group_size * linear.outputs
    nbytes = (linear.inputs * linear.outputs + groups) * bits // 8 + groups * computes.itemsize
    note = "" if group_size == config.group_size else f"group size {group_size}, as {config.group_size} does not divide"
    return RiverLinear(linear.name, layer, linear.weight.name, bits, group_size, nbytes, note, linear, computes)


def _together(linears: Sequence[RiverLinear]) -> list[list[RiverLinear]]:
    """Quantized linear layers, those side by side that multiply one activation on one grid as one product: a product
    costs a fixed time besides its bytes (query, key and value; gate and up)."""
    groups: dict[tuple[object, ...], list[RiverLinear]] = {}
    for linear in linears:
        if linear.bits is None:
            continue
        alone = linear.source.node.name if linear.source.bias else ""
        key = (
            linear.source.node.inputs[0].name,
            linear.bits,
            linear.group_size,
            str(linear.source.dtype),
            alone,
        )
        groups.setdefault(key, []).append(linear)
    return list(groups.values())


def _grow(
    graph: OnnxGraph,
    together: Sequence[RiverLinear],
    quantizer: Quantizer,
    lowering: LinearLowering,
    grown: dict[str, Sequence[gs.Constant]],
    moments: Mapping[str, np.ndarray] | None,
) -> Sequence[gs.Node]:
    """Quantize the weights of one product; the nodes that stand for its linear layers in the river."""
    bits, group_size = together[0].bits, together[0].group_size
    assert bits is not None and group_size is not None
    sources = [linear.source for linear in together]
    weights = [f"{source.weight.name}{'.T' if source.transposed else ''}" for source in sources]
    name = f"river/{'+'.join(weights)}.q{bits}g{group_size}"
    computes, dtype = together[0].computes, sources[0].dtype
    if name in grown and grown[name][1].dtype != computes:
        name += f".{computes}"
    if name not in grown:
        parts = [quantize(source, source.matrix(graph), bits, group_size, quantizer, moments) for source in sources]
        grown[name] = lowering.weights(graph, name, QuantizedWeight.side_by_side(parts), computes)
    shape = ProductShape(sources[0].inputs, sum(source.outputs for source in sources), bits, group_size, dtype)
    first = sources[0].node
    results = [gs.Variable(source.node.outputs[0].name, dtype) for source in sources]
    if len(sources) == 1:
        return lowering.product(first.inputs[0].name, grown[name], shape, sources[0].bias, results[0])
    joined = gs.Variable(f"{first.name}/joined", dtype)
    product = lowering.product(first.inputs[0].name, grown[name], shape, None, joined)
    widths = [source.outputs for source in sources]
    sizes = "river/split." + "+".join(map(str, widths))
    if sizes not in graph.weights:
        graph.add_weight(sizes, np.array(widths, np.int64))
    split = gs.Node("Split", f"{first.name}/split", attrs={"axis": -1}, inputs=[joined, outer(sizes)], outputs=results)
    return [*product, split]


def quantize(
    source: Linear,
    matrix: np.ndarray,
    bits: int,
    group_size: int,
    quantizer: Quantizer,
    moments: Mapping[str, np.ndarray] | None,
) -> QuantizedWeight:
    """The weight of a linear layer on a grid, chosen by its inputs as well where the quantizer asks for them."""
    if moments is not None and isinstance(quantizer, ActivationAware):
        return quantizer.quantize_for(moments[source.node.inputs[0].name], matrix, bits, group_size)
    return quantizer.quantize(matrix, bits, group_size)
