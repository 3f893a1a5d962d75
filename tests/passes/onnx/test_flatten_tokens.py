"""Branches compute on rows of tokens where they can, and stay as they are where they cannot; the function is the same
either way (see also tests/exporters/test_tensorrt_onnx.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from river_compile.errors import PassError
from river_compile.exporters.tensorrt.build import EngineOptions, default_config, write_onnx
from river_compile.passes.anatomy import Anatomy, Layer
from river_compile.passes.onnx.flatten_tokens import flatten_tokens
from river_compile.passes.onnx.graph import export_model, import_model, toposorted
from river_compile.passes.onnx.verify import Original, verify
from tests.families import LAYERS, VOCABULARY
from tests.oracle import Player, assert_close, session
from tests.static_player import StaticPlayer

Exported = Callable[[str], Path]

WIDTH = 6
FLAT = ("rows", "gemm")
"""Tensors of branches, by names that the cases below keep for them, whose shape [tokens, WIDTH] the exporter noted."""
ANATOMY = Anatomy((Layer(0, "x", "y", ("n",), (), (), (), (), 0),), "names")


def _ifs(path: Path) -> list[onnx.NodeProto]:
    graph = onnx.load(path, load_external_data=False).graph
    return [node for node in graph.node if node.op_type == "If"]


@pytest.mark.parametrize(
    ("family", "mixing"),
    [("llama", 0), ("gpt2", 0), ("falcon", 0), ("gemma2", 0), ("phi3", 0), ("bloom", 0), ("mixtral", LAYERS)],
)
def test_all_branches_of_real_layers_but_routers_yield_rows(
    exported: Exported, tmp_path: Path, family: str, mixing: int
) -> None:
    options = EngineOptions(max_length=40, dtype="float32")
    made = write_onnx(exported(family), tmp_path / "m.onnx", default_config(tau=2.0), options)
    ifs = _ifs(made.path)
    shapes = {
        value.name: len(value.type.tensor_type.shape.dim) for value in onnx.load(exported(family)).graph.value_info
    }
    batched = {name for node in ifs for name in node.output if shapes.get(name) == 3}
    assert len(batched) == mixing
    inside = {inner.op_type for node in ifs for a in node.attribute for inner in a.g.node}
    assert mixing or "Reshape" not in inside
    ours, plain = (
        StaticPlayer(session(made.path), 2, {"tau": 2.0, "max_depth": LAYERS}),
        Player(session(exported(family)), 2),
    )
    for ids in (np.array([[5, 6, 7], [8, 9, 10]]), np.array([[11], [12]])):
        assert_close(ours.step(ids % VOCABULARY), plain.step(ids % VOCABULARY))


def test_without_noted_shapes_branches_stay_as_they_are(exported: Exported, tmp_path: Path) -> None:
    model = onnx.load(exported("gpt_neox"))
    del model.graph.value_info[:]
    onnx.save(model, tmp_path / "bare.onnx")
    options = EngineOptions(max_length=40, dtype="float32")
    made = write_onnx(tmp_path / "bare.onnx", tmp_path / "m.onnx", default_config(tau=2.0), options)
    assert not any(name.endswith("/rows") for node in _ifs(made.path) for name in node.output)
    ours = StaticPlayer(session(made.path), 2, {"tau": 2.0, "max_depth": LAYERS})
    plain = Player(session(exported("gpt_neox")), 2)
    for ids in (np.array([[5, 6, 7], [8, 9, 10]]), np.array([[11], [12]])):
        assert_close(ours.step(ids), plain.step(ids))


def _model(*nodes: onnx.NodeProto, **weights: np.ndarray) -> onnx.ModelProto:
    """``y`` = an If of twice ``nodes``, which lead from ``x`` [batch, sequence, WIDTH] to ``out`` of the same shape."""
    shape = ["batch", "sequence", WIDTH]
    bodies = []
    for side in ("else_branch", "then_branch"):
        copies = []
        for node in nodes:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            made = {name for other in nodes for name in other.output}
            copy.name = f"{side}/{node.output[0]}"
            copy.input[:] = [f"{side}/{name}" if name in made else name for name in node.input]
            copy.output[:] = [f"{side}/{name}" for name in node.output]
            copies.append(copy)
        result = helper.make_tensor_value_info(f"{side}/out", TensorProto.FLOAT, shape)
        noted = [helper.make_tensor_value_info(f"{side}/{name}", TensorProto.FLOAT, ["n", WIDTH]) for name in FLAT]
        bodies.append(helper.make_graph(copies, side, [], [result], value_info=noted))
    graph = helper.make_graph(
        [
            helper.make_node("Identity", ["given"], ["x"], name="n"),
            helper.make_node("If", ["flag"], ["y"], name="river/one", else_branch=bodies[0], then_branch=bodies[1]),
            helper.make_node("Tanh", ["y"], ["z"], name="between"),
            helper.make_node("Softmax", ["z"], ["w"], name="across", axis=1),
        ],
        "g",
        [
            helper.make_tensor_value_info("given", TensorProto.FLOAT, shape),
            helper.make_tensor_value_info("flag", TensorProto.BOOL, [1]),
        ],
        [helper.make_tensor_value_info("w", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
        value_info=[helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xyz"],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def _flattened(model: onnx.ModelProto) -> int:
    """How many Ifs are flattened, after a check that the function stays the same, with either flag."""
    before = onnxruntime.InferenceSession(model.SerializeToString())
    graph = import_model(model)
    original = Original.of(graph)
    # The If stands for a layer of the original; the model of this test has it from the start.
    original = dataclasses.replace(original, nodes=frozenset(n for n in original.nodes if not n.startswith("river/")))
    count = flatten_tokens(graph, ANATOMY)
    verify(graph, original, ANATOMY, ["flatten_tokens"])
    after = onnxruntime.InferenceSession(export_model(graph).SerializeToString())
    given = np.random.default_rng(0).normal(size=(2, 3, WIDTH)).astype(np.float32)
    for flag in (True, False):
        feeds = {"given": given, "flag": np.array([flag])}
        np.testing.assert_allclose(after.run(None, feeds)[0], before.run(None, feeds)[0], rtol=1e-5, atol=1e-6)
    return count


_node = helper.make_node
_MATRIX = np.random.default_rng(1).normal(size=(WIDTH, WIDTH)).astype(np.float32)
_LAST, _EVERY = np.array([2]), np.array([0, 0, WIDTH])
_HALF = np.array([WIDTH // 2])

ROW_WISE = {
    "product": ([_node("MatMul", ["x", "m"], ["out"])], {"m": _MATRIX}),
    "bias": ([_node("Add", ["x", "b"], ["a"]), _node("Gelu", ["a"], ["out"])], {"b": _MATRIX[0]}),
    "gemm between reshapes": (
        [
            _node("Reshape", ["x", "flat"], ["rows"]),
            _node("Gemm", ["rows", "m", "b"], ["gemm"]),
            _node("Reshape", ["gemm", "back"], ["out"]),
        ],
        {"flat": np.array([-1, WIDTH]), "back": np.array([2, -1, WIDTH]), "m": _MATRIX, "b": _MATRIX[0]},
    ),
    "axes counted from the front": (
        [
            _node("ReduceMean", ["x", "axes"], ["mean"]),
            _node("Sub", ["x", "mean"], ["centred"]),
            _node("Softmax", ["centred"], ["soft"], axis=2),
            _node("Split", ["soft"], ["left", "right"], axis=2, num_outputs=2),
            _node("Concat", ["right", "left"], ["turned"], axis=2),
            _node("Slice", ["turned", "zero", "half", "axes"], ["front"]),
            _node("Slice", ["turned", "half", "end", "axes"], ["rear"]),
            _node("Concat", ["rear", "front"], ["out"], axis=-1),
        ],
        {"axes": _LAST, "zero": np.array([0]), "half": _HALF, "end": np.array([WIDTH])},
    ),
    "norm": ([_node("LayerNormalization", ["x", "s"], ["out"], axis=-1)], {"s": _MATRIX[1]}),
}

MIXING = {
    "softmax over tokens": ([_node("Softmax", ["x"], ["out"], axis=1)], {}),
    "mean over tokens": (
        [_node("ReduceMean", ["x", "axes"], ["m"]), _node("Sub", ["x", "m"], ["out"])],
        {"axes": np.array([1])},
    ),
    "a weight for each token": (
        [_node("Mul", ["x", "w3"], ["out"])],
        {"w3": _MATRIX[None, :1, :1] * np.ones((1, 3, 1), np.float32)},
    ),
    "transpose": (
        [_node("Transpose", ["x"], ["t"], perm=[1, 0, 2]), _node("Transpose", ["t"], ["out"], perm=[1, 0, 2])],
        {},
    ),
    "a stack of matrices": (
        [_node("MatMul", ["x", "ms"], ["out"])],
        {"ms": np.stack([_MATRIX, _MATRIX.T])},
    ),
    "a constant beside it": (
        [
            _node("Slice", ["x", "zero", "half", "axes"], ["l"]),
            _node("Expand", ["l", "shape"], ["e"]),
            _node("Concat", ["e", "e"], ["out"], axis=2),
        ],
        {"zero": np.array([0]), "half": _HALF, "axes": _LAST, "shape": np.array([1, 1, 1])},
    ),
}


@pytest.mark.parametrize("case", ROW_WISE)
def test_what_is_row_by_row_is_flattened(case: str) -> None:
    nodes, weights = ROW_WISE[case]
    assert _flattened(_model(*nodes, **weights)) == 1


@pytest.mark.parametrize("case", MIXING)
def test_what_mixes_tokens_or_cannot_be_told_is_left(case: str) -> None:
    nodes, weights = MIXING[case]
    assert _flattened(_model(*nodes, **weights)) == 0


def test_what_stands_between_is_done_on_rows_until_tokens_mix() -> None:
    graph = import_model(_model(*ROW_WISE["product"][0], m=_MATRIX))
    flatten_tokens(graph, ANATOMY)
    operands = {node.name: node.inputs[0].name for node in graph.nodes}
    assert operands["between"] == "y/rows" and operands["across"] == "z"
    assert "rows/y" not in operands


def test_a_circle_is_found_by_the_check_and_hangs_nothing() -> None:
    graph = import_model(_model(*ROW_WISE["product"][0], m=_MATRIX))
    original = Original.of(graph)
    between = next(node for node in graph.nodes if node.name == "between")
    between.inputs[0] = gs.Variable("w")
    graph.surgeon.nodes = toposorted(graph.nodes)
    with pytest.raises(PassError, match="before it is made"):
        verify(graph, original, ANATOMY, ["broken"])
