"""A canonical text of a piece of graph: equal for isomorphic pieces, whatever their nodes and tensors are called."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from river_compile.passes.onnx.graph import OnnxGraph

__all__ = ["signature"]


def signature(
    graph: OnnxGraph, nodes: Sequence[gs.Node], hidden_in: str, ends: Sequence[str], *, with_shapes: bool
) -> str:
    """The structure of ``nodes``, walked from the tensors ``ends`` backward in operand order.

    Args:
        hidden_in: the name of the tensor that enters the piece.
        with_shapes: whether shapes and types of constants count; without, only operators, attributes and wiring do.
    """
    producer = {output.name: node for node in nodes for output in node.outputs if output.name}
    number: dict[int, int] = {}
    words: list[str] = []

    def word(tensor: Any) -> str:
        if not tensor.name:
            return "-"
        if tensor.name == hidden_in:
            return "h"
        if tensor.name in producer:
            node = producer[tensor.name]
            slot = next(i for i, output in enumerate(node.outputs) if output.name == tensor.name)
            return f"#{number[id(node)]}.{slot}"
        if isinstance(tensor, gs.Constant):
            return f"w{list(tensor.shape)}{tensor.dtype}" if with_shapes else "w"
        return "x"

    def visit(end: str) -> None:
        stack: list[tuple[gs.Node, bool]] = [(producer[end], False)] if end in producer else []
        while stack:
            node, inputs_done = stack.pop()
            if id(node) in number:
                continue
            if inputs_done:
                number[id(node)] = len(number)
                attributes = ",".join(f"{key}={_attribute(value)}" for key, value in sorted(node.attrs.items()))
                words.append(f"{node.domain or ''}:{node.op}({attributes})[{','.join(map(word, node.inputs))}]")
                continue
            stack.append((node, True))
            stack += [(producer[t.name], False) for t in reversed(node.inputs) if t.name in producer]

    for end in ends:
        visit(end)
    return hashlib.sha256("\n".join(words).encode()).hexdigest()


def _attribute(value: Any) -> str:
    if isinstance(value, gs.Constant):
        data = value.values
        return f"{data.dtype}{data.shape}" + (str(data.tolist()) if data.size <= 8 else "")
    if isinstance(value, gs.Graph):
        return ";".join(node.op for node in value.nodes)
    return str(value.tolist() if isinstance(value, np.ndarray) else value)
