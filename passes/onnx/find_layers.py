"""Pass 1: find the decoder layers of an ONNX graph."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import onnx_graphsurgeon as gs

from river_compile.errors import LayersNotFound
from river_compile.passes.anatomy import Anatomy, CacheSlot, Layer
from river_compile.passes.onnx.explain_refusal import explain_no_layers
from river_compile.passes.onnx.graph import OnnxGraph, Uses, reads
from river_compile.passes.onnx.residual_stream import Segment, Stream, find_stream
from river_compile.passes.onnx.signature import signature

__all__ = ["Anatomy", "find_layers"]

_INDEXED = re.compile(r"(?:^|(?<=[./_]))(\d+)(?=[./_]|$)")


def find_layers(graph: OnnxGraph) -> Anatomy:
    """Find the ordered decoder layers, and for each its nodes, hidden state, cache slots, side inputs and weights.

    The residual stream's cuts are the only places where a layer may begin or end. Which of them do is told by the
    exporter's metadata, else by the scopes in node names, else by structure: a layer reaches from the cut before one
    cache write to the cut before the next, and the last is as long as its like.

    Requires: nodes in topological order; a KV cache in the signature.
    Ensures: the graph is unchanged; the layers are disjoint, and each layer's hidden_out is the next one's hidden_in.

    Raises:
        LayersNotFound: there is no KV cache in the signature, or no chain of at least two layers.
    """
    uses = Uses(graph.nodes)
    stream = find_stream(graph, uses)
    if not stream.cache_segments:
        raise LayersNotFound(explain_no_layers(graph, ()))
    finders: dict[str, Callable[[gs.Node], Iterable[str]]] = {
        "metadata": lambda node: graph.scopes.get(id(node), ()),
        "names": lambda node: filter(None, [graph.file_names.get(id(node))]),
    }
    for how, scopes_of in finders.items():
        bounds = _bounds_by_scope(stream, scopes_of)
        if bounds:
            return Anatomy(_layers(graph, uses, stream, bounds), how)
    bounds = _bounds_by_structure(graph, stream)
    if len(bounds) < 3:
        caches = [slot for segment in stream.segments for slot in segment.caches]
        raise LayersNotFound(explain_no_layers(graph, caches))
    return Anatomy(_layers(graph, uses, stream, bounds), "structure")


def _bounds_by_scope(stream: Stream, scopes_of: Callable[[gs.Node], Iterable[str]]) -> list[str]:
    """The hidden states between layers, by the numbered container in the nodes' scopes that all cache writes lie in."""
    tags = [{tag for scope in scopes_of(node) for tag in _tags(scope)} for s in stream.segments for node in s.nodes]
    containers = Counter(container for found in tags for container, _ in found)
    for container, _ in containers.most_common(8):
        labels = [_label(segment, scopes_of, container) for segment in stream.segments]
        at_cache = [labels[index] for index in stream.cache_segments]
        if None in at_cache or len(at_cache) < 2 or len(set(at_cache)) != len(at_cache):
            continue
        bounds = _bounds_of_runs(stream, labels)
        if bounds:
            return bounds
    return []


def _tags(scope: str) -> list[tuple[str, int]]:
    """``layers.3.mlp`` -> [("layers.", 3)], for every number that stands alone in the scope."""
    return [(scope[: match.start()], int(match.group())) for match in _INDEXED.finditer(scope)]


def _label(segment: Segment, scopes_of: Callable[[gs.Node], Iterable[str]], container: str) -> int | None:
    """The layer that most of a segment's nodes name."""
    votes = Counter(
        number
        for node in segment.nodes
        for number in {number for scope in scopes_of(node) for key, number in _tags(scope) if key == container}
    )
    return votes.most_common(1)[0][0] if votes else None


