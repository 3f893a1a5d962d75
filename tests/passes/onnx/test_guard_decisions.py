"""With exits off no layer computes a similarity; with exits on each decides as it did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from river_compile.api import export
from river_compile.config import RiverConfig
from river_compile.measure.bench_rows import BenchRow
from river_compile.measure.onnx_profile import profile_operators
from river_compile.measure.onnx_ways import Prompt, Way
from river_compile.measure.onnx_weights import ReadWeights
from river_compile.runtime import OnnxDecoder
from tests.conftest import Exported
from tests.families import LAYERS

POINTS = LAYERS - 1


@pytest.fixture(scope="module")
def river(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("guarded") / "river.onnx"
    export(exported("llama"), path, RiverConfig(tau_offsets=()))
    return path


def _branches(path: Path) -> list[onnx.GraphProto]:
    layers = [node for node in onnx.load(path).graph.node if node.name.startswith("river/layer.")]
    return [a.g for node in layers for a in node.attribute if a.name == "else_branch"]


def test_each_decision_is_in_a_branch_of_its_own(river: Path) -> None:
    inner = [[node for node in branch.node if node.op_type == "If"] for branch in _branches(river)]
    assert [len(found) for found in inner] == [1] * POINTS + [0]
    for branch in _branches(river):
        assert not [node for node in branch.node if node.op_type == "ReduceL2"]


def _similarities(path: Path, tau: float) -> float:
    """How many of the norms that a similarity is made of a decode pass computes."""
    decoder = OnnxDecoder(path)
    prompt = Prompt.read(decoder, np.array([[5, 9, 17, 33]]), 4)
    row = BenchRow("row", tau, LAYERS)
    calls = profile_operators(Way(row, decoder, ReadWeights.of(path)), prompt, 4).calls
    return calls.get("ReduceL2", 0)


def test_no_similarity_is_computed_where_none_can_decide(river: Path) -> None:
    assert _similarities(river, 1.5) == 0
    assert _similarities(river, 1.0) == 2 * POINTS


def _depth(decoder: OnnxDecoder, **settings: Any) -> int | None:
    return decoder.forward(
        np.array([[5, 9, 17], [0, 9, 4]]), decoder.start(2), np.array([[1, 1, 1], [0, 1, 1]]), **settings
    )[1]


def test_an_offset_below_a_high_threshold_still_lets_exit(river: Path) -> None:
    decoder = OnnxDecoder(river)
    assert _depth(decoder, tau=2.0) == LAYERS
    assert _depth(decoder, tau=2.0, tau_offsets=[0.0, -3.0, 0.0, 0.0]) == 2
    assert _depth(decoder, tau=-1.0) == 1
    assert _depth(decoder, tau=-1.0, tau_offsets=[3.0, 3.0, 0.0, 0.0]) == 3
