"""The graph that the ONNX passes work on: onnx-graphsurgeon's, plus what that library does not carry.

GraphSurgeon drops node metadata and overridable initializers, and it would copy a weight into every subgraph that reads
it. :class:`OnnxGraph` keeps the exporter's scopes, the exact signature, and the outer scope's weights.
"""

from __future__ import annotations

import ast
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues
from onnx_graphsurgeon.logger import G_LOGGER

from river_compile.passes.onnx.external_data import tensor_values

__all__ = ["OnnxGraph", "Uses", "bodies", "constant_value", "export_model", "import_model", "reads", "toposorted"]

_SCOPES = "pkg.torch.onnx.name_scopes"

log = logging.getLogger("river_compile")


@dataclass
class OnnxGraph:
    """An ONNX model under rewriting.

    Fields:
        surgeon: the graph; every pass works on its node list.
        weights: all constants of the outer scope by name, those that only subgraphs read included.
        scopes: for the id of a node, the module scopes that torch.onnx.export noted for it, outermost first.
        file_names: for the id of a node, the name that it has in the file, if it has one.
        inputs, outputs: the signature as it was in the file.
        overridable: names of weights that are graph inputs as well (a default, settable per run).
        replaceable: those of the file's own that are meant to be set (LoRA weights); none of a file that lists every
            weight as an input, as files of IR 3 must.
        added_outputs: outputs that the passes add, after the original ones.
        restated: names of the model's own nodes that a pass has written otherwise, to the same effect.
        foreign: what the file has that its opset does not, see `opset_problems`.
        metadata: the model's metadata properties.
        folder: where external data lies; None when there is none.
    """

    surgeon: gs.Graph
    weights: dict[str, gs.Constant]
    scopes: dict[int, tuple[str, ...]]
    file_names: dict[int, str]
    inputs: list[onnx.ValueInfoProto]
    outputs: list[onnx.ValueInfoProto]
    overridable: list[str] = field(default_factory=list)
    added_outputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    restated: set[str] = field(default_factory=set)
    replaceable: frozenset[str] = frozenset()
    foreign: frozenset[str] = frozenset()
    metadata: dict[str, str] = field(default_factory=dict)
    folder: Path | None = None

    @property
    def nodes(self) -> list[gs.Node]:
        nodes: list[gs.Node] = self.surgeon.nodes
        return nodes

    def add_weight(self, name: str, values: np.ndarray) -> gs.Constant:
        """A new constant of the outer scope. Requires that no weight has this name yet."""
        assert name not in self.weights, name
        self.weights[name] = gs.Constant(name, values)
        return self.weights[name]

    def integers(self, name: str, values: Sequence[int]) -> gs.Constant:
        """The int64 constant of this name, of the outer scope; made at its first use."""
        return self.weights.get(name) or self.add_weight(name, np.array(values, np.int64))

    def read(self, constant: gs.Constant) -> np.ndarray:
        """The values of a weight, read from external data if need be and not kept."""
        return constant_value(constant, self.folder)


def constant_value(constant: gs.Constant, folder: Path | None = None) -> np.ndarray:
    values = constant._values
    if isinstance(values, np.ndarray):
        return values
    return tensor_values(values.tensor, folder)


class Uses:
    """Who produces and who reads each tensor, by name, in the outer scope; subgraphs' reads count for their node."""

    def __init__(self, nodes: Sequence[gs.Node]) -> None:
        self.position = {id(node): index for index, node in enumerate(nodes)}
        self.producer: dict[str, gs.Node] = {}
        self.readers: dict[str, list[gs.Node]] = {}
        for node in nodes:
            for output in node.outputs:
                if output.name:
                    self.producer[output.name] = node
            for name in reads(node):
                self.readers.setdefault(name, []).append(node)


