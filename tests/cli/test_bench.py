"""`river-bench` of ONNX models from the command line; tests/measure/test_bench.py has Hugging Face folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from river_compile.cli.bench import main
from river_compile.measure import onnx_bench
from tests.conftest import Exported

QUICK = ("--rounds", "1", "--tokens", "4", "--quiet")


@pytest.fixture(autouse=True)
def known_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_bench, "memory_bandwidth", lambda device: 1e9)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in (*arguments, *QUICK)])


def test_sweeps_are_tables_and_a_picture(exported: Exported, tmp_path: Path) -> None:
    png = tmp_path / "sweep.png"
    given = ("--tau", "-1", "--depths", "1", "--batch", "1,2", "--context", "8,16", "--exact", "--png", png)
    result = run(exported("llama", 2), *given)
    assert result.exit_code == 0, result.output
    for line in ("plain: the model itself; in the cache: random tokens", "batch 1, context 8", "batch 1, context 16"):
        assert line in result.stdout
    shown = [line.split() for line in result.stdout.splitlines()]
    assert ["batch", "1", "2"] in shown and ["context", "8", "16"] in shown
    # Of a threshold, ratio and mean exit depth at each batch size.
    sweep = shown[shown.index(["batch", "1", "2"]) :]
    row = next(words for words in sweep if words[:3] == ["river,", "tau", "-1"])
    assert [word for word in row if word.startswith("(")] == ["(1.0)", "(1.0)"]
    assert result.stdout.count("tokens differ from the backbone's") == 3
    assert png.read_bytes().startswith(b"\x89PNG")


def test_one_point_is_drawn_as_bars(exported: Exported, tmp_path: Path) -> None:
    result = run(exported("llama", 2), "--context", "8", "--json", "--png", tmp_path / "bars.png")
    assert result.exit_code == 0, result.output
    assert [point["context"] for point in json.loads(result.stdout)["points"]] == [8]
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_operators_are_a_table(exported: Exported) -> None:
    result = run(exported("llama", 2), "--context", "8", "--operators")
    assert result.exit_code == 0, result.output
    shown = result.stdout[result.stdout.index("where a decode pass spends its time") :]
    rows = {line.strip().split("  ")[0] for line in shown.splitlines()}
    assert {"MatMulNBits", "MatMul", "other operators", "between operators"} <= rows


def test_a_folder_of_optimum_is_its_model_and_knows_its_context(exported: Exported, tmp_path: Path) -> None:
    shutil.copytree(exported("llama", 2).parent, tmp_path / "folder")
    (tmp_path / "folder" / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 16}))
    result = run(tmp_path / "folder", "--context", "16,17", "--depths", "", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["notes"] == ["batch 1, context 17: skipped: the model was made for 16 tokens"]
    assert document["points"][0]["rows"][0]["name"] == "plain"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    (
        (("--startup",), "startup: is for Hugging Face folders"),
        (("--dtype", "float32"), "dtype: is for Hugging Face folders"),
        (("--batch", "0"), "batch: must be numbers of 1 or more"),
        (("--context", "many"), "context: 'many' is no list of whole numbers"),
        (("--tau", "7x"), "tau: '7x' is no list"),
        (("--plain", "nowhere.onnx"), "does not exist"),
        (("--quantizer", "nope"), "quantizer"),
    ),
)
def test_a_mistake_is_one_line(exported: Exported, arguments: tuple[str, ...], problem: str) -> None:
    result = run(exported("llama", 2), *arguments)
    assert result.exit_code == 2
    assert problem in result.stderr and len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "problem"),
    (
        (("--int4",), "int4: is for ONNX models"),
        (("--context", "8"), "context: is for ONNX models"),
        (("--batch", "1,2"), "batch: several batch sizes are for ONNX models"),
    ),
)
def test_what_is_for_onnx_models_is_refused_for_folders(
    tmp_path: Path, arguments: tuple[str, ...], problem: str
) -> None:
    result = run(tmp_path, *arguments)
    assert result.exit_code == 2
    assert problem in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_a_file_that_is_no_model_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    result = run(tmp_path / "model.onnx")
    assert result.exit_code == 2
    assert "model.onnx: ONNX Runtime cannot load it" in result.stderr
