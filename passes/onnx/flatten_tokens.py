"""Let the river's branches compute on rows of tokens, [batch * sequence, width]."""

from __future__ import annotations

import logging
import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from river_compile.passes.onnx.find_layers import Anatomy
from river_compile.passes.onnx.graph import OnnxGraph, reads, toposorted
from river_compile.passes.onnx.row_wise import OTHER, ROWS, TOKENS, RowWise, restate
from river_compile.passes.onnx.twin import outer

__all__ = ["ROWS_SUFFIX", "flatten_tokens"]

ROWS_SUFFIX = "/rows"
"""Ends the name of a tensor's form in rows."""

_PREFIX = "rows/"
_LEADING = "rows/leading"

log = logging.getLogger("river_compile")


def flatten_tokens(graph: OnnxGraph, anatomy: Anatomy) -> int:
    """Reshape what the Ifs of the river read and yield to one row a token, where all that they do is row by row; how
    many Ifs that are.

    A matrix product takes rows. With two dimensions that vary, TensorRT reshapes, and copies, before and after each
    product of a branch, and derives each shape anew; one reshape outside, before attention and behind it, spares that.
    What stands between two Ifs and works row by row, such as a norm, does so on rows too.

    Requires: Ifs called ``river/...``; the hidden state's shape noted.
    Ensures: the same function. A branch that mixes tokens, or whose shapes are not known, stays as it is.
    """
    tensors: dict[str, gs.Tensor] = {tensor.name: tensor for tensor in graph.surgeon.inputs}
    tensors |= {output.name: output for node in graph.nodes for output in node.outputs} | graph.weights
    first = tensors.get(anatomy.layers[0].hidden_in)
    leading = list(first.shape[:2]) if first is not None and first.shape is not None and len(first.shape) == 3 else []
    if len(leading) != 2 or None in leading:
        log.info("the hidden state's shape is not known: branches keep batch and sequence apart")
        return 0
    scope = _Scope.of(graph, tensors, leading)
    nodes: list[gs.Node] = []
    flattened = 0
    for node in graph.nodes:
        back = _flatten_if(graph, scope, node) if _is_river(node) else _flatten_node(graph, scope, node)
        flattened += _is_river(node) and back is not None
        nodes += [node, *(back or ())]
    if flattened:
        _name_sizes(graph, scope, nodes)
        wanted = {name for node in nodes for name in reads(node)} | {value.name for value in graph.outputs}
        nodes = [n for n in nodes if not n.name.startswith(_PREFIX) or any(o.name in wanted for o in n.outputs)]
        graph.surgeon.nodes = toposorted([*nodes, *scope.nodes(graph, first)])
    return flattened


@dataclass
class _Scope:
    """What is known of the outer scope: the layout of its tensors, their shapes, and which were reshaped so far."""

    leading: list[int | str]
    layouts: dict[str, str]
    tensors: dict[str, gs.Tensor]
    flat: set[str]
    reshaped: dict[str, gs.Variable]
    sizes: set[tuple[int, ...]]

    @classmethod
    def of(cls, graph: OnnxGraph, tensors: dict[str, gs.Tensor], leading: list[int | str]) -> _Scope:
        found = {name: layout for name, t in tensors.items() if (layout := _layout(t, leading))}
        scope = cls(leading, found, tensors, set(), {}, set())
        for node in graph.nodes:
            if node.op == "Reshape" and _makes_rows(tensors[node.inputs[0].name], node.outputs[0], leading):
                scope.layouts[node.outputs[0].name] = ROWS
                scope.flat.add(node.outputs[0].name)
        return scope

    def rows(self, name: str) -> str:
        """The name of an outer tensor in rows."""
        if name in self.flat or self.layouts.get(name, OTHER) == OTHER:
            return name
        if name not in self.reshaped:
            source = self.tensors[name]
            self.reshaped[name] = gs.Variable(name + ROWS_SUFFIX, source.dtype)
        return name + ROWS_SUFFIX

    def read_rows(self, node: gs.Node, inner: Container[str] = ()) -> None:
        """Let a node read rows of outer tensors; ``inner`` names those that are none."""
        for index, tensor in enumerate(node.inputs):
            if tensor.name not in inner and (rows := self.rows(tensor.name)) != tensor.name:
                node.inputs[index] = outer(rows)

    def has_rows(self, name: str) -> bool:
        """Whether a tensor is made in rows."""
        return name in self.flat or (name in self.reshaped and bool(self.reshaped[name].inputs))

    def batched(self, *sizes: int) -> gs.Variable:
        """The shape [batch, sequence, *sizes]."""
        self.sizes.add(sizes)
        return outer(f"{_PREFIX}batched.{'.'.join(map(str, sizes))}")

    def nodes(self, graph: OnnxGraph, hidden: gs.Tensor) -> list[gs.Node]:
        """The reshapes of what no flattened If yields, and the shape that brings rows back into batch and sequence."""
        made = []
        for name, rows in self.reshaped.items():
            if not rows.inputs:
                width = [self.tensors[name].shape[-1]] if self.layouts[name] == ROWS else []
                shape = graph.integers(f"{_PREFIX}shape.{'.'.join(map(str, width))}", [-1, *width])
                made.append(gs.Node("Reshape", _PREFIX + name, inputs=[outer(name), shape], outputs=[rows]))
        leading = gs.Variable(_LEADING, np.int64)
        made.append(gs.Node("Shape", leading.name, {"start": 0, "end": 2}, [outer(hidden.name)], [leading]))
        for sizes in sorted(self.sizes):
            rest = graph.integers(f"{_PREFIX}sizes.{'.'.join(map(str, sizes))}", sizes)
            shape = self.batched(*sizes)
            made.append(gs.Node("Concat", shape.name, {"axis": 0}, [leading, rest], [shape]))
        return made


