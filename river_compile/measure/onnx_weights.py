"""What a pass of an ONNX decoder reads from memory, as its file tells."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx

from river_compile.passes.onnx.external_data import tensor_bytes
from river_compile.passes.onnx.share_head import HEAD

__all__ = ["ReadWeights"]

_LAYER = re.compile(r"river/layer\.(\d+)")
_BY_ROW = {"Gather", "GatherND", "GatherElements", "GatherBlockQuantized"}
_EXPERTS = {"MoE", "QMoE"}


@dataclass(frozen=True)
class ReadWeights:
    """Names of the weights that a decode pass reads.

    Fields:
        sizes: bytes of each weight, as the file holds it: what a runtime makes of it when it loads it is not known.
        always: read by every pass.
        layers: of each layer with a twin, in their order, what its backbone reads, and what its river.
        head: likewise of an LM head with a twin.
        known: whether they can be told; not where a token chooses experts.
    """

    sizes: dict[str, int]
    always: frozenset[str]
    layers: tuple[tuple[frozenset[str], frozenset[str]], ...]
    head: tuple[frozenset[str], frozenset[str]]
    known: bool

    @classmethod
    def of(cls, path: Path) -> ReadWeights:
        """Those of a file that a runtime has loaded. A table that is only read by row counts as nothing."""
        graph = onnx.load(str(path), load_external_data=False).graph
        weights = {tensor.name: tensor for tensor in graph.initializer}
        folded: dict[str, frozenset[str]] = {name: frozenset([name]) for name in weights}
        outer, layers = [], {}
        head: tuple[frozenset[str], frozenset[str]] = (frozenset(), frozenset())
        known = True
        for node in graph.node:
            known = known and not _chooses(node, weights)
            place = _LAYER.fullmatch(node.name)
            if node.op_type == "If" and (place or node.name == HEAD):
                bodies = {attribute.name: attribute.g for attribute in node.attribute}
                both = (_read(bodies["else_branch"].node, folded), _read(bodies["then_branch"].node, folded))
                if place:
                    layers[int(place[1])] = both
                else:
                    head = both
            elif node.input and all(name in folded for name in node.input):
                # Computed once when the model is loaded, and read where its result is: the transpose of a tied head.
                folded |= dict.fromkeys(node.output, frozenset().union(*(folded[name] for name in node.input)))
            else:
                outer.append(node)
        sizes = {name: tensor_bytes(tensor) for name, tensor in weights.items()}
        return cls(sizes, _read(outer, folded), tuple(layers[index] for index in sorted(layers)), head, known)

    def bytes(self, in_river: int = 0) -> float:
        """Bytes of the weights that a pass reads whose last ``in_river`` layers, and so the head, are the river's; NaN
        where that cannot be told."""
        if not self.known:
            return math.nan
        staying = len(self.layers) - in_river
        read = self.always | self.head[in_river > 0]
        for place, layer in enumerate(self.layers):
            read |= layer[place >= staying]
        return float(sum(self.sizes[name] for name in read))


def _read(nodes: Iterable[onnx.NodeProto], folded: Mapping[str, frozenset[str]]) -> frozenset[str]:
    """The weights that nodes read, where ``folded`` tells of which weights a value is made."""
    read: set[str] = set()
    for node in nodes:
        inputs = node.input[1:] if node.op_type in _BY_ROW else node.input
        read.update(*(folded[name] for name in inputs if name in folded))
        for attribute in node.attribute:
            if attribute.HasField("g"):
                read |= _read(attribute.g.node, folded)
    return frozenset(read)


def _chooses(node: onnx.NodeProto, weights: dict[str, onnx.TensorProto]) -> bool:
    """Whether a node, or one within it, takes some of a layer's experts."""
    stacked = node.op_type in _BY_ROW and node.input[0] in weights and len(weights[node.input[0]].dims) > 2
    inner = (inside for attribute in node.attribute if attribute.HasField("g") for inside in attribute.g.node)
    return node.op_type in _EXPERTS or stacked or any(_chooses(inside, weights) for inside in inner)
