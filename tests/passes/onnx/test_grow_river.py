"""What the river is made of, and what stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from river_compile.api import export, plan
from river_compile.config import RiverConfig
from river_compile.errors import ConfigError, LayersNotFound
from tests.contrib_model import ContribDecoder
from tests.oracle import Player, assert_close, assert_every_depth, session

Exported = Callable[[str], Path]


def _subgraphs(path: Path) -> list[onnx.GraphProto]:
    nodes = onnx.load(path, load_external_data=False).graph.node
    return [attribute.g for node in nodes for attribute in node.attribute if attribute.HasField("g")]


def _products(path: Path) -> list[dict[str, int]]:
    return [
        {attribute.name: attribute.i for attribute in node.attribute}
        for graph in _subgraphs(path)
        for node in graph.node
        if node.op_type == "MatMulNBits"
    ]


def test_weights_stay_in_the_outer_scope(exported: Exported, tmp_path: Path) -> None:
    export(exported("llama"), tmp_path / "m.onnx")
    graphs = _subgraphs(tmp_path / "m.onnx")
    assert len(graphs) == 8
    assert all(len(graph.initializer) == 0 for graph in graphs)
    constants = [node for graph in graphs for node in graph.node if node.op_type == "Constant"]
    assert all(len(node.attribute[0].t.raw_data) <= 8 for node in constants)


def test_node_names_are_unique_in_the_whole_model(exported: Exported, tmp_path: Path) -> None:
    export(exported("llama"), tmp_path / "m.onnx")
    names = [node.name for node in onnx.load(tmp_path / "m.onnx").graph.node]
    names += [node.name for graph in _subgraphs(tmp_path / "m.onnx") for node in graph.node]
    assert len(names) == len(set(names))


def test_bits_by_pattern(exported: Exported, tmp_path: Path) -> None:
    config = RiverConfig(bits_for=(("*down_proj*", 8), ("layers.0", 8)), activations="float")
    original, river = exported("llama"), tmp_path / "m.onnx"
    linears = plan(original, config).linears
    assert {linear.bits for linear in linears if "down_proj" in linear.name or linear.layer == 0} == {8}
    assert {linear.bits for linear in linears if "down_proj" not in linear.name and linear.layer} == {4}
    export(original, river, config)
    assert {product["bits"] for product in _products(river)} == {4, 8}
    assert_every_depth(original, river)


@pytest.mark.parametrize("group_size", (32, 64))
@pytest.mark.parametrize("bits", (4, 8))
def test_every_grid_equals_its_dequantized_weights(
    exported: Exported, tmp_path: Path, bits: int, group_size: int
) -> None:
    original, river = exported("qwen2"), tmp_path / "m.onnx"
    export(original, river, RiverConfig(bits=bits, group_size=group_size, activations="float"))
    assert {(product["bits"], product["block_size"]) for product in _products(river)} == {(bits, group_size)}
    assert_every_depth(original, river)


def test_a_group_size_that_does_not_divide_falls_back_and_says_so(exported: Exported, tmp_path: Path) -> None:
    original, river = exported("llama"), tmp_path / "m.onnx"
    report = export(original, river, RiverConfig(group_size=128, activations="float"))
    assert len(report.notes) == 1
    assert report.notes[0].startswith("group size 64, as 128 does not divide: 24 linear layers, such as ")
    assert {product["block_size"] for product in _products(river)} == {64, 128}
    assert_every_depth(original, river)


def test_a_weight_that_no_group_divides_stays_as_it_is_and_the_report_says_so(tmp_path: Path) -> None:
    original = ContribDecoder(ffn=100).save(tmp_path / "model.onnx")
    report = export(original, tmp_path / "m.onnx", RiverConfig(activations="float"))
    assert report.notes == (
        "100 inputs are divided by no group size; the weight stays as it is: "
        "3 linear layers, such as model.layers.0.mlp.down_proj",
    )
    assert_every_depth(original, tmp_path / "m.onnx")


def test_experts_stay_as_they_are_and_the_report_says_so(exported: Exported) -> None:
    notes = plan(exported("mixtral")).report.notes
    why = "most weights are in no linear layer (a mixture of experts?) and stay as they are"
    assert notes == (f"{why}: layers 0-3",)


def test_kept_layers_get_no_twin(exported: Exported, tmp_path: Path) -> None:
    report = export(exported("llama"), tmp_path / "m.onnx", RiverConfig(keep_layers=(0, -1)))
    assert report.river_layers == 2
    assert report.notes == ("backbone only, asked for: layers 0, 3",)
    ifs = [node.name for node in onnx.load(tmp_path / "m.onnx").graph.node if node.op_type == "If"]
    assert ifs == ["river/layer.1", "river/layer.2"]


def test_layers_that_are_quantized_already_are_left_as_they_are(tmp_path: Path) -> None:
    original = ContribDecoder(quantized=(1,)).save(tmp_path / "model.onnx")
    report = export(original, tmp_path / "m.onnx", RiverConfig(activations="float"))
    assert (report.layers, report.river_layers) == (3, 2)
    assert report.notes == ("backbone only, already quantized (MatMulNBits), so start from the float model: layers 1",)
    assert_every_depth(original, tmp_path / "m.onnx", depths=(0, 3), kept=True)


@pytest.mark.parametrize("dtype", (np.float32, np.float16))
@pytest.mark.parametrize("part", ("mlp", "attn"))
def test_a_layer_that_is_quantized_in_part_has_a_twin_for_the_rest(part: str, dtype: type, tmp_path: Path) -> None:
    decoder = ContribDecoder(quantized=(0, 1, 2), quantized_part=part, accuracy=4, dtype=dtype)
    original = decoder.save(tmp_path / "model.onnx")
    report = export(original, tmp_path / "m.onnx", RiverConfig(activations="float"))
    assert (report.layers, report.river_layers) == (3, 3)
    assert report.notes == ("already quantized in part (MatMulNBits), which stays as it is: layers 0-2",)
    assert_every_depth(original, tmp_path / "m.onnx", tolerance=1e-4 if dtype is np.float32 else 2e-2)


def test_a_model_that_is_quantized_throughout_has_no_river(tmp_path: Path) -> None:
    original = ContribDecoder(quantized=(0, 1, 2)).save(tmp_path / "model.onnx")
    with pytest.raises(LayersNotFound, match=r"no decoder layer can be given a river twin: already quantized"):
        export(original, tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()


def test_an_unknown_quantizer_is_an_error(exported: Exported, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^quantizer: "):
        export(exported("llama"), tmp_path / "m.onnx", RiverConfig(quantizer="magic"))


def test_int8_activations_are_close_to_the_dequantized_weights(exported: Exported, tmp_path: Path) -> None:
    original, river = exported("llama"), tmp_path / "m.onnx"
    export(original, river, RiverConfig(tau=2.0))
    assert {product["accuracy_level"] for product in _products(river)} == {4}
    assert_every_depth(original, river, tolerance=0.1)
    ids = np.array([[5, 6, 7]])
    backbone = Player(session(original), 1).step(ids)
    assert_close(Player(session(river), 1).step(ids), backbone)


def test_a_pattern_that_matches_nothing_is_told(exported: Callable[[str], Path]) -> None:
    config = RiverConfig(bits_for=(("*down*", 8), ("*dwon*", 8), ("layers.1", 8)))
    notes = plan(exported("llama"), config).report.notes
    assert notes == ("bits for '*dwon*': it matches no linear layer",)
