"""Turn a KV cache that grows by concatenation into one of fixed length that is written in place."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from river_compile.errors import ConfigError, InputError
from river_compile.passes.onnx.graph import OnnxGraph, toposorted

__all__ = ["KV_CACHE", "OPSET", "static_cache"]

KV_CACHE = "river.kv_cache"
"""Metadata: the form of the KV cache, "concatenated" or "static"."""

OPSET = 24
"""The first with TensorScatter, the standard operator for a cache update."""

_TOKENS, _MASK = "input_ids", "attention_mask"
_PREFIX = "cache/"


def static_cache(graph: OnnxGraph, max_length: int, scatter: bool = False) -> int:
    """Give every cache slot [batch, heads, past, width] a buffer [batch, heads, max_length, width], bound as the input
    and as the output; how many slots were found.

    New keys and values are written behind those that are there, and attention reads what is filled. How much that is
    tells ``attention_mask`` [batch, past + sequence], which stays as it is: past = its length - that of ``input_ids``.
    Sequences of a batch are padded on the left, so one length holds for all.

    Args:
        scatter: write by ``ScatterElements``, for a runtime that has no operator for a cache update. Whether the output
            may then have the address of the input is the runtime's affair.

    Requires: a cache that is written by ``Concat`` of past and new along one axis; without ``scatter``, opset 24.
    Ensures: the same function while past + sequence <= max_length; every slot is written by one ``TensorScatter`` (or
    ``ScatterElements``), whose output is the slot's.

    Raises:
        InputError: the cache is written otherwise, or the signature does not tell how much of it is filled.
        ConfigError: ``max_length`` is less than 2.
    """
    if max_length < 2:
        raise ConfigError("max_length", f"must be 2 or more, not {max_length}")
    slots = _slots(graph)
    inputs = {value.name for value in graph.inputs}
    if not slots:
        raise InputError("no KV cache that grows by concatenation; build it with its cache as it is")
    if not {_TOKENS, _MASK} <= inputs:
        raise InputError(f"a static KV cache needs {_TOKENS} and {_MASK} in the signature to tell how much is filled")
    filled = _Filled.of(graph, scatter)
    replaced = {id(slot.node) for slot in slots}
    pasts = {slot.past: slot for slot in slots}
    nodes = [node for node in graph.nodes if id(node) not in replaced]
    for slot in slots:
        nodes += _update(slot, filled, scatter)
    for node in [*nodes]:
        for index, tensor in enumerate(node.inputs):
            if tensor.name in pasts and not node.name.startswith(_PREFIX):
                node.inputs[index] = pasts[tensor.name].old
    read = {tensor.name for node in nodes for tensor in node.inputs}
    nodes += [filled.slice(slot.cache, filled.past, slot.axis, slot.old) for slot in slots if slot.old.name in read]
    graph.surgeon.nodes = toposorted([*filled.nodes, *nodes])
    for value in [*graph.inputs, *graph.outputs]:
        for slot in slots:
            if value.name in (slot.past, slot.present):
                value.type.tensor_type.shape.dim[slot.axis].Clear()
                value.type.tensor_type.shape.dim[slot.axis].dim_value = max_length
    graph.metadata[KV_CACHE] = "static"
    return len(slots)


@dataclass
class _Slot:
    """A cache slot: the Concat that writes it and that node's operands; ``old`` and ``all`` are what is filled of the
    buffer before and after."""

    node: gs.Node
    cache: gs.Tensor
    new: gs.Tensor
    axis: int
    rank: int
    past: str
    present: str
    old: gs.Variable
    all: gs.Variable


def _slots(graph: OnnxGraph) -> list[_Slot]:
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in graph.inputs}
    outputs = {value.name for value in graph.outputs}
    slots = []
    for node in graph.nodes:
        if node.op != "Concat" or len(node.inputs) != 2 or node.outputs[0].name not in outputs:
            continue
        cache, new = node.inputs
        rank = ranks.get(cache.name, 0)
        if rank >= 3:
            present = node.outputs[0]
            axis = int(node.attrs["axis"]) % rank
            old, filled = (_part(present, axis, name) for name in (cache.name, present.name))
            slots.append(_Slot(node, cache, new, axis, rank, cache.name, present.name, old, filled))
    return slots


def _part(present: gs.Variable, axis: int, name: str) -> gs.Variable:
    """What is filled of a buffer. Its length is a dimension of no name: no two of that name could differ."""
    shape = None if present.shape is None else [None if a == axis else size for a, size in enumerate(present.shape)]
    return gs.Variable(f"{_PREFIX}{name}", present.dtype, shape)


@dataclass
class _Filled:
    """How much of the cache is filled, int64 [1] each, before a pass and after; where a sequence is written, [batch],
    or each token, [sequence]."""

    past: gs.Variable
    total: gs.Variable
    rows: gs.Variable
    positions: gs.Variable
    start: gs.Constant
    axes: dict[int, gs.Constant]
    nodes: list[gs.Node]

    @classmethod
    def of(cls, graph: OnnxGraph, scatter: bool) -> _Filled:
        known = {tensor.name: tensor for tensor in graph.surgeon.inputs}
        names = ("batch", "sequence", "total", "past", "rows", "first", "end", "positions")
        made = {name: gs.Variable(f"{_PREFIX}{name}", np.int64) for name in names}

        def node(op: str, result: str, *inputs: gs.Tensor, **attributes: int) -> gs.Node:
            return gs.Node(op, f"{_PREFIX}{op}.{result}", attrs=attributes, inputs=[*inputs], outputs=[made[result]])

        nodes = [
            node("Shape", "batch", known[_TOKENS], start=0, end=1),
            node("Shape", "sequence", known[_TOKENS], start=1, end=2),
            node("Shape", "total", known[_MASK], start=1, end=2),
            node("Sub", "past", made["total"], made["sequence"]),
        ]
        if scatter:
            one = graph.add_weight(f"{_PREFIX}one", np.array(1, np.int64))
            nodes += [node("Squeeze", "first", made["past"]), node("Squeeze", "end", made["total"])]
            nodes.append(node("Range", "positions", made["first"], made["end"], one))
        else:
            nodes.append(node("Expand", "rows", made["past"], made["batch"]))
        ranks = {len(value.type.tensor_type.shape.dim) for value in graph.inputs}
        axes = {a: graph.add_weight(f"{_PREFIX}axis.{a}", np.array([a], np.int64)) for a in range(max(ranks))}
        start = graph.add_weight(f"{_PREFIX}start", np.array([0], np.int64))
        return cls(made["past"], made["total"], made["rows"], made["positions"], start, axes, nodes)

    def slice(self, buffer: gs.Tensor, length: gs.Variable, axis: int, result: gs.Variable) -> gs.Node:
        operands = [buffer, self.start, length, self.axes[axis]]
        return gs.Node("Slice", f"{result.name}/Slice", inputs=operands, outputs=[result])


def _update(slot: _Slot, filled: _Filled, scatter: bool) -> list[gs.Node]:
    """Write the slot in place; what read the grown cache reads the filled part of the buffer."""
    present = slot.node.outputs[0]
    for reader in list(present.outputs):
        for index, tensor in enumerate(reader.inputs):
            if tensor is present:
                reader.inputs[index] = slot.all
    slot.node.inputs.clear()
    slot.node.outputs.clear()
    written = _scatter(slot, filled, present) if scatter else [_tensor_scatter(slot, filled, present)]
    return [*written, filled.slice(present, filled.total, slot.axis, slot.all)]


def _tensor_scatter(slot: _Slot, filled: _Filled, present: gs.Variable) -> gs.Node:
    operands = [slot.cache, slot.new, filled.rows]
    attributes = {"axis": slot.axis, "mode": "linear"}
    return gs.Node("TensorScatter", f"{_PREFIX}{slot.node.name}", attributes, operands, [present])


def _scatter(slot: _Slot, filled: _Filled, present: gs.Variable) -> list[gs.Node]:
    """The position of every new element along the axis, spread to their shape; and the scatter."""
    name = f"{_PREFIX}{slot.node.name}"
    shape, column, places = (gs.Variable(f"{name}/{part}", np.int64) for part in ("shape", "column", "places"))
    others = [filled.axes[axis] for axis in range(slot.rank) if axis != slot.axis]
    axes = gs.Variable(f"{name}/axes", np.int64)
    return [
        gs.Node("Shape", f"{name}/Shape", inputs=[slot.new], outputs=[shape]),
        gs.Node("Concat", f"{name}/Concat", {"axis": 0}, others, [axes]),
        gs.Node("Unsqueeze", f"{name}/Unsqueeze", inputs=[filled.positions, axes], outputs=[column]),
        gs.Node("Expand", f"{name}/Expand", inputs=[column, shape], outputs=[places]),
        gs.Node("ScatterElements", name, {"axis": slot.axis}, [slot.cache, places, slot.new], [present]),
    ]
