"""`river-export` with quantizers that read texts, and with budgets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from river_compile.cli.export import main
from tests.families import VOCABULARY
from tests.words import save_word_tokenizer

TEXTS = [" ".join(f"w{(start + step * 7) % VOCABULARY}" for step in range(70)) for start in range(3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tuning")
    save_word_tokenizer(path / "tokenizer")
    (path / "tuning.jsonl").write_text("\n".join(map(json.dumps, TEXTS)))
    return path


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_a_budget_is_spent_on_what_was_measured(folder: Path, exported: Callable[[str], Path], tmp_path: Path) -> None:
    sensitivity = tmp_path / "sensitivity.json"
    command = [exported("llama"), "--tokenizer", folder / "tokenizer", "--tuning-texts", folder / "tuning.jsonl"]
    command += ["--quantizer", "gptq", "--sensitivity", sensitivity, "--json"]
    first = _run(*command, "--avg-bits", 5, "-o", tmp_path / "a.onnx")
    assert first.exit_code == 0, first.stderr
    report = json.loads(first.stdout)
    assert report["quantizer"] == "gptq"
    assert 4.5 < report["average_bits"] <= 5
    # What was measured is kept: a second budget measures nothing, so it needs no other texts than gptq does.
    before = sensitivity.read_bytes()
    second = _run(*command, "--max-kl", 1e-9, "-o", tmp_path / "b.onnx")
    assert second.exit_code == 0, second.stderr
    assert json.loads(second.stdout)["average_bits"] > 24
    assert sensitivity.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--quantizer", "gptq"), "tokenizer: tuning texts need"),
        (("--avg-bits", 5), "tokenizer: tuning texts need"),
        (("--quantizer", "awq"), "quantizer: 'awq' is none of rtn"),
        (("--avg-bits", 5, "--dry-run"), "avg_bits: a dry run measures nothing"),
        (("--avg-bits", 5, "--max-kl", 0.1, "--tokenizer", "TOKENIZER"), "avg_bits: give avg_bits or max_kl"),
        (("--avg-bits", 3, "--tokenizer", "TOKENIZER", "--tuning-texts", "TEXTS"), "avg_bits: must be 4 or more"),
        (("--bits-for", "x=16"), "bits_for: x=16"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    folder: Path, exported: Callable[[str], Path], tmp_path: Path, arguments: tuple[object, ...], message: str
) -> None:
    places = {"TOKENIZER": folder / "tokenizer", "TEXTS": folder / "tuning.jsonl"}
    result = _run(exported("llama"), "-o", tmp_path / "out.onnx", *(places.get(str(a), a) for a in arguments))
    assert result.exit_code == 2
    assert message in result.stderr
    assert "\n" not in result.stderr.strip()
    assert list(tmp_path.iterdir()) == []
