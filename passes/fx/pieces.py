"""Pieces of a graph: runs of consecutive nodes, each as a graph of its own.

Consecutive matters: a piece that starts where the one before it ends runs every write to memory in the order of the
whole, so the pieces one after the other are the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from river_compile.passes.fx.graph import FxGraph, bound_symbols, symbols_of, value_of

__all__ = ["Piece", "Symbols", "cut_piece", "signature"]


@dataclass(frozen=True)
class Piece:
    """A run of nodes as a graph of its own.

    Fields:
        graph: one placeholder for each input, in order; it returns a tuple of the outputs.
        held: what its ``get_attr`` nodes read, by their targets.
        inputs, outputs: names of the values in the whole graph that they are.
    """

    graph: fx.Graph
    held: Mapping[str, Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def module(self) -> fx.GraphModule:
        """The piece to be called or compiled, made anew: it costs, and of pieces of one form one is compiled."""
        return fx.GraphModule(dict(self.held), self.graph)

    @property
    def placeholders(self) -> dict[str, fx.Node]:
        """The placeholder of each input, by the name of the value."""
        nodes = [node for node in self.graph.nodes if node.op == "placeholder"]
        return dict(zip(self.inputs, nodes, strict=True))

    @property
    def results(self) -> dict[str, fx.Node]:
        """The node of each output, by the name of the value."""
        output = next(iter(reversed(self.graph.nodes)))
        return dict(zip(self.outputs, output.args[0], strict=True))


def cut_piece(graph: FxGraph, nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> Piece:
    """The piece that consists of ``nodes`` and yields ``outputs``.

    Its inputs are the values that it reads, in order of first use, then what else binds the symbolic sizes that its
    values need: the graph's input that is such a size, or has it as one of its own.

    Requires: consecutive steps of the graph; outputs among them.
    """
    if graph.local_sizes:
        nodes = [*_sizes_from_outside(nodes), *nodes]
    inside = set(nodes)
    read = dict.fromkeys(
        operand
        for node in nodes
        for operand in node.all_input_nodes
        if operand not in inside and not (operand.op == "get_attr" and operand in graph.steps)
    )
    needed = dict.fromkeys(symbol for node in [*read, *nodes] for symbol in symbols_of(value_of(node)))
    if needed:
        sizes, tensors = (
            _binders(node for node in graph.placeholders if _is_number(node) is whether) for whether in (True, False)
        )
        bound = _binders(node for node in read if _is_number(node))
        read |= dict.fromkeys(sizes[symbol] for symbol in needed if symbol in sizes and symbol not in bound)
        bound = _binders(read)
        read |= dict.fromkeys(tensors[symbol] for symbol in needed if symbol in tensors and symbol not in bound)

    piece, held = fx.Graph(), {}
    copies: dict[fx.Node, fx.Node] = {}
    for node in read:
        copies[node] = piece.placeholder(node.name)
        copies[node].meta = _kept(node)
    for node in nodes:
        if node.op == "get_attr":
            held[str(node.target)] = getattr(graph.module, str(node.target))
        copies[node] = piece.node_copy(node, lambda operand: copies[operand])
        copies[node].meta = _kept(node)
    piece.output(tuple(copies[node] for node in outputs))
    piece.lint()
    return Piece(piece, held, tuple(node.name for node in read), tuple(node.name for node in outputs))


def _sizes_from_outside(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """The steps before ``nodes`` that work out a size which these read, in order."""
    inside, found = set(nodes), dict[fx.Node, None]()

    def collect(node: fx.Node) -> None:
        for operand in node.all_input_nodes:
            if operand not in inside and operand not in found and _is_size(operand):
                collect(operand)
                found[operand] = None

    for node in nodes:
        collect(node)
    return list(found)


def _is_size(node: fx.Node) -> bool:
    return node.op not in ("placeholder", "get_attr") and _is_number(node)


def _is_number(node: fx.Node) -> bool:
    return isinstance(value_of(node), (torch.SymInt, torch.SymFloat, torch.SymBool, int, float))


def _kept(node: fx.Node) -> dict[str, Any]:
    """What is kept of a node's meta data: its value, and where it comes from."""
    return {key: node.meta[key] for key in ("example_value", "val", "stack_trace") if key in node.meta}


def _binders(nodes: Iterable[fx.Node]) -> dict[Any, fx.Node]:
    """For each symbolic size the first of the values that binds it."""
    found: dict[Any, fx.Node] = {}
    for node in nodes:
        for symbol in bound_symbols(value_of(node)):
            found.setdefault(symbol, node)
    return found


class Symbols:
    """New names for a piece's symbolic sizes, in order of first use: its signature does not depend on the old ones."""

    def __init__(self, describe: Callable[[Any], str] = lambda symbol: "") -> None:
        self.names: dict[Any, str] = {}
        self._describe = describe

    def name(self, symbol: Any) -> str:
        if symbol not in self.names:
            self.names[symbol] = f"d{len(self.names)}"
        return self.names[symbol]

    def text(self, number: Any) -> str:
        """A size as text."""
        if not isinstance(number, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return repr(number)
        expression = number.node.expr
        import sympy

        renamed = {symbol: sympy.Symbol(self.name(symbol)) for symbol in symbols_of(number)}
        return str(expression.xreplace(renamed))

    def facts(self) -> list[str]:
        """What is known of each symbolic size, in order."""
        return [f"{name}: {self._describe(symbol)}" for symbol, name in self.names.items()]


def signature(piece: Piece, symbols: Symbols | None = None, *, with_values: bool = True) -> str:
    """A text that is the same for two pieces iff they are the same computation on operands of the same form.

    Args:
        symbols: receives the symbolic sizes met, in order.
        with_values: compare shapes, strides, types and devices of operands as well, not only the operations.
    """
    symbols = symbols if symbols is not None else Symbols()
    numbers: dict[fx.Node, str] = {}
    lines = []
    for node in piece.graph.nodes:
        numbers[node] = f"%{len(numbers)}"
        target = "" if node.op in ("placeholder", "output") else _target(node, piece.held)
        operands = "" if node.op == "placeholder" else f"{_text(node.args, numbers)} {_text(node.kwargs, numbers)}"
        form = _form(value_of(node), symbols) if with_values and node.op == "placeholder" else ""
        lines.append(f"{numbers[node]} {node.op} {target} {operands} {form}")
    return "\n".join([*lines, *symbols.facts()])


def _target(node: fx.Node, held: Mapping[str, Any]) -> str:
    if node.op == "get_attr":
        attribute = held.get(str(node.target))
        return attribute.code if isinstance(attribute, fx.GraphModule) else repr(attribute)
    if isinstance(node.target, str):
        return node.target
    target: Any = node.target
    # What Dynamo makes on the fly has its settings in no argument.
    settings = [cell.cell_contents for cell in getattr(target, "__closure__", None) or ()]
    name = f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', repr(target))}"
    return f"{name} {settings}" if settings else name


def _text(value: Any, numbers: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return numbers[value]
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_text(item, numbers) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_text(item, numbers)}' for key, item in value.items())}}}"
    if isinstance(value, slice):
        return f"slice({_text([value.start, value.stop, value.step], numbers)})"
    return repr(value)


def _form(value: Any, symbols: Symbols) -> str:
    if isinstance(value, torch.Tensor):
        strides = value.stride() if value.layout == torch.strided else ()
        sizes = [*value.shape, "|", *strides, "|", value.storage_offset()]
        return f"{value.dtype} {value.device} {' '.join(symbols.text(size) for size in sizes)}"
    return f"{type(value).__name__} {symbols.text(value)}"
