"""`river-bench` on a small random model: the table, the JSON and the picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from river_compile.cli.bench import main
from river_compile.exporters.torch import seam
from river_compile.measure.bench import BenchResult, BenchRow
from tests.families import random_model
from tests.torch_models import as_it_is


def test_ratios_are_within_rounds_and_the_limit_is_bytes_over_bandwidth() -> None:
    plain = BenchRow("inductor", seconds=[1.0, 2.0, 4.0], bytes_per_token=50.0)
    river = BenchRow("river", tau=0.5, seconds=[0.5, 1.0, 1.0], depths=[1, 3], bytes_per_token=25.0)
    result = BenchResult("m", "cpu", "bfloat16", 2, 3, 3, 100.0, [plain, river], {}, 10, 2, {})
    assert result.ratio(plain) == 1
    assert result.ratio(river) == 2
    assert (result.limit(plain), result.limit(river)) == (2, 4)
    assert river.mean_depth == 2
    shown = json.loads(result.to_json())["rows"]
    assert [row["tokens_per_second"] for row in shown] == [1, 2]
    assert [row["mean_depth"] for row in shown] == [None, 2]


@pytest.mark.slow
def test_the_command_measures_every_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seam, "compile_piece", as_it_is)
    torch.compiler.reset()
    random_model("llama", 3).save_pretrained(tmp_path / "model")
    arguments = ["--rounds", "1", "--tokens", "4", "--depths", "1", "--tau", "-1", "--quiet"]
    result = CliRunner().invoke(
        main, [str(tmp_path / "model"), *arguments, "--json", "--png", str(tmp_path / "bench.png")]
    )
    assert result.exit_code == 0, result.output
    rows = {row["name"]: row for row in json.loads(result.stdout)["rows"]}
    assert list(rows) == [
        "eager",
        "inductor",
        "river, exits off",
        "river, tau -1",
        "river, exit depth 1",
        "all quantized",
    ]
    peaks = json.loads(result.stdout)["decode_peak_bytes"]
    assert 0 < peaks["inductor"] <= peaks["river"] * 1.01
    depths = [rows[name]["mean_depth"] for name in list(rows)[2:]]
    assert depths == [3, 1, 1, 0]
    assert (tmp_path / "bench.png").stat().st_size > 1000


def test_exact_decoding_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor itself runs in the test above."""
    monkeypatch.setattr(seam, "compile_piece", as_it_is)
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda module, values, **_: module)
    torch.compiler.reset()
    random_model("llama", 2).save_pretrained(tmp_path / "model")
    arguments = ["--rounds", "1", "--tokens", "6", "--depths", "1", "--dtype", "float32", "--quiet", "--exact"]
    result = CliRunner().invoke(main, [str(tmp_path / "model"), *arguments, "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["rows"][-1]["name"] == "exact"
    assert document["rows"][-1]["ratio"] > 0
    assert document["rows"][-1]["byte_limit_tokens_per_second"] is None
    assert document["exact"]["tokens"] == 6
    assert document["exact"]["differing"] == 0


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, [str(tmp_path / "none")])
    assert result.exit_code == 2
    assert "does not exist" in result.output
