"""Logits that nobody reads are left out, and those that are there stay what they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import river_compile
from river_compile import RiverConfig
from river_compile.exporters.onnx import onnx_file
from river_compile.passes.onnx.cut_logits import LOGITS_FROM, cut_logits
from river_compile.passes.onnx.find_layers import find_layers
from river_compile.passes.onnx.graph import import_model
from river_compile.runtime import OnnxDecoder
from tests.conftest import Exported
from tests.families import LAYERS, VOCABULARY

IDS = np.array([[0, 0, 5, 9, 17], [33, 4, 8, 21, 6]])
MASK = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


@pytest.mark.parametrize("family", ("llama", "gpt_neox", "gemma2"))
@pytest.mark.parametrize("head_bits", ("float", 8))
def test_the_last_row_is_that_of_a_pass_that_tells_all(
    exported: Exported, tmp_path: Path, family: str, head_bits: int
) -> None:
    """At each depth, prompt and single token, with padding; the K and V of all tokens are written."""
    river_compile.export(exported(family), tmp_path / "m.onnx", RiverConfig(head_bits=head_bits))
    decoder = OnnxDecoder(tmp_path / "m.onnx", threads=1)
    for depth in range(LAYERS + 1):
        whole, cut = decoder.start(2), decoder.start(2)
        for ids, mask in ((IDS, MASK), (IDS[:, :1], None)):
            expected, _ = decoder.forward(ids, whole, mask, 2.0, depth)
            found, _ = decoder.forward(ids, cut, mask, 2.0, depth, last_only=True)
            assert expected.shape == (*ids.shape, VOCABULARY) and found.shape == (2, 1, VOCABULARY)
            np.testing.assert_allclose(found, expected[:, -1:], rtol=0, atol=1e-5 * float(np.ptp(expected)))
        for name, value in whole.caches.items():
            np.testing.assert_allclose(cut.caches[name].numpy(), value.numpy(), atol=1e-5)


def test_a_prompt_is_read_with_one_row_of_logits(exported: Exported, tmp_path: Path) -> None:
    river_compile.export(exported("llama"), tmp_path / "m.onnx", RiverConfig(tau=2.0))
    decoder = OnnxDecoder(tmp_path / "m.onnx", threads=1)
    rows = []
    run = decoder._run

    def note(feeds: dict[str, object]) -> dict[str, object]:
        outputs = run(feeds)
        rows.append(outputs["logits"].shape()[1])
        return outputs

    decoder._run = note  # type: ignore[method-assign]
    for exact in (False, True):
        decoder.generate([[5, 9, 17, 33]], 2, exact=exact)
    assert rows[0] == 1 and 4 not in rows


def test_what_has_other_results_or_a_fixed_length_stays(exported: Exported) -> None:
    def cut(change: object) -> bool:
        model = onnx_file.load(exported("llama"))
        change(model.graph)  # type: ignore[operator]
        graph = import_model(model, exported("llama").parent)
        before = len(graph.nodes)
        done = cut_logits(graph, find_layers(graph))
        assert (len(graph.nodes) > before, LOGITS_FROM in graph.overridable) == (done, done)
        return done

    def fix(graph: onnx.GraphProto) -> None:
        graph.output[0].type.tensor_type.shape.dim[1].dim_value = 4

    def normed(graph: onnx.GraphProto) -> None:
        """The state that the head reads is a result as well."""
        head = next(node for node in graph.node if node.output[0] == graph.output[0].name)
        graph.output.append(onnx.helper.make_tensor_value_info(head.input[0], onnx.TensorProto.FLOAT, ["b", "s", 64]))

    assert cut(lambda graph: None)
    assert not cut(fix)
    assert not cut(normed)
