"""The graph that the FX passes work on: one that Dynamo or torch.export made, and what is known of its inputs."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

__all__ = [
    "FxGraph",
    "bound_symbols",
    "import_graph",
    "operands",
    "operation",
    "root_of",
    "symbols_of",
    "value_of",
    "written_inputs",
    "written_roots",
]

_OVERLOAD, _PACKET = type(torch.ops.aten.add.Tensor), type(torch.ops.aten.add)
_IN_PLACE = re.compile(r"[a-z0-9]_$")
_VIEWS = {
    "getitem",
    "view",
    "reshape",
    "transpose",
    "permute",
    "to",
    "contiguous",
    "expand",
    "unsqueeze",
    "squeeze",
    "slice",
    "select",
    "narrow",
    "detach",
    "alias",
    "flatten",
}


@dataclass
class FxGraph:
    """A graph under rewriting.

    Fields:
        module: the graph with its constants; the passes do not change it.
        weights: names of the placeholders that are a module's parameters.
        local_sizes: whether a piece works out the sizes that it needs from the tensors it reads, for destinations where
            only tensors may go from one piece to the next.
        steps: all nodes that compute something, in execution order.
    """

    module: fx.GraphModule
    weights: frozenset[str]
    local_sizes: bool = False
    steps: tuple[fx.Node, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.steps = tuple(node for node in self.module.graph.nodes if _is_step(node))

    @property
    def placeholders(self) -> list[fx.Node]:
        return [node for node in self.module.graph.nodes if node.op == "placeholder"]

    @functools.cached_property
    def _lasting(self) -> frozenset[int]:
        return frozenset(m for node in [*self.placeholders, *self.results] for m in _memory_of(value_of(node)))

    def outlives(self, node: fx.Node) -> bool:
        """Whether the memory of a value is there before the graph runs, or after it."""
        return node.op in ("placeholder", "get_attr") or not self._lasting.isdisjoint(_memory_of(value_of(node)))

    @functools.cached_property
    def deepest(self) -> fx.Node | None:
        """The result that the most operations one after the other lead to: the logits."""
        depth: dict[fx.Node, int] = {}
        for node in self.steps:
            depth[node] = 1 + max((depth.get(operand, 0) for operand in operands(node)), default=0)
        return max(self.results, key=lambda node: depth.get(node, 0), default=None)

    @property
    def output(self) -> fx.Node:
        output: fx.Node = next(iter(reversed(self.module.graph.nodes)))
        return output

    @property
    def results(self) -> list[fx.Node]:
        """The values that the graph returns."""
        return self.output.all_input_nodes


def import_graph(module: fx.GraphModule, weights: Sequence[str]) -> FxGraph:
    """The graph of a module, without the nodes that only look at a size.

    Args:
        module: a graph whose nodes carry their fake value; it is changed: nodes without effect are taken out.
        weights: names of the placeholders that are parameters.
    """
    for node in reversed(list(module.graph.nodes)):
        if node.op in ("call_function", "call_method") and not node.users and not _has_effect(node):
            module.graph.erase_node(node)
    return FxGraph(module, frozenset(weights))


def _is_step(node: fx.Node) -> bool:
    if node.op == "get_attr":
        return isinstance(_attribute(node), fx.GraphModule)
    return node.op not in ("placeholder", "output")


def _attribute(node: fx.Node) -> Any:
    found: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        found = getattr(found, part)
    return found


def _has_effect(node: fx.Node) -> bool:
    """Whether a node that nobody reads does something: only sizes and notes to the log surely do not."""
    value = value_of(node)
    return isinstance(value, torch.Tensor) or (value is None and "log_api_usage" not in str(node.target))


def value_of(node: fx.Node) -> Any:
    """The fake value of a node: a tensor, a symbolic number, or None if it has none."""
    return node.meta.get("example_value", node.meta.get("val"))


def operation(node: fx.Node) -> str:
    """The bare name of what a node calls: ``add``, ``index_copy_``, ``linear``."""
    if node.op == "call_method":
        return str(node.target)
    # Of the overloads of one operation the name is that of all.
    target = getattr(node.target, "overloadpacket", node.target)
    return str(getattr(target, "__name__", target))


def written_roots(node: fx.Node) -> list[fx.Node]:
    """The tensors whose memory a node changes, each traced through views to where it comes from."""
    name = operation(node)
    if name == "setitem" or (_IN_PLACE.search(name) and not name.startswith("_")):
        target = node.args[0] if node.args else None
        return [root_of(target)] if isinstance(target, fx.Node) else []
    out = node.kwargs.get("out")
    return [root_of(out)] if isinstance(out, fx.Node) else []


def written_inputs(graph: FxGraph) -> frozenset[str]:
    """Names of the inputs that the graph may write in place; an operation that is not torch's own may write all it
    reads."""
    written = []
    for node in graph.steps:
        written += written_roots(node)
        if _is_foreign(node.target):
            written += [root_of(operand) for operand in operands(node)]
    names = {node.name for node in written}
    memory = {found for node in written for found in _memory_of(value_of(node))}
    return frozenset(
        node.name
        for node in graph.placeholders
        if node.name in names or not memory.isdisjoint(_memory_of(value_of(node)))
    )


def _is_foreign(target: Any) -> bool:
    if isinstance(target, _OVERLOAD) and target._schema.is_mutable:
        return True
    if isinstance(target, (_OVERLOAD, _PACKET)):
        return not str(target).startswith(("aten.", "prims."))
    # What is left beside functions are operators on graphs and what others have made.
    return callable(target) and not inspect.isroutine(target)


def _memory_of(value: Any) -> list[int]:
    """What two values of a graph have in common iff one is a view of the other's memory."""
    if isinstance(value, (tuple, list)):
        return [found for item in value for found in _memory_of(item)]
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return []
    return [value.untyped_storage()._cdata]


def root_of(node: fx.Node) -> fx.Node:
    """Where a value's memory comes from, as far as views and in-place operations tell."""
    while node.op in ("call_method", "call_function") and node.args and isinstance(node.args[0], fx.Node):
        name = operation(node)
        if name not in _VIEWS and not (_IN_PLACE.search(name) and not name.startswith("_")):
            break
        node = node.args[0]
    return node


def operands(node: fx.Node) -> Iterator[fx.Node]:
    """The tensors that a node reads; not those of which it only takes a size."""
    for operand in node.all_input_nodes:
        value = value_of(operand)
        if not isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool, int, float)):
            yield operand


def symbols_of(value: Any) -> list[Any]:
    """The free symbols in a fake value's shape, strides and offset, or in a symbolic number, in order of first use."""
    found: dict[Any, None] = {}
    for number in _numbers_of(value):
        if isinstance(number, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            symbols = number.node.expr.free_symbols
            found |= dict.fromkeys(sorted(symbols, key=str))
    return list(found)


def bound_symbols(value: Any) -> list[Any]:
    """The symbols that a compiler can read off a value: those that are a size or stride of it, or all of it, bare."""
    numbers = [number for number in _numbers_of(value) if isinstance(number, torch.SymInt)]
    return [number.node.expr for number in numbers if getattr(number.node.expr, "is_Symbol", False)]


def _numbers_of(value: Any) -> list[Any]:
    if isinstance(value, torch.Tensor):
        return [*value.shape, *(value.stride() if value.layout == torch.strided else ()), value.storage_offset()]
    return [value]
