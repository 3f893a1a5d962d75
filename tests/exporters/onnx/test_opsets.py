"""Models of either exporter of torch, of any opset: what is written loads, and is right at every depth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import transformers
from packaging.version import Version

from river_compile.api import export
from river_compile.config import RiverConfig
from river_compile.exporters.onnx.normal_form import opset_of
from river_compile.exporters.tensorrt.build import EngineOptions, default_config, write_onnx
from tests.contrib_model import ContribDecoder
from tests.cross_attending_model import cross_attending_model
from tests.families import LAYERS, VOCABULARY
from tests.oracle import Oracle, Player, assert_close, session
from tests.traced_model import traced_model

_OPSETS = [(False, 11), (False, 12), (False, 13), (False, 14), (False, 15), (False, 17), (False, 18), (False, 20)]


def _check(original: Path, river: Path, config: RiverConfig) -> onnx.ModelProto:
    """The river model, once it was compared at every depth."""
    report = export(original, river, config)
    assert report.layers == report.river_layers == LAYERS
    onnx.checker.check_model(str(river), full_check=True)
    oracle, runner = Oracle(original, river), session(river)
    ids = np.random.default_rng(0).integers(3, VOCABULARY, (2, 5))
    for depth in range(LAYERS + 1):
        found, expected = Player(runner, 2), Player(oracle.at(depth), 2)
        for tokens in (ids, ids[:, :1]):
            outputs = found.step(tokens, max_depth=depth)
            assert_close(outputs, expected.step(tokens))
            assert outputs["river.exit_depth"] == depth
    plain, off = Player(session(original), 2), Player(runner, 2)
    assert_close(off.step(ids, tau=2.0), plain.step(ids))
    return onnx.load(river)


@pytest.mark.parametrize(("dynamo", "opset"), [*_OPSETS, (True, 18), pytest.param(True, 24, marks=pytest.mark.slow)])
def test_each_depth_equals_the_plain_model_with_dequantized_weights(tmp_path: Path, dynamo: bool, opset: int) -> None:
    original = traced_model(tmp_path / "model.onnx", opset, dynamo=dynamo)
    river = _check(original, tmp_path / "m.onnx", RiverConfig(tau=2.0, activations="float"))
    assert opset_of(river) == max(opset, 13)
    assert all(tensor.name for tensor in river.graph.initializer)


@pytest.mark.parametrize("opset", (13, 17))
def test_thresholds_by_layer_and_a_quantized_head_fit_old_opsets_too(tmp_path: Path, opset: int) -> None:
    original = traced_model(tmp_path / "model.onnx", opset, dynamo=False)
    _check(original, tmp_path / "m.onnx", RiverConfig(tau=2.0, activations="float", tau_offsets=(), head_bits="float"))
    report = export(original, tmp_path / "head.onnx", RiverConfig(tau=2.0, head_bits=8, exit_every=2))
    runner = session(tmp_path / "head.onnx")
    assert report.exit_points == (2,)
    assert Player(runner, 1).step(np.array([[3, 4]]), tau=-1.0)["river.exit_depth"].item() == 2


def test_weights_that_a_file_lists_as_inputs_are_weights(tmp_path: Path) -> None:
    """Exporters of old list every weight as an input as well; files of IR 3 must."""
    original = traced_model(tmp_path / "model.onnx", 14, dynamo=False, keep_initializers_as_inputs=True)
    _check(original, tmp_path / "m.onnx", RiverConfig(tau=2.0, activations="float"))
    model = onnx.load(original)
    model.ir_version = 3
    onnx.save(model, tmp_path / "ir3.onnx")
    river = _check(tmp_path / "ir3.onnx", tmp_path / "m3.onnx", RiverConfig(tau=2.0, activations="float"))
    assert river.ir_version >= 4


@pytest.mark.parametrize("opset", (12, 17))
def test_operators_that_are_a_runtime_s_own_stay(tmp_path: Path, opset: int) -> None:
    """ONNX Runtime has norms in the standard domain that ONNX has not at this opset, or not at all."""
    model = onnx.load(ContribDecoder(layers=LAYERS).save(tmp_path / "contrib.onnx"))
    model.opset_import[0].version = opset
    for node in model.graph.node:
        if node.op_type == "ReduceSum" and opset < 13:
            node.input.pop()
            node.attribute.append(onnx.helper.make_attribute("axes", [1]))
    onnx.save(model, tmp_path / "contrib.onnx")
    assert export(tmp_path / "contrib.onnx", tmp_path / "m.onnx").river_layers == LAYERS
    ids = np.array([[3, 4, 5]])
    plain, off = Player(session(tmp_path / "contrib.onnx"), 1), Player(session(tmp_path / "m.onnx"), 1)
    assert_close(off.step(ids, tau=2.0), plain.step(ids))


@pytest.mark.parametrize("kv_cache", ("static", "scattered", "concatenated"))
def test_what_is_written_for_tensorrt_fits_its_opset(tmp_path: Path, kv_cache: str) -> None:
    original = traced_model(tmp_path / "model.onnx", 14, dynamo=False)
    options = EngineOptions(max_length=40, dtype="float32", kv_cache=kv_cache)
    made = write_onnx(original, tmp_path / "m.onnx", default_config(tau=2.0), options)
    onnx.checker.check_model(str(made.path), full_check=True)
    assert opset_of(made.proto) == (24 if kv_cache == "static" else 21)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.10"), reason="the masks of transformers cannot be traced"
)
def test_a_decoder_that_also_looks_at_an_encoder_has_a_river(tmp_path: Path) -> None:
    """As of BART or Whisper, by the legacy exporter: the encoder's keys and values come in and stay as they are."""
    original, river = cross_attending_model(tmp_path / "model.onnx", layers=LAYERS), tmp_path / "m.onnx"
    report = export(original, river, RiverConfig(tau=2.0, activations="float"))
    assert report.layers == report.river_layers == LAYERS
    oracle, runner = Oracle(original, river), session(river)
    rng = np.random.default_rng(0)
    feeds: dict[str, np.ndarray] = {
        "input_ids": rng.integers(3, VOCABULARY, (2, 1)),
        "encoder_attention_mask": np.ones((2, 6), np.int64),
        "encoder_hidden_states": rng.standard_normal((2, 6, 64), np.float32),
    }
    for value in runner.get_inputs():
        if value.name not in feeds:
            _, heads, _, width = value.shape
            sizes = (2, heads, 6 if ".encoder." in value.name else 3, width)
            feeds[value.name] = rng.standard_normal(sizes, np.float32)
    names = [value.name for value in runner.get_outputs()]
    for depth in range(LAYERS + 1):
        plain = oracle.at(depth)
        expected = plain.run(None, feeds)
        settings = {"river.tau": np.array(2, np.float32), "river.max_depth": np.array(depth)}
        found = dict(zip(names, runner.run(names, feeds | settings), strict=True))
        assert_close(found, dict(zip((value.name for value in plain.get_outputs()), expected, strict=True)))
        assert found["river.exit_depth"] == depth
