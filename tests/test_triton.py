"""A model repository of Triton: its configuration is of Triton's own schema, and a server that follows it decodes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import river_compile
from river_compile import RiverConfig
from river_compile.cli.export import main
from river_compile.errors import ConfigError, InputError, RiverError
from river_compile.exporters.tensorrt.build import EngineOptions, build, default_config
from river_compile.exporters.tensorrt.engine import EngineInfo, Tensor, side_file
from river_compile.runtime import OnnxDecoder
from river_compile.triton import (
    KV_CACHE,
    check_repository,
    config_of_engine,
    config_of_onnx,
    staging_place,
    write_engine,
)
from tests.conftest import Exported
from tests.families import LAYERS, exported_layers
from tests.oracle import session
from tests.signatures import write
from tests.static_player import StaticPlayer
from tests.test_documents import examples
from tests.triton_server import Client, Remote, Server, parsed

PROMPTS = ([5, 9, 17, 33], [40, 3])
NEW = 6


def test_the_client_of_the_docs_decodes(exported: Exported, tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "triton.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec(next(example for example in examples(page) if "tritonclient" in example), names)
    river_compile.export(exported("llama"), tmp_path, RiverConfig(tau=0.2), layout="triton")
    server = Server.of(tmp_path / "model")
    remote = Remote(server)
    own = OnnxDecoder(tmp_path / "model" / "1" / "model.onnx").generate([PROMPTS[0]], NEW, tau=0.95)
    assert names["infer"](remote, "model", 7, PROMPTS[0], [0], 0.95) == (own.tokens[0][0], own.steps[0].exit_depth)
    # The same number once more begins anew.
    assert names["generate"](remote, "model", 7, PROMPTS[0], NEW, 0.95) == own.tokens[0]
    assert not server.sequences


@pytest.mark.parametrize("family", ("llama", "gpt2", "gemma3"))
def test_a_server_decodes_several_sequences_by_it(exported: Exported, tmp_path: Path, family: str) -> None:
    layers = exported_layers(family)
    report = river_compile.export(exported(family, layers), tmp_path / "repo", RiverConfig(tau=0.2), layout="triton")
    assert report.output == str(tmp_path / "repo" / "model")
    assert [file.name for file in (tmp_path / "repo").iterdir()] == ["model"]
    server, own = Server.of(tmp_path / "repo" / "model"), OnnxDecoder(tmp_path / "repo" / "model" / "1" / "model.onnx")
    # What a request sets holds for that request: the last two say nothing again, and get the file's threshold.
    for settings in ({}, {"tau": 2.0}, {}):
        clients = [Client(server, index, prompt, **settings) for index, prompt in enumerate(PROMPTS, 1)]
        for _ in range(NEW):
            for client in clients:
                client.step()
        for client, prompt in zip(clients, PROMPTS, strict=True):
            expected = own.generate([prompt], NEW, tau=settings.get("tau"))
            assert client.tokens == expected.tokens[0]
            assert client.depths == [step.exit_depth for step in expected.steps]
            assert set(client.depths) == {layers} if settings else min(client.depths) < layers


def test_each_request_has_settings_of_its_own(exported: Exported, tmp_path: Path) -> None:
    river_compile.export(exported("llama"), tmp_path, RiverConfig(tau=0.2), layout="triton")
    server = Server.of(tmp_path / "model")
    clients = [Client(server, 1, PROMPTS[0], max_depth=2, tau=2.0), Client(server, 2, PROMPTS[0], tau=2.0)]
    for end in (False, False, True):
        for client in clients:
            client.step(end)
    assert [client.depths for client in clients] == [[2] * 3, [LAYERS] * 3]


def test_sequences_outlast_a_slow_pass_and_weights_are_loaded_once(exported: Exported) -> None:
    config = parsed(config_of_onnx(OnnxDecoder(exported("llama")), "m", sequences=3))
    assert config.sequence_batching.max_sequence_idle_microseconds == 60_000_000
    assert config.sequence_batching.oldest.max_candidate_sequences == 3
    assert [(group.count, group.kind) for group in config.instance_group] == [(1, 0)]


@pytest.mark.parametrize(
    "variant", ("static", "tokens before heads", "dimensions without names", "int32 tokens", "one sequence")
)
def test_other_signatures_are_served(exported: Exported, tmp_path: Path, variant: str) -> None:
    source = write(exported("llama"), variant, tmp_path / "m.onnx")
    river_compile.export(source, tmp_path / "repo", RiverConfig(tau=0.2), layout="triton")
    server, own = Server.of(tmp_path / "repo" / "m"), OnnxDecoder(tmp_path / "repo" / "m" / "1" / "model.onnx")
    clients = [Client(server, index, prompt) for index, prompt in enumerate(PROMPTS, 1)]
    for _ in range(NEW):
        for client in clients:
            client.step()
    assert [client.tokens for client in clients] == [own.generate([prompt], NEW).tokens[0] for prompt in PROMPTS]


def test_a_cache_that_triton_would_mix_up_is_refused(exported: Exported, tmp_path: Path) -> None:
    """Named in one order going in and in another coming out, as triton-inference-server/server #8586 has it."""
    decoder = OnnxDecoder(write(exported("llama"), "other names", tmp_path / "m.onnx"))
    with pytest.raises(InputError, match="would continue 'state_a' with 'next_a' instead of 'next_h'"):
        config_of_onnx(decoder, "m")


