"""Pass 1: the decoder's anatomy."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import fx

from river_compile.errors import LayersNotFound
from river_compile.passes.anatomy import Anatomy, CacheSlot, Layer
from river_compile.passes.fx.graph import FxGraph, operands, operation, root_of, value_of, written_roots
from river_compile.passes.fx.pieces import cut_piece, signature
from river_compile.passes.fx.residual_stream import find_streams

__all__ = ["find_layers"]

_INDEXED = re.compile(r"^(.+)\.(\d+)$")


def find_layers(graph: FxGraph) -> Anatomy:
    """Find the ordered decoder layers, and for each its nodes, hidden state, cache slots, side inputs and weights.

    A layer is a run of consecutive nodes. Where it begins and ends is told by the module paths that Dynamo notes with
    each node, or by structure: it begins at the cut of the residual stream before a cache write.

    Requires: nodes that carry their fake value, in execution order.
    Ensures: the graph is unchanged; the layers are consecutive and disjoint, and each layer's hidden_out is the next
    one's hidden_in.

    Raises:
        LayersNotFound: there is no KV cache in the graph, or no chain of at least two layers, or it is cut off.
    """
    if not _cache_writes(graph, graph.steps, frozenset()):
        raise LayersNotFound("the graph keeps no KV cache")
    for found_by, find in (("metadata", _runs_by_scope), ("structure", _runs_by_structure)):
        runs = find(graph)
        if len(runs) >= 2:
            return Anatomy(_layers(graph, runs), found_by)
    raise LayersNotFound("the graph has no chain of repeated decoder layers along a residual stream")


def _runs_by_scope(graph: FxGraph) -> list[Sequence[fx.Node]]:
    """The runs of the numbered container whose members write the KV cache: most of them, if there are several.

    Layers behind may write none and read what layers before them have written.
    """
    tags = [dict(_tags(node)) for node in graph.steps]
    containers = Counter(container for found in tags for container in found)
    best: list[Sequence[fx.Node]] = []
    for container in containers:
        labels = [found.get(container) for found in tags]
        runs = _runs_of_labels(graph.steps, labels)
        writing = [bool(_cache_writes(graph, run, frozenset())) for run in runs]
        if len(runs) > len(best) and writing[:2] == [True, True] and writing == sorted(writing, reverse=True):
            best = runs
    return best


def _tags(node: fx.Node) -> Iterable[tuple[str, int]]:
    """``model.layers.3`` -> (``model.layers``, 3), for each module that the node lies in."""
    for path, _ in node.meta.get("nn_module_stack", {}).values():
        match = _INDEXED.match(path)
        if match:
            yield match.group(1), int(match.group(2))


def _runs_of_labels(steps: Sequence[fx.Node], labels: Sequence[int | None]) -> list[Sequence[fx.Node]]:
    """The runs labelled 0, 1, 2, ...; what lies between two of them goes with the one before. Empty if out of order."""
    starts: list[int] = []
    end = 0
    for position, label in enumerate(labels):
        if label is None:
            continue
        if label == len(starts):
            starts.append(position)
        elif label != len(starts) - 1:
            return []
        end = position + 1
    return [steps[begin:stop] for begin, stop in pairwise([*starts, end])]


def _runs_by_structure(graph: FxGraph) -> list[Sequence[fx.Node]]:
    """A layer begins at the cut before a cache write. The last one ends where its like would, and the first one, which
    would begin at the embedding, begins where its like would."""
    position = {node: index for index, node in enumerate(graph.steps)}
    cuts = _find_cuts(graph)
    ends = [position.get(cut, -1) + 1 for cut in cuts]
    segments = [graph.steps[begin:end] for begin, end in pairwise(ends)]
    starts = [i for i, segment in enumerate(segments) if _cache_writes(graph, segment, frozenset(cuts))]
    if len(starts) < 2:
        return []
    shapes = [_shape(graph, segment, cut) for segment, cut in zip(segments, cuts[1:], strict=True)]
    after = shapes[starts[-1] + 1 :]
    tails = [shapes[begin + 1 : end] for begin, end in pairwise(starts)]
    matching = [len(tail) for tail in tails if after[: len(tail)] == tail]
    if not matching:
        return []
    bounds = [*(ends[start] for start in starts), ends[starts[-1] + max(matching) + 1]]
    runs: list[Sequence[fx.Node]] = [graph.steps[begin:end] for begin, end in pairwise(bounds)]
    runs[0] = _like_the_others(runs)
    return runs


def _find_cuts(graph: FxGraph) -> list[fx.Node]:
    """The cuts of the stream along which most of the KV cache is written."""
    position = {node: index for index, node in enumerate(graph.steps)}

    def written(cuts: list[fx.Node]) -> tuple[int, int]:
        hidden = frozenset(cuts)
        ends = [position.get(cut, -1) + 1 for cut in cuts]
        segments = [graph.steps[begin:end] for begin, end in pairwise(ends)]
        return sum(bool(_cache_writes(graph, segment, hidden)) for segment in segments), len(cuts)

    return max(find_streams(graph), key=written, default=[])


def _shape(graph: FxGraph, nodes: Sequence[fx.Node], end: fx.Node) -> str:
    return signature(cut_piece(graph, nodes, [end]), with_values=False)


def _like_the_others(runs: Sequence[Sequence[fx.Node]]) -> Sequence[fx.Node]:
    """The end of the first run that is, operation for operation, one of the others; arithmetic on sizes is not counted,
    as it is done where a size is first needed."""
    first = [(position, operation(node)) for position, node in enumerate(runs[0]) if _rank(node) > 0]
    for run in runs[1:]:
        pattern = [operation(node) for node in run if _rank(node) > 0]
        if [name for _, name in first[-len(pattern) :]] == pattern:
            return runs[0][first[-len(pattern)][0] :]
    return runs[0]


def _cache_writes(graph: FxGraph, nodes: Sequence[fx.Node], hidden: frozenset[fx.Node]) -> tuple[CacheSlot, ...]:
    """The cache slots written by some nodes: tensors changed in place that outlive the graph, and new ones that it
    returns."""
    slots: dict[fx.Node, CacheSlot] = {}
    for node in nodes:
        for root in written_roots(node):
            # A sum over processes writes its operand in place: no cache, since that is gone after the pass.
            if _rank(root) >= 3 and root not in hidden and graph.outlives(root):
                slots[root] = CacheSlot(root.name, node.name)
    results = set(graph.results)
    inside = set(nodes)
    sink = graph.deepest
    for node in nodes:
        if node in results and node is not sink and _rank(node) >= 3 and node not in hidden:
            root = root_of(node)
            if root not in slots:
                slots[root] = CacheSlot(_past_of(graph, node, inside), node.name)
    return tuple(slots.values())


def _rank(node: fx.Node) -> int:
    value = value_of(node)
    return value.dim() if isinstance(value, torch.Tensor) else 0


def _past_of(graph: FxGraph, present: fx.Node, inside: set[fx.Node]) -> str:
    """The one graph input that a present continues; empty if it begins here."""
    pasts: set[str] = set()
    open_nodes, seen = [present], {present}
    while open_nodes:
        for operand in operands(open_nodes.pop()):
            if operand in seen:
                continue
            seen.add(operand)
            if operand.op == "placeholder" and operand.name not in graph.weights and _rank(operand) == _rank(present):
                pasts.add(operand.name)
            elif operand in inside:
                open_nodes.append(operand)
    return pasts.pop() if len(pasts) == 1 else ""


def _layers(graph: FxGraph, runs: Sequence[Sequence[fx.Node]]) -> tuple[Layer, ...]:
    after = graph.steps[graph.steps.index(runs[-1][-1]) + 1 :]
    if not after:
        raise LayersNotFound("the graph ends with a decoder layer: it is part of a model, cut off by a graph break")
    states = _hidden_states(graph, [*runs, after])
    hidden = frozenset(states)
    kinds: dict[str, int] = {}
    layers = []
    for index, (run, (before, behind)) in enumerate(zip(runs, pairwise(states), strict=True)):
        inside = set(run)
        slots = _cache_writes(graph, run, hidden)
        read = dict.fromkeys(operand for node in run for operand in node.all_input_nodes if operand not in inside)
        outputs = [node for node in run if any(user not in inside for user in node.users)]
        past = {slot.past for slot in slots}
        cache = past | {slot.present for slot in slots}
        shape = signature(cut_piece(graph, run, outputs))
        layers.append(
            Layer(
                index=index,
                hidden_in=before.name,
                hidden_out=behind.name,
                nodes=tuple(node.name for node in run),
                caches=slots,
                side_inputs=tuple(
                    node.name
                    for node in read
                    if node is not before and node.name not in past and node.name not in graph.weights
                ),
                side_outputs=tuple(node.name for node in outputs if node is not behind and node.name not in cache),
                weights=tuple(node.name for node in read if node.name in graph.weights),
                kind=kinds.setdefault(shape, len(kinds)),
            )
        )
    return tuple(layers)


def _hidden_states(graph: FxGraph, runs: Sequence[Sequence[fx.Node]]) -> list[fx.Node]:
    """The hidden state before each run and after the last but one: what alone passes from one run into the next."""
    cuts: frozenset[fx.Node] | None = None
    states: list[fx.Node] = []
    for index, (run, following) in enumerate(pairwise(runs)):
        inside, next_inside = set(run), set(following)
        crossing = [node for node in run if _is_state(node) and any(user in next_inside for user in node.users)]
        own = _computed(graph, run, crossing)
        if not states:
            likes = {_form(node) for node in own}
            read = dict.fromkeys(operand for node in run for operand in node.all_input_nodes)
            before = [
                node
                for node in read
                if node not in inside and _is_state(node) and _form(node) in likes and node.name not in graph.weights
            ]
            cuts = frozenset(_find_cuts(graph)) if len(before) != 1 else cuts
            states.append(_only(before, cuts, 0))
        alike = [node for node in own if _form(node) == _form(states[-1])]
        if len(alike) == 1:
            states += alike
            continue
        cuts = cuts if cuts is not None else frozenset(_find_cuts(graph))
        states.append(_only(crossing, cuts, index + 1))
    return states


def _computed(graph: FxGraph, run: Sequence[fx.Node], crossing: Sequence[fx.Node]) -> list[fx.Node]:
    """Those of the nodes that the run computes with weights: what it only cuts out for the next one is no state."""
    computed: set[fx.Node] = set()
    for node in run:
        if any(operand in computed or operand.name in graph.weights for operand in operands(node)):
            computed.add(node)
    return [node for node in crossing if node in computed]


def _only(candidates: Sequence[fx.Node], cuts: frozenset[fx.Node] | None, depth: int) -> fx.Node:
    if len(candidates) != 1 and cuts is not None:
        candidates = [node for node in candidates if node in cuts]
    if len(candidates) != 1:
        where = f"between decoder layers {depth - 1} and {depth}" if depth else "before the first decoder layer"
        found = ", ".join(node.name for node in candidates) or "none"
        raise LayersNotFound(f"{where} there is no single hidden state that goes on in one form: {found}")
    return candidates[0]


def _is_state(node: fx.Node) -> bool:
    value = value_of(node)
    return isinstance(value, torch.Tensor) and value.dim() >= 2 and value.is_floating_point()


def _form(node: fx.Node) -> tuple[object, ...]:
    value = value_of(node)
    return (value.dtype, tuple(map(str, value.shape)))
