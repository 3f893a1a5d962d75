"""A threshold for each layer in an exported model: `insert_exits` with ``tau_offsets``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from river_compile import RiverConfig, export
from river_compile.errors import ConfigError
from river_compile.runtime import OnnxDecoder
from tests.families import LAYERS, VOCABULARY

NO_EXIT = 3.0


@pytest.fixture(scope="module")
def model(exported: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("offsets") / "model.onnx"
    export(exported("llama"), path, RiverConfig(tau=-1.0, tau_offsets=()))
    return path


@pytest.mark.parametrize("depth", range(1, LAYERS + 1))
def test_a_closed_layer_is_no_exit(model: Path, depth: int) -> None:
    decoder = OnnxDecoder(model)
    offsets = [NO_EXIT] * (depth - 1) + [0.0] * (LAYERS - depth + 1)
    ids = np.random.default_rng(0).integers(3, VOCABULARY, (2, 5))
    assert decoder.forward(ids, decoder.start(2), tau_offsets=offsets)[1] == depth


def test_padding_has_no_say_with_offsets_either(model: Path) -> None:
    decoder = OnnxDecoder(model)
    rng = np.random.default_rng(0)
    row = rng.integers(3, VOCABULARY, (1, 4))
    padded = np.concatenate([rng.integers(3, VOCABULARY, (1, 3)), row], axis=1)
    mask = np.array([[0, 0, 0, 1, 1, 1, 1]])
    for tau in (0.0, 0.3, 0.5, 0.7):
        alone = decoder.forward(row, decoder.start(1), tau=tau, tau_offsets=[0.1, 0.05, 0.0, 0.0])
        beside = decoder.forward(padded, decoder.start(1), mask, tau=tau, tau_offsets=[0.1, 0.05, 0.0, 0.0])
        assert alone[1] == beside[1]
        assert np.abs(alone[0] - beside[0][:, 3:]).max() <= 1e-4 * np.ptp(alone[0])


def test_an_offset_is_added_to_tau(model: Path) -> None:
    decoder = OnnxDecoder(model)
    ids = np.random.default_rng(3).integers(3, VOCABULARY, (1, 1))
    for tau in np.linspace(-0.5, 0.9, 15):
        expected = decoder.forward(ids, decoder.start(1), tau=float(tau))
        found = decoder.forward(ids, decoder.start(1), tau=float(tau) - 0.25, tau_offsets=[0.25] * LAYERS)
        assert found[1] == expected[1]


def test_the_room_is_one_overridable_initializer_and_two_or_three_nodes(
    model: Path, exported: Callable[[str], Path], tmp_path: Path
) -> None:
    export(exported("llama"), tmp_path / "plain.onnx", RiverConfig(tau=-1.0))
    plain, layered = onnx.load(tmp_path / "plain.onnx").graph, onnx.load(model).graph
    added = {value.name for value in layered.input} - {value.name for value in plain.input}
    assert added == {"river.tau_offsets"}
    assert 2 <= len(layered.node) - len(plain.node) <= 3


def test_a_wrong_number_of_offsets_is_one_clear_line(exported: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tau_offsets: 2 numbers for a stack of 4 layers"):
        export(exported("llama"), tmp_path / "wrong.onnx", RiverConfig(tau_offsets=(0.0, 0.0)))
    with pytest.raises(ConfigError, match="tau_offsets: must be numbers"):
        RiverConfig(tau_offsets=(float("nan"),))


def test_a_model_without_the_room_says_so(exported: Callable[[str], Path], tmp_path: Path) -> None:
    export(exported("llama"), tmp_path / "plain.onnx", RiverConfig())
    decoder = OnnxDecoder(tmp_path / "plain.onnx")
    with pytest.raises(ConfigError, match="tau_offsets: this model has no threshold for each layer"):
        decoder.forward(np.array([[5]]), decoder.start(1), tau_offsets=[0.0] * LAYERS)