def reads(node: gs.Node) -> list[str]:
    """Names of all tensors that a node reads, those captured by its subgraphs included, in order, each once."""
    names = [tensor.name for tensor in node.inputs if tensor.name]
    for subgraph in node.subgraphs():
        inside = {tensor.name for tensor in subgraph.inputs}
        inside |= {output.name for inner in subgraph.nodes for output in inner.outputs}
        captured = [name for inner in subgraph.nodes for name in reads(inner)]
        captured += [output.name for output in subgraph.outputs]
        names += [name for name in captured if name not in inside]
    return list(dict.fromkeys(names))


def bodies(nodes: list[gs.Node]) -> Iterator[list[gs.Node]]:
    """A node list and those of all subgraphs in it."""
    yield nodes
    for node in nodes:
        for subgraph in node.subgraphs():
            yield from bodies(subgraph.nodes)


@contextmanager
def _quiet_surgeon() -> Iterator[None]:
    severity, G_LOGGER.severity = G_LOGGER.severity, G_LOGGER.ERROR
    try:
        yield
    finally:
        G_LOGGER.severity = severity


def import_model(model: onnx.ModelProto, folder: Path | None = None) -> OnnxGraph:
    """The graph of a model.

    Args:
        model: read without its external data; its tensors are taken over, not copied.
        folder: where the external data lies.
    """
    initializers = {tensor.name for tensor in model.graph.initializer}
    overridable = [value.name for value in model.graph.input if value.name in initializers]
    _constants_to_weights(model.graph)
    with _quiet_surgeon():
        surgeon = gs.import_onnx(model)
    scopes = _scopes(surgeon, model)
    weights = _outer_weights(surgeon, model)
    surgeon.nodes = _live(surgeon.nodes, {value.name for value in model.graph.output})
    for node in surgeon.nodes:
        for subgraph in node.subgraphs(recursive=True):
            _refer_outward(subgraph, weights)
    scopes = {id(node): scopes[id(node)] for node in surgeon.nodes if id(node) in scopes}
    file_names = {id(node): node.name for node in surgeon.nodes if node.name}
    _name_nodes(surgeon)
    return OnnxGraph(
        surgeon=surgeon,
        weights=weights,
        scopes=scopes,
        file_names=file_names,
        inputs=list(model.graph.input),
        outputs=list(model.graph.output),
        overridable=overridable,
        replaceable=frozenset(overridable) if set(overridable) != initializers else frozenset(),
        metadata={prop.key: prop.value for prop in model.metadata_props},
        folder=folder,
    )


def _constants_to_weights(graph: onnx.GraphProto) -> None:
    """Make weights of the outer scope's Constant nodes, since a pass should meet one form only."""
    outputs = {value.name for value in graph.output}
    kept = []
    for node in graph.node:
        constant = node.op_type == "Constant" and node.domain in ("", "ai.onnx") and node.output[0] not in outputs
        tensor = _constant_tensor(node) if constant else None
        if tensor is None:
            kept.append(node)
        else:
            tensor.name = node.output[0]
            graph.initializer.append(tensor)
    if len(kept) < len(graph.node):
        nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
        del graph.node[:]
        graph.node.extend(nodes)


