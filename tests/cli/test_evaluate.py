"""`river-eval`, as a person or a program meets it, and the page that it writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

import river_compile
from river_compile.cli.evaluate import main
from river_compile.config import RiverConfig
from river_compile.exporters.torch import seam
from river_compile.measure.sensitivity import measure_sensitivity
from tests.families import LAYERS, VOCABULARY
from tests.torch_models import as_it_is
from tests.words import save_word_model, save_word_tokenizer

TEXT = "w5 w6 w7 w8 w9 w100 w20 w30 w4 w50"
# The tokenizer's own template adds one.
TOKENS = 11


@pytest.fixture(scope="module")
def folder(exported: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A river model, a tokenizer of its vocabulary, and texts."""
    path = tmp_path_factory.mktemp("river-eval")
    river_compile.export(exported("llama"), path / "model.river.onnx", RiverConfig(activations="float"))
    for name, size in (("tokenizer", VOCABULARY), ("foreign", 2 * VOCABULARY)):
        save_word_tokenizer(path / name, size)
    (path / "a.txt").write_text(TEXT)
    (path / "b.jsonl").write_text("\n".join(json.dumps({"prompt": f"{TEXT} w{i}"}) for i in range(3)))
    return path


def _run(folder: Path, *arguments: object, tokenizer: str = "tokenizer", texts: tuple[str, ...] = ("a.txt",)) -> Result:
    named = [argument for text in texts for argument in ("--texts", folder / text)]
    command = [folder / "model.river.onnx", "--tokenizer", folder / tokenizer, *named, "--no-cache", *arguments]
    return CliRunner().invoke(main, list(map(str, command)))


def test_the_table_has_a_row_for_each_setting(folder: Path) -> None:
    result = _run(folder, "--tau", "0.9,0.5", "--depths", "0,2", "--speed-rounds", 1, texts=("a.txt", "b.jsonl"))
    assert result.exit_code == 0, result.stderr
    for words in ("tau 0.9", "tau 0.5", "all river", "exit depth 2", "4 documents", "river by rtn", "r ="):
        assert words in result.stdout.replace("\n", " ")


def test_json_is_the_evaluation_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    result = _run(folder, "--tau", "0.5", "--speed-rounds", 0, "--json", "--output", target)
    assert json.loads(result.stdout) == json.loads(target.read_text())
    assert json.loads(result.stdout)["tokens"] == TOKENS


class Page(HTMLParser):
    """What a page loads from elsewhere, and whether its tags are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.open: list[str] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action") and not (value or "").startswith("#"):
                self.loads.append(f"{tag} {name}={value}")
            if name == "id":
                self.ids.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing(folder: Path, exported: Callable[[str], Path], tmp_path: Path) -> None:
    texts = [np.random.default_rng(0).integers(3, VOCABULARY, 64)]
    sensitivity = tmp_path / "sensitivity.json"
    sensitivity.write_text(measure_sensitivity(exported("llama"), RiverConfig(), texts, tokens=64).to_json())
    target = tmp_path / "page.html"
    result = _run(
        folder, "--tau", "0.9,0.5", "--speed-rounds", 1, "--html", target, "--sensitivity", sensitivity, "--quiet"
    )
    assert (result.exit_code, result.stdout) == (0, "")
    text = target.read_text(encoding="utf-8")
    page = Page(text)
    assert page.loads == page.open == []
    assert len(set(page.ids)) == len(page.ids)
    assert "@import" not in text
    assert text.count("<svg") == 5
    for heading in (
        "Fidelity",
        "Agreement and speed",
        "Where tokens leave",
        "KV cache",
        "What each layer",
        "by exit depth",
    ):
        assert heading in text
    assert text.count("title='exit depth") == 2 * TOKENS
    for depth in range(LAYERS + 1):
        assert f"title='exit depth {depth}'" in text or depth not in (1, LAYERS)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("--tau", "high"), {}, "tau: 'high' is no list of numbers"),
        (("--tau", "1.5"), {}, "tau: must lie in [-1, 1]"),
        (("--depths", "x"), {}, "depths: 'x' is no list of whole numbers"),
        (("--depths", "9"), {}, "depths: 9 is more than the model's 4 layers"),
        (("--quantizer", "lsq"), {}, "quantizer: only for a folder"),
        (("--dtype", "float32"), {}, "dtype: only for a folder"),
        ((), {"tokenizer": "foreign"}, "do not belong together"),
        ((), {"tokenizer": "missing"}, "no tokenizer"),
        ((), {"texts": ("missing.txt",)}, "No such file"),
        (("--sensitivity", "missing.json"), {}, "no sensitivity file"),
        (("--html", "missing/page.html"), {}, "there is no such folder"),
        (("--max-tokens", 1), {}, "max_tokens: must be 2 or more"),
        (("--chat",), {}, "the tokenizer has no chat template"),
        (("--documents", 0), {}, "max_documents: must be 1 or more"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_two(
    folder: Path, arguments: tuple[object, ...], options: dict[str, object], message: str
) -> None:
    result = _run(folder, *arguments, **options)  # type: ignore[arg-type]
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.strip().startswith("error: ")
    assert message in result.stderr
    assert "\n" not in result.stderr.strip()


def test_a_text_that_is_empty_or_too_short_is_one_line(folder: Path, tmp_path: Path) -> None:
    for content, message in (("", "the text is empty"), ("w5", "1 tokens are too few")):
        (folder / "bad.txt").write_text(content)
        result = _run(folder, texts=("bad.txt",))
        assert result.exit_code == 2
        assert message in result.stderr


def test_readings_are_kept_where_the_user_says(folder: Path, tmp_path: Path) -> None:
    command = [folder / "model.river.onnx", "--tokenizer", folder / "tokenizer", "--texts", folder / "a.txt"]
    command += ["--tau", "0.5", "--speed-rounds", "0", "--json", "--cache", tmp_path / "kept"]
    first, second = (CliRunner().invoke(main, list(map(str, command))) for _ in range(2))
    assert first.exit_code == 0
    assert first.stdout == second.stdout
    # Similarities, one threshold, all river.
    assert len(list((tmp_path / "kept").glob("*.npz"))) == 3


@pytest.mark.parametrize("quantizer", ["lsq", "gptq"])
def test_a_folder_is_compiled_and_its_own_tokenizer_read(
    quantizer: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPTQ's weights are made on the package's tuning texts first."""
    import torch

    monkeypatch.setattr(seam, "compile_piece", as_it_is)
    torch.compiler.reset()
    model = save_word_model(tmp_path / "model")
    options = ["--tau", "1", "--depths", "0,2", "--speed-rounds", "0", "--no-cache", "--dtype", "float32", "--json"]
    command = [model, "--texts", folder / "a.txt", "--quantizer", quantizer, *options]
    result = CliRunner().invoke(main, list(map(str, command)))
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["details"]["river.quantizer"] == quantizer
    assert found["settings"][0]["top1"]["value"] == 1
    assert [np.argmax(row["exit_histogram"]) for row in found["settings"]] == [LAYERS, 0, 2]


def test_a_folder_without_a_model_is_one_line(folder: Path) -> None:
    result = CliRunner().invoke(main, [str(folder), "--tokenizer", str(folder / "tokenizer")])
    assert result.exit_code == 2
    assert "there is no config.json" in result.stderr
