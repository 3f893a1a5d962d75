"""ONNX in, river ONNX out: the passes in their order, with the check after each."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx

from river_compile.config import RiverConfig
from river_compile.errors import PassError
from river_compile.exporters.onnx.onnx_file import CALIBRATION, RIVER_CONFIG
from river_compile.passes.onnx.external_data import tensor_bytes
from river_compile.passes.onnx.find_layers import Anatomy, find_layers
from river_compile.passes.onnx.fit_opset import fit_opset, opset_problems
from river_compile.passes.onnx.graph import OnnxGraph, bodies, export_model, import_model
from river_compile.passes.onnx.grow_river import LinearLowering, River, grow_river, plan_river
from river_compile.passes.onnx.insert_exits import exit_points, insert_exits
from river_compile.passes.onnx.share_head import share_head
from river_compile.passes.onnx.share_kv import share_kv
from river_compile.passes.onnx.unfuse_skip_norms import unfuse_skip_norms
from river_compile.passes.onnx.verify import Original, verify
from river_compile.passes.quantizer import Quantizer

__all__ = ["Finish", "Preparation", "Rewrite", "count_nodes", "dissect", "exit_points", "rewrite", "survey"]

log = logging.getLogger("river_compile")

Preparation = Callable[[OnnxGraph], object]
Finish = Callable[[OnnxGraph, Anatomy], object]


@dataclass
class Rewrite:
    """The rewritten model and what the passes found and made.

    Fields:
        made_by: by the name of each node that is not the source's, the pass that made it.
        seconds: by the name of each pass, in their order, the time it took, its check included.
    """

    model: onnx.ModelProto
    anatomy: Anatomy
    river: River
    exit_points: tuple[int, ...]
    backbone_bytes: int
    added_nodes: int
    made_by: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def dissect(
    model: onnx.ModelProto, folder: Path | None, prepare: Sequence[Preparation] = ()
) -> tuple[OnnxGraph, Anatomy]:
    """Import a model, bring it into the form the passes expect, and find its layers.

    Args:
        prepare: passes of a destination, which run first.

    Raises:
        LayersNotFound: it is no decoder with a KV cache.
        PassError: a pass needs an operator that the model's opset does not have.
    """
    graph = import_model(model, folder)
    graph.foreign = frozenset(opset_problems(graph))
    for number, preparing in enumerate((*prepare, unfuse_skip_norms)):
        preparing(graph)
        fit_opset(graph)
        if problems := opset_problems(graph):
            raise PassError(tuple(map(_name, (*prepare, unfuse_skip_norms)[: number + 1])), problems[0])
    return graph, find_layers(graph)


def rewrite(
    model: onnx.ModelProto,
    folder: Path | None,
    config: RiverConfig,
    quantizer: Quantizer,
    lowering: LinearLowering,
    progress: Callable[[int, int], None] = lambda done, total: None,
    moments: Mapping[str, np.ndarray] | None = None,
    *,
    found: Callable[[Anatomy], object] = lambda anatomy: None,
    prepare: Sequence[Preparation] = (),
    before_head: Sequence[Finish] = (),
    finish: Sequence[Finish] = (),
) -> Rewrite:
    """Give a decoder its exit river.

    Args:
        model: a decoder with a KV cache, read without external data; it is consumed.
        folder: where its external data lies.
        progress: is told layers quantized and layers in all.
        moments: see `grow_river`.
        found: is told the layers when they are found.
        prepare, before_head, finish: passes that only this destination needs: before those that all have, before the
            last of them, `share_head`, and after it.

    Raises:
        RiverError: the model is no decoder that can be rewritten, or a pass failed its check.
    """
    nodes_before = len(model.graph.node)
    made_by = {node.name: "" for node in model.graph.node}
    backbone_bytes = sum(map(tensor_bytes, model.graph.initializer))
    seconds: dict[str, float] = {}
    ran: list[str] = []

    def after(name: str, started: float) -> None:
        ran.append(name)
        fit_opset(graph)
        for nodes in bodies(graph.nodes):
            for node in nodes:
                made_by.setdefault(node.name, name)
        verify(graph, original, anatomy, ran)
        if config.dump_dir is not None:
            _dump(graph, config.dump_dir / f"{len(ran)}_{name}.txt")
        seconds[name] = time.perf_counter() - started

    def run(passes: Sequence[Finish]) -> None:
        for one in passes:
            started = time.perf_counter()
            one(graph, anatomy)
            after(_name(one), started)

    started = time.perf_counter()
    graph, anatomy = dissect(model, folder, prepare)
    original = Original.of(graph)
    after("find_layers", started)
    found(anatomy)
    started = time.perf_counter()
    river = grow_river(graph, anatomy, config, quantizer, lowering, progress, moments)
    made_by |= {node.name: "grow_river" for twin in river.twins.values() for node in twin.river}
    after("grow_river", started)
    started = time.perf_counter()
    branches = share_kv(graph, anatomy, river, config.max_depth)
    after("share_kv", started)
    started = time.perf_counter()
    points = insert_exits(graph, anatomy, branches, config)
    after("insert_exits", started)
    run(before_head)
    if river.head_twin is not None:
        started = time.perf_counter()
        share_head(graph, river, branches)
        after("share_head", started)
    run(finish)
    started = time.perf_counter()
    _note_settings(graph, anatomy, config, quantizer)
    rewritten = export_model(graph)
    _forget_shapes(rewritten.graph)
    added = count_nodes(rewritten.graph) - nodes_before
    made_by = {name: maker for name, maker in made_by.items() if name and maker}
    seconds["assemble"] = time.perf_counter() - started
    return Rewrite(rewritten, anatomy, river, points, backbone_bytes, added, made_by, seconds)


def _note_settings(graph: OnnxGraph, anatomy: Anatomy, config: RiverConfig, quantizer: Quantizer) -> None:
    """What a runtime reads of a river, as metadata."""
    graph.metadata[RIVER_CONFIG] = config.to_json()
    if config.calibration is not None:
        graph.metadata[CALIBRATION] = str(config.calibration)
    graph.metadata["river.quantizer"] = quantizer.name
    graph.metadata["river.layers"] = str(len(anatomy.layers))
    slots = [[slot.past, slot.present] for layer in anatomy.layers for slot in layer.caches]
    graph.metadata["river.cache"] = json.dumps(slots)


def _name(step: object) -> str:
    """What a pass is called, its settings aside."""
    return str(getattr(getattr(step, "func", step), "__name__", step))


def _forget_shapes(graph: onnx.GraphProto) -> None:
    """Drop what is noted of shapes inside: runtimes infer them, and plan their memory by wrong ones if noted."""
    graph.ClearField("value_info")
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _forget_shapes(attribute.g)


def survey(model: onnx.ModelProto, folder: Path | None, config: RiverConfig) -> tuple[Anatomy, River]:
    """What `rewrite` would do: the anatomy, and the river without its twins. Reads no weight.

    Raises: as `rewrite`.
    """
    graph, anatomy = dissect(model, folder)
    return anatomy, plan_river(graph, anatomy, config)


def count_nodes(graph: onnx.GraphProto) -> int:
    """Nodes of a graph and of all its subgraphs."""
    inner = sum(count_nodes(a.g) for node in graph.node for a in node.attribute if a.HasField("g"))
    return len(graph.node) + inner


def _dump(graph: OnnxGraph, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(onnx.printer.to_text(_without_weights(export_model(graph))))


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with large weights replaced by a mention of their type and shape, for reading."""
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    del shown.graph.initializer[:]
    for tensor in model.graph.initializer:
        if tensor_bytes(tensor) <= 64:
            shown.graph.initializer.append(tensor)
        else:
            dims = list(tensor.dims)
            shown.graph.value_info.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, dims))
    return shown