def test_one_model_of_a_repository_is_made_anew(exported: Exported, tmp_path: Path) -> None:
    repository = tmp_path / "repo"
    (repository / "other").mkdir(parents=True)
    (repository / "other" / "config.pbtxt").write_text("kept")
    for tau, data in (("0.5", "--no-external-data"), ("0.6", "--external-data"), ("0.7", "--no-external-data")):
        options = ["-o", str(repository), "--layout", "triton", data, "--tau", tau]
        result = CliRunner().invoke(main, [str(exported("llama")), *options])
        assert result.exit_code == 0, result.output
        beside = ["model.onnx.data"] if data == "--external-data" else []
        assert sorted(file.name for file in (repository / "model" / "1").iterdir()) == ["model.onnx", *beside]
        # A server would go on with an older model of a higher version.
        (repository / "model" / "2").mkdir()
    assert not list((repository / "model" / "1").glob("*.data"))
    assert json.loads(OnnxDecoder(repository / "model" / "1" / "model.onnx").metadata["river.config"])["tau"] == 0.7
    assert (repository / "other" / "config.pbtxt").read_text() == "kept"
    assert sorted(file.name for file in repository.iterdir()) == ["model", "other"]
    assert [file.name for file in tmp_path.iterdir()] == ["repo"]


def test_a_model_stays_where_the_new_one_fails(exported: Exported, tmp_path: Path, monkeypatch: Any) -> None:
    river_compile.export(exported("llama"), tmp_path / "repo", layout="triton")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "repo").rglob("*")}
    moved = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if target.name == "model" and not self.name.endswith(".old"):
            raise OSError(28, "No space left on device")
        return moved(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(RiverError, match="cannot be written: No space left on device"):
        river_compile.export(exported("llama"), tmp_path / "repo", layout="triton")
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "repo").rglob("*")} == before
    assert [file.name for file in tmp_path.iterdir()] == ["repo"]


def test_a_repository_where_nothing_can_be_beside_it_holds_what_is_being_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "repo").mkdir()
    assert staging_place(tmp_path / "repo") == tmp_path
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    assert staging_place(tmp_path / "repo") == tmp_path / "repo"
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(RiverError, match="repo: cannot be written to"):
        check_repository(tmp_path / "repo")


