"""`river-run`, and the part of `river-export` that builds engines, as met on a machine without a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from river_compile.api import export
from river_compile.cli.export import main as river_export
from river_compile.cli.run import main as river_run
from river_compile.config import RiverConfig
from river_compile.runtime import OnnxDecoder
from tests.families import LAYERS
from tests.words import save_word_tokenizer

Exported = Callable[[str], Path]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_word_tokenizer(tmp_path_factory.mktemp("tokenizer"), eos_token=None)


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(river_run, [str(argument) for argument in arguments])


def test_an_onnx_model_generates_what_the_decoder_does(exported: Exported, tokenizer: Path, tmp_path: Path) -> None:
    model = tmp_path / "m.onnx"
    export(exported("llama"), model, RiverConfig(tau=2.0))
    result = _run(model, "--tokenizer", tokenizer, "-p", "w5 w6 w7", "--max-new-tokens", 5, "--max-depth", 2, "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    expected = OnnxDecoder(model).generate([[5, 6, 7]], 5, max_depth=2)
    assert answer["tokens"] == expected.tokens
    assert answer["exit_depths"] == [2] * 5
    assert answer["texts"] == [" ".join(f"w{token}" for token in expected.tokens[0])]
    shown = _run(model, "--tokenizer", tokenizer, "-p", "w5 w6 w7", "--max-new-tokens", 5, "--tau", 2.0)
    assert "tokens/s" in shown.stdout and f"mean exit depth {LAYERS}.0" in shown.stdout


def test_an_engine_is_built_shown_and_refused_without_a_gpu(
    exported: Exported, tokenizer: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    engine = tmp_path / "m.engine"
    arguments = [exported("llama"), "--target", "tensorrt", "--engine", engine, "--max-batch", 2, "--max-length", 24]
    arguments += ["--keep-layers", "1-3", "--runtime", "tensorrt-rtx", "--json"]
    built = CliRunner().invoke(river_export, [str(argument) for argument in arguments])
    assert built.exit_code == 0, built.output
    fields = json.loads(built.stdout)
    assert (fields["max_batch"], fields["max_length"], fields["kv_cache"]) == (2, 24, "static")
    assert fields["config"]["group_size"] == 64 and fields["config"]["quantizer"] == "rtn-symmetric"
    assert json.loads(_run(engine, "--info").stdout) == fields
    long = _run(engine, "--tokenizer", tokenizer, "-p", "w5 w6", "--max-new-tokens", 24)
    assert long.exit_code == 2 and long.stderr == "error: max_length: this engine's KV cache holds 24 tokens, not 25\n"
    many = _run(engine, "--tokenizer", tokenizer, "-p", "w5", "-p", "w6", "-p", "w7", "--max-new-tokens", 2)
    assert many.exit_code == 2 and many.stderr.startswith("error: max_batch: this engine takes 1 to 2 sequences")
    if not torch.cuda.is_available():
        alone = _run(engine, "--tokenizer", tokenizer, "-p", "w5", "--max-new-tokens", 2)
        assert alone.exit_code == 2 and alone.stderr.startswith("error: no GPU: running a TensorRT engine needs one")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "x.engine"], "engine: is for --target tensorrt only"),
        (["--dtype", "float16"], "dtype: is for --target tensorrt only"),
        (["--weightless"], "weightless: is for --target tensorrt only"),
        (["--target", "tensorrt", "--activations", "int8"], "activations: an engine's river computes in"),
        (["--target", "tensorrt", "--avg-bits", "5"], "target: an engine's bits are planned by"),
        (["--target", "tensorrt", "--max-length", "1"], "max_length: must be a whole number, 2 or more"),
        (["--target", "tensorrt", "--quantizer", "rtn"], "quantizer: TensorRT dequantizes symmetric grids only"),
        (["--target", "tensorrt", "--compute-capability", "5.0"], "compute_capabilities: "),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    exported: Exported, tmp_path: Path, arguments: list[str], message: str
) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    result = CliRunner().invoke(river_export, [str(exported("llama")), *arguments, "-o", str(tmp_path / "o.onnx")])
    assert result.exit_code == 2 and result.stderr.strip().startswith(f"error: {message}"), result.output
    assert len(result.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir()) and not exported("llama").with_suffix(".engine").exists()


def test_what_is_missing_is_asked_for(tmp_path: Path, tokenizer: Path) -> None:
    assert _run(tmp_path / "no.engine", "--info").stderr == f"error: {tmp_path / 'no.engine'}: no such file\n"
    asked = _run(tmp_path / "no.engine")
    assert asked.exit_code == 2 and "--tokenizer FOLDER and --prompt TEXT" in asked.stderr
    missing = _run(tmp_path / "no.engine", "--tokenizer", tmp_path / "none", "-p", "x")
    assert missing.exit_code == 2 and missing.stderr.startswith(f"error: {tmp_path / 'none'}: no tokenizer")
