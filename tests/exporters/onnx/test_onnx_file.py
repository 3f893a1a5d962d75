"""Files that cannot be used, and writing whole or not at all."""

from __future__ import annotations

import errno
import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.numpy
import torch

from river_compile.api import export
from river_compile.config import RiverConfig
from river_compile.errors import InputError, RiverError
from river_compile.exporters.onnx import onnx_file
from river_compile.exporters.onnx.probe import Probe
from tests.contrib_model import ContribDecoder
from tests.oracle import Player, assert_close, session

Exported = Callable[[str], Path]


def _saved(state: dict[str, torch.Tensor], **settings: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, **settings)
    return buffer.getvalue()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return ContribDecoder().save(tmp_path / "model.onnx")


@pytest.fixture
def external(tmp_path: Path) -> Path:
    path = ContribDecoder().save(tmp_path / "model.onnx")
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="weights.bin", size_threshold=1024)
    return path


def _refused(path: Path, problem: str) -> None:
    before = {file: file.read_bytes() for file in path.parent.iterdir() if file.is_file()}
    with pytest.raises(InputError, match=problem) as caught:
        export(path, path.parent / "out.onnx")
    assert "\n" not in str(caught.value)
    assert {file: file.read_bytes() for file in path.parent.iterdir() if file.is_file()} == before


def test_no_file(tmp_path: Path) -> None:
    _refused(tmp_path / "nothing.onnx", "no such file")


