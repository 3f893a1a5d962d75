"""Pass 4: let each token leave the backbone where its hidden state stops turning."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from river_compile.config import RiverConfig
from river_compile.errors import ConfigError
from river_compile.passes.anatomy import CacheSlot, Layer
from river_compile.passes.onnx.find_layers import Anatomy
from river_compile.passes.onnx.graph import OnnxGraph, toposorted
from river_compile.passes.onnx.static_cache import KV_CACHE
from river_compile.passes.onnx.twin import outer

__all__ = ["EXIT_DEPTH", "TAU", "TAU_OFFSETS", "THRESHOLDS", "exit_points", "insert_exits"]

TAU = "river.tau"
TAU_OFFSETS = "river.tau_offsets"
EXIT_DEPTH = "river.exit_depth"
THRESHOLDS = "river/thresholds"
"""The node that gives each layer its threshold, where they differ, out of one tensor of all."""
_MASK = "attention_mask"
_FLOAT32 = np.dtype(np.float32)
_LAST_AXIS = "river/last_axis"


def insert_exits(
    graph: OnnxGraph, anatomy: Anatomy, branches: dict[int, gs.Node], config: RiverConfig
) -> tuple[int, ...]:
    """Make each layer's ``If`` follow the exit decision of the layers before it.

    State transition similarity (paper, section 3): the cosine between a layer's input and output, per token, in fp32.
    The model exits after a layer iff the similarity of every token of every sequence lies above ``river.tau``, an
    overridable initializer, float32 []; with ``tau_offsets`` in the config, above that plus the layer's entry in
    ``river.tau_offsets``, another, float32 [layers]. A similarity that is NaN or infinite is not above anything. The
    flag is sticky: a river layer hands it on as true. Only the backbone branch computes similarity, so the river costs
    no decision. Padding tokens have no say where the model has an ``attention_mask`` [batch, past + sequence].

    Requires: the Ifs that `share_kv` made of this graph.
    Ensures: with tau above 1 the branches taken are those of `share_kv`; ``river.exit_depth``, int64 [1], the number of
    backbone layers that ran, is an output if the config wants it. Returns the depths at which an exit may be decided.
    """
    points = exit_points(anatomy, branches, config)
    graph.add_weight(_LAST_AXIS, np.array([-1], np.int64))
    thresholds, padding = _thresholds(graph, len(anatomy.layers), config), _padding(graph, anatomy)
    order = sorted(branches)
    for index, following in pairwise(order):
        beyond = branches[following].inputs[0]
        flag = gs.Variable(f"river/exited.{index + 1}", bool, [1])
        layer, branch = anatomy.layers[index], branches[index]
        stay, go = branch.attrs["else_branch"], branch.attrs["then_branch"]
        if index + 1 in points:
            _decide(stay, layer, thresholds[index], padding, beyond, f"backbone.{index}/river/")
        else:
            _pass_on(stay, beyond, f"backbone.{index}/river/")
        go.outputs.append(_constant_flag(go, f"river.{index}/river/stays"))
        branch.outputs.append(flag)
        branches[following].inputs[0] = flag
    if config.extra_output:
        _exit_depth(graph, [branches[index].inputs[0] for index in order], len(anatomy.layers))
    graph.surgeon.nodes = toposorted(graph.nodes)
    return points


def exit_points(anatomy: Anatomy, twins: Collection[int], config: RiverConfig) -> tuple[int, ...]:
    """The depths at which an exit may be decided: after a layer with a twin, and before another one."""
    last = max(twins, default=0)
    return tuple(d for d in config.exit_points(len(anatomy.layers)) if d - 1 in twins and d <= last)


def _padding(graph: OnnxGraph, anatomy: Anatomy) -> gs.Tensor | None:
    """Which tokens of the pass are padding, bool [batch, sequence]; None where the signature does not tell."""
    tensors = {t.name: t for node in graph.nodes for t in [*node.inputs, *node.outputs]}
    tensors |= {tensor.name: tensor for tensor in graph.surgeon.inputs}
    mask = tensors.get(_MASK)
    states = [tensors.get(layer.hidden_in, gs.Variable("")) for layer in anatomy.layers]
    ranks = {None if state.shape is None else len(state.shape) for state in states}
    if mask is None or len(mask.shape or ()) != 2 or ranks != {3} or not _grows(graph, anatomy.layers[0].caches):
        return None
    chain = _Chain(graph.nodes, "river/padding/")
    length = chain.add("Shape", [states[0]], np.int64, start=1, end=2)
    start = chain.add("Neg", [length], np.int64)
    end = graph.add_weight("river/padding/end", np.array([np.iinfo(np.int64).max], np.int64))
    axis = graph.add_weight("river/padding/axis", np.array([1], np.int64))
    current = chain.add("Slice", [mask, start, end, axis], mask.dtype)
    real = chain.add("Cast", [current], bool, to=onnx.TensorProto.BOOL)
    padding = chain.add("Not", [real], bool)
    padding.shape = list(states[0].shape[:2])
    return padding


def _thresholds(graph: OnnxGraph, layers: int, config: RiverConfig) -> list[gs.Tensor]:
    """Each layer's threshold: tau, float32 []; or that plus its offset, float32 [1], if the config has any, by two
    nodes for the whole stack."""
    threshold = graph.add_weight(TAU, np.array(config.tau, np.float32))
    graph.overridable.append(TAU)
    if config.tau_offsets is None:
        return [threshold] * layers
    if config.tau_offsets and len(config.tau_offsets) != layers:
        raise ConfigError("tau_offsets", f"{len(config.tau_offsets)} numbers for a stack of {layers} layers")
    values = np.array(config.tau_offsets or (0.0,) * layers, np.float32)
    offsets = graph.add_weight(TAU_OFFSETS, values)
    graph.overridable.append(TAU_OFFSETS)
    chain = _Chain(graph.nodes, "river/thresholds/")
    every = chain.add("Add", [offsets, threshold], _FLOAT32)
    parts = [gs.Variable(f"river/threshold.{index}", _FLOAT32, [1]) for index in range(layers)]
    graph.nodes.append(gs.Node("Split", THRESHOLDS, {"axis": 0, "num_outputs": layers}, [every], parts))
    return parts


def _grows(graph: OnnxGraph, caches: Sequence[CacheSlot]) -> bool:
    """Whether the mask is as long as the tokens seen, so that it ends with the current ones: the cache is as long, or
    `static_cache` has made it longer and left the mask."""
    shapes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.inputs}
    shapes |= {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.outputs}
    grows = bool(caches) and shapes[caches[0].past] != shapes[caches[0].present]
    return grows or graph.metadata.get(KV_CACHE) == "static"


class _Chain:
    """Appends nodes to a node list, naming them and their one result after their operator."""

    def __init__(self, nodes: list[gs.Node], prefix: str) -> None:
        self.nodes, self.prefix = nodes, prefix

    def add(self, op: str, inputs: Sequence[gs.Tensor], dtype: object, **attributes: object) -> gs.Variable:
        name = f"{self.prefix}{op}_{len(self.nodes)}"
        result = gs.Variable(name, dtype)
        self.nodes.append(gs.Node(op, name, attrs=attributes, inputs=list(inputs), outputs=[result]))
        return result


def _decide(
    branch: gs.Graph, layer: Layer, threshold: gs.Tensor, padding: gs.Tensor | None, beyond: gs.Tensor, prefix: str
) -> None:
    """Nine nodes (two more unless float32, one more with padding). The comparison comes before the minimum, since a
    minimum may lose a NaN; so does padding, whose similarity is one where its embedding is zero."""
    chain = _Chain(branch.nodes, prefix)
    states = [outer(layer.hidden_in), branch.outputs[0]]
    if branch.outputs[0].dtype != _FLOAT32:
        states = [chain.add("Cast", [state], _FLOAT32, to=onnx.TensorProto.FLOAT) for state in states]
    # Not LpNormalization: ONNX Runtime has that of opset 22 on few devices, and before 1.24 on none.
    norms = [chain.add("ReduceL2", [state, outer(_LAST_AXIS)], _FLOAT32, keepdims=0) for state in states]
    product = chain.add("Mul", states, _FLOAT32)
    total = chain.add("ReduceSum", [product, outer(_LAST_AXIS)], _FLOAT32, keepdims=0)
    similarity = chain.add("Div", [total, chain.add("Mul", norms, _FLOAT32)], _FLOAT32)
    above = chain.add("Greater", [similarity, outer(threshold.name)], bool)
    if padding is not None:
        above = chain.add("Or", [above, outer(padding.name)], bool)
    decided = chain.add("ReduceMin", [above], bool, keepdims=0)
    branch.outputs.append(chain.add("Or", [decided, outer(beyond.name)], bool))


def _pass_on(branch: gs.Graph, flag: gs.Tensor, prefix: str) -> None:
    branch.outputs.append(_Chain(branch.nodes, prefix).add("Identity", [outer(flag.name)], bool))


def _constant_flag(branch: gs.Graph, name: str) -> gs.Variable:
    """True, as a constant: cheaper than handing on the condition that led into the branch."""
    flag = gs.Variable(name, bool, [1])
    value = gs.Constant(f"{name}/value", np.array([True]))
    branch.nodes.append(gs.Node("Constant", name, attrs={"value": value}, outputs=[flag]))
    return flag


def _exit_depth(graph: OnnxGraph, conditions: Sequence[gs.Tensor], layers: int) -> None:
    total = graph.add_weight("river/layers", np.array([layers], np.int64))
    # Not a scalar: runtimes that bind buffers of their own to outputs do not all take those.
    depth = gs.Variable(EXIT_DEPTH, np.int64, [1])
    graph.surgeon.outputs.append(depth)
    graph.added_outputs.append(onnx.helper.make_tensor_value_info(EXIT_DEPTH, onnx.TensorProto.INT64, [1]))
    if not conditions:
        graph.nodes.append(gs.Node("Identity", "river/depth", inputs=[total], outputs=[depth]))
        return
    chain = _Chain(graph.nodes, "river/depth/")
    flags = chain.add("Concat", conditions, bool, axis=0)
    numbers = chain.add("Cast", [flags], np.int64, to=onnx.TensorProto.INT64)
    in_river = chain.add("ReduceSum", [numbers], np.int64, keepdims=1)
    graph.nodes.append(gs.Node("Sub", "river/depth", inputs=[total, in_river], outputs=[depth]))
