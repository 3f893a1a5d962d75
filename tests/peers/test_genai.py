"""ONNX Runtime GenAI: its builder's folders take a river, and its generator runs the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from river_compile.cli.export import main as river_export
from river_compile.runtime import OnnxDecoder
from tests.peers.peer import NEW_TOKENS, PROMPT, Peer, check_river, save_model

GENAI = Peer(
    "genai",
    (
        "onnxruntime-genai==0.18.0",
        "onnxruntime==1.32.0",
        "onnx==1.23.2",
        "onnx-ir==1.1.0",
        "onnxscript==0.7.2",
        "torch==2.13.0",
        "transformers==5.24.0",
    ),
)
OTHER = [40, 3, 8, 21]

_GENERATE = """
import json, sys
import numpy as np, onnxruntime_genai as og
model, prompts, new = og.Model(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
rows, length = len(prompts), len(prompts[0])
settings = og.GeneratorParams(model)
settings.set_search_options(max_length=3 * (length + new), do_sample=False, batch_size=rows)
generator = og.Generator(model, settings)
depths = []

def turn(tokens):
    generator.append_tokens(np.array(tokens, np.int32))
    start = len(generator.get_sequence(0))
    for _ in range(new):
        generator.generate_next_token()
        if "depths" in sys.argv[4:]:
            depths.append(int(generator.get_output("river.exit_depth")[0]))
    return [[int(token) for token in generator.get_sequence(row)][start:] for row in range(rows)]

told = {"tokens": turn(prompts)}
told["speculative"] = generator.get_speculative_stats()
if "turns" in sys.argv[4:]:
    # Several sequences have one turn, and go back to the start only.
    if rows == 1:
        told["second turn"] = turn(prompts)
    place = length if rows == 1 else 0
    generator.rewind_to(place)
    told["after a rewind"] = turn([[7]] if place else prompts[::-1])
print(json.dumps(told | {"depths": depths}))
"""


def _generated(folder: Path, prompts: list[list[int]], *words: str) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(GENAI.run(_GENERATE, folder, json.dumps(prompts), NEW_TOKENS, *words))
    return told


def _built(folder: Path, precision: str = "fp32") -> tuple[Path, Path]:
    """A Hugging Face folder, and what the builder made of it."""
    GENAI.made()
    source, built = save_model(folder / "hf"), folder / "built"
    builder = ["-m", "onnxruntime_genai.models.builder", "-i", source, "-o", built, "-e", "cpu", "-p", precision]
    GENAI.call("python", *builder, "-c", folder / "cache")
    return source, built


def _export(*arguments: object) -> None:
    made = CliRunner().invoke(river_export, [str(argument) for argument in arguments])
    assert made.exit_code == 0, made.output
    assert "the result was not run" not in made.output


@pytest.mark.slow
@pytest.mark.parametrize("precision", ("fp32", "fp16"))
def test_the_builders_models_take_a_river(tmp_path: Path, precision: str) -> None:
    source, built = _built(tmp_path, precision)
    # In float16 the builder notes wrong shapes, by which its own generator cannot decode; a river notes none.
    plain = OnnxDecoder(built / "model.onnx").generate([PROMPT], NEW_TOKENS).tokens[0]
    expected = _generated(built, [PROMPT])["tokens"][0] if precision == "fp32" else plain
    check_river(built, source, tmp_path / "river" / "model.onnx", expected, tmp_path)
    assert _generated(tmp_path / "river", [PROMPT])["tokens"] == [expected]


@pytest.mark.slow
def test_rewind_batches_and_continued_decoding_are_the_originals(tmp_path: Path) -> None:
    _, built = _built(tmp_path)
    _export(built, "-o", tmp_path / "river", "--tau", "2")
    for prompts in ([PROMPT], [PROMPT, OTHER]):
        expected = _generated(built, prompts, "turns")
        found = _generated(tmp_path / "river", prompts, "turns", "depths")
        assert set(found.pop("depths")) == {4} and not expected.pop("depths")
        assert ("second turn" in found, "after a rewind" in found) == (len(prompts) == 1, True)
        assert found == expected


@pytest.mark.slow
def test_exits_are_what_our_own_runtime_decides(tmp_path: Path) -> None:
    """Tau is the file's: what `river-export` was told."""
    _, built = _built(tmp_path)
    _export(built, "-o", tmp_path / "river", "--tau", "0.2")
    found = _generated(tmp_path / "river", [PROMPT], "depths")
    own = OnnxDecoder(tmp_path / "river" / "model.onnx").generate([PROMPT], NEW_TOKENS)
    assert found["tokens"] == own.tokens
    assert found["depths"] == [step.exit_depth for step in own.steps]
    assert min(found["depths"]) < 4


@pytest.mark.slow
def test_it_drafts_by_the_river_and_says_what_the_original_says(tmp_path: Path) -> None:
    _, built = _built(tmp_path)
    _export(built, "-o", tmp_path / "river", "--exact")
    expected, found = (_generated(folder, [PROMPT], "turns") for folder in (built, tmp_path / "river"))
    drafted = found.pop("speculative")
    assert drafted["draft_tokens_accepted"] > 0
    expected.pop("speculative")
    assert found == expected
