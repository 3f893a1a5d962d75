"""The quantized LM head: taken after an exit and only then, and the product with its dequantized weight."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from river_compile.api import export, plan
from river_compile.config import RiverConfig
from river_compile.errors import ConfigError
from river_compile.exporters.onnx.rewrite import survey
from river_compile.passes.onnx.share_head import HEAD
from tests.conftest import Exported
from tests.families import LAYERS, VOCABULARY, exported_layers, families_that_export
from tests.oracle import Oracle, Player, assert_close, dequantize, session


def _telling(model: Path, tensors: list[str], target: Path) -> Path:
    """The model with more outputs."""
    changed = onnx.load(model)
    for name in tensors:
        changed.graph.output.append(onnx.ValueInfoProto(name=name))
    onnx.save(changed, target)
    return target


def _head_weight(river: Path) -> np.ndarray:
    """Dequantized, in the layout of the original's initializer."""
    graph = onnx.load(river).graph
    choice = next(node for node in graph.node if node.name == HEAD)
    product = next(a.g for a in choice.attribute if a.name == "then_branch").node[0]
    (weight,) = dequantize(product, {tensor.name: tensor for tensor in graph.initializer}).values()
    return weight


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", families_that_export())
def test_the_head_goes_with_the_last_layer(exported: Exported, family: str, bits: int, tmp_path: Path) -> None:
    layers = exported_layers(family)
    original, river = exported(family, layers), tmp_path / "m.onnx"
    export(original, river, RiverConfig(tau=2.0, activations="float", head_bits=bits))
    found = survey(onnx.load(original, load_external_data=False), original.parent, RiverConfig())[1].head
    assert found is not None
    assert found.source.outputs == VOCABULARY
    state, result = found.source.node.inputs[0].name, found.source.node.outputs[0].name
    oracle = Oracle(_telling(original, [state, result], tmp_path / "plain.onnx"), river)
    runner = session(_telling(river, [result], tmp_path / "river.onnx"))
    weight = _head_weight(river)
    weight = weight.T if found.source.transposed else weight
    bias = onnx.numpy_helper.to_array(_initializer(original, found.source.bias)) if found.source.bias else 0
    for depth in range(layers + 1):
        outputs = Player(runner, 2).step(_ids(depth), max_depth=depth)
        expected = Player(oracle.at(depth), 2).step(_ids(depth))
        exited = expected[state] @ weight + bias
        assert_close(outputs, {result: exited if depth < layers else expected[result]})
    assert np.abs(exited - expected[result]).max() > 0


def test_a_token_that_exits_by_similarity_takes_the_quantized_head(exported: Exported, tmp_path: Path) -> None:
    original = exported("llama")
    settings = {"tau": -1.0, "activations": "float"}
    export(original, tmp_path / "float.onnx", RiverConfig(**settings))
    export(original, tmp_path / "four.onnx", RiverConfig(**settings, head_bits=4))
    plain, quantized = (Player(session(tmp_path / name), 1).step(_ids(0)[:1]) for name in ("float.onnx", "four.onnx"))
    assert plain["river.exit_depth"] == quantized["river.exit_depth"] == 1
    assert np.abs(plain["logits"] - quantized["logits"]).max() > 0


def test_kept_layers_at_the_end_leave_the_head_to_the_last_twin(exported: Exported, tmp_path: Path) -> None:
    original, river = exported("llama"), tmp_path / "m.onnx"
    export(original, river, RiverConfig(tau=2.0, head_bits=8, keep_layers=(-1,)))
    choice = next(node for node in onnx.load(river).graph.node if node.name == HEAD)
    assert choice.input[0] == onnx.load(river).graph.node[_last_layer(river)].input[0]


def test_the_report_counts_the_head(exported: Exported, tmp_path: Path) -> None:
    original = exported("llama")
    without, with_head = (plan(original, RiverConfig(head_bits=bits)) for bits in ("float", 8))
    assert len(with_head.linears) == len(without.linears) + 1
    assert with_head.linears[-1].bits == 8
    assert with_head.report.river_bytes > without.report.river_bytes
    assert with_head.report.average_bits == without.report.average_bits


def test_the_plan_shows_the_head_beside_layers_that_stay_float(exported: Exported) -> None:
    config = RiverConfig(head_bits=8, bits_for=(("*down*", "float"),))
    linears = plan(exported("llama"), config).linears
    assert [linear.bits for linear in linears].count(None) == LAYERS
    assert (linears[-1].layer, linears[-1].bits) == (LAYERS, 8)


def test_a_wrong_width_is_named() -> None:
    with pytest.raises(ConfigError, match="head_bits"):
        RiverConfig(head_bits=5)


def test_the_result_loads_without_a_warning_of_its_own(exported: Exported, tmp_path: Path) -> None:
    export(exported("gpt2"), tmp_path / "m.onnx", RiverConfig(head_bits=8))
    onnx.checker.check_model(str(tmp_path / "m.onnx"))
    ort.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])


def _ids(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, VOCABULARY, (2, 12))


def _initializer(model: Path, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in onnx.load(model).graph.initializer if tensor.name == name)


def _last_layer(river: Path) -> int:
    names = [node.name for node in onnx.load(river).graph.node]
    return max(index for index, name in enumerate(names) if name.startswith("river/layer."))
