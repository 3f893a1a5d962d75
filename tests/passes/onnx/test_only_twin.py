"""River layers alone compute what the river model does at depth 0; the backbone's alone are the original."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest

import river_compile
from river_compile import RiverConfig
from river_compile.exporters.onnx.onnx_file import RIVER_CONFIG
from river_compile.passes.onnx.only_twin import only_twin
from river_compile.runtime import OnnxDecoder
from tests.conftest import Exported
from tests.contrib_model import ContribDecoder
from tests.families import exported_layers


@pytest.mark.parametrize(
    ("family", "config"),
    (
        ("llama", RiverConfig(bits=8, head_bits=8)),
        ("gpt2", RiverConfig(keep_layers=(1,))),
        ("gemma3", RiverConfig(max_depth=2)),
    ),
)
def test_the_river_computes_without_its_backbone(
    exported: Exported, tmp_path: Path, family: str, config: RiverConfig
) -> None:
    layers = exported_layers(family)
    source = exported(family, layers)
    river_compile.export(source, tmp_path / "river.onnx", config)
    drafter = only_twin(onnx.load(tmp_path / "river.onnx"), river=True)
    onnx.save(drafter, tmp_path / "draft.onnx")

    assert "If" not in {node.op_type for node in drafter.graph.node}
    read = {name for node in drafter.graph.node for name in node.input}
    assert {tensor.name for tensor in drafter.graph.initializer} <= read
    original = onnx.load(source, load_external_data=False).graph
    assert [value.name for value in drafter.graph.input] == [value.name for value in original.input]
    assert [value.name for value in drafter.graph.output] == [value.name for value in original.output]
    assert RIVER_CONFIG not in {prop.key for prop in drafter.metadata_props}
    assert len([tensor for tensor in drafter.graph.initializer if "river/" in tensor.name]) > layers

    river, alone = OnnxDecoder(tmp_path / "river.onnx"), OnnxDecoder(tmp_path / "draft.onnx")
    ids, states = np.array([[5, 9, 17, 33]]), (river.start(1), alone.start(1))
    for new in (ids, ids[:, :1]):
        expected, depth = river.forward(new, states[0], tau=2.0, max_depth=0)
        found, _ = alone.forward(new, states[1])
        assert depth == (1 if config.keep_layers else 0)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * float(np.ptp(expected)))


def _operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize(
    ("family", "config"),
    (
        ("llama", RiverConfig(head_bits=8, tau_offsets=())),
        ("gpt2", RiverConfig(keep_layers=(1,))),
        ("gemma3", RiverConfig(max_depth=1, extra_output=False)),
    ),
)
def test_the_backbone_has_the_original_s_operators_weights_and_signature(
    exported: Exported, tmp_path: Path, family: str, config: RiverConfig
) -> None:
    source = exported(family, exported_layers(family))
    river_compile.export(source, tmp_path / "river.onnx", config, check=False)
    original = onnx.load(source)
    found = only_twin(onnx.load(tmp_path / "river.onnx"), river=False)
    assert _operators(found) == _operators(original)
    assert {tensor.name for tensor in found.graph.initializer} == {t.name for t in original.graph.initializer}
    for kind in ("input", "output"):
        assert [v.name for v in getattr(found.graph, kind)] == [v.name for v in getattr(original.graph, kind)]


def test_norms_that_were_taken_apart_stay_apart_and_compute_the_same(tmp_path: Path) -> None:
    source = ContribDecoder(skip_norm=True).save(tmp_path / "model.onnx")
    river_compile.export(source, tmp_path / "river.onnx", check=False)
    found = only_twin(onnx.load(tmp_path / "river.onnx"), river=False)
    assert "If" not in _operators(found)
    assert _operators(found)["SkipSimplifiedLayerNormalization"] == 0
    assert _operators(onnx.load(source))["SkipSimplifiedLayerNormalization"] > 0
    onnx.save(found, tmp_path / "plain.onnx")
    ids = np.array([[5, 9, 17, 33]])
    decoders = [OnnxDecoder(path) for path in (source, tmp_path / "plain.onnx")]
    expected, again = (decoder.forward(ids, decoder.start(1))[0] for decoder in decoders)
    np.testing.assert_allclose(again, expected, rtol=0, atol=1e-5 * float(np.ptp(expected)))
