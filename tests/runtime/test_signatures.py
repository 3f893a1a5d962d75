"""The same decoder under many signatures generates the same tokens, with and without a river."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from river_compile.api import export
from river_compile.config import RiverConfig
from river_compile.errors import ConfigError, InputError
from river_compile.measure.calibratable import OnnxCalibratable, Thresholds
from river_compile.measure.subjects import BACKBONE, OnnxSubject, Setting
from river_compile.runtime import OnnxDecoder
from tests.contrib_model import ContribDecoder
from tests.runtime.test_exact_onnx import eager
from tests.signatures import ROOM, VARIANTS, write

Exported = Callable[[str], Path]

PROMPT = [5, 9, 17, 33]
SILENT = RiverConfig(tau=2.0, activations="float")


@pytest.fixture(scope="module")
def river(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("signatures") / "model.river.onnx"
    export(exported("llama"), target, SILENT)
    return target


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_signature_is_understood(exported: Exported, river: Path, tmp_path: Path, variant: str) -> None:
    expected = OnnxDecoder(river, threads=1)
    source = write(exported("llama"), variant, tmp_path / "model.onnx")
    plain = OnnxDecoder(source, threads=1)
    assert plain.generate([PROMPT], 12).tokens == expected.generate([PROMPT], 12).tokens
    export(source, tmp_path / "m.onnx", SILENT)
    found = OnnxDecoder(tmp_path / "m.onnx", threads=1)
    assert found.generate([PROMPT], 12).tokens == expected.generate([PROMPT], 12).tokens
    assert found.generate([PROMPT], 12, max_depth=1).tokens == expected.generate([PROMPT], 12, max_depth=1).tokens
    exact = eager(found).generate([PROMPT], 12, exact=True)
    assert exact.tokens == expected.generate([PROMPT], 12).tokens
    # Without logits for every token nothing can be verified.
    assert (exact.drafted > 0) == (variant not in ("logits of the last token", "one token a pass"))
    ids = np.arange(3, 15)
    ours, theirs = OnnxSubject(tmp_path / "m.onnx", 1), OnnxSubject(river, 1)
    for setting, stepwise in ((BACKBONE, False), (Setting(0.5), True)):
        one, other = (subject.read(ids, setting, stepwise=stepwise) for subject in (ours, theirs))
        np.testing.assert_allclose(one.logits, other.logits, atol=1e-3)
        np.testing.assert_array_equal(one.depths, other.depths)
        if variant != "other names":  # which name neither keys nor values
            for mine, its in zip(one.keys + one.values, other.keys + other.values, strict=True):
                np.testing.assert_allclose(mine, its, atol=1e-3)
    one, other = (OnnxCalibratable(path, 1).read(ids, Thresholds(0.5), 4) for path in (tmp_path / "m.onnx", river))
    np.testing.assert_allclose(one[0][3:], other[0][3:], atol=1e-3)


def test_slots_tell_what_grows(exported: Exported, tmp_path: Path) -> None:
    grows = OnnxDecoder(write(exported("llama"), "nothing said of the cache", tmp_path / "a.onnx"), threads=1)
    first = grows.signature.slots[0]
    assert (first.past, first.sizes, first.axis, first.static, first.room) == (
        "past_key_values.0.key",
        (None, 2, 0, 16),
        2,
        False,
        None,
    )
    other = OnnxDecoder(write(exported("llama"), "tokens before heads", tmp_path / "b.onnx"), threads=1)
    assert {(slot.sizes, slot.axis) for slot in other.signature.slots} == {((None, 0, 2, 16), 1)}
    static = OnnxDecoder(write(exported("llama"), "static", tmp_path / "c.onnx"), threads=1)
    assert {(slot.room, slot.axis) for slot in static.signature.slots} == {(ROOM, 2)}


def test_a_static_cache_says_when_it_is_full(exported: Exported, tmp_path: Path) -> None:
    decoder = OnnxDecoder(write(exported("llama"), "static", tmp_path / "m.onnx"), threads=1)
    assert len(decoder.generate([PROMPT], ROOM - 3).tokens[0]) == ROOM - 3
    with pytest.raises(ConfigError, match=rf"^max_length: .* holds {ROOM} tokens, not {ROOM + 1}$"):
        decoder.generate([PROMPT], ROOM - 2)
    with pytest.raises(ConfigError, match=r"^max_length: "):
        decoder.forward(np.zeros((1, ROOM + 1), np.int64), decoder.start(1))


def test_a_fixed_batch_says_so(exported: Exported, tmp_path: Path) -> None:
    decoder = OnnxDecoder(write(exported("llama"), "one sequence", tmp_path / "m.onnx"), threads=1)
    with pytest.raises(ConfigError, match=r"^prompts: this model takes 1 sequence at once, not 2$"):
        decoder.generate([PROMPT, PROMPT], 2)


def test_prompts_of_two_lengths_where_padding_cannot_be_told(exported: Exported, tmp_path: Path) -> None:
    """GroupQueryAttention counts the mask's ones: with padding on the left its tokens would silently be others."""
    for path in (
        ContribDecoder().save(tmp_path / "contrib.onnx"),
        write(exported("llama"), "no mask", tmp_path / "maskless.onnx"),
    ):
        decoder = OnnxDecoder(path, threads=1)
        assert decoder.generate([PROMPT, PROMPT[::-1]], 3).tokens[0] == decoder.generate([PROMPT], 3).tokens[0]
        with pytest.raises(ConfigError, match=r"^prompts: this model does not tell padding from tokens"):
            decoder.generate([PROMPT, [7]], 3)