def _constant_tensor(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """The value of a Constant node; None if it is sparse or a text."""
    kinds = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
    for attribute in node.attribute:
        if attribute.name == "value":
            tensor: onnx.TensorProto = attribute.t
            return tensor
        if attribute.name in kinds:
            value = onnx.helper.get_attribute_value(attribute)
            return onnx.numpy_helper.from_array(np.array(value, kinds[attribute.name]))
    return None


def _scopes(surgeon: gs.Graph, model: onnx.ModelProto) -> dict[int, tuple[str, ...]]:
    scopes = {}
    for node, proto in zip(surgeon.nodes, model.graph.node, strict=True):
        for prop in proto.metadata_props:
            if prop.key == _SCOPES:
                scopes[id(node)] = tuple(str(scope) for scope in ast.literal_eval(prop.value))
    return scopes


def _outer_weights(surgeon: gs.Graph, model: onnx.ModelProto) -> dict[str, gs.Constant]:
    """All constants of the outer scope."""
    found = {tensor.name: tensor for tensor in surgeon.tensors().values() if isinstance(tensor, gs.Constant)}
    for tensor in model.graph.initializer:
        found.setdefault(tensor.name, gs.Constant(tensor.name, LazyValues(tensor)))
    return found


def _live(nodes: Sequence[gs.Node], wanted: set[str]) -> list[gs.Node]:
    """The nodes that some graph output depends on."""
    wanted = set(wanted)
    live = []
    for node in reversed(toposorted(nodes)):
        if any(output.name in wanted for output in node.outputs):
            wanted.update(reads(node))
            live.append(node)
    return live[::-1]


def _refer_outward(subgraph: gs.Graph, weights: dict[str, gs.Constant]) -> None:
    for node in subgraph.nodes:
        for index, tensor in enumerate(node.inputs):
            weight = weights.get(tensor.name)
            if weight is not None and weight is tensor:
                node.inputs[index] = gs.Variable(weight.name)


def toposorted(nodes: Sequence[gs.Node]) -> list[gs.Node]:
    """The nodes in an order in which each comes after what it reads; otherwise as they were.

    Nodes in a circle come in some order, for the check after the pass to find.
    """
    producer = {output.name: node for node in nodes for output in node.outputs if output.name}
    begun: set[int] = set()
    ordered: list[gs.Node] = []
    stack: list[tuple[gs.Node, bool]] = [(node, False) for node in reversed(nodes)]
    while stack:
        node, ready = stack.pop()
        if ready:
            ordered.append(node)
            continue
        if id(node) in begun:
            continue
        begun.add(id(node))
        stack.append((node, True))
        stack += [(producer[name], False) for name in reversed(reads(node)) if name in producer]
    return ordered


def _name_nodes(surgeon: gs.Graph) -> None:
    """Give every node a name of its own: exporters leave names empty or use them twice, runtimes refuse the latter."""
    taken: set[str] = set()
    for index, node in enumerate(surgeon.nodes):
        if not node.name or node.name in taken:
            node.name = f"{node.name or node.op}_{index}"
        taken.add(node.name)


def export_model(graph: OnnxGraph) -> onnx.ModelProto:
    """The model of a graph. Weights that lie in external data still point there; those of the graph's own lie in the
    model from then on, and once only."""
    with _quiet_surgeon():
        model: onnx.ModelProto = gs.export_onnx(graph.surgeon, do_type_check=False)
    present = {tensor.name for tensor in model.graph.initializer}
    for name in sorted(_names_read(model.graph) | set(graph.overridable)):
        constant = graph.weights.get(name)
        if constant is not None and name not in present:
            model.graph.initializer.append(_tensor_proto(constant))
            constant._values = LazyValues(model.graph.initializer[-1])
    del model.graph.input[:]
    del model.graph.output[:]
    known = {value.name for value in graph.inputs}
    model.graph.input.extend(graph.inputs)
    for name in graph.overridable:
        if name not in known:
            constant = graph.weights[name]
            dtype = onnx.helper.np_dtype_to_tensor_dtype(constant.dtype)
            model.graph.input.append(onnx.helper.make_tensor_value_info(name, dtype, list(constant.shape)))
    model.graph.output.extend(graph.outputs + graph.added_outputs)
    for key, value in graph.metadata.items():
        model.metadata_props.add(key=key, value=value)
    return model


def _names_read(graph: onnx.GraphProto) -> set[str]:
    names = {name for node in graph.node for name in node.input}
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                names |= _names_read(attribute.g)
    return names


def _tensor_proto(constant: gs.Constant) -> onnx.TensorProto:
    values: Any = constant._values
    if isinstance(values, np.ndarray):
        return onnx.numpy_helper.from_array(values, constant.name)
    tensor: onnx.TensorProto = values.tensor
    return tensor
