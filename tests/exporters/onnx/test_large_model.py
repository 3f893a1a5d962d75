"""Models of a size: one of Llama-3.2-1B's shape in float16, its export's time and memory and weights beyond two
gigabytes; and what a river adds to the memory of a model that decodes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from river_compile.api import export
from river_compile.config import RiverConfig
from river_compile.exporters.tensorrt.build import EngineOptions, build, default_config
from river_compile.measure.plan import plan_river

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
import json, sys, time
import river_compile
started = time.perf_counter()
config = river_compile.RiverConfig(head_bits=json.loads(sys.argv[3]))
report = river_compile.export(sys.argv[1], sys.argv[2], config, check=json.loads(sys.argv[4]))
# Not getrusage's peak, which a process has from the one that started it.
held = dict(line.split(":") for line in open("/proc/self/status"))
peak = int(held["VmHWM"].split()[0]) * 1024
seconds = time.perf_counter() - started
print(json.dumps({"seconds": seconds, "peak": peak, "layers": report.river_layers, "steps": report.seconds}))
"""


_MAKE_QUARTER = """
import pathlib, sys, torch, transformers
from river_compile.exporters.onnx.hf import export_decoder
config = transformers.LlamaConfig(
    dtype="float32", hidden_size=1024, intermediate_size=4096, num_hidden_layers=12, num_attention_heads=16,
    num_key_value_heads=4, vocab_size=32000, tie_word_embeddings=True,
)
export_decoder(transformers.AutoModelForCausalLM.from_config(config).eval(), pathlib.Path(sys.argv[1]))
config.save_pretrained(pathlib.Path(sys.argv[1]).parent)
"""

# Memory that is the process's own: pages of the mapped file can go at any time.
_DECODE = """
import json, sys
from river_compile.runtime import OnnxDecoder
decoder = OnnxDecoder(sys.argv[1])
for depth in json.loads(sys.argv[2]):
    decoder.generate([[5, 6, 7, 8]], 6, max_depth=depth)
held = dict(line.split(":") for line in open("/proc/self/status"))
print(json.dumps({"own": int(held["RssAnon"].split()[0]) * 1024, "peak": int(held["VmHWM"].split()[0]) * 1024}))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "model.onnx"
    subprocess.run([sys.executable, "-c", _MAKE, str(path)], check=True)
    return path


@pytest.fixture(scope="module")
def quarter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quarter of a billion parameters in float32, its config beside it."""
    path = tmp_path_factory.mktemp("quarter") / "model.onnx"
    subprocess.run([sys.executable, "-c", _MAKE_QUARTER, str(path)], check=True)
    return path


def _exported(model: Path, river: Path, head_bits: str, *, check: bool) -> dict[str, Any]:
    command = [sys.executable, "-c", _EXPORT, str(model), str(river), head_bits, json.dumps(check)]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("head_bits", ["float", 8])
def test_an_export_takes_the_memory_that_a_plan_tells(head_bits: int | str, quarter: Path, tmp_path: Path) -> None:
    config = RiverConfig(head_bits=head_bits)
    plan = plan_river(quarter.parent, 1e9, config=config).export
    assert plan is not None
    measured = _exported(quarter, tmp_path / "river.onnx", json.dumps(head_bits), check=False)
    print(plan, plan.seconds, measured)
    assert plan.peak == pytest.approx(measured["peak"], rel=0.15)
    # A shared machine: a rule of thumb.
    assert plan.seconds == pytest.approx(measured["steps"]["total"], rel=1)


@pytest.mark.slow
def test_a_billion_parameters_in_a_minute_and_little_more_memory_than_the_model(model: Path, tmp_path: Path) -> None:
    size = sum(os.path.getsize(path) for path in model.parent.iterdir())
    started = time.perf_counter()
    measured = _exported(model, tmp_path / "river.onnx", '"float"', check=True)
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


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read where Linux tells it")
def test_backbone_and_river_decode_in_at_most_1_3_times_the_memory_of_the_backbone(
    quarter: Path, tmp_path: Path
) -> None:
    river = tmp_path / "river.onnx"
    export(quarter, river, RiverConfig(head_bits=8))

    def held(path: Path, depths: list[int | None]) -> dict[str, int]:
        command = [sys.executable, "-c", _DECODE, str(path), json.dumps(depths)]
        found: dict[str, int] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        return found

    alone, both = held(quarter, [None]), held(river, [0, 4, None])
    print({"plain": alone, "river": both})
    assert both["own"] <= 1.3 * alone["own"]
    assert both["peak"] <= 1.3 * alone["peak"]
