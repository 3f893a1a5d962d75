"""`river-bench` on a small random model: the table, the JSON and the picture."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from river_compile.cli.bench import main
from river_compile.cli.bench_report import show_bench
from river_compile.exporters.torch import seam
from river_compile.exporters.torch.timing import Choice
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


def test_products_are_a_table_in_which_what_was_taken_is_marked() -> None:
    choices = (
        Choice("1 x 576 -> 960, float32, float", "linear", {"linear": 1.2e-4, "loop": 1.1e-4}),
        Choice("1 x 576 -> 960, float32, 8 bits, groups of 32", "int8", {"int4": 9e-5, "int8": 5e-5}),
    )
    result = BenchResult("m", "cpu", "bfloat16", 1, 3, 3, 1e9, [BenchRow("inductor", seconds=[1.0])], {}, 10, 2, {})
    result = replace(result, compile_seconds=dict.fromkeys(("inductor", "river"), 1.0), choices=choices)
    result = replace(result, decode_peak_bytes=dict.fromkeys(("inductor", "river"), 10))
    console = Console(file=io.StringIO(), width=120)
    show_bench(console, result, choices=True)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    shown = {line.split(", groups")[0].strip(): line.split()[-2:] for line in lines if "x 576 ->" in line}
    assert list(shown.values()) == [["120*", "110"], ["90", "50*"]]
    assert json.loads(result.to_json())["choices"][1]["taken"] == "int8"


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