def test_what_no_repository_can_be_is_refused(exported: Exported, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^output: name the model repository"):
        river_compile.export(exported("llama"), layout="triton")
    with pytest.raises(ConfigError, match=r"^layout: must be one of tool, triton, not 'tirton'"):
        river_compile.export(exported("llama"), tmp_path / "out", layout="tirton")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file; name a model repository"):
        river_compile.export(exported("llama"), tmp_path / "file", layout="triton")
    decoder = OnnxDecoder(exported("llama"))
    with pytest.raises(ConfigError, match=r"'a b' is no name of a model"):
        config_of_onnx(decoder, "a b")
    decoder.__dict__["takes_padding"] = False
    with pytest.raises(InputError, match="takes no padding on the left"):
        config_of_onnx(decoder, "m")


@pytest.fixture(scope="module")
def engine(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> EngineInfo:
    """An engine as Triton takes it, but for the runtime that built it, and ``m.onnx`` as it was handed to TensorRT."""
    pytest.importorskip("tensorrt_rtx_bindings")
    folder = tmp_path_factory.mktemp("engine")
    options = EngineOptions(kv_cache=KV_CACHE, dtype="float32", max_length=32, runtime="tensorrt-rtx")
    config = default_config(keep_layers=(1, 2, 3), tau=0.2)
    info = build(exported("llama"), folder / "m.engine", config, options, onnx_output=folder / "m.onnx")
    return replace(info, runtime="tensorrt", onnx=str(folder / "m.onnx"))


def test_an_engine_of_tensorrt_has_a_configuration(engine: EngineInfo) -> None:
    config = parsed(config_of_engine(engine, "m"))
    assert (config.backend, config.default_model_filename) == ("tensorrt", "model.plan")
    assert {value.name: list(value.dims) for value in config.input} == {
        "input_ids": [-1, -1],
        "attention_mask": [-1, -1],
        "position_ids": [-1, -1],
        "river.tau": [1],
        "river.max_depth": [1],
    }
    assert {value.name for value in config.output} == {"logits", "river.exit_depth"}
    # Each profile needs a name in the group: the backend takes the first one only where there is none.
    (group,) = config.instance_group
    assert (list(group.profile), group.count) == ([str(index) for index in range(len(engine.profiles))], 1)
    assert len(config.sequence_batching.state) == 2 * LAYERS
    assert all(state.use_same_buffer_for_input_output for state in config.sequence_batching.state)


def test_a_server_decodes_several_sequences_by_an_engine(engine: EngineInfo) -> None:
    """The ONNX that was handed to TensorRT stands in for the engine, which takes a GPU."""
    model = session(Path(str(engine.onnx)))
    server = Server(parsed(config_of_engine(engine, "m")), model)
    for settings in ({"tau": 0.2, "max_depth": LAYERS}, {"tau": 2.0, "max_depth": LAYERS}):
        clients = [Client(server, index, prompt, **settings) for index, prompt in enumerate(PROMPTS, 1)]
        for _ in range(NEW):
            for client in clients:
                client.step()
        for client, prompt in zip(clients, PROMPTS, strict=True):
            player, ids, expected = StaticPlayer(model, 1, dict(settings)), prompt, []
            for _ in range(NEW):
                made = player.step(np.array([ids]))
                ids = [int(made["logits"][0, -1].argmax())]
                expected.append((ids[0], made["river.exit_depth"].item()))
            assert list(zip(client.tokens, client.depths, strict=True)) == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    (
        ({"runtime": "tensorrt-rtx"}, "not of TensorRT-RTX: give --runtime tensorrt"),
        ({"kv_cache": "static"}, "a static KV cache is written in place.*give --kv-cache scattered"),
        ({"kv_cache": "concatenated"}, "a concatenated KV cache grows.*give --kv-cache scattered"),
        ({"inputs": (Tensor("river.tau", "float32", ()),)}, "'river.tau' is a scalar.*build it anew"),
    ),
)
def test_an_engine_that_triton_cannot_serve_is_refused(
    engine: EngineInfo, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        config_of_engine(replace(engine, **fields), "m")


def test_an_engine_goes_into_a_repository_with_its_side_file(engine: EngineInfo, tmp_path: Path) -> None:
    (tmp_path / "x.engine").write_bytes(b"")
    side_file(tmp_path / "x.engine").write_text(replace(engine, nbytes=0).to_json())
    made = write_engine(tmp_path / "x.engine", tmp_path / "repo", "x")
    assert sorted(str(file.relative_to(made)) for file in made.rglob("*.*")) == [
        "1/model.plan",
        "1/model.plan.json",
        "config.pbtxt",
    ]


def test_the_command_refuses_what_triton_has_not(exported: Exported, tmp_path: Path) -> None:
    options = ["--target", "tensorrt", "--runtime", "tensorrt-rtx", "--layout", "triton"]
    repository = ["-o", str(tmp_path / "repo")]
    for given, message in (
        ([], "output: name the model repository"),
        (repository, "not of TensorRT-RTX"),
        ([*repository, "--kv-cache", "static"], "give --kv-cache scattered"),
    ):
        result = CliRunner().invoke(main, [str(exported("llama")), *options, *given])
        assert (result.exit_code, message in " ".join(result.output.split())) == (2, True), result.output
