"""A static cache: what it refuses and what it does to the graph; its function is tested with the exporter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from river_compile.errors import ConfigError, InputError
from river_compile.exporters.onnx import onnx_file
from river_compile.passes.onnx.find_layers import find_layers
from river_compile.passes.onnx.graph import OnnxGraph, import_model
from river_compile.passes.onnx.static_cache import KV_CACHE, static_cache
from tests.families import LAYERS

Exported = Callable[[str], Path]


@pytest.fixture
def graph(exported: Exported) -> OnnxGraph:
    return import_model(onnx_file.load(exported("llama")), exported("llama").parent)


def test_every_slot_becomes_a_buffer_of_one_shape_in_and_out(graph: OnnxGraph) -> None:
    assert static_cache(graph, 32) == 2 * LAYERS
    shapes = {
        value.name: [dim.dim_value or dim.dim_param for dim in value.type.tensor_type.shape.dim]
        for value in [*graph.inputs, *graph.outputs]
    }
    for layer in range(LAYERS):
        for kind in ("key", "value"):
            assert shapes[f"past_key_values.{layer}.{kind}"] == ["batch", 2, 32, 16]
            assert shapes[f"present.{layer}.{kind}"] == ["batch", 2, 32, 16]
    assert shapes["attention_mask"] == ["batch", "past + sequence"]


def test_each_slot_is_written_by_one_update_between_input_and_output(graph: OnnxGraph) -> None:
    static_cache(graph, 32)
    updates = [node for node in graph.nodes if node.op == "TensorScatter"]
    assert {(node.inputs[0].name, node.outputs[0].name) for node in updates} == {
        (f"past_key_values.{layer}.{kind}", f"present.{layer}.{kind}")
        for layer in range(LAYERS)
        for kind in ("key", "value")
    }
    assert graph.metadata[KV_CACHE] == "static"


def test_a_scatter_does_it_without_the_newest_operators(graph: OnnxGraph) -> None:
    opset = graph.surgeon.opset
    assert static_cache(graph, 32, scatter=True) == 2 * LAYERS
    operators = [node.op for node in graph.nodes]
    assert operators.count("ScatterElements") == 2 * LAYERS and "TensorScatter" not in operators
    assert graph.surgeon.opset == opset and graph.metadata[KV_CACHE] == "static"


@pytest.mark.parametrize("scatter", [False, True])
def test_the_layers_are_found_as_before(graph: OnnxGraph, scatter: bool) -> None:
    before = find_layers(graph)
    static_cache(graph, 32, scatter)
    after = find_layers(graph)
    assert after.found_by == before.found_by == "metadata"
    assert [layer.caches for layer in after.layers] == [layer.caches for layer in before.layers]
    assert [layer.hidden_out for layer in after.layers] == [layer.hidden_out for layer in before.layers]


def test_what_it_cannot_do_is_refused(graph: OnnxGraph) -> None:
    with pytest.raises(ConfigError, match="max_length: must be 2 or more"):
        static_cache(graph, 1)
    graph.inputs = [value for value in graph.inputs if value.name != "attention_mask"]
    with pytest.raises(InputError, match="needs input_ids and attention_mask"):
        static_cache(graph, 32)


def test_it_can_be_done_once_only(graph: OnnxGraph) -> None:
    static_cache(graph, 32)
    with pytest.raises(InputError, match="no KV cache that grows"):
        static_cache(graph, 32)
