"""The sample that measures offloading tells the same tokens, and what memory the system tells."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from river_compile.api import export
from river_compile.config import RiverConfig
from tests.conftest import Exported
from tests.mapped_memory import only_where_told
from tests.words import save_word_model, save_word_tokenizer

SAMPLE = Path(__file__).parent.parent.parent / "samples" / "offload.py"


def measured(*arguments: str) -> Any:
    common = ("--after", "2", "--depths", "2,4", "--tokens", "6", "--threads", "1", "--json")
    made = subprocess.run(
        [sys.executable, str(SAMPLE), *arguments, *common], capture_output=True, text=True, check=True
    )
    return json.loads(made.stdout)


def check(ways: Any) -> None:
    for depth in ("2", "4"):
        plain, offloaded = ways["memory"][depth], ways["offloaded"][depth]
        assert offloaded["tokens"] == plain["tokens"]
        for found in (plain, offloaded):
            memory = found["memory"]
            assert 0 < memory["RssFile:"] + memory["RssAnon:"] <= memory["VmRSS:"] + 1
            assert found["ms"] > 0
            assert found["ratio"] > 0
        assert plain["ratio"] == 1.0


@only_where_told
def test_with_onnxruntime(exported: Exported, tmp_path: Path) -> None:
    river = tmp_path / "model.river.onnx"
    export(exported("llama"), river, RiverConfig(external_data=True))
    check(measured("--onnx", str(river)))


@only_where_told
@pytest.mark.slow
def test_with_torch(tmp_path: Path) -> None:
    ways = measured(str(save_word_tokenizer(save_word_model(tmp_path / "model"))))
    check(ways)
    assert ways["plain"]["4"]["tokens"] == ways["memory"]["4"]["tokens"]
