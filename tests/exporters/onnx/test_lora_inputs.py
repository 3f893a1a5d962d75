"""LoRA weights as graph inputs: they are no hidden state, they stay float, and they count in both twins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from river_compile.api import export, plan
from river_compile.config import RiverConfig
from tests.contrib_model import ContribDecoder
from tests.families import VOCABULARY
from tests.lora import with_lora
from tests.oracle import Oracle, Player, assert_close, session
from tests.strip import without_names

_FORMS: dict[str, dict[str, Any]] = {
    "query": {"projections": ["q_proj"], "layers": ["layers.0"]},
    "query and down": {"projections": ["q_proj", "down_proj"]},
    "all": {"projections": ["_proj"], "rank": 8},
    "key, value": {"projections": ["k_proj", "v_proj"], "rank": 2, "turned": True},
    "stacked": {"projections": ["k_proj", "q_proj", "up_proj"], "stacked": True},
}


def _play(runner: Any, feeds: dict[str, np.ndarray], **river: Any) -> dict[str, np.ndarray]:
    player = Player(runner, 2)
    names = {value.name for value in [*runner.get_inputs(), *runner.get_overridable_initializers()]}
    whole = {name: value for name, value in feeds.items() if name in names}
    kinds = {"tau": np.float32, "max_depth": np.int64}
    whole |= {f"river.{name}": np.array(value, kinds[name]) for name, value in river.items()}
    ids = np.random.default_rng(1).integers(3, VOCABULARY, (2, 4))
    whole |= {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    whole |= {name: value for name, value in player.caches.items() if name not in feeds}
    return dict(zip([value.name for value in runner.get_outputs()], runner.run(None, whole), strict=True))


@pytest.mark.parametrize("default", (True, False))
@pytest.mark.parametrize("form", _FORMS)
@pytest.mark.parametrize("named", (True, False))
def test_lora_inputs_count_in_both_twins(tmp_path: Path, form: str, default: bool, named: bool) -> None:
    plain = ContribDecoder(skip_norm=False).save(tmp_path / "plain.onnx")
    feeds = with_lora(plain, tmp_path / "model.onnx", default=default, **_FORMS[form])
    original = tmp_path / "model.onnx"
    if not named:
        original = without_names(original, tmp_path / "bare.onnx")
    report = export(original, tmp_path / "m.onnx", RiverConfig(tau=2.0, activations="float"))
    assert report.layers == report.river_layers == 3
    oracle, runner = Oracle(original, tmp_path / "m.onnx"), session(tmp_path / "m.onnx")
    for depth in range(4):
        found, expected = _play(runner, feeds, max_depth=depth), _play(oracle.at(depth), feeds)
        assert_close(found, expected)
        assert found["river.exit_depth"] == depth
    without = {name: np.zeros_like(value) for name, value in feeds.items()}
    assert np.abs(_play(runner, feeds)["logits"] - _play(runner, without)["logits"]).max() > 0.01


@pytest.mark.parametrize("form", _FORMS)
def test_a_layer_begins_with_what_the_tokens_made(tmp_path: Path, form: str) -> None:
    plain = ContribDecoder(skip_norm=False).save(tmp_path / "plain.onnx")
    with_lora(plain, tmp_path / "model.onnx", **_FORMS[form])
    before, after = (plan(tmp_path / name).layers for name in ("plain.onnx", "model.onnx"))
    assert [layer.hidden_in for layer in after] == [layer.hidden_in for layer in before]
    assert [layer.caches for layer in after] == [layer.caches for layer in before]


def test_attention_of_the_standard_operators_does_not_hide_the_stream(
    exported: Callable[[str], Path], tmp_path: Path
) -> None:
    """Where attention is one operator, a LoRA input of the query has as many cache slots behind it as the tokens."""
    model = onnx.load(exported("llama"))
    onnx.save(model, tmp_path / "plain.onnx")
    for default in (True, False):
        with_lora(tmp_path / "plain.onnx", tmp_path / "model.onnx", ["q_proj", "v_proj"], default=default, layers=[""])
        report = export(tmp_path / "model.onnx", tmp_path / "m.onnx", RiverConfig(tau=2.0))
        assert report.layers == report.river_layers == 4
        session(tmp_path / "m.onnx")
