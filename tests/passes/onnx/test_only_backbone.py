"""A river model without its river is the model that it was made for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest

import river_compile
from river_compile import RiverConfig
from river_compile.passes.onnx.only_backbone import only_backbone
from river_compile.runtime import OnnxDecoder
from tests.conftest import Exported
from tests.contrib_model import ContribDecoder


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
def test_it_has_the_original_s_operators_weights_and_signature(
    exported: Exported, tmp_path: Path, family: str, config: RiverConfig
) -> None:
    layers = 2 if family == "gemma3" else 4
    source = exported(family, layers)
    river_compile.export(source, tmp_path / "river.onnx", config, check=False)
    original = onnx.load(source)
    found = only_backbone(onnx.load(tmp_path / "river.onnx"))
    assert _operators(found) == _operators(original)
    assert {tensor.name for tensor in found.graph.initializer} == {t.name for t in original.graph.initializer}
    for kind in ("input", "output"):
        assert [v.name for v in getattr(found.graph, kind)] == [v.name for v in getattr(original.graph, kind)]


def test_norms_that_were_taken_apart_stay_apart_and_compute_the_same(tmp_path: Path) -> None:
    source = ContribDecoder(skip_norm=True).save(tmp_path / "model.onnx")
    river_compile.export(source, tmp_path / "river.onnx", check=False)
    found = only_backbone(onnx.load(tmp_path / "river.onnx"))
    assert "If" not in _operators(found)
    assert _operators(found)["SkipSimplifiedLayerNormalization"] == 0
    assert _operators(onnx.load(source))["SkipSimplifiedLayerNormalization"] > 0
    onnx.save(found, tmp_path / "plain.onnx")
    ids = np.array([[5, 9, 17, 33]])
    decoders = [OnnxDecoder(path) for path in (source, tmp_path / "plain.onnx")]
    expected, again = (decoder.forward(ids, decoder.start(1))[0] for decoder in decoders)
    np.testing.assert_allclose(again, expected, rtol=0, atol=1e-5 * float(np.ptp(expected)))
