"""A river made for drafting: the formula, and that what is written is the fastest of what was measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from river_compile.cli.export import main
from river_compile.config import RiverConfig
from river_compile.measure.drafting import DraftTuning, acceptance_by_place, fixed_length
from river_compile.measure.fidelity import Document, TextTokenizer
from river_compile.runtime import Generation, OnnxDecoder
from river_compile.runtime.drafting import expected_speedup
from tests.families import VOCABULARY
from tests.words import save_word_texts, save_word_tokenizer


def test_the_formula_is_tokens_of_a_round_over_its_time() -> None:
    speedup, length = expected_speedup((0.8, 0.8), 10.0, 2.0, lambda rows: 10.0 + rows)
    assert (speedup, length) == (pytest.approx(10 * (1 + 0.8 + 0.64) / (2 * 2 + 13)), 2)


def test_drafts_that_cost_too_much_are_not_made() -> None:
    assert expected_speedup((0.9, 0.9), 10.0, 20.0, lambda rows: 10.0) == (1.0, 0)
    assert expected_speedup((), 10.0, 1.0, lambda rows: 10.0) == (1.0, 0)


def test_certain_drafts_are_made_to_the_last() -> None:
    speedup, length = expected_speedup((1.0,) * 8, 10.0, 1.0, lambda rows: 10.0)
    assert (speedup, length) == (pytest.approx(9 * 10 / 18), 8)


BYTES = TextTokenizer(lambda text: [3 + ord(c) % (VOCABULARY - 3) for c in text], lambda ids: "", VOCABULARY)
TEXTS = [
    Document(str(n), "prose", f"{n}: the river flows on and on, past mills and meadows, to the sea.") for n in range(3)
]


@pytest.fixture(scope="module")
def chosen(exported: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DraftTuning]:
    from river_compile.api import export

    target, tuning = tmp_path_factory.mktemp("drafts") / "m.onnx", DraftTuning(BYTES, TEXTS)
    export(exported("llama"), target, RiverConfig(exact=True), tuning=tuning)
    return target, tuning


def test_the_river_written_is_the_fastest_of_those_timed(chosen: tuple[Path, DraftTuning]) -> None:
    path, tuning = chosen
    plan = tuning.plans[0]
    timed = [point for point in plan.points if point.measured is not None]
    assert len(plan.points) >= 4
    assert len(timed) == 3
    assert plan.best.measured == max(point.measured for point in timed if point.measured is not None)
    assert {point.bits for point in plan.points} >= {4.0, 8.0}
    decoder = OnnxDecoder(path)
    assert decoder.defaults.exact
    noted = json.loads(decoder.metadata["river.exact"])
    assert noted["points"][noted["chosen"]]["bits"] == plan.best.bits
    assert noted["cpu"]


def test_more_bits_are_accepted_more_often(chosen: tuple[Path, DraftTuning]) -> None:
    points = sorted(chosen[1].plans[0].points, key=lambda point: point.bits)
    assert sum(points[-1].acceptance) / len(points[-1].acceptance) > sum(points[0].acceptance) / len(
        points[0].acceptance
    )


def test_fixed_lengths_are_drafted_in_every_round(chosen: tuple[Path, DraftTuning]) -> None:
    decoder = OnnxDecoder(chosen[0])
    with fixed_length(decoder, 3):
        result = decoder.generate([[5, 9, 17]], 20, exact=True, lookup=False)
    assert {step.drafted for step in result.steps[1:-2]} == {3}
    assert all(0 <= share <= 1 for share in acceptance_by_place(decoder, [[5, 9, 17], [7, 8, 9]]))


def _arguments(model: Path, folder: Path, *more: str) -> list[str]:
    tokenizer = save_word_tokenizer(folder / "tokenizer", eos_token=None)
    texts = save_word_texts(folder / "texts.jsonl", count=3, length=70)
    how = ["--exact", "--no-quality", "--tokenizer", str(tokenizer), "--tuning-texts", str(texts)]
    return [str(model), "-o", str(folder / "m.onnx"), *how, *more]


def test_the_command_ends_with_the_sentence_that_matters(exported: Callable[[str], Path], tmp_path: Path) -> None:
    found = CliRunner().invoke(main, _arguments(exported("llama"), tmp_path))
    assert found.exit_code == 0, found.output
    assert found.output.rstrip().endswith("(exact decoding, greedy, batch 1)")
    assert "times faster, same output" in found.output


def test_a_decoder_that_says_something_else_is_found_out(
    exported: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = OnnxDecoder.generate

    def other(self: OnnxDecoder, *arguments: Any, **settings: Any) -> Generation:
        made = generate(self, *arguments, **settings)
        if settings.get("exact"):
            made.tokens[0][-1] += 1
        return made

    monkeypatch.setattr(OnnxDecoder, "generate", other)
    found = CliRunner().invoke(main, _arguments(exported("llama"), tmp_path))
    assert "same output" not in found.output
    assert "TOKENS DIFFER" in found.output


def test_a_budget_of_bits_is_for_another_kind_of_river(exported: Callable[[str], Path], tmp_path: Path) -> None:
    found = CliRunner().invoke(main, _arguments(exported("llama"), tmp_path, "--avg-bits", "5"))
    assert found.exit_code == 2
    assert "error: exact: chooses bits by measured speed" in found.output
    assert not (tmp_path / "m.onnx").exists()
