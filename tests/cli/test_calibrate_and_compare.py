"""`river-calibrate` and `river-compare` as a user meets them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from river_compile import RiverConfig, export
from river_compile.cli.calibrate import main as river_calibrate
from river_compile.cli.compare import main as river_compare
from river_compile.cli.export import main as river_export
from tests.words import save_word_model, save_word_texts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_word_model(tmp_path_factory.mktemp("hf") / "model")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_word_texts(tmp_path_factory.mktemp("texts") / "texts.jsonl")


@pytest.fixture(scope="module")
def river(exported: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("river") / "model.river.onnx"
    export(exported("llama"), path, RiverConfig())
    return path


def _run(command: object, *args: object) -> Result:
    return CliRunner().invoke(command, [str(arg) for arg in args])  # type: ignore[arg-type]


def test_calibrate_writes_what_export_takes(
    river: Path, folder: Path, texts: Path, exported: Callable[[str], Path], tmp_path: Path
) -> None:
    out, png = tmp_path / "calibration.json", tmp_path / "calibration.png"
    options = ["--texts", texts, "--max-risk", 0.9, "--tau", "0.9,0.5", "--cache", tmp_path / "kept"]
    result = _run(river_calibrate, river, "--tokenizer", folder, *options, "-o", out, "--png", png)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert f"tau {found['tau']:g}: risk at most 0.9 with 95% confidence" in result.output
    assert found["documents"] == 30
    assert png.exists()
    made = _run(river_export, exported("llama"), "-o", tmp_path / "out.onnx", "--calibration", out, "--json")
    assert made.exit_code == 0, made.output
    shown = _run(river_calibrate, river, "--tokenizer", folder, *options, "--json", "-q")
    assert json.loads(shown.stdout) == found


def test_calibrate_says_how_many_documents_are_needed(river: Path, folder: Path, texts: Path) -> None:
    result = _run(river_calibrate, river, "--tokenizer", folder, "--texts", texts, "--no-cache")
    assert result.exit_code == 0, result.output
    assert "takes at least 149 documents even with no loss at all, and there are 30" in " ".join(result.output.split())


def test_compare_prints_a_table_and_writes_json_and_plot(folder: Path, texts: Path, tmp_path: Path) -> None:
    result = _run(
        river_compare, folder, "--texts", texts, "--documents", 2, "--prompt-tokens", 4, "--rounds", 1, "--tau", "0.5",
        "--policies", "share,mask", "--dtype", "float32", "--no-cache", "--png", tmp_path / "a.png", "-o",
        tmp_path / "a.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for word in ("backbone", "all river", "share", "mask", "ms/token", "no kernel here"):
        assert word in result.output
    assert len(json.loads((tmp_path / "a.json").read_text())["points"]) == 4
    assert (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{river}", "--tokenizer", "{folder}", "--max-risk", "1"), "error: max_risk: must lie in (0, 1), not 1.0"),
        (("{river}",), "its tokenizer is not in it; name a folder with --tokenizer"),
        (("none.onnx", "--tokenizer", "{folder}"), "error: none.onnx: no such file"),
        (("{river}", "--tokenizer", "{folder}", "--texts", "none.txt"), "error: none.txt: No such file"),
        (("{river}", "--tokenizer", "{folder}", "--tau", "x"), "error: tau: 'x' is no list of numbers"),
        (("{river}", "--tokenizer", "{folder}", "-o", "nowhere/a.json"), "there is no such folder"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    arguments: tuple[str, ...], message: str, river: Path, folder: Path
) -> None:
    result = _run(river_calibrate, *(argument.format(river=river, folder=folder) for argument in arguments))
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_compare_refuses_what_does_not_exist(folder: Path) -> None:
    for arguments, message in (
        ((folder, "--policies", "skip"), "error: kv_policy: 'skip' is none of"),
        ((folder / "none",), "not a causal language model"),
    ):
        result = _run(river_compare, *arguments)
        assert result.exit_code == 2
        assert message in result.output
