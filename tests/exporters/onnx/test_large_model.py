"""A model of Llama-3.2-1B's shape in float16: time and memory of an export, and weights beyond two gigabytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from river_compile.exporters.tensorrt.build import EngineOptions, build, default_config

_PARAMETERS = 1.236e9

_MAKE = """
import pathlib, sys, torch, transformers
from river_compile.exporters.onnx.hf import export_decoder
config = transformers.LlamaConfig(
    hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
    head_dim=64, vocab_size=128256, tie_word_embeddings=True, max_position_embeddings=131072,
)
torch.manual_seed(0)
torch.set_default_dtype(torch.float16)
export_decoder(transformers.AutoModelForCausalLM.from_config(config).half().eval(), pathlib.Path(sys.argv[1]))
"""

_EXPORT = """
import json, resource, sys, time
import river_compile
started = time.perf_counter()
report = river_compile.export(sys.argv[1], sys.argv[2])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
seconds = time.perf_counter() - started
print(json.dumps({"seconds": seconds, "peak": peak, "layers": report.river_layers, "steps": report.seconds}))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "model.onnx"
    subprocess.run([sys.executable, "-c", _MAKE, str(path)], check=True)
    return path


@pytest.mark.slow
def test_a_billion_parameters_in_a_minute_and_little_more_memory_than_the_model(model: Path, tmp_path: Path) -> None:
    size = sum(os.path.getsize(path) for path in model.parent.iterdir())
    started = time.perf_counter()
    command = [sys.executable, "-c", _EXPORT, str(model), str(tmp_path / "river.onnx")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    measured = json.loads(done.stdout)
    print(f"{measured}, model {size / 1e9:.2f} GB, wall {time.perf_counter() - started:.1f} s")
    assert measured["layers"] == 16
    assert measured["peak"] <= size + 3e9
    assert measured["seconds"] <= 60 * _PARAMETERS / 1e9


@pytest.mark.slow
def test_tensorrt_parses_more_than_two_gigabytes_from_its_file(model: Path, tmp_path: Path) -> None:
    """No protobuf message holds that much: the weights are read from the external data."""
    pytest.importorskip("tensorrt_rtx_bindings")
    options = EngineOptions(max_length=512, runtime="tensorrt-rtx")
    config = default_config(keep_layers=tuple(range(14)))
    info = build(model, tmp_path / "m.engine", config, options)
    assert info.nbytes > 1 << 31 and (info.layers, info.river_layers, info.dtype) == (16, 2, "float16")
