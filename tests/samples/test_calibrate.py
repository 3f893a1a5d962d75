"""samples/calibrate.py, run as it stands."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

from river_compile import RiverConfig, export
from tests.words import save_word_model, save_word_texts

_SAMPLE = Path(__file__).parent.parent.parent / "samples" / "calibrate.py"


def test_it_writes_a_calibration_and_says_what_was_found(
    exported: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    export(exported("llama"), "model.river.onnx", RiverConfig())
    save_word_model(tmp_path / "hf")
    save_word_texts(tmp_path / "texts.jsonl")
    runpy.run_path(str(_SAMPLE))["main"]("model.river.onnx", "hf", "0.9", "texts.jsonl")
    shown = capsys.readouterr().out
    assert "risk at most 0.9 with 95% confidence" in shown
    assert json.loads(Path("calibration.json").read_text())["documents"] == 30
