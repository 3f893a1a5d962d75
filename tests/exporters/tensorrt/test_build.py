"""Engines are built on the CPU, and say what they are; what cannot be built or run is refused in one line."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

from river_compile.errors import ConfigError, InputError, MissingExtra, RiverError
from river_compile.exporters.tensorrt import builder
from river_compile.exporters.tensorrt import runtime as seam
from river_compile.exporters.tensorrt.build import (
    KV_CACHES,
    EngineOptions,
    build,
    default_config,
    profiles,
    write_onnx,
)
from river_compile.exporters.tensorrt.engine import EngineInfo, side_file
from river_compile.exporters.tensorrt.runtime import load_runtime
from river_compile.runtime import TensorRTDecoder
from tests.families import LAYERS, families_that_export
from tests.oracle import session
from tests.static_player import StaticPlayer

Exported = Callable[[str], Path]

pytest.importorskip("tensorrt_rtx_bindings")

LENGTH = 48
ONE_TWIN = default_config(keep_layers=(1, 2, 3))
"""Where a test is about something else: what a build costs goes with the layers that have a twin."""

MAGIC, MALFORMED = b"vtrt", 32


@pytest.fixture(scope="module")
def engine(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engine") / "model.engine"
    build(exported("llama"), path, ONE_TWIN, EngineOptions(max_batch=2, max_length=LENGTH, runtime="tensorrt-rtx"))
    return path


@pytest.mark.parametrize(
    ("family", "kv_cache", "dtype"),
    [
        pytest.param("llama", "concatenated", "bfloat16", marks=pytest.mark.slow),
        ("llama", "static", "float32"),
        ("qwen2", "concatenated", "float16"),
        pytest.param("gpt2", "static", "float16", marks=pytest.mark.slow),
        ("gpt2", "concatenated", "float32"),
        ("gpt_neox", "static", "bfloat16"),
        ("llama", "scattered", "float16"),
        pytest.param("gpt2", "scattered", "float32", marks=pytest.mark.slow),
    ],
)
def test_tensorrt_rtx_builds_it(exported: Exported, tmp_path: Path, family: str, kv_cache: str, dtype: str) -> None:
    options = EngineOptions(kv_cache=kv_cache, dtype=dtype, max_length=LENGTH, runtime="tensorrt-rtx")
    (tmp_path / "out").mkdir()
    engine = tmp_path / "out" / "m.engine"
    info = build(exported(family), engine, default_config(), options, onnx_output=tmp_path / "m.onnx")
    assert sorted(path.name for path in engine.parent.iterdir()) == ["m.engine", "m.engine.json"]
    assert (info.layers, info.river_layers, info.dtype, info.kv_cache) == (LAYERS, LAYERS, dtype, kv_cache)
    types = {tensor.name: tensor.dtype for tensor in (*info.inputs, *info.outputs)}
    assert {types[name] for pair in info.caches for name in pair} == {dtype}
    assert types["river.tau"] == "float32" and types["river.max_depth"] == types["river.exit_depth"] == "int64"
    assert all(tensor.shape for tensor in (*info.inputs, *info.outputs))
    _assert_header(engine)
    if dtype != "bfloat16":
        _assert_predicted_shapes(info, tmp_path / "m.onnx")


def test_a_runtime_that_updates_no_cache_gets_a_scatter(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seam.TensorRT, "updates_caches", False)
    options = EngineOptions(max_length=LENGTH, runtime="tensorrt-rtx")
    info = build(exported("llama"), tmp_path / "m.engine", ONE_TWIN, options)
    assert info.kv_cache == "scattered" and EngineInfo.load(tmp_path / "m.engine").kv_cache == "scattered"


@pytest.mark.slow
@pytest.mark.parametrize("kv_cache", KV_CACHES)
@pytest.mark.parametrize("family", families_that_export())
def test_tensorrt_rtx_builds_every_family(exported: Exported, tmp_path: Path, family: str, kv_cache: str) -> None:
    options = EngineOptions(kv_cache=kv_cache, max_length=LENGTH, runtime="tensorrt-rtx")
    info = build(exported(family), tmp_path / "m.engine", default_config(), options)
    assert info.river_layers == LAYERS
    _assert_header(tmp_path / "m.engine")


def _assert_predicted_shapes(info: EngineInfo, model: Path) -> None:
    """The generation loop allocates every output before a pass by these shapes: they are those that ONNX Runtime, which
    has kernels for all types but bfloat16, really makes."""
    player = StaticPlayer(session(model), 2, {"tau": 2.0, "max_depth": LAYERS})
    for past, tokens in ((0, 5), (5, 1)):
        shapes = info.shapes(2, tokens, past)
        before = {name: value.shape for name, value in player.caches.items()}
        outputs = player.step(np.full((2, tokens), 7))
        assert all(shapes[name] == shape for name, shape in before.items())
        assert shapes["logits"] == outputs["logits"].shape
        assert all(shapes[present] == player.caches[name].shape for name, present in info.caches)
        assert info.profiles[info.profile_for(shapes)].name == ("decode" if tokens == 1 else "prefill")


def test_exit_points_bits_and_targets_can_be_chosen(exported: Exported, tmp_path: Path) -> None:
    options = EngineOptions(max_length=LENGTH, runtime="tensorrt-rtx", compute_capabilities=("8.9",))
    info = build(exported("llama"), tmp_path / "m.engine", default_config(exit_every=2, bits=8), options)
    assert info.river_layers == LAYERS and info.exit_points == (2,) and info.compute_capabilities == ("8.9",)


def _assert_header(engine: Path) -> None:
    """What TensorRT-RTX tells of an engine without a device: that it is none, or nothing."""
    runtime = load_runtime("tensorrt-rtx")
    loader = runtime.module.Runtime(runtime.logger)
    head = engine.read_bytes()[: loader.engine_header_size]
    assert head.startswith(MAGIC)
    assert not loader.get_engine_validity(head)[1] & MALFORMED
    assert loader.get_engine_validity(head[::-1])[1] & MALFORMED


def test_the_side_file_says_what_the_engine_is(engine: Path, exported: Exported, tmp_path: Path) -> None:
    info = EngineInfo.load(engine)
    assert info.runtime == "tensorrt-rtx" and info.version == load_runtime("tensorrt-rtx").version
    assert info.nbytes == engine.stat().st_size
    assert info.config["group_size"] == 64 and info.quantizer == "rtn-symmetric" and info.exit_points == ()
    assert info.defaults == {"river.tau": pytest.approx(0.9), "river.max_depth": LAYERS}
    made = write_onnx(exported("llama"), tmp_path / "m.onnx", ONE_TWIN, EngineOptions(max_length=LENGTH))
    assert info.weights_sha256 == made.weights_sha256
    other = write_onnx(exported("qwen2"), tmp_path / "n.onnx", ONE_TWIN, EngineOptions(max_length=LENGTH))
    assert info.weights_sha256 != other.weights_sha256


def test_the_profiles_are_prefill_and_decode(engine: Path) -> None:
    prefill, decode = EngineInfo.load(engine).profiles
    assert prefill.shapes["input_ids"] == ((1, 1), (1, LENGTH), (2, LENGTH))
    assert decode.shapes["input_ids"] == ((1, 1), (1, 1), (2, 1))
    assert decode.shapes["attention_mask"] == ((1, 1), (1, LENGTH), (2, LENGTH))
    assert prefill.shapes["past_key_values.0.key"][2] == (2, 2, LENGTH, 16)


def test_a_concatenated_cache_grows_in_the_decode_profile(exported: Exported, tmp_path: Path) -> None:
    options = EngineOptions(max_length=LENGTH, kv_cache="concatenated", dtype="float32")
    made = write_onnx(exported("llama"), tmp_path / "m.onnx", ONE_TWIN, options)
    prefill, decode = profiles(made.proto, made.caches, options)
    assert {bounds[2] for name, bounds in prefill.shapes.items() if "past" in name} == {(4, 2, 0, 16)}
    assert {bounds[2] for name, bounds in decode.shapes.items() if "past" in name} == {(4, 2, LENGTH - 1, 16)}


def test_requests_beyond_the_profiles_are_refused(engine: Path) -> None:
    info = EngineInfo.load(engine)
    info.check_request(2, LENGTH)
    with pytest.raises(ConfigError, match="max_batch: this engine takes 1 to 2 sequences, not 3"):
        info.check_request(3, 1)
    with pytest.raises(ConfigError, match=f"max_length: .* holds {LENGTH} tokens, not {LENGTH + 1}"):
        info.check_request(1, LENGTH + 1)
    with pytest.raises(ConfigError, match=r"no profile of this engine takes input_ids \[3, 1\]"):
        info.profile_for(info.shapes(3, 1, 0))


def test_running_without_a_gpu_is_one_clear_line(engine: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(InputError, match="no GPU: running a TensorRT engine needs one"):
        TensorRTDecoder(engine)


def test_a_truncated_engine_is_refused(engine: Path, tmp_path: Path) -> None:
    short = _copy(engine, tmp_path)
    short.write_bytes(engine.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"truncated \(1000 bytes instead of"):
        TensorRTDecoder(short)


def test_an_engine_of_another_version_is_refused(engine: Path, tmp_path: Path) -> None:
    old = _copy(engine, tmp_path)
    side_file(old).write_text(dataclasses.replace(EngineInfo.load(engine), version="1.0.0.1").to_json())
    with pytest.raises(InputError, match=r"built by tensorrt-rtx 1\.0\.0\.1; installed is"):
        TensorRTDecoder(old)


@pytest.mark.parametrize("text", ("", "{}", '{"format": 99}', "[1]"))
def test_a_broken_side_file_is_refused(engine: Path, tmp_path: Path, text: str) -> None:
    broken = _copy(engine, tmp_path)
    side_file(broken).write_text(text)
    with pytest.raises(InputError, match=r"m\.engine\.json: "):
        EngineInfo.load(broken)
    side_file(broken).unlink()
    with pytest.raises(InputError, match="no such file"):
        EngineInfo.load(broken)


def _copy(engine: Path, folder: Path) -> Path:
    (folder / "m.engine").write_bytes(engine.read_bytes())
    side_file(folder / "m.engine").write_text(side_file(engine).read_text())
    return folder / "m.engine"


def test_a_node_that_the_parser_does_not_take_is_named(exported: Exported, tmp_path: Path) -> None:
    model = onnx.load(exported("llama"))
    last = next(node for node in model.graph.node if "logits" in node.output)
    last.output[0] = "before"
    model.graph.node.append(
        helper.make_node("Strange", ["before"], ["logits"], name="the_culprit", domain="com.microsoft")
    )
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    folder = tmp_path / "in"
    folder.mkdir()
    onnx.save(model, folder / "odd.onnx")
    with pytest.raises(InputError, match=r"tensorrt-rtx does not take node 'the_culprit' \(Strange\)"):
        build(folder / "odd.onnx", tmp_path / "m.engine", ONE_TWIN, EngineOptions(runtime="tensorrt-rtx"))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_crash_of_the_builder_is_an_error_and_leaves_nothing(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash = tmp_path / "python"
    crash.write_text("#!/bin/sh\nkill -SEGV $$\n")
    crash.chmod(0o755)
    monkeypatch.setattr(builder.sys, "executable", str(crash))
    with pytest.raises(RiverError, match="builder ended by signal 11"):
        build(exported("llama"), tmp_path / "m.engine", ONE_TWIN, EngineOptions(runtime="tensorrt-rtx"))
    assert [path.name for path in tmp_path.iterdir()] == ["python"]
    assert sys.executable == str(crash)


def test_the_builder_ends_with_the_process_that_started_it() -> None:
    builder = (
        "import os, time; from river_compile.exporters.tensorrt import builder;"
        "builder._end_with_parent(); print(os.getpid(), flush=True); time.sleep(60)"
    )
    starter = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {builder!r}])"
    with subprocess.Popen([sys.executable, "-c", starter], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        builder_id = process.stdout.readline().strip()
        process.kill()
    deadline = time.monotonic() + 20
    while _is_alive(builder_id) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _is_alive(builder_id)


def _is_alive(process_id: str) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{process_id}/status").read_text()
    except OSError:
        return False


def test_an_absent_runtime_names_its_extra(exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        seam.importlib.util, "find_spec", lambda name: None if name.startswith("tensorrt") else find(name)
    )
    for runtime, extra in (("auto", "tensorrt-rtx"), ("tensorrt", "tensorrt"), ("tensorrt-rtx", "tensorrt-rtx")):
        with pytest.raises(MissingExtra, match=rf"pip install 'river-compile\[{extra}\]'"):
            build(exported("llama"), tmp_path / "m.engine", ONE_TWIN, EngineOptions(runtime=runtime))
    assert not list(tmp_path.iterdir())


def test_an_unsupported_compute_capability_is_refused(exported: Exported, tmp_path: Path) -> None:
    options = EngineOptions(runtime="tensorrt-rtx", compute_capabilities=("6.1",))
    with pytest.raises(ConfigError, match=r"compute_capabilities: .* cannot build for 6\.1; it builds for .*8\.9"):
        build(exported("llama"), tmp_path / "m.engine", ONE_TWIN, options)
    assert not list(tmp_path.iterdir())


def test_no_file_of_the_model_is_written_and_none_twice(exported: Exported, tmp_path: Path) -> None:
    for file in exported("llama").parent.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    model, engine = tmp_path / "model.onnx", tmp_path / "m.engine"
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    options = EngineOptions(max_length=LENGTH, runtime="tensorrt-rtx")
    for target, kept in ((model, None), (engine, model), (tmp_path / "model.onnx.data", None)):
        with pytest.raises(InputError, match="output and input are the same file"):
            build(model, target, ONE_TWIN, options, onnx_output=kept)
    for kept in (engine, side_file(engine)):
        with pytest.raises(InputError, match="need three names"):
            build(model, engine, ONE_TWIN, options, onnx_output=kept)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_what_is_handed_to_tensorrt_is_the_same_every_time(exported: Exported, tmp_path: Path) -> None:
    script = (
        "import pathlib, sys;"
        "from river_compile.exporters.tensorrt.build import EngineOptions, default_config, write_onnx;"
        "made = write_onnx(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), default_config(), EngineOptions());"
        "print(made.weights_sha256)"
    )
    digests = set()
    for seed in ("1", "2"):
        command = [sys.executable, "-c", script, str(exported("llama")), str(tmp_path / f"{seed}.onnx")]
        environment = os.environ | {"PYTHONHASHSEED": seed}
        digests.add(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)
    assert len(digests) == 1
    first, second = ((tmp_path / f"{seed}.onnx.data").read_bytes() for seed in ("1", "2"))
    assert first == second


def test_a_plain_engine_can_have_tensorrts_attention_layer(exported: Exported, tmp_path: Path) -> None:
    options = EngineOptions(max_length=LENGTH, runtime="tensorrt-rtx", river=False, attention_layer=True)
    info = build(exported("llama"), tmp_path / "m.engine", options=options, onnx_output=tmp_path / "m.onnx")
    kinds = [node.op_type for node in onnx.load(tmp_path / "m.onnx", load_external_data=False).graph.node]
    assert kinds.count("Attention") == info.layers == LAYERS
    with pytest.raises(ConfigError, match="attention_layer: TensorRT's attention layer does not build between"):
        EngineOptions(attention_layer=True)


def test_every_layer_can_be_kept(exported: Exported, tmp_path: Path) -> None:
    options = EngineOptions(max_length=LENGTH, runtime="tensorrt-rtx")
    config = default_config(keep_layers=tuple(range(LAYERS)))
    info = build(exported("llama"), tmp_path / "deep" / "er" / "m.engine", config, options)
    assert info.river_layers == 0 and info.exit_points == ()
    assert EngineInfo.load(str(tmp_path / "deep" / "er" / "m.engine")) == info


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_batch", 0),
        ("max_length", 1),
        ("dtype", "int8"),
        ("kv_cache", "paged"),
        ("runtime", "x"),
        ("max_batch", True),
        ("max_length", 1 << 40),
        ("compute_capabilities", "8.9"),
        ("compute_capabilities", (8.9,)),
        ("compute_capabilities", 8.9),
    ],
)
def test_options_are_valid_by_construction(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: ") as error:
        EngineOptions(**{field: value})  # type: ignore[arg-type]
    assert error.value.field == field


def test_a_weightless_engine_needs_a_gpu_and_says_so(exported: Exported, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    options = EngineOptions(max_length=LENGTH, runtime="tensorrt-rtx", weightless=True, river=False)
    with pytest.raises(RiverError, match="a weightless one needs a GPU to be built"):
        build(exported("llama"), tmp_path / "m.engine", ONE_TWIN, options)
    assert not list(tmp_path.iterdir())


def test_the_side_file_is_plain_json(engine: Path) -> None:
    fields = json.loads(side_file(engine).read_text())
    assert [value["name"] for value in fields["profiles"]] == ["prefill", "decode"]