def _is_river(node: gs.Node) -> bool:
    return bool(node.op == "If" and node.name.startswith("river/"))


def _layout(tensor: gs.Tensor, leading: list[int | str]) -> str | None:
    if isinstance(tensor, gs.Constant):
        return OTHER
    if tensor.shape is None:
        return None
    dims = list(tensor.shape)
    if dims in (leading, [1, *leading]):
        return TOKENS
    if len(dims) == 3 and dims[:2] == leading and isinstance(dims[2], int):
        return ROWS
    return OTHER if len(dims) <= 1 else None


def _makes_rows(source: gs.Tensor, result: gs.Tensor, leading: Sequence[int | str]) -> bool:
    """Whether a Reshape brings [batch, sequence, ...] into [batch * sequence, width]."""
    before, after = source.shape, result.shape
    if before is None or after is None or len(after) != 2 or list(before[:2]) != list(leading):
        return False
    return all(isinstance(size, int) for size in before[2:]) and math.prod(before[2:]) == after[1]


def _flatten_if(graph: OnnxGraph, scope: _Scope, branch: gs.Node) -> Sequence[gs.Node] | None:
    """Flatten an If; the nodes that bring its results back into batch and sequence, or None if it cannot be."""
    bodies = [branch.attrs["else_branch"], branch.attrs["then_branch"]]
    shapes = _noted(bodies)
    plans = []
    for body in bodies:
        plan = RowWise(scope.layouts, scope.tensors, shapes, f"{body.name}/", graph.folder)
        if (problem := plan.follow(toposorted(body.nodes))) is not None:
            log.info("%s keeps batch and sequence apart: %s is not computed row by row", branch.name, problem)
            return None
        plans.append(plan)
    layouts = [[plan.layout(output.name) for output in body.outputs] for plan, body in zip(plans, bodies, strict=True)]
    if layouts[0] != layouts[1] or any(map(_is_unknown, layouts[0], branch.outputs)):
        return None
    for body, plan in zip(bodies, plans, strict=True):
        for node in body.nodes:
            restate(graph, node, plan, f"{body.name}/")
            for output in node.outputs:
                if plan.layout(output.name) != OTHER:
                    output.shape = None
            scope.read_rows(node, plan.made)
    return _give_back(scope, branch, layouts[0])


def _flatten_node(graph: OnnxGraph, scope: _Scope, node: gs.Node) -> Sequence[gs.Node] | None:
    """Let a node of the outer scope, all of whose operands are made in rows, compute on rows; as `_flatten_if`."""
    operands = [t.name for t in node.inputs if t.name and scope.layouts.get(t.name) != OTHER]
    if node.op == "Reshape" or not operands or not all(map(scope.has_rows, operands)):
        return None
    plan = RowWise(scope.layouts, scope.tensors, {}, "", graph.folder)
    if plan.follow([node]) is not None:
        return None
    layouts = [plan.layout(output.name) or OTHER for output in node.outputs]
    if any(map(_is_unknown, layouts, node.outputs)):
        return None
    restate(graph, node, plan, "")
    scope.read_rows(node)
    return _give_back(scope, node, layouts)


def _give_back(scope: _Scope, node: gs.Node, layouts: Sequence[str | None]) -> Sequence[gs.Node]:
    """Let a node yield rows; the reshapes that make of them what it yielded so far."""
    back = []
    for index, layout in enumerate(layouts):
        result = node.outputs[index]
        if layout in (None, OTHER):
            continue
        scope.layouts[result.name] = str(layout)
        if layout == ROWS and len(result.shape) == 2:
            scope.flat.add(result.name)
            continue
        rows = scope.reshaped[result.name] = gs.Variable(result.name + ROWS_SUFFIX, result.dtype)
        node.outputs[index] = rows
        shape = scope.batched(result.shape[-1]) if layout == ROWS else outer(_LEADING)
        back.append(gs.Node("Reshape", _PREFIX + result.name, inputs=[rows, shape], outputs=[result]))
    return back


def _is_unknown(layout: str | None, result: gs.Tensor) -> bool:
    """Whether a result of an If is in rows and its shape, which it must get back, is not known."""
    return layout == ROWS and (result.shape is None or not isinstance(result.shape[-1], int))


def _name_sizes(graph: OnnxGraph, scope: _Scope, nodes: Sequence[gs.Node]) -> None:
    """Give reshapes to [batch, sequence, ...] the other sizes as numbers. TensorRT works out a -1 from shapes that it
    can follow; behind a reshape from rows it no longer can, and the cache update asks for a known number of heads."""
    reached = {output.name for node in nodes if _is_river(node) for output in node.outputs}
    for node in toposorted(nodes):
        if reached.isdisjoint(reads(node)):
            continue
        reached.update(output.name for output in node.outputs)
        shape = node.outputs[0].shape if node.op == "Reshape" and not node.name.startswith(_PREFIX) else None
        if shape is None or len(shape) <= len(scope.leading) or list(shape[: len(scope.leading)]) != scope.leading:
            continue
        if not all(isinstance(size, int) for size in shape[len(scope.leading) :]):
            continue
        if scope.has_rows(node.inputs[0].name):
            node.inputs[0] = outer(scope.rows(node.inputs[0].name))
        node.inputs[1] = scope.batched(*shape[len(scope.leading) :])
        graph.restated.add(node.name)


def _noted(bodies: Sequence[gs.Graph]) -> Mapping[str, Sequence[int | str | None]]:
    """Shapes noted in either branch, by names without its prefix: the river's own products have none."""
    return {
        output.name.removeprefix(f"{body.name}/"): output.shape
        for body in bodies
        for node in body.nodes
        for output in node.outputs
        if output.shape is not None
    }
