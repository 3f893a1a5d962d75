"""What is written is looked at first: a result that is not legal, or not the original, is not kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from click.testing import CliRunner

from river_compile.api import export
from river_compile.cli.export import main
from river_compile.config import RiverConfig
from river_compile.errors import PassError
from river_compile.exporters.onnx import rewrite
from river_compile.passes.onnx.graph import bodies
from tests.conftest import Exported
from tests.contrib_model import ContribDecoder
from tests.families import LAYERS
from tests.lora import with_lora
from tests.oracle import Player, session
from tests.traced_model import traced_model

Spoil = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture
def traced(tmp_path: Path) -> Path:
    return traced_model(tmp_path / "model.onnx", 17, dynamo=False)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return ContribDecoder().save(tmp_path / "model.onnx")


def _after(step: str, change: Callable[[gs.Node], None]) -> Spoil:
    """A pass that does one thing wrong, which the check between passes cannot see."""
    right = getattr(rewrite, step)

    def wrong(graph: Any, *rest: Any, **settings: Any) -> Any:
        made = right(graph, *rest, **settings)
        twins = made.twins.values() if step == "grow_river" else ()
        for nodes in [*bodies(graph.nodes), *(twin.river for twin in twins)]:
            for node in nodes:
                change(node)
        return made

    return lambda patch: patch.setattr(rewrite, step, wrong)


def _wrong_type(node: gs.Node) -> None:
    if node.op == "Cast" and node.name.startswith("river/depth/"):
        node.attrs["to"] = onnx.TensorProto.FLOAT


def _wrong_way(node: gs.Node) -> None:
    if node.name == "river/limit":
        node.op = "Greater"


def _wrong_width(node: gs.Node) -> None:
    if node.op == "MatMulNBits":
        node.attrs["K"] *= 2


_WRONG = {
    "a type": (_after("insert_exits", _wrong_type), r"share_kv -> insert_exits: ONNX's checker refuses the result: "),
    "a branch": (_after("share_kv", _wrong_way), r"after find_layers -> .*: with exits off 'logits' differs from the"),
    "a product": (_after("grow_river", _wrong_width), r"after find_layers -> grow_river: ONNX Runtime refuses the"),
}


@pytest.mark.parametrize("external_data", (True, False))
@pytest.mark.parametrize("what", _WRONG)
def test_a_result_that_is_wrong_is_not_kept(
    traced: Path, monkeypatch: pytest.MonkeyPatch, what: str, external_data: bool
) -> None:
    model, (spoil, message) = traced, _WRONG[what]
    target, config = model.parent / "out.onnx", RiverConfig(external_data=external_data)
    target.write_bytes(b"the old result")
    before = sorted(file.name for file in model.parent.iterdir())
    spoil(monkeypatch)
    with pytest.raises(PassError, match=message) as caught:
        export(model, target, config)
    assert "\n" not in str(caught.value)
    assert target.read_bytes() == b"the old result"
    assert sorted(file.name for file in model.parent.iterdir()) == before
    assert "check" not in export(model, target, config, check=False).seconds
    assert target.read_bytes() != b"the old result"


def test_the_command_says_so_in_one_line(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _WRONG["a type"][0](monkeypatch)
    result = CliRunner().invoke(main, [str(model)])
    assert result.exit_code == 2 and result.stderr.strip().startswith("error: after find_layers -> ")
    assert not model.with_name("model.river.onnx").exists()
    assert CliRunner().invoke(main, [str(model), "--no-check"]).exit_code == 0
    assert model.with_name("model.river.onnx").exists()


def test_what_the_original_cannot_do_is_not_asked_of_the_result(model: Path, tmp_path: Path) -> None:
    proto = onnx.load(model)
    for node in proto.graph.node:
        if node.op_type == "Sigmoid":
            node.domain = "somebody.else"
    proto.opset_import.add(domain="somebody.else", version=1)
    onnx.save(proto, tmp_path / "own.onnx")
    report = export(tmp_path / "own.onnx", tmp_path / "out.onnx")
    (note,) = [note for note in report.notes if "not run" in note]
    assert note.startswith("the result was not run: ONNX Runtime's CPU cannot load the original: ")


def test_bfloat16_is_not_asked_of_a_cpu(exported: Exported, tmp_path: Path) -> None:
    report = export(exported("llama", dtype="bfloat16"), tmp_path / "out.onnx")
    assert report.river_layers == 4
    assert any("cannot load the original" in note for note in report.notes)


def _signature(path: Path, change: Callable[[str, int, Any], None]) -> Path:
    proto = onnx.load(path)
    for value in [*proto.graph.input, *proto.graph.output]:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            change(value.name, axis, dim)
    onnx.save(proto, path)
    return path


def _forget_numbers(name: str, axis: int, dim: Any) -> None:
    dim.dim_param = dim.dim_param or f"{name}.{axis}"


def _forget_names(name: str, axis: int, dim: Any) -> None:
    if dim.dim_param:
        dim.Clear()


def _one_sequence(name: str, axis: int, dim: Any) -> None:
    if axis == 0:
        dim.dim_value = 1


def _one_token(name: str, axis: int, dim: Any) -> None:
    if name in ("input_ids", "logits") and axis == 1:
        dim.dim_value = 1


def _past_of_four(name: str, axis: int, dim: Any) -> None:
    """As a tracer writes it that was told of no dynamic axis."""
    _one_sequence(name, axis, dim)
    _one_token(name, axis, dim)
    sizes = {"past": 4, "pres": 5, "atte": 5}
    if name[:4] in sizes and axis == (1 if name.startswith("attention") else 2):
        dim.dim_value = sizes[name[:4]]


@pytest.mark.parametrize("change", (_forget_numbers, _forget_names, _one_sequence, _one_token, _past_of_four))
def test_any_signature_is_fed(traced: Path, tmp_path: Path, change: Callable[[str, int, Any], None]) -> None:
    """No note says that the result was not run."""
    assert export(_signature(traced, change), tmp_path / "out.onnx").notes == ()


def test_lora_inputs_are_fed(model: Path, tmp_path: Path) -> None:
    with_lora(model, tmp_path / "lora.onnx", ["q_proj"], default=False, turned=True)
    notes = export(tmp_path / "lora.onnx", tmp_path / "out.onnx").notes
    assert not [note for note in notes if "not run" in note]


def test_exits_are_off_where_thresholds_of_layers_lie_below_any_similarity(exported: Exported, tmp_path: Path) -> None:
    offsets = (-3.0,) + (0.0,) * (LAYERS - 1)
    export(exported("llama"), tmp_path / "out.onnx", RiverConfig(tau_offsets=offsets))


def test_results_that_are_no_numbers_are_the_same_ones(model: Path, tmp_path: Path) -> None:
    proto = onnx.load(model)
    norm = next(tensor for tensor in proto.graph.initializer if tensor.name.startswith("/model/layers.1"))
    norm.CopyFrom(onnx.numpy_helper.from_array(np.full(list(norm.dims), np.nan, np.float32), norm.name))
    onnx.save(proto, tmp_path / "spoiled.onnx")
    export(tmp_path / "spoiled.onnx", tmp_path / "out.onnx", RiverConfig(keep_layers=(1,)))
    logits = Player(session(tmp_path / "out.onnx"), 1).step(np.array([[3, 4]]), tau=2.0)["logits"]
    assert not np.isfinite(logits).any()
