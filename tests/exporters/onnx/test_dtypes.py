"""Half-precision models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from river_compile.api import export
from river_compile.config import RiverConfig
from river_compile.passes.onnx.external_data import tensor_bytes
from tests.conftest import Exported
from tests.contrib_model import ContribDecoder
from tests.families import VOCABULARY
from tests.oracle import Player, assert_close, assert_every_depth, session

LAYERS = 2


@pytest.mark.parametrize("family", ("llama", "gpt2"))
def test_float16(exported: Exported, family: str, tmp_path: Path) -> None:
    original, river = exported(family, LAYERS, "float16"), tmp_path / "m.onnx"
    export(original, river, RiverConfig(tau=2.0, activations="float"))
    # float16 has 11 bits: 4e-3 of the range is a handful of roundings in each layer.
    assert_every_depth(original, river, tolerance=4e-3)


@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("family", ("llama", "gpt2"))
def test_float16_with_default_activations(exported: Exported, family: str, bits: int, tmp_path: Path) -> None:
    """Within an If, ONNX Runtime's CPU makes zeros of some float16 products with int8 activations."""
    original, river = exported(family, LAYERS, "float16"), tmp_path / "m.onnx"
    export(original, river, RiverConfig(tau=2.0, bits=bits))
    products = [node for node in _inner_nodes(river) if node.op_type == "MatMulNBits"]
    assert {a.i for node in products for a in node.attribute if a.name == "accuracy_level"} == {4}
    assert_every_depth(original, river, tolerance=0.1)


@pytest.mark.parametrize("dtype", (np.float32, np.float16))
def test_default_activations_with_a_bias_within_the_product(dtype: type, tmp_path: Path) -> None:
    original, river = ContribDecoder(form="gemm", dtype=dtype).save(tmp_path / "model.onnx"), tmp_path / "m.onnx"
    report = export(original, river, RiverConfig(tau=2.0))
    assert all(len(node.input) == 6 for node in _inner_nodes(river) if node.op_type == "MatMulNBits")
    assert report.river_bytes == sum(
        tensor_bytes(tensor)
        for tensor in onnx.load(river).graph.initializer
        if tensor.name.endswith((".values", ".scales", ".zero_points"))
    )
    assert_every_depth(original, river, tolerance=0.1)


@pytest.mark.parametrize("bits", (4, 8))
def test_a_float16_head_with_default_activations(exported: Exported, bits: int, tmp_path: Path) -> None:
    original, river, plain = exported("llama", LAYERS, "float16"), tmp_path / "m.onnx", tmp_path / "plain.onnx"
    export(original, river, RiverConfig(tau=2.0, head_bits=bits))
    export(original, plain, RiverConfig(tau=2.0))
    ids = np.random.default_rng(0).integers(3, VOCABULARY, (2, 7))
    found, expected = (Player(session(path), 2).step(ids, max_depth=0) for path in (river, plain))
    assert np.abs(found["logits"] - expected["logits"]).max() > 0
    assert_close(found, expected, 0.1 if bits == 4 else 0.02)


@pytest.mark.parametrize("activations", ("int8", "float"))
@pytest.mark.parametrize("inside", (TensorProto.FLOAT, TensorProto.FLOAT16))
def test_weights_kept_in_a_type_that_nothing_computes_in(inside: int, activations: str, tmp_path: Path) -> None:
    """Converters leave float16 weights and cast them in the graph, or cast float32 weights down."""
    kept, dtype = (np.float16, np.float32) if inside == TensorProto.FLOAT else (np.float32, np.float16)
    original, river = ContribDecoder(dtype=dtype).save(tmp_path / "model.onnx"), tmp_path / "m.onnx"
    model = onnx.load(original)
    products = {node.input[1]: node for node in model.graph.node if node.op_type == "MatMul"}
    for tensor in model.graph.initializer:
        if tensor.name in products:
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype(kept), tensor.name))
            products[tensor.name].input[1] = f"{tensor.name}/cast"
            cast = onnx.helper.make_node("Cast", [tensor.name], [f"{tensor.name}/cast"], tensor.name, to=inside)
            model.graph.node.insert(0, cast)
    onnx.save(model, original)
    export(original, river, RiverConfig(tau=2.0, activations=activations))
    assert_every_depth(original, river, tolerance=0.1 if activations == "int8" else 4e-3)


@pytest.mark.parametrize("activations", ("int8", "float"))
def test_bfloat16(exported: Exported, activations: str, tmp_path: Path) -> None:
    """ONNX Runtime's CPU has no bfloat16 kernels, for the plain model neither. So the exported graph, its weights and
    casts widened to float32, is compared with the original, widened alike: the wiring is what is tested."""
    original, river = exported("llama", LAYERS, "bfloat16"), tmp_path / "m.onnx"
    export(original, river, RiverConfig(tau=2.0, activations=activations))
    types = {tensor.data_type for tensor in onnx.load(river).graph.initializer if ".scales" in tensor.name}
    assert types == {TensorProto.BFLOAT16}
    wide, wide_river = tmp_path / "wide.onnx", tmp_path / "wide.river.onnx"
    _widen(original, wide)
    _widen(river, wide_river)
    assert_every_depth(wide, wide_river)


def test_similarity_is_computed_in_float32(exported: Exported, tmp_path: Path) -> None:
    river = tmp_path / "m.onnx"
    export(exported("llama", LAYERS, "float16"), river)
    decisions = [node for node in _inner_nodes(river) if node.op_type == "If"]
    assert len(decisions) == LAYERS - 1
    for nodes in (a.g.node for decision in decisions for a in decision.attribute if a.name == "then_branch"):
        kinds = {o: n for n in nodes for o in n.output}
        norms = [node for node in nodes if node.op_type == "ReduceL2"]
        assert len(norms) == 2
        for norm in norms:
            assert kinds[norm.input[0]].op_type == "Cast"
            assert kinds[norm.input[0]].attribute[0].i == TensorProto.FLOAT


def _inner_nodes(path: Path) -> list[onnx.NodeProto]:
    nodes = onnx.load(path).graph.node
    return [inner for node in nodes for a in node.attribute if a.HasField("g") for inner in a.g.node]


def _widen(source: Path, target: Path) -> None:
    model = onnx.load(source)

    def value(info: onnx.ValueInfoProto) -> None:
        if info.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            info.type.tensor_type.elem_type = TensorProto.FLOAT

    def tensor(constant: onnx.TensorProto) -> None:
        if constant.data_type == TensorProto.BFLOAT16:
            values = onnx.numpy_helper.to_array(constant).astype(np.float32)
            constant.CopyFrom(onnx.numpy_helper.from_array(values, constant.name))

    def widen(graph: onnx.GraphProto) -> None:
        for info in [*graph.input, *graph.output, *graph.value_info]:
            value(info)
        for constant in graph.initializer:
            tensor(constant)
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    widen(attribute.g)
                elif attribute.HasField("t"):
                    tensor(attribute.t)
                elif (
                    attribute.name in ("to", "stash_type", "softmax_precision") and attribute.i == TensorProto.BFLOAT16
                ):
                    attribute.i = TensorProto.FLOAT

    widen(model.graph)
    onnx.save(model, target)
