"""The small passes that bring a graph into the form that TensorRT takes, each alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto

from river_compile.config import RiverConfig
from river_compile.exporters.onnx import onnx_file
from river_compile.passes.onnx.graph import OnnxGraph, export_model, import_model
from river_compile.passes.onnx.join_linears import join_linears
from river_compile.passes.onnx.lower_attention import lower_attention
from river_compile.passes.onnx.narrow_floats import narrow_floats
from tests.families import LAYERS
from tests.oracle import Player, assert_close, session

Exported = Callable[[str], Path]
Pass = Callable[[OnnxGraph], object]

IDS = (np.array([[5, 6, 7], [8, 9, 10]]), np.array([[11], [12]]))


def _after(model: Path, changed: Pass, output: Path) -> onnx.ModelProto:
    graph = import_model(onnx_file.load(model), model.parent)
    changed(graph)
    onnx_file.save(export_model(graph), output, model.parent)
    return onnx.load(output)


def _assert_equal(model: Path, output: Path, tolerance: float = 1e-4) -> None:
    found, expected = Player(session(output), 2), Player(session(model), 2)
    for ids in IDS:
        assert_close(found.step(ids), expected.step(ids), tolerance)


def _products(model: ModelProto) -> int:
    return [node.op_type for node in model.graph.node].count("MatMul")


@pytest.mark.parametrize("family", ("llama", "gpt2", "gemma"))
def test_lower_attention_keeps_the_function(exported: Exported, tmp_path: Path, family: str) -> None:
    """With as many key heads as query heads, with two for four, and with one for all."""
    made = _after(exported(family), lower_attention, tmp_path / "m.onnx")
    operators = [node.op_type for node in made.graph.node]
    assert "Attention" not in operators and operators.count("Softmax") == LAYERS
    _assert_equal(exported(family), tmp_path / "m.onnx")


def test_lower_attention_leaves_other_forms_alone(exported: Exported) -> None:
    graph = import_model(onnx_file.load(exported("llama")), exported("llama").parent)
    for node in graph.nodes:
        if node.op == "Attention":
            node.attrs["softcap"] = 30.0
    assert lower_attention(graph) == 0


def test_join_linears_keeps_the_function(exported: Exported, tmp_path: Path) -> None:
    made = _after(exported("llama"), lambda graph: join_linears(graph, RiverConfig()), tmp_path / "m.onnx")
    # Query, key and value are one product, gate and up another.
    assert _products(onnx.load(exported("llama"))) - _products(made) == 3 * LAYERS
    _assert_equal(exported("llama"), tmp_path / "m.onnx")


def test_join_linears_keeps_apart_what_gets_other_bits(exported: Exported, tmp_path: Path) -> None:
    config = RiverConfig(bits_for=(("*v_proj*", 8),))
    made = _after(exported("llama"), lambda graph: join_linears(graph, config), tmp_path / "m.onnx")
    assert _products(onnx.load(exported("llama"))) - _products(made) == 2 * LAYERS


def test_narrow_floats_keeps_the_function_nearly(exported: Exported, tmp_path: Path) -> None:
    made = _after(exported("gpt_neox"), lambda graph: narrow_floats(graph, "float16"), tmp_path / "m.onnx")
    onnx.checker.check_model(made, full_check=True)
    _assert_equal(exported("gpt_neox"), tmp_path / "m.onnx", 5e-3)


def test_narrow_floats_leaves_no_wide_matrix(exported: Exported, tmp_path: Path) -> None:
    made = _after(exported("llama"), lambda graph: narrow_floats(graph, "bfloat16"), tmp_path / "m.onnx")
    onnx.checker.check_model(made, full_check=True)
    sizes = {t.name: t.data_type for t in made.graph.initializer if len(t.dims) == 2 and min(t.dims) > 1}
    assert set(sizes.values()) == {TensorProto.BFLOAT16}
    wide = [t.dims for t in made.graph.initializer if t.data_type == TensorProto.FLOAT and np.prod(t.dims) > 1]
    # The frequencies of rotary positions.
    assert len(wide) == 1 and np.prod(wide[0]) == max(wide[0])


def test_narrow_floats_cuts_what_float16_cannot_hold(exported: Exported, tmp_path: Path) -> None:
    model = onnx.load(exported("llama"))
    weight = next(t for t in model.graph.initializer if len(t.dims) == 2)
    values = onnx.numpy_helper.to_array(weight).copy()
    values[0, 0] = 1e6
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(model, tmp_path / "big.onnx")
    made = _after(tmp_path / "big.onnx", lambda graph: narrow_floats(graph, "float16"), tmp_path / "m.onnx")
    found = {t.name: onnx.numpy_helper.to_array(t) for t in made.graph.initializer}
    narrow = next(value for name, value in found.items() if name.startswith(weight.name))
    assert narrow.dtype == np.float16 and np.isfinite(narrow).all() and narrow[0, 0] == 65504
