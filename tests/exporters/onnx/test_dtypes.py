"""Half-precision models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from river_compile.api import export
from river_compile.config import RiverConfig
from tests.conftest import Exported
from tests.oracle import assert_every_depth

LAYERS = 2


@pytest.mark.parametrize("family", ("llama", "gpt2"))
def test_float16(exported: Exported, family: str, tmp_path: Path) -> None:
    original, river = exported(family, LAYERS, "float16"), tmp_path / "m.onnx"
    export(original, river, RiverConfig(tau=2.0, activations="float"))
    # float16 has 11 bits: 4e-3 of the range is a handful of roundings in each layer.
    assert_every_depth(original, river, tolerance=4e-3)


def test_bfloat16(exported: Exported, tmp_path: Path) -> None:
    """ONNX Runtime's CPU has no bfloat16 kernels, for the plain model neither. So the exported graph, its weights and
    casts widened to float32, is compared with the original, widened alike: the wiring is what is tested."""
    original, river = exported("llama", LAYERS, "bfloat16"), tmp_path / "m.onnx"
    export(original, river, RiverConfig(tau=2.0, activations="float"))
    types = {tensor.data_type for tensor in onnx.load(river).graph.initializer if ".scales" in tensor.name}
    assert types == {TensorProto.BFLOAT16}
    wide, wide_river = tmp_path / "wide.onnx", tmp_path / "wide.river.onnx"
    _widen(original, wide)
    _widen(river, wide_river)
    assert_every_depth(wide, wide_river)


def test_similarity_is_computed_in_float32(exported: Exported, tmp_path: Path) -> None:
    river = tmp_path / "m.onnx"
    export(exported("llama", LAYERS, "float16"), river)
    for node in onnx.load(river).graph.node:
        for branch in (a.g for a in node.attribute if a.name == "else_branch"):
            kinds = {o: n for n in branch.node for o in n.output}
            for norm in (n for n in branch.node if n.op_type == "LpNormalization"):
                assert kinds[norm.input[0]].op_type == "Cast"
                assert kinds[norm.input[0]].attribute[0].i == TensorProto.FLOAT


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
