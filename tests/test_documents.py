"""What CONTRIBUTING.md says is true: its examples run, and what it names is there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from river_compile.exporters.quantizers import QUANTIZERS
from tests.contrib_model import ContribDecoder

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_examples_run_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With linear layers that have a bias and some that have none."""
    examples = re.findall(r"^```python\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    assert len(examples) == 4
    ContribDecoder(form="matmul_bias").save(tmp_path / "model.onnx")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("river_compile.exporters.quantizers.QUANTIZERS", QUANTIZERS.copy())
    names: dict[str, Any] = {}
    for number, example in enumerate(examples, 1):
        exec(compile(example, f"CONTRIBUTING.md, example {number}", "exec"), names)


def test_folders_files_and_make_targets_are_there() -> None:
    named = re.findall(r"`([\w./]+(?:/|\.py|\.toml))`", TEXT)
    assert len(named) > 15
    wings = [ROOT / wing for wing in ("", "exporters", "passes", "river_compile/cli")]
    assert [name for name in named if not any((wing / name).exists() for wing in wings)] == []
    targets = set(re.findall(r"make ([\w-]+)", TEXT))
    assert targets <= set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
