"""The decoder's anatomy, by whatever the exporter left to find it by."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from river_compile.errors import LayersNotFound
from river_compile.exporters.onnx.rewrite import dissect
from river_compile.passes.anatomy import Layer
from river_compile.passes.onnx.find_layers import Anatomy
from tests.conftest import Exported
from tests.contrib_model import ContribDecoder
from tests.families import exported_layers, families_that_export
from tests.strip import with_scoped_names, without_names


def _anatomy(path: Path) -> Anatomy:
    return dissect(onnx.load(path, load_external_data=False), path.parent)[1]


def _shape(layer: Layer) -> tuple[object, ...]:
    """What a layer is, whatever its nodes and tensors are called."""
    slots = [(slot.past, slot.present) for slot in layer.caches]
    return len(layer.nodes), slots, len(layer.side_inputs), len(layer.weights), layer.kind


@pytest.mark.parametrize("family", families_that_export())
def test_three_ways_lead_to_the_same_layers(exported: Exported, family: str, tmp_path: Path) -> None:
    original = exported(family, exported_layers(family))
    by_metadata = _anatomy(original)
    by_names = _anatomy(with_scoped_names(original, tmp_path / "names.onnx"))
    by_structure = _anatomy(without_names(original, tmp_path / "structure.onnx"))
    assert [by_metadata.found_by, by_names.found_by, by_structure.found_by] == ["metadata", "names", "structure"]
    expected = [_shape(layer) for layer in by_metadata.layers]
    assert len(expected) == exported_layers(family)
    assert [_shape(layer) for layer in by_names.layers] == expected
    assert [_shape(layer) for layer in by_structure.layers] == expected


def test_layers_are_a_chain_of_disjoint_pieces_with_one_key_and_one_value(exported: Exported) -> None:
    layers = _anatomy(exported("llama")).layers
    assert all(before.hidden_out == after.hidden_in for before, after in pairwise(layers))
    nodes = [name for layer in layers for name in layer.nodes]
    assert len(nodes) == len(set(nodes))
    for index, layer in enumerate(layers):
        assert [slot.past for slot in layer.caches] == [f"past_key_values.{index}.{what}" for what in ("key", "value")]
        assert [slot.present for slot in layer.caches] == [f"present.{index}.{what}" for what in ("key", "value")]
        assert layer.side_outputs == ()


def test_alternating_kinds_of_layer_are_told_apart(exported: Exported) -> None:
    assert [layer.kind for layer in _anatomy(exported("llama")).layers] == [0, 0, 0, 0]
    assert [layer.kind for layer in _anatomy(exported("gemma2")).layers] in ([0, 1, 0, 1], [0, 0, 0, 0])


@pytest.mark.parametrize("form", ("matmul", "matmul_bias", "gemm"))
@pytest.mark.parametrize("skip_norm", (True, False))
def test_contrib_attention_and_fused_norms(form: str, skip_norm: bool, tmp_path: Path) -> None:
    path = ContribDecoder(layers=5, form=form, skip_norm=skip_norm).save(tmp_path / "model.onnx")
    named, bare = _anatomy(path), _anatomy(without_names(path, tmp_path / "bare.onnx"))
    assert (named.found_by, bare.found_by) == ("names", "structure")
    assert [_shape(layer) for layer in named.layers] == [_shape(layer) for layer in bare.layers]
    assert len(named.layers) == 5
    assert {layer.kind for layer in named.layers} == {0}


def test_the_graph_stays_as_it_was(exported: Exported) -> None:
    path = exported("llama")
    graph, _ = dissect(onnx.load(path, load_external_data=False), path.parent)
    assert [node.op for node in graph.nodes if node.op == "If"] == []
    assert list(graph.inputs) == list(onnx.load(path, load_external_data=False).graph.input)


def _mlp(layers: int, with_cache: bool) -> onnx.ModelProto:
    """A chain of residual blocks, with one fake cache if asked."""
    nodes, weights, hidden = [], [], "x"
    for index in range(layers):
        weight = onnx.numpy_helper.from_array(np.eye(8, dtype=np.float32), f"w{index}")
        weights.append(weight)
        nodes.append(helper.make_node("MatMul", [hidden, weight.name], [f"m{index}"]))
        nodes.append(helper.make_node("Add", [hidden, f"m{index}"], [f"h{index}"]))
        hidden = f"h{index}"
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", "s", 8])]
    outputs = [helper.make_tensor_value_info(hidden, TensorProto.FLOAT, ["b", "s", 8])]
    if with_cache:
        inputs.append(helper.make_tensor_value_info("past", TensorProto.FLOAT, ["b", "p", 8]))
        nodes.append(helper.make_node("Concat", ["past", "m0"], ["present"], axis=1))
        outputs.append(helper.make_tensor_value_info("present", TensorProto.FLOAT, ["b", "t", 8]))
    graph = helper.make_graph(nodes, "main", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def test_a_model_without_a_cache_is_refused() -> None:
    with pytest.raises(LayersNotFound, match="no KV cache in its signature"):
        dissect(_mlp(4, with_cache=False), None)


def test_a_model_with_a_cache_but_no_repeated_layers_is_refused() -> None:
    with pytest.raises(LayersNotFound, match="no chain of repeated decoder layers"):
        dissect(_mlp(4, with_cache=True), None)
