"""Every command and example of README and docs/ runs, one page after the other, on a small model under their names.

What is not run here: engines (no GPU), servers, which `tests/serve` runs, a model of a billion weights,
and EleutherAI's harness (`tests/peers`, in an environment of its own).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

import river_compile
from river_compile import RiverConfig
from river_compile.cli.main import main
from tests.conftest import Exported
from tests.families import LAYERS
from tests.test_documents import PAGES, commands, examples
from tests.words import save_word_model, save_word_texts, save_word_tokenizer

FOLDERS = (
    "path/to/model",
    "path/to/hf_model",
    "hf_folder",
    ".cache/smollm2",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
)
MODELS = ("model.onnx", ".cache/smollm2.onnx")
RIVERS = ("model.exact.onnx", "smollm2.river.onnx", ".cache/smollm2.river.head8.onnx")
ELSEWHERE = ("tensorrt", ".engine", "1b.", "openai.")


@pytest.fixture(scope="module")
def prepared(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("documents")
    model = save_word_tokenizer(save_word_model(work / "word_model"))
    for name in FOLDERS:
        shutil.copytree(model, work / name)
    in_one_file = RiverConfig(exact=True, bits=8, head_bits=8, external_data=False)
    river_compile.export(exported("llama"), work / "river.onnx", in_one_file)
    for name in MODELS:
        shutil.copy(exported("llama"), work / name)
        shutil.copy(str(exported("llama")) + ".data", (work / name).parent / "model.onnx.data")
    river_compile.export(work / "model.onnx", work / "model.river.onnx")
    for name in RIVERS:
        shutil.copy(work / "river.onnx", work / name)
    shutil.copytree(model, work / "built", ignore=shutil.ignore_patterns("*.safetensors"))
    for name in ("model.onnx", "model.onnx.data"):
        shutil.copy(work / name, work / "built")
    shutil.copy(model / "config.json", work)
    save_word_texts(work / "mine.jsonl")
    (work / "docs").mkdir()
    return work


@pytest.fixture
def place(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(prepared, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_run(page: Path, place: Path) -> None:
    for name, arguments in commands(page.read_text(encoding="utf-8")):
        if name in ("lm-eval", "serve") or any(word in argument for word in ELSEWHERE for argument in arguments):
            continue
        command = main.get_command(click.Context(main), name)
        assert command is not None
        if "--depths" in arguments:
            # The model here has fewer layers.
            place = arguments.index("--depths") + 1
            arguments[place] = ",".join(str(min(int(depth), LAYERS)) for depth in arguments[place].split(","))
        done = CliRunner().invoke(command, arguments)
        assert done.exit_code == 0, f"river {name} {' '.join(arguments)}\n{done.output[-2000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_run(page: Path, place: Path) -> None:
    torch.compiler.reset()
    tokenizer = AutoTokenizer.from_pretrained("hf_folder")
    names: dict[str, Any] = {
        "river_compile": river_compile,
        "RiverConfig": RiverConfig,
        "torch": torch,
        "tokenizer": tokenizer,
        "prompts": [[5, 9, 17]],
        "texts": [json.loads(line)["text"] for line in Path("mine.jsonl").read_text().splitlines()],
        "inputs": tokenizer("w5 w9 w17", return_tensors="pt"),
        "model": AutoModelForCausalLM.from_pretrained("hf_folder").eval(),
    }
    for number, example in enumerate(examples(page.read_text(encoding="utf-8")), 1):
        if any(word in example for word in ELSEWHERE):
            continue
        if "(model, texts" in example:
            names["model"] = AutoModelForCausalLM.from_pretrained("hf_folder").eval()
            long = (" ".join([text] * 12) for text in names["texts"])
            names["texts"] = [tokenizer(text, return_tensors="pt")["input_ids"][0] for text in long]
        exec(compile(example, f"{page.name}, example {number}", "exec"), names)
