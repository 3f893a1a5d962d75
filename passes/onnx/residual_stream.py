"""The residual stream of an ONNX graph: the tensors that every path from the tokens to the logits goes through."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import onnx_graphsurgeon as gs

from river_compile.passes.anatomy import CacheSlot
from river_compile.passes.onnx.graph import OnnxGraph, Uses, reads

__all__ = ["Segment", "Stream", "ancestors", "find_stream"]

_SHAPE_ONLY = {"Shape", "Size"}
_PRODUCTS = {"MatMul", "Gemm", "Einsum", "Conv"}

# Operators that take a past and give a present: output index -> input index.
_STATE_OPS = {
    "Attention": {1: 4, 2: 5},
    "GroupQueryAttention": {1: 3, 2: 4},
    "MultiHeadAttention": {1: 6, 2: 7},
    "SparseAttention": {1: 3, 2: 4},
    "TensorScatter": {0: 0},
    "ScatterND": {0: 0},
    "ScatterElements": {0: 0},
}


@dataclass(frozen=True)
class Segment:
    """The nodes between two consecutive cuts of the stream, and the cache slots written there."""

    start: str
    end: str
    nodes: tuple[gs.Node, ...]
    caches: tuple[CacheSlot, ...]


@dataclass(frozen=True)
class Stream:
    """The whole stream: its segments in order, from the tokens to the logits.

    Fields:
        early: nodes that compute what several layers read from the tokens alone (embeddings for each layer).
        cached: what several layers read of the KV cache that one of them wrote.
    """

    segments: tuple[Segment, ...]
    early: tuple[gs.Node, ...] = ()
    cached: frozenset[str] = frozenset()

    @property
    def cache_segments(self) -> tuple[int, ...]:
        return tuple(index for index, segment in enumerate(self.segments) if segment.caches)

    def reads_caches(self, segment: Segment) -> bool:
        return any(self.cached.intersection(reads(node)) for node in segment.nodes)


def find_stream(graph: OnnxGraph, uses: Uses) -> Stream:
    """The residual stream along which most of the KV cache is written, over all graph inputs, to the deepest output.

    Nothing else than it passes from layer to layer; or, where more layers are found so, what several of them read:
    tensors made of the tokens alone (embeddings for each layer), and the caches of others.

    Requires: nodes in topological order.
    Ensures: every node that lies on a path from the stream's source to its sink is in exactly one segment.
    """
    sink = _deepest_output(graph)
    above = ancestors(sink, uses)
    sources = _sources(graph, above)
    streams = [_stream(graph, uses, source, sink, above, aside) for aside in (False, True) for source in sources]
    return max(streams, key=_reach, default=Stream(()))


def _reach(stream: Stream) -> tuple[int, int, bool, int]:
    written = sum(len(segment.caches) for segment in stream.segments)
    attending = sum(bool(s.caches) or stream.reads_caches(s) for s in stream.segments)
    return written, attending, not stream.cached, len(stream.segments)


def _sources(graph: OnnxGraph, above: set[int]) -> list[str]:
    """The inputs that tokens may come in by: those on which the most products depend.

    A weight that is an input (LoRA), a mask or a cache is no source: whatever product depends on it depends on the
    tokens as well, and others do on the tokens alone.
    """
    reached: dict[str, int] = {}
    for index, node in enumerate(reversed(graph.nodes)):
        if id(node) in above:
            products = 1 << index if _multiplies(graph, node) else 0
            for output in node.outputs:
                products |= reached.get(output.name, 0)
            for name in reads(node):
                reached[name] = reached.get(name, 0) | products
    found = {v.name: reached.get(v.name, 0) for v in graph.inputs if v.name not in graph.weights}
    return [
        name
        for name, products in found.items()
        if not any(products != others and products | others == others for others in found.values())
    ]


def _multiplies(graph: OnnxGraph, node: gs.Node) -> bool:
    """Whether a node is a product, or reads a matrix of weights in another way (an embedding, a quantized product)."""
    weights = (graph.weights[name] for name in reads(node) if name in graph.weights)
    return node.op in _PRODUCTS or any(sum(size > 1 for size in weight.shape) > 1 for weight in weights)


def _stream(graph: OnnxGraph, uses: Uses, source: str, sink: str, above: set[int], with_aside: bool) -> Stream:
    nodes = _on_paths(source, above, uses)
    aside = _aside(graph, uses, nodes) if with_aside else _NOTHING
    cuts = _cuts(source, sink, nodes, uses, aside.early | aside.cached)
    caches = _caches_by_node(graph, uses, set(cuts), {id(node) for node in nodes})
    segments = []
    remaining = iter(nodes)
    for start, end in pairwise(cuts):
        inside = []
        for node in remaining:
            inside.append(node)
            if node is uses.producer[end]:
                break
        slots = tuple(slot for node in inside for slot in caches.get(id(node), ()))
        segments.append(Segment(start, end, tuple(inside), slots))
    before = set().union(*(ancestors(name, uses) for name in aside.early))
    return Stream(tuple(segments), tuple(node for node in graph.nodes if id(node) in before), aside.cached)


def _deepest_output(graph: OnnxGraph) -> str:
    depth: dict[str, int] = {}
    for node in graph.nodes:
        level = 1 + max((depth.get(name, 0) for name in reads(node)), default=0)
        for output in node.outputs:
            depth[output.name] = level
    return max((value.name for value in graph.outputs), key=lambda name: depth.get(name, 0))


def ancestors(sink: str, uses: Uses) -> set[int]:
    """Ids of all nodes that a tensor depends on, other than by a shape."""
    found: set[int] = set()
    open_names = [sink]
    while open_names:
        node = uses.producer.get(open_names.pop())
        if node is None or id(node) in found or node.op in _SHAPE_ONLY:
            continue
        found.add(id(node))
        open_names += reads(node)
    return found


def _on_paths(source: str, above: set[int], uses: Uses) -> list[gs.Node]:
    """The nodes on the paths from a source to the sink that these are above of, in order."""
    on_path: dict[int, gs.Node] = {}
    open_names = [source]
    while open_names:
        for node in uses.readers.get(open_names.pop(), ()):
            if id(node) in above and id(node) not in on_path:
                on_path[id(node)] = node
                open_names += [output.name for output in node.outputs]
    return sorted(on_path.values(), key=lambda node: uses.position[id(node)])


def _cuts(source: str, sink: str, nodes: Sequence[gs.Node], uses: Uses, aside: frozenset[str]) -> list[str]:
    """All tensors that every path from source to sink passes, but for what passes aside."""
    rank = {id(node): index for index, node in enumerate(nodes)}

    def last_read(name: str) -> int:
        if name == sink:
            return len(nodes)
        return max((rank[id(node)] for node in uses.readers.get(name, ()) if id(node) in rank), default=-1)

    # A tensor is a cut if at some moment of the execution it alone is alive.
    alive = {source: last_read(source)}
    cuts = [source] if alive[source] >= 0 else []
    for index, node in enumerate(nodes):
        alive = {name: last for name, last in alive.items() if last > index}
        made = [output.name for output in node.outputs if output.name not in aside]
        alive |= {name: last for name in made if (last := last_read(name)) > index}
        if len(alive) == 1 and (only := next(iter(alive))) not in cuts[-1:]:
            cuts.append(only)
    return cuts


@dataclass(frozen=True)
class _Aside:
    """What passes from layer to layer beside the hidden state: made of the tokens alone, and of caches."""

    early: frozenset[str] = frozenset()
    cached: frozenset[str] = frozenset()


_NOTHING = _Aside()


def _aside(graph: OnnxGraph, uses: Uses, nodes: Sequence[gs.Node]) -> _Aside:
    """Tensors made before a cache is read, and still read where the second layer writes its own; the caches
    themselves; and what is made of nothing else.

    The second layer writes the first cache into which another one flows.
    """
    on_path = {id(node) for node in nodes}
    homes = _caches_by_node(graph, uses, set(), on_path, (False,))
    writers = [node for node in nodes if id(node) in homes]
    slots = [slot for node in writers for slot in homes[id(node)]]
    later = _made_of({output.name for node in writers[:1] for output in node.outputs}, nodes)
    second = next((uses.position[id(node)] for node in writers if any(name in later for name in reads(node))), None)
    if second is None:
        return _NOTHING
    of_caches = _made_of({slot.past for slot in slots}, nodes)
    early = {
        output.name
        for node in nodes
        for output in node.outputs
        if output.name not in of_caches
        and any(uses.position[id(reader)] > second for reader in uses.readers.get(output.name, ()))
    }
    cached = {slot.present for slot in slots}
    made = {output.name for node in nodes for output in node.outputs}
    for node in nodes:
        results = {output.name for output in node.outputs}
        operands = made.intersection(reads(node))
        if early & results or (operands and operands <= early):
            early |= results
        elif operands and operands <= early | cached:
            cached |= results
    return _Aside(frozenset(early), frozenset(cached))


def _made_of(names: set[str], nodes: Sequence[gs.Node]) -> set[str]:
    """These tensors and all that depend on them."""
    found = set(names)
    for node in nodes:
        if not found.isdisjoint(reads(node)):
            found.update(output.name for output in node.outputs)
    return found


def _caches_by_node(
    graph: OnnxGraph, uses: Uses, cuts: set[str], on_stream: set[int], through_products: Sequence[bool] = (True, False)
) -> dict[int, tuple[CacheSlot, ...]]:
    """For the id of a node on the stream, the cache slots whose new content it computes."""
    pasts = {v.name: v for v in graph.inputs if _rank(v) >= 3 and v.name not in graph.weights}
    found: dict[int, list[CacheSlot]] = {}
    for value in graph.outputs:
        if _rank(value) < 3 or value.name in cuts:
            continue
        past, home = _trace_cache(value.name, set(pasts), uses, cuts, on_stream, through_products)
        if past is not None and home is not None and _dtype(pasts[past]) == _dtype(value):
            found.setdefault(id(home), []).append(CacheSlot(past, value.name))
    return {key: tuple(slots) for key, slots in found.items()}


def _trace_cache(
    present: str, pasts: set[str], uses: Uses, cuts: set[str], on_stream: set[int], through_products: Sequence[bool]
) -> tuple[str | None, gs.Node | None]:
    """The one past that a present output continues, and the last node on the stream that it comes from.

    A cache is moved, masked or scaled; what only comes in by a product is none, but a weight (LoRA).
    """
    home: gs.Node | None = None
    for products in through_products:
        reached: set[str] = set()
        seen: set[str] = set()
        open_names = [present]
        while open_names:
            name = open_names.pop()
            if name in seen or name in cuts:
                continue
            seen.add(name)
            if name in pasts:
                reached.add(name)
            node = uses.producer.get(name)
            if node is None or node.op in _SHAPE_ONLY:
                continue
            if id(node) in on_stream and (home is None or uses.position[id(node)] > uses.position[id(home)]):
                home = node
            if products or node.op not in _PRODUCTS:
                open_names += _state_inputs(node, name)
        if len(reached) == 1:
            return reached.pop(), home
    return None, None


def _state_inputs(node: gs.Node, name: str) -> Iterable[str]:
    """What an output's cache content comes from: for an operator with a state, that state's input only."""
    index = next(i for i, output in enumerate(node.outputs) if output.name == name)
    state = _STATE_OPS.get(node.op, {}).get(index)
    if state is not None and state < len(node.inputs) and node.inputs[state].name:
        return [node.inputs[state].name]
    return reads(node)


def _rank(value: object) -> int:
    tensor_type = value.type.tensor_type  # type: ignore[attr-defined]
    return len(tensor_type.shape.dim) if tensor_type.HasField("shape") else 4


def _dtype(value: object) -> int:
    return int(value.type.tensor_type.elem_type)  # type: ignore[attr-defined]
