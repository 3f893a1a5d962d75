"""The agreement that an export ends with: as measured by hand, told everywhere, written without touching a weight."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

import river_compile
from river_compile.cli.export import main as river_export
from river_compile.config import RiverConfig
from river_compile.measure.agreement import AgreementTexts
from river_compile.measure.fidelity import Document, load_tokenizer
from river_compile.runtime import OnnxDecoder
from tests.families import LAYERS
from tests.words import save_word_model

Exported = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_word_model(tmp_path_factory.mktemp("agreement"))


@pytest.fixture(scope="module")
def texts(folder: Path) -> AgreementTexts:
    rng = np.random.default_rng(1)
    words = [" ".join(f"w{i}" for i in rng.integers(3, 120, 40)) for _ in range(3)]
    documents = [Document(str(number), "words", text) for number, text in enumerate(words)]
    return AgreementTexts(load_tokenizer(folder), documents, tokens=20)


def _decoded(decoder: OnnxDecoder, ids: np.ndarray, **settings: float) -> list[int]:
    state = decoder.start(1)
    parts = [ids[None, :8], *ids[8:].reshape(-1, 1, 1)]
    return [int(decoder.forward(part, state, **settings)[0][0, -1].argmax()) for part in parts]  # type: ignore[arg-type]


@pytest.mark.parametrize("external", (False, True))
def test_it_is_what_both_choose_alike(
    exported: Exported, texts: AgreementTexts, tmp_path: Path, external: bool
) -> None:
    config = RiverConfig(tau=0.5, external_data=external)
    plain = river_compile.export(exported("llama"), tmp_path / "plain.onnx", config)
    assert plain.agreement is None
    found = river_compile.export(exported("llama"), tmp_path / "m.onnx", config, quality=texts).agreement
    assert found is not None
    decoder = OnnxDecoder(tmp_path / "m.onnx")
    alike = []
    for document in texts.texts or ():
        ids = np.array(texts.tokenizer.encode(document.text))[:20]
        alike += np.equal(_decoded(decoder, ids), _decoded(decoder, ids, tau=2.0)).tolist()
    assert (found.top1, found.tokens, found.documents) == (round(np.mean(alike), 4), len(alike), 3)
    assert found.tau == 0.5 and found.exit_depth is not None and 1 <= found.exit_depth < LAYERS
    assert json.loads(decoder.metadata["river.agreement"])["top1"] == found.top1
    # Nothing but the entry has been added behind what was written.
    before, after = (tmp_path / "plain.onnx").read_bytes(), (tmp_path / "m.onnx").read_bytes()
    assert len(after) - len(before) < 600 and (external or after.startswith(before))
    assert onnx.load(tmp_path / "m.onnx").graph.node


def test_a_river_that_never_flows_agrees_fully(exported: Exported, texts: AgreementTexts, tmp_path: Path) -> None:
    found = river_compile.export(exported("llama"), tmp_path / "m.onnx", RiverConfig(tau=2.0), quality=texts).agreement
    assert found is not None and (found.top1, found.exit_depth, found.advice) == (1.0, LAYERS, None)


def test_a_low_one_says_what_helps(exported: Exported, texts: AgreementTexts, tmp_path: Path) -> None:
    low = river_compile.export(exported("llama"), tmp_path / "m.onnx", RiverConfig(tau=-1.0), quality=texts).agreement
    assert low is not None and low.top1 < 0.95 and low.advice is not None
    for words in ("below 95%", "a higher tau (0.99: ", "river-calibrate", "--bits 8", "--quantizer lsq"):
        assert words in low.advice
    wide = RiverConfig(tau=-1.0, bits=8, quantizer="lsq")
    other = river_compile.export(exported("llama"), tmp_path / "m.onnx", wide, quality=texts).agreement
    assert other is not None and "--bits" not in (other.advice or "") and "--quantizer" not in (other.advice or "")


def test_it_ends_in_time(exported: Exported, texts: AgreementTexts, tmp_path: Path) -> None:
    hurried = AgreementTexts(texts.tokenizer, texts.texts, seconds=0.0)
    found = river_compile.export(exported("llama"), tmp_path / "m.onnx", quality=hurried).agreement
    assert found is not None and found.documents == 1


def test_the_command_line_tells_it_where_there_is_a_tokenizer(folder: Path, exported: Exported, tmp_path: Path) -> None:
    def run(*arguments: object) -> str:
        result = CliRunner().invoke(river_export, [str(a) for a in (*arguments, "-o", tmp_path / "m.onnx")])
        assert result.exit_code == 0, result.output
        return result.stdout

    shown = " ".join(run(exported("llama"), "--tokenizer", folder).split())
    assert "with the backbone at tau 0.9" in shown and "tokens of 9 texts" in shown
    report = json.loads(run(exported("llama"), "--tokenizer", folder, "--json"))
    assert 0 <= report["agreement"]["top1"] <= 1 and report["seconds"]["measure agreement"] > 0
    assert "agreement" not in run(exported("llama"), "--tokenizer", folder, "--no-quality")
    assert "agreement" not in run(exported("llama"))


def test_a_foreign_tokenizer_is_noted_and_the_model_kept(
    exported: Exported, texts: AgreementTexts, tmp_path: Path
) -> None:
    foreign = AgreementTexts(type(texts.tokenizer)(texts.tokenizer.encode, str, 50000), texts.texts)
    report = river_compile.export(exported("llama"), tmp_path / "m.onnx", quality=foreign)
    assert report.agreement is None and "do not belong together" in report.notes[-1]
    OnnxDecoder(tmp_path / "m.onnx")


def test_a_folder_without_a_tokenizer_is_exported_all_the_same(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "hf"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((folder / name).read_bytes())

    def run(source: Path, *arguments: str) -> str:
        result = CliRunner().invoke(river_export, [str(source), "--json", "-o", str(tmp_path / "m.onnx"), *arguments])
        return result.stdout if result.exit_code == 0 else result.stderr

    assert json.loads(run(bare))["agreement"] is None
    assert json.loads(run(folder))["agreement"]["documents"] == 9
    assert "no tokenizer" in run(bare, "--tokenizer", str(tmp_path))
