"""Other projects' exporters and runtimes, each in a virtual environment of its own under .cache."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from click.testing import CliRunner
from filelock import FileLock
from transformers import AutoConfig, AutoModelForCausalLM

from river_compile.cli.evaluate import main as river_eval
from river_compile.cli.export import main as river_export
from river_compile.runtime import OnnxDecoder
from tests.words import save_word_model, save_word_texts

__all__ = ["NEW_TOKENS", "PROMPT", "Peer", "check_river", "save_model"]

_VENVS = Path(__file__).parents[2] / ".cache" / "venvs"

PROMPT = [5, 9, 17, 33]
NEW_TOKENS = 8


@dataclass(frozen=True)
class Peer:
    """A virtual environment with pinned packages, made on first use."""

    name: str
    pins: tuple[str, ...]

    @property
    def folder(self) -> Path:
        digest = hashlib.sha256("\n".join((*self.pins, sys.version)).encode()).hexdigest()[:12]
        return _VENVS / f"{self.name}-{digest}"

    def made(self) -> Peer:
        _VENVS.mkdir(parents=True, exist_ok=True)
        with FileLock(_VENVS / f"{self.name}.lock", timeout=1800):
            ready = self.folder / ".ready"
            if not ready.exists():
                _run([sys.executable, "-m", "venv", "--clear", self.folder])
                _run([self.folder / "bin" / "pip", "install", "--quiet", *self.pins])
                ready.touch()
        return self

    def run(self, program: str, *arguments: object) -> str:
        """Run a Python program in it; what it prints last."""
        printed = _run([self.folder / "bin" / "python", "-c", program, *arguments])
        return printed.strip().splitlines()[-1]

    def call(self, command: str, *arguments: object) -> None:
        _run([self.folder / "bin" / command, *arguments])


def _run(command: Sequence[object]) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, f"{command[0]}: {done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def save_model(folder: Path) -> Path:
    """A folder of a random model and its tokenizer. No layer is as wide as the vocabulary: GenAI's builder would take
    that one for the LM head."""
    save_word_model(folder)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder, intermediate_size=192)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    model.save_pretrained(folder)
    return folder


def check_river(model: Path, tokenizer: Path, river: Path, expected: list[int], work: Path) -> None:
    """`river-export`, `river-eval` and generation take a model that should say ``expected``.

    Args:
        model: an ONNX file, or a folder that one lies in.
        river: the river model's file; where the model is a folder, in a folder that is made of it.
    """
    source = model if model.is_file() else model / river.name
    assert OnnxDecoder(source).generate([PROMPT], NEW_TOKENS).tokens == [expected]
    output = ("-o", river, "--external-data") if model.is_file() else ("-o", river.parent)
    made = CliRunner().invoke(river_export, [str(a) for a in (model, "--tau", "2", *output)])
    assert made.exit_code == 0, made.output
    decoder = OnnxDecoder(river)
    assert decoder.generate([PROMPT], NEW_TOKENS).tokens == [expected]
    assert decoder.generate([PROMPT], NEW_TOKENS, max_depth=0).exit_depths == [0] * (NEW_TOKENS - 1)
    texts = save_word_texts(work / "texts.jsonl", count=2)
    options = ["--texts", texts, "--tau", "0.9", "--speed-rounds", "0", "--no-cache", "--json"]
    read = CliRunner().invoke(river_eval, [str(a) for a in (river, "--tokenizer", tokenizer, *options)])
    assert read.exit_code == 0, read.output
    settings = json.loads(read.stdout)["settings"]
    assert all(0 <= setting["top1"]["value"] <= 1 for setting in settings)
