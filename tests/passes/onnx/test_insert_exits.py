"""The exit decision, against similarities computed outside the model from the untouched graph's hidden states."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest

from river_compile.api import export
from river_compile.config import RiverConfig
from river_compile.exporters.onnx.rewrite import dissect
from tests.families import LAYERS, VOCABULARY
from tests.oracle import Player, session

Exported = Callable[[str], Path]


@pytest.fixture(scope="module")
def llama(exported: Exported) -> Path:
    return exported("llama")


@pytest.fixture(scope="module")
def river(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("exits") / "model.river.onnx"
    export(llama, target, RiverConfig(tau=2.0))
    return target


@pytest.fixture(scope="module")
def similarities(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., np.ndarray]:
    """s[layer, batch, token] of the backbone, in float64, from hidden states that the plain graph is made to yield."""
    model = onnx.load(llama)
    _, anatomy = dissect(onnx.load(llama, load_external_data=False), llama.parent)
    states = [anatomy.layers[0].hidden_in, *(layer.hidden_out for layer in anatomy.layers)]
    for name in states:
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    path = tmp_path_factory.mktemp("states") / "model.onnx"
    onnx.save(model, path)
    plain = session(path)

    def compute(ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        outputs = Player(plain, len(ids)).step(ids, mask)
        hidden = [outputs[name].astype(np.float64) for name in states]
        units = [state / np.linalg.norm(state, axis=-1, keepdims=True) for state in hidden]
        return np.stack([(before * after).sum(-1) for before, after in pairwise(units)])

    return compute


def _ids(seed: int, batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, VOCABULARY, (batch, length))


def _depth(similarity: np.ndarray, tau: float, points: tuple[int, ...] = tuple(range(1, LAYERS))) -> int:
    """Method: exit after layer l iff the least similarity lies above tau."""
    return next((depth for depth in points if similarity[depth - 1].min() > tau), LAYERS)


def _taus(similarity: np.ndarray) -> list[float]:
    """Thresholds between all the values that could decide, and beyond them."""
    least = np.sort(similarity.reshape(len(similarity), -1).min(1))
    return [float(least[0]) - 0.01, *((least[1:] + least[:-1]) / 2), float(least[-1]) + 0.01]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 7), (4, 1), (3, 5)])
def test_exit_depth_is_what_the_similarities_say(
    river: Path, similarities: Callable[..., np.ndarray], seed: int, batch: int, length: int
) -> None:
    ids = _ids(seed, batch, length)
    expected = similarities(ids)
    runner = session(river)
    found = set()
    for tau in _taus(expected):
        depth = Player(runner, batch).step(ids, tau=tau)["river.exit_depth"].item()
        assert depth == _depth(expected, tau)
        found.add(depth)
    assert LAYERS in found
    assert len(found) > 1


def test_padding_has_no_say(river: Path, similarities: Callable[..., np.ndarray]) -> None:
    ids = _ids(11, 2, 6)
    mask = np.array([[0, 0, 0, 1, 1, 1], [1] * 6])
    expected = similarities(ids, mask)
    runner = session(river)
    real = np.where(mask.astype(bool), expected, np.inf)
    for tau in _taus(real):
        assert Player(runner, 2).step(ids, mask, tau=tau)["river.exit_depth"].item() == _depth(real, tau)


def test_min_depth_and_every_kth_layer_limit_the_exits(
    llama: Path, similarities: Callable[..., np.ndarray], tmp_path: Path
) -> None:
    ids = _ids(5, 1, 1)
    expected = similarities(ids)
    for config, points in (
        (RiverConfig(min_depth=2), (2, 3)),
        (RiverConfig(exit_every=2), (2,)),
        (RiverConfig(keep_layers=(1,)), (1, 3)),
    ):
        report = export(llama, tmp_path / "m.onnx", config)
        assert report.exit_points == points
        runner = session(tmp_path / "m.onnx")
        for tau in (-1.0, *_taus(expected)):
            depth = _depth(expected, tau, points)
            river_layers = [layer for layer in range(depth, LAYERS) if layer not in config.kept(LAYERS)]
            ran = Player(runner, 1).step(ids, tau=tau)["river.exit_depth"].item()
            assert ran == LAYERS - len(river_layers)


def test_tau_has_a_default_that_needs_no_feeding_and_can_be_set_per_run(llama: Path, tmp_path: Path) -> None:
    export(llama, tmp_path / "m.onnx", RiverConfig(tau=-1.0))
    runner = session(tmp_path / "m.onnx")
    ids = _ids(0, 1, 3)
    assert Player(runner, 1).step(ids)["river.exit_depth"].item() == 1
    assert Player(runner, 1).step(ids, tau=1.5)["river.exit_depth"].item() == LAYERS
    assert Player(runner, 1).step(ids)["river.exit_depth"].item() == 1


def test_max_depth_is_a_default_too(llama: Path, tmp_path: Path) -> None:
    export(llama, tmp_path / "m.onnx", RiverConfig(tau=2.0, max_depth=2))
    runner = session(tmp_path / "m.onnx")
    assert Player(runner, 1).step(_ids(0, 1, 3))["river.exit_depth"].item() == 2
    assert Player(runner, 1).step(_ids(0, 1, 3), max_depth=0)["river.exit_depth"].item() == 0


@pytest.mark.parametrize("value", (np.nan, np.inf))
def test_what_is_not_a_number_never_exits(exported: Exported, tmp_path: Path, value: float) -> None:
    """A weight of one layer is spoiled, so that the hidden state after it is NaN or infinite: whatever tau, no exit."""
    model = onnx.load(exported("llama"))
    norm = next(t for t in model.graph.initializer if t.name.endswith("layers.1.post_attention_layernorm.weight"))
    spoiled = onnx.numpy_helper.to_array(norm).copy()
    spoiled[3] = value
    norm.CopyFrom(onnx.numpy_helper.from_array(spoiled, norm.name))
    onnx.save(model, tmp_path / "spoiled.onnx")
    export(tmp_path / "spoiled.onnx", tmp_path / "m.onnx", RiverConfig(min_depth=2))
    outputs = Player(session(tmp_path / "m.onnx"), 1).step(_ids(0, 1, 3), tau=-1.0)
    assert not np.isfinite(outputs["logits"]).all()
    assert outputs["river.exit_depth"].item() == LAYERS


def test_the_exit_depth_output_can_be_left_out(llama: Path, tmp_path: Path) -> None:
    export(llama, tmp_path / "m.onnx", RiverConfig(extra_output=False))
    before, after = session(llama), session(tmp_path / "m.onnx")
    assert [v.name for v in after.get_outputs()] == [v.name for v in before.get_outputs()]
