"""A river made fast for a machine: what is chosen, by which rule, and that huge activations are seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from river_compile.api import export
from river_compile.cli.export import main
from river_compile.config import RiverConfig
from river_compile.exporters.onnx.hf import export_decoder
from river_compile.measure import speed
from river_compile.measure.speed import SpeedTuning
from river_compile.measure.tuning import Tuning
from river_compile.runtime import OnnxDecoder
from tests.conftest import Exported
from tests.contrib_model import ContribDecoder
from tests.families import random_model
from tests.measure.test_drafting import BYTES, TEXTS
from tests.words import save_word_texts, save_word_tokenizer

Form = tuple[int, int, str, Any]

ASKED: Form = (4, 32, "int8", "float")


def chosen(monkeypatch: pytest.MonkeyPatch, measured: dict[Form, tuple[float, float]], config: RiverConfig) -> Any:
    """The plan where forms are as fast, and agree as often, as told; others are slow and agree on nothing."""

    def add(self: Any, config: RiverConfig) -> None:
        form = (config.bits, config.group_size, config.activations, config.head_bits)
        speedup, agreement = measured.get(form, (0.5, 0.0))
        self.configs.append(config)
        self.points.append(speed.SpeedPoint(*form, river_ms=1.0, speedup=speedup, agreement=agreement))

    monkeypatch.setattr(speed._Tried, "add", add)
    plan = speed.choose_for_speed(Path(), config, [np.arange(9)], Tuning(BYTES, TEXTS))
    point = plan.points[plan.chosen]
    assert (point.bits, point.group_size, point.activations, point.head_bits) == (
        plan.config.bits,
        plan.config.group_size,
        plan.config.activations,
        plan.config.head_bits,
    )
    return plan


@pytest.mark.parametrize(
    ("measured", "expected"),
    (
        ({ASKED: (2.0, 0.8), (4, 128, "int8", "float"): (2.5, 0.79)}, (4, 128, "int8", "float")),
        # Faster, and says something else.
        ({ASKED: (2.0, 0.8), (4, 128, "int8", "float"): (2.5, 0.7)}, ASKED),
        # No faster than noise.
        ({ASKED: (2.0, 0.8), (4, 64, "int8", "float"): (2.03, 0.9)}, ASKED),
        ({ASKED: (2.0, 0.8), (4, 32, "float", "float"): (2.6, 0.8)}, (4, 32, "float", "float")),
        ({ASKED: (2.0, 0.8), (8, 32, "int8", "float"): (2.4, 0.9)}, (8, 32, "int8", "float")),
        # The head comes last, on top of what was found before.
        (
            {ASKED: (2.0, 0.8), (4, 64, "int8", "float"): (2.5, 0.8), (4, 64, "int8", 8): (3.0, 0.8)},
            (4, 64, "int8", 8),
        ),
    ),
)
def test_the_fastest_that_agrees_as_often_is_chosen(
    monkeypatch: pytest.MonkeyPatch, measured: dict[Form, tuple[float, float]], expected: Form
) -> None:
    plan = chosen(monkeypatch, measured, RiverConfig())
    assert (plan.config.bits, plan.config.group_size, plan.config.activations, plan.config.head_bits) == expected
    assert plan.spoilt is None


def test_where_int8_activations_spoil_the_model_float_ones_are_the_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {ASKED: (2.0, 0.3), (4, 128, "int8", "float"): (3.0, 0.31), (4, 32, "float", "float"): (1.2, 0.9)}
    plan = chosen(monkeypatch, measured, RiverConfig())
    assert (plan.config.activations, plan.spoilt) == ("float", pytest.approx(0.6))


def test_what_is_given_for_the_head_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RiverConfig(bits=8, group_size=64, activations="float", head_bits=4)
    plan = chosen(monkeypatch, {(8, 64, "float", 4): (2.0, 0.8)}, config)
    assert {point.head_bits for point in plan.points} == {4}
    assert plan.points[0] == plan.points[plan.chosen]


def test_what_is_written_is_what_was_chosen(tmp_path: Path) -> None:
    model, tuning = ContribDecoder().save(tmp_path / "model.onnx"), SpeedTuning(BYTES, TEXTS)
    report = export(model, tmp_path / "m.onnx", RiverConfig(), tuning=tuning)
    plan = tuning.plans[0]
    assert len(plan.points) == 9
    assert report.speeds == plan.to_dict()
    told = OnnxDecoder(tmp_path / "m.onnx").metadata
    assert json.loads(told["river.speed"]) == plan.to_dict()
    best = plan.points[plan.chosen]
    for name in ("bits", "group_size", "activations", "head_bits"):
        assert json.loads(told["river.config"])[name] == getattr(best, name)
    by_bits = {point.bits: point.agreement for point in plan.points if point.head_bits == "float"}
    assert by_bits[8] > by_bits[4] > 0.1


def test_huge_activations_are_seen(tmp_path: Path) -> None:
    """A channel thirty times as large as the rest, whose weights are as much smaller: the same function, and a scale of
    int8 activations that leaves the others four steps."""
    model = random_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            for norm, linears in (
                (layer.input_layernorm, ("q_proj", "k_proj", "v_proj")),
                (layer.post_attention_layernorm, ("gate_proj", "up_proj")),
            ):
                norm.weight[::16] *= 30
                for name in linears:
                    part = layer.self_attn if hasattr(layer.self_attn, name) else layer.mlp
                    getattr(part, name).weight[:, ::16] /= 30
    export_decoder(model, tmp_path / "model.onnx")
    tuning = SpeedTuning(BYTES, TEXTS)
    export(tmp_path / "model.onnx", tmp_path / "m.onnx", RiverConfig(bits=8), tuning=tuning)
    plan = tuning.plans[0]
    assert plan.spoilt is not None
    assert plan.spoilt > 0.05
    assert plan.config.activations == "float"


def test_the_command_shows_what_was_tried(exported: Exported, tmp_path: Path) -> None:
    tokenizer, texts = save_word_tokenizer(tmp_path / "tokenizer"), save_word_texts(tmp_path / "texts.jsonl", 3)
    command = [exported("llama"), "--tune-speed", "--tokenizer", tokenizer, "--tuning-texts", texts, "--no-quality"]
    shown = CliRunner().invoke(main, [*map(str, command), "-o", str(tmp_path / "m.onnx")])
    assert shown.exit_code == 0, shown.stderr
    assert "activations" in shown.stdout
    assert "agrees" in shown.stdout
    points = json.loads(OnnxDecoder(tmp_path / "m.onnx").metadata["river.speed"])["points"]
    assert all(f"{point['agreement']:.1%}" in shown.stdout for point in points)


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        ((), "tokenizer: tuning texts need"),
        (("--exact", "--tokenizer", "TOKENIZER"), "tune_speed: measures a river with exits"),
        (("--dry-run",), "tune_speed: a dry run measures nothing"),
        (("--target", "tensorrt"), "target: an engine's bits are planned"),
    ),
)
def test_a_mistake_is_one_line(exported: Exported, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    given = [str(save_word_tokenizer(tmp_path / "t")) if a == "TOKENIZER" else a for a in arguments]
    result = CliRunner().invoke(main, [str(exported("llama")), "--tune-speed", *given])
    assert result.exit_code == 2
    assert message in result.stderr