def _bounds_of_runs(stream: Stream, labels: Sequence[int | None]) -> list[str]:
    """The bounds of runs 0, 1, 2, ... of equal labels; unlabelled segments inside the stack go with the layer before.

    A segment that carries the label of a layer without a cache write and lies at the end (a final norm numbered like a
    layer) is no layer, unless it reads what another layer has cached.
    """
    last_cache = stream.cache_segments[-1]
    reading = {label for segment, label in zip(stream.segments, labels, strict=True) if stream.reads_caches(segment)}
    bounds: list[str] = []
    current: int | None = None
    for index, (segment, label) in enumerate(zip(stream.segments, labels, strict=True)):
        if label is None:
            continue
        if label != current:
            if index > last_cache and label not in reading:
                break
            if current is not None and label != current + 1:
                return []
            bounds.append(segment.start)
            current, end = label, segment.end
        end = segment.end
    return [*bounds, end] if len(bounds) >= 2 else []


def _bounds_by_structure(graph: OnnxGraph, stream: Stream) -> list[str]:
    """A layer begins where the segment of a cache write begins; the last one ends where its like would."""
    starts = stream.cache_segments
    if len(starts) < 2:
        return []
    shapes = [
        signature(graph, segment.nodes, segment.start, (segment.end,), with_shapes=False) for segment in stream.segments
    ]
    tails = [shapes[begin + 1 : end] for begin, end in pairwise(starts)]
    after = shapes[starts[-1] + 1 :]
    matching = [len(tail) for tail in tails if after[: len(tail)] == tail]
    if not matching:
        return []
    end = stream.segments[starts[-1] + max(matching)].end
    return [*(stream.segments[start].start for start in starts), end]


def _layers(graph: OnnxGraph, uses: Uses, stream: Stream, bounds: Sequence[str]) -> tuple[Layer, ...]:
    level = _levels(graph, bounds) | {id(node): 0 for node in stream.early}
    outputs = {value.name for value in graph.outputs}
    slots = [slot for segment in stream.segments for slot in segment.caches]
    kinds: dict[str, int] = {}
    layers = []
    for index, (hidden_in, hidden_out) in enumerate(pairwise(bounds)):
        nodes = [node for node in graph.nodes if level[id(node)] == index + 1]
        produced = {output.name for node in nodes for output in node.outputs}
        inside = {id(node) for node in nodes}
        caches = tuple(slot for slot in slots if slot.present in produced)
        passed_on = {hidden_out, *(slot.present for slot in caches)}
        side_outputs = [
            name
            for name in sorted(produced - passed_on)
            if name in outputs or any(id(reader) not in inside for reader in uses.readers.get(name, ()))
        ]
        read = dict.fromkeys(name for node in nodes for name in reads(node) if name not in produced)
        known = {hidden_in, *(slot.past for slot in caches)}
        shape = signature(graph, nodes, hidden_in, (hidden_out, *(slot.present for slot in caches)), with_shapes=True)
        layers.append(
            Layer(
                index=index,
                hidden_in=hidden_in,
                hidden_out=hidden_out,
                nodes=tuple(node.name for node in nodes),
                caches=_ordered(caches, graph),
                side_inputs=tuple(n for n in read if n not in known and n not in graph.weights),
                side_outputs=tuple(side_outputs),
                weights=tuple(name for name in read if name in graph.weights),
                kind=kinds.setdefault(shape, len(kinds)),
            )
        )
    return tuple(layers)


def _ordered(caches: tuple[CacheSlot, ...], graph: OnnxGraph) -> tuple[CacheSlot, ...]:
    order = {value.name: index for index, value in enumerate(graph.outputs)}
    return tuple(sorted(caches, key=lambda slot: order[slot.present]))


def _levels(graph: OnnxGraph, bounds: Sequence[str]) -> dict[int, int]:
    """For the id of each node: 0 before the first layer, i + 1 if it depends on layer i's input and not its output."""
    of_tensor = {name: index + 1 for index, name in enumerate(bounds)}
    levels = {}
    for node in graph.nodes:
        level = max((of_tensor.get(name, 0) for name in reads(node)), default=0)
        levels[id(node)] = level
        for output in node.outputs:
            of_tensor.setdefault(output.name, level)
    return levels