def test_the_runtimes_own_builder_leaves_the_width_open(tmp_path: Path) -> None:
    plain = ContribDecoder().save(tmp_path / "plain.onnx")
    model = onnx.load(plain)
    for value in (*model.graph.input, *model.graph.output):
        dims = value.type.tensor_type.shape.dim
        if len(dims) == 4:
            dims[3].Clear()
            dims[3].dim_param = "kv_cache_dim"
    onnx.save(model, tmp_path / "open.onnx")
    export(tmp_path / "open.onnx", tmp_path / "m.onnx", SILENT)
    expected = OnnxDecoder(plain).generate([PROMPT], 6).tokens
    assert OnnxDecoder(tmp_path / "open.onnx").generate([PROMPT], 6).tokens == expected
    assert OnnxDecoder(tmp_path / "m.onnx").generate([PROMPT], 6).tokens == expected


def test_an_unknown_input_is_named(exported: Exported, tmp_path: Path) -> None:
    model = onnx.load(exported("llama"))
    model.graph.input.append(onnx.helper.make_tensor_value_info("pixel_values", 1, ["batch", 3]))
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(InputError, match=r"needs an input 'pixel_values', tensor\(float\) .*, unknown here$"):
        OnnxDecoder(tmp_path / "m.onnx")


def test_an_export_notes_no_shapes_inside(exported: Exported, tmp_path: Path) -> None:
    """ONNX Runtime plans its memory by them, and GenAI's builder notes some wrongly in float16."""
    model = onnx.load(exported("llama"))
    grown = next(value.name for value in model.graph.output if value.name != "logits")
    node = next(node for node in model.graph.node if grown in node.input)
    model.graph.value_info.append(onnx.helper.make_tensor_value_info(node.output[0], 1, ["batch", 2, "sequence", 16]))
    onnx.save(model, tmp_path / "wrong.onnx")
    export(tmp_path / "wrong.onnx", tmp_path / "m.onnx", SILENT)

    def noted(graph: onnx.GraphProto) -> int:
        inner = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
        return len(graph.value_info) + sum(map(noted, inner))

    assert noted(onnx.load(tmp_path / "m.onnx").graph) == 0