@pytest.mark.parametrize("content", (b"", b"\x00" * 100, b"not onnx at all, but some text", b"PK\x03\x04" + b"x" * 64))
def test_not_onnx(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    _refused(tmp_path / "model.onnx", "not an ONNX model, or truncated")


@pytest.mark.parametrize(
    ("content", "kind"),
    (
        (b"GGUF\x03\x00\x00\x00" + b"\x00" * 64, "a GGUF file; give the Hugging Face model's folder"),
        (safetensors.numpy.save({"w": np.ones(3)}), "a safetensors file; give the Hugging Face model's folder"),
        (_saved({"w": torch.ones(3)}), "a PyTorch checkpoint or another zip archive; give the Hugging Face"),
        (_saved({"w": torch.ones(3)}, _use_new_zipfile_serialization=False), "a pickle, as PyTorch checkpoints are"),
        (pickle.dumps({"w": [1.0]}), "a pickle"),
        (b"\x1c\x00\x00\x00TFL3" + b"\x00" * 64, "a TensorFlow Lite model"),
        (b"\x20\x00\x00\x00ORTM" + b"\x00" * 64, r"a model in ONNX Runtime's own format \(\.ort\)"),
        (b"<!DOCTYPE html><html></html>", "a web page"),
    ),
    # Some contents differ from process to process.
    ids=("gguf", "safetensors", "zip", "legacy-checkpoint", "pickle", "tflite", "ort", "html"),
)
@pytest.mark.parametrize("name", ("model.onnx", "model.bin"))
def test_another_kind_of_file_is_told_by_its_content(tmp_path: Path, name: str, content: bytes, kind: str) -> None:
    (tmp_path / name).write_bytes(content)
    _refused(tmp_path / name, rf"not an ONNX model, or truncated \({kind}")


def test_weights_that_are_not_in_the_file(model: Path) -> None:
    proto = onnx.load(model)
    kept = [tensor for tensor in proto.graph.initializer if "mlp" not in tensor.name]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    onnx.save(proto, model)
    _refused(model, r"a graph without its weights: 9 of them are read and are not there, such as '.*mlp")


def test_weights_without_values(model: Path) -> None:
    proto = onnx.load(model)
    for tensor in proto.graph.initializer:
        if tensor.name.endswith("/weight"):
            tensor.ClearField("raw_data")
    onnx.save(proto, model)
    _refused(model, r"a graph without its weights: \d+ of them have no values, such as '/model/layers.0")


def test_weights_that_are_inputs(model: Path) -> None:
    proto = onnx.load(model)
    for tensor in proto.graph.initializer:
        if "_proj" in tensor.name:
            value = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            proto.graph.input.append(value)
    kept = [tensor for tensor in proto.graph.initializer if "_proj" not in tensor.name]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    onnx.save(proto, model)
    session(model)
    _refused(model, "its weights are inputs without a value, such as '/model/layers.0/attn/q_proj/weight'")


@pytest.mark.parametrize("share", (0.1, 0.5, 0.99))
def test_truncated(model: Path, share: float) -> None:
    content = model.read_bytes()
    model.write_bytes(content[: int(len(content) * share)])
    _refused(model, "not an ONNX model, or truncated")


def test_external_data_missing(external: Path) -> None:
    (external.parent / "weights.bin").unlink()
    _refused(external, "external data is missing: weights.bin")


def test_external_data_truncated(external: Path) -> None:
    data = external.parent / "weights.bin"
    data.write_bytes(data.read_bytes()[:1000])
    _refused(external, "external data is truncated: weights.bin")


@pytest.mark.parametrize("location", ("../weights.bin", "/etc/hostname", "sub/../../weights.bin"))
def test_external_data_outside_the_folder(external: Path, location: str) -> None:
    proto = onnx.load(external, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    external.write_bytes(proto.SerializeToString())
    _refused(external, "lies outside the model's folder")


def test_external_data_through_a_link_out_of_the_folder(
    external: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "weights.bin"
    (external.parent / "weights.bin").rename(elsewhere)
    (external.parent / "weights.bin").symlink_to(elsewhere)
    _refused(external, "lies outside the model's folder")


_BLOBS, _SNAPSHOT = "blobs", "snapshots/abc"


def _hub(external: Path, root: Path, data: str = "blobs/bb", model: str = "blobs/aa", under: str = "") -> Path:
    """The model as a hub's cache lays it out: a folder of links to files that are called by their hashes."""
    files = {"model.onnx": root / model, "weights.bin": root / data}
    folder = root / _SNAPSHOT / under
    folder.mkdir(parents=True)
    for name, file in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(external.parent / name, file)
        (folder / name).symlink_to(os.path.relpath(file, folder))
    return folder / "model.onnx"


@pytest.mark.parametrize("layout", ({}, {"under": "onnx"}, {"data": "blobs/more/bb"}))
def test_a_folder_of_links_as_a_hub_makes_it(external: Path, tmp_path: Path, layout: dict[str, str]) -> None:
    path = _hub(external, tmp_path / "hub", **layout)
    report = export(path)
    assert report.river_layers == 3 and report.output == str(path.parent / "model.river.onnx")
    session(path.parent / "model.river.onnx")
    ids = np.array([[3, 4, 5]])
    probe = Probe(onnx_file.load(path), path.parent, ["logits"])
    np.testing.assert_array_equal(probe.read(ids[0])["logits"], Player(session(external), 1).step(ids)["logits"])


def test_weights_stay_where_the_model_has_them(model: Path, tmp_path: Path) -> None:
    apart = tmp_path / "apart.onnx"
    onnx.save(onnx.load(model), apart, save_as_external_data=True, location="w", size_threshold=1024)
    for source, where, beside in (
        (model, None, False),
        (apart, None, True),
        (model, True, True),
        (apart, False, False),
    ):
        export(source, tmp_path / "m.onnx", RiverConfig(external_data=where))
        assert (tmp_path / "m.onnx.data").exists() is beside, (source.name, where)


def test_links_within_the_folder_and_a_link_to_the_model_alone(external: Path, tmp_path: Path) -> None:
    inside = external.parent / "sub"
    inside.mkdir()
    (external.parent / "weights.bin").rename(inside / "w")
    (external.parent / "weights.bin").symlink_to("sub/w")
    assert export(external, tmp_path / "inside.onnx").river_layers == 3
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    external.rename(elsewhere / "aa")
    external.symlink_to(elsewhere / "aa")
    assert export(external, tmp_path / "alone.onnx").river_layers == 3


def test_a_link_to_weights_that_belong_to_another_folder(external: Path, tmp_path: Path) -> None:
    path = _hub(external, tmp_path / "hub", data="secrets/bb")
    _refused(path, "lies outside the model's folder: weights.bin")


def _edit(external: Path, **entries: str | None) -> None:
    """Set keys of the external data of a weight; None takes the key away, from all weights."""
    proto = onnx.load(external, load_external_data=False)
    wanted = next(t for t in proto.graph.initializer if t.name == "lm_head")
    for tensor in proto.graph.initializer:
        kept = {entry.key: entry.value for entry in tensor.external_data}
        for key, value in entries.items():
            if value is None:
                kept.pop(key, None)
            elif tensor.name == wanted.name:
                kept[key] = value
        del tensor.external_data[:]
        for key, value in kept.items():
            tensor.external_data.add(key=key, value=value)
    external.write_bytes(proto.SerializeToString())


@pytest.mark.parametrize("external_data", (True, False))
def test_the_length_of_external_data_may_be_left_out(external: Path, tmp_path: Path, external_data: bool) -> None:
    config = RiverConfig(tau=2.0, external_data=external_data)
    told = export(external, tmp_path / "told.onnx", config)
    _edit(external, length=None)
    assert export(external, tmp_path / "out.onnx", config).backbone_bytes == told.backbone_bytes
    ids = np.array([[3, 4, 5]])
    assert_close(Player(session(tmp_path / "out.onnx"), 1).step(ids), Player(session(external), 1).step(ids))


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        ({"length": "-4"}, "the length of its external data is '-4', not a number"),
        ({"length": "many"}, "the length of its external data is 'many', not a number"),
        ({"length": "32772"}, "is 32772 bytes of external data, but its shape takes 32768"),
        ({"length": "0"}, "is 0 bytes of external data, but its shape takes 32768"),
        ({"offset": "-1"}, "the offset of its external data is '-1', not a number"),
        ({"offset": "0x10"}, "the offset of its external data is '0x10', not a number"),
        ({"offset": "1e3"}, "the offset of its external data is '1e3', not a number"),
        ({"offset": "99999999999"}, "external data is truncated: weights.bin ends before weight 'lm_head' does"),
        ({"location": ""}, "'lm_head' is external data without a location"),
    ],
)
def test_external_data_told_wrongly(external: Path, entries: dict[str, str | None], problem: str) -> None:
    _edit(external, **entries)
    _refused(external, problem)


def test_a_weight_that_is_not_as_long_as_its_shape(model: Path) -> None:
    proto = onnx.load(model)
    tensor = next(t for t in proto.graph.initializer if t.name == "lm_head")
    tensor.raw_data = tensor.raw_data[:-4]
    onnx.save(proto, model)
    _refused(model, "weight 'lm_head' is 32764 bytes, but its shape takes 32768")
    tensor.dims[0] = -1
    onnx.save(proto, model)
    _refused(model, "weight 'lm_head' has a negative size in its shape")


_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


def test_pointers_of_git_lfs_are_named(external: Path) -> None:
    (external.parent / "weights.bin").write_bytes(_POINTER)
    _refused(external, r"external data weights.bin is a Git LFS pointer, not the file itself; .*git lfs pull")
    external.write_bytes(_POINTER)
    _refused(external, r"model.onnx is a Git LFS pointer, not the file itself")


def test_constants_of_a_branch_may_be_large_and_lie_outside(external: Path, tmp_path: Path) -> None:
    """A model with branches of its own: their constants are moved into the model, since no weight of it is one."""
    proto = onnx.load(external)
    table = onnx.numpy_helper.from_array(np.zeros((128, 64), np.float32), "table")
    node = next(n for n in proto.graph.node if n.name == "/model/embed/Gather")
    flag = onnx.helper.make_node("Constant", [], ["flag"], value=onnx.numpy_helper.from_array(np.array(True), "flag"))
    ways = []
    for name in ("then", "else"):
        value = onnx.helper.make_tensor_value_info(f"{name}/value", 1, [128, 64])
        constant = onnx.helper.make_node("Constant", [], [value.name], f"{name}/table", value=table)
        ways.append(onnx.helper.make_graph([constant], name, [], [value]))
    choice = onnx.helper.make_node("If", ["flag"], ["more"], "own/If", then_branch=ways[0], else_branch=ways[1])
    total = onnx.helper.make_node("Add", ["more", node.input[0]], ["embedded"], "own/Add")
    node.input[0] = "embedded"
    for extra in (total, choice, flag):
        proto.graph.node.insert(0, extra)
    path = tmp_path / "branches.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="b.data", size_threshold=1024, convert_attribute=True)
    export(path, tmp_path / "out" / "out.onnx", RiverConfig(tau=2.0, external_data=True))
    ids = np.array([[3, 4, 5]])
    assert_close(Player(session(tmp_path / "out" / "out.onnx"), 1).step(ids), Player(session(path), 1).step(ids))


def test_already_a_river_model(model: Path) -> None:
    export(model, model.parent / "once.onnx")
    _refused(model.parent / "once.onnx", "already a river model")


def test_output_equal_to_input(model: Path) -> None:
    before = model.read_bytes()
    for same in (model, model.parent / "." / "model.onnx", model.parent.parent / model.parent.name / "model.onnx"):
        with pytest.raises(InputError, match="output and input are the same file"):
            export(model, same)
    assert model.read_bytes() == before


def test_output_that_would_overwrite_the_external_data_of_the_input(model: Path) -> None:
    data = "other.onnx.data"
    onnx.save(onnx.load(model), model, save_as_external_data=True, location=data, size_threshold=0)
    before = (model.parent / data).read_bytes()
    with pytest.raises(InputError, match=r"output and input are the same file: other\.onnx\.data"):
        export(model, model.parent / "other.onnx")
    assert (model.parent / data).read_bytes() == before


def test_output_is_a_folder(model: Path) -> None:
    with pytest.raises(InputError, match="is a folder"):
        export(model, model.parent)


def test_output_below_a_file(model: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        export(model, model / "out.onnx")


@pytest.mark.parametrize("source", ("model", "external"))
@pytest.mark.parametrize("external_data", (True, False))
def test_weights_go_beside_the_model_or_within_it(
    request: pytest.FixtureRequest, source: str, external_data: bool
) -> None:
    path = request.getfixturevalue(source)
    target, other = path.parent / "out.onnx", path.parent / "other.onnx"
    export(path, target, RiverConfig(tau=2.0, external_data=external_data))
    export(path, other, RiverConfig(tau=2.0, external_data=not external_data))
    assert (path.parent / "out.onnx.data").exists() is external_data
    assert not [file for file in path.parent.iterdir() if file.name.startswith(".")]
    ids = np.array([[3, 4, 5]])
    found, expected = Player(session(target), 1).step(ids), Player(session(other), 1).step(ids)
    np.testing.assert_array_equal(found["logits"], expected["logits"])


def test_a_stale_data_file_goes_when_the_weights_move_into_the_model(model: Path) -> None:
    target = model.parent / "out.onnx"
    export(model, target, RiverConfig(external_data=True))
    export(model, target, RiverConfig(external_data=False))
    assert not (model.parent / "out.onnx.data").exists()
    session(target)


@pytest.mark.parametrize("external_data", (True, False))
def test_a_full_disk_leaves_the_old_result_and_nothing_else(
    model: Path, monkeypatch: pytest.MonkeyPatch, external_data: bool
) -> None:
    target = model.parent / "out.onnx"
    target.write_bytes(b"the old result")
    before = sorted(file.name for file in model.parent.iterdir())

    def full(*arguments: Any, **settings: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(onnx_file, "_stream" if external_data else "_write", full)
    with pytest.raises(RiverError, match="cannot be written: No space left on device"):
        export(model, target, RiverConfig(external_data=external_data))
    assert target.read_bytes() == b"the old result"
    assert sorted(file.name for file in model.parent.iterdir()) == before


def test_local_functions_are_inlined(model: Path, tmp_path: Path) -> None:
    """Exporters wrap pieces of the model in functions; the passes meet plain nodes."""
    proto = onnx.load(model)
    sigmoid = onnx.helper.make_function(
        "local",
        "MySigmoid",
        ["x"],
        ["y"],
        [onnx.helper.make_node("Sigmoid", ["x"], ["y"])],
        [onnx.helper.make_opsetid("", 20)],
    )
    for node in proto.graph.node:
        if node.op_type == "Sigmoid":
            node.op_type, node.domain = "MySigmoid", "local"
    proto.functions.append(sigmoid)
    proto.opset_import.append(onnx.helper.make_opsetid("local", 1))
    onnx.save(proto, tmp_path / "functions.onnx")
    report = export(tmp_path / "functions.onnx", tmp_path / "out.onnx")
    assert report.river_layers == 3
