"""A decoder of river layers alone computes what the river model computes at depth 0."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import river_compile
from river_compile import RiverConfig
from river_compile.exporters.onnx.onnx_file import RIVER_CONFIG
from river_compile.passes.onnx.only_river import only_river
from river_compile.runtime import OnnxDecoder
from tests.conftest import Exported
from tests.families import LAYERS


@pytest.mark.parametrize(
    ("family", "config"),
    (
        ("llama", RiverConfig(bits=8, head_bits=8)),
        ("gpt2", RiverConfig(keep_layers=(1,))),
        ("gemma3", RiverConfig(max_depth=2)),
    ),
)
def test_it_is_the_river_without_its_backbone(
    exported: Exported, tmp_path: Path, family: str, config: RiverConfig
) -> None:
    source = exported(family)
    river_compile.export(source, tmp_path / "river.onnx", config)
    drafter = only_river(onnx.load(tmp_path / "river.onnx"))
    onnx.save(drafter, tmp_path / "draft.onnx")

    assert "If" not in {node.op_type for node in drafter.graph.node}
    read = {name for node in drafter.graph.node for name in node.input}
    assert {tensor.name for tensor in drafter.graph.initializer} <= read
    original = onnx.load(source, load_external_data=False).graph
    assert [value.name for value in drafter.graph.input] == [value.name for value in original.input]
    assert [value.name for value in drafter.graph.output] == [value.name for value in original.output]
    assert RIVER_CONFIG not in {prop.key for prop in drafter.metadata_props}
    assert len([tensor for tensor in drafter.graph.initializer if "river/" in tensor.name]) > LAYERS

    river, alone = OnnxDecoder(tmp_path / "river.onnx"), OnnxDecoder(tmp_path / "draft.onnx")
    ids, states = np.array([[5, 9, 17, 33]]), (river.start(1), alone.start(1))
    for new in (ids, ids[:, :1]):
        expected, depth = river.forward(new, states[0], tau=2.0, max_depth=0)
        found, _ = alone.forward(new, states[1])
        assert depth == (1 if config.keep_layers else 0)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * float(np.ptp(expected)))
