"""A model repository of Triton: its configuration is of Triton's own schema, and a server that follows it decodes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner

import river_compile
from river_compile import RiverConfig
from river_compile.cli.export import main
from river_compile.errors import ConfigError, InputError
from river_compile.exporters.tensorrt.engine import EngineInfo, Tensor, side_file
from river_compile.runtime import OnnxDecoder
from river_compile.triton import config_of_engine, config_of_onnx, write_engine
from tests.conftest import Exported
from tests.families import LAYERS
from tests.test_documents import examples
from tests.triton_server import Client, Remote, Server, parsed

PROMPTS = ([5, 9, 17, 33], [40, 3])
NEW = 6


def test_the_client_of_the_docs_decodes(exported: Exported, tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "tools.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec(next(example for example in examples(page) if "tritonclient" in example), names)
    river_compile.export(exported("llama"), tmp_path, RiverConfig(tau=0.2), layout="triton")
    server = Server.of(tmp_path / "model")
    remote = Remote(server)
    mask, tokens, made = [0], PROMPTS[0], []
    for step in range(NEW):
        token, depth = names["infer"](remote, "model", 7, tokens, mask, 0.95, end=step == NEW - 1)
        assert 0 < depth <= LAYERS
        tokens = [token]
        made.append(token)
    own = OnnxDecoder(tmp_path / "model" / "1" / "model.onnx")
    assert made == own.generate([PROMPTS[0]], NEW, tau=0.95).tokens[0]
    assert not server.sequences


@pytest.mark.parametrize("family", ("llama", "gpt2", "gemma3"))
def test_a_server_decodes_several_sequences_by_it(exported: Exported, tmp_path: Path, family: str) -> None:
    report = river_compile.export(exported(family), tmp_path / "repo", RiverConfig(tau=0.2), layout="triton")
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
            assert set(client.depths) == {LAYERS} if settings else min(client.depths) < LAYERS


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


def test_a_cache_that_triton_would_mix_up_is_refused(exported: Exported, tmp_path: Path) -> None:
    """Named in one order going in and in another coming out, as triton-inference-server/server #8586 has it."""
    model = onnx.load(exported("llama"))
    names = {f"present.{layer}.key": f"present.{LAYERS - layer}.key" for layer in range(LAYERS)}
    names = {name: f"{new}.of.{name}" for name, new in names.items()}
    for node in model.graph.node:
        for part in (node.input, node.output):
            part[:] = [names.get(name, name) for name in part]
    for value in model.graph.output:
        value.name = names.get(value.name, value.name)
    for entry in model.metadata_props:
        if entry.key == "river.cache":
            entry.value = json.dumps([(past, names.get(new, new)) for past, new in json.loads(entry.value)])
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(InputError, match=r"would continue 'past_key_values\.0\.key' with 'present\.0\.value'"):
        config_of_onnx(OnnxDecoder(tmp_path / "model.onnx"), "m")


def test_one_model_of_a_repository_is_made_anew(exported: Exported, tmp_path: Path) -> None:
    repository = tmp_path / "repo"
    (repository / "other").mkdir(parents=True)
    (repository / "other" / "config.pbtxt").write_text("kept")
    for tau in ("0.5", "0.7"):
        options = ["-o", str(repository), "--layout", "triton", "--external-data", "--tau", tau]
        result = CliRunner().invoke(main, [str(exported("llama")), *options])
        assert result.exit_code == 0, result.output
    assert sorted(file.name for file in (repository / "model" / "1").iterdir()) == ["model.onnx", "model.onnx.data"]
    assert json.loads(OnnxDecoder(repository / "model" / "1" / "model.onnx").metadata["river.config"])["tau"] == 0.7
    assert (repository / "other" / "config.pbtxt").read_text() == "kept"
    assert sorted(file.name for file in repository.iterdir()) == ["model", "other"]


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


def _engine(runtime: str, kv_cache: str) -> EngineInfo:
    length = 64 if kv_cache == "static" else -1
    return EngineInfo(
        **dict.fromkeys(("version", "quantizer", "weights_sha256"), ""),
        **dict.fromkeys(("nbytes", "layers", "river_layers", "network_layers"), 0),
        runtime=runtime,
        compute_capabilities=(),
        weightless=False,
        onnx=None,
        exit_points=(),
        config={},
        dtype="float16",
        kv_cache=kv_cache,
        max_batch=1,
        max_length=64,
        inputs=(
            Tensor("input_ids", "int64", (-1, -1)),
            Tensor("river.tau", "float32", ()),
            Tensor("past.0.key", "float16", (-1, 2, length, 16)),
        ),
        outputs=(
            Tensor("logits", "float16", (-1, -1, 128)),
            Tensor("present.0.key", "float16", (-1, 2, length, 16)),
        ),
        caches=(("past.0.key", "present.0.key"),),
        profiles=(),
        defaults={"river.tau": 0.9},
        seconds={},
    )


@pytest.mark.parametrize(("kv_cache", "tokens"), (("static", 64), ("concatenated", -1)))
def test_an_engine_of_tensorrt_has_a_configuration(kv_cache: str, tokens: int) -> None:
    config = parsed(config_of_engine(_engine("tensorrt", kv_cache), "m"))
    assert (config.backend, config.default_model_filename) == ("tensorrt", "model.plan")
    assert [(value.name, list(value.dims), value.optional) for value in config.input] == [
        ("input_ids", [-1, -1], False),
        ("river.tau", [1], False),
    ]
    (state,) = config.sequence_batching.state
    assert (list(state.dims), list(state.initial_state[0].dims)) == ([-1, 2, tokens, 16], [1, 2, abs(tokens), 16])
    assert state.use_same_buffer_for_input_output == (kv_cache == "static")


def test_an_engine_of_tensorrt_rtx_is_refused() -> None:
    with pytest.raises(InputError, match="not of TensorRT-RTX: give --runtime tensorrt"):
        config_of_engine(_engine("tensorrt-rtx", "static"), "m")


def test_an_engine_goes_into_a_repository_with_its_side_file(tmp_path: Path) -> None:
    info = _engine("tensorrt", "static")
    (tmp_path / "x.engine").write_bytes(b"")
    side_file(tmp_path / "x.engine").write_text(info.to_json())
    made = write_engine(tmp_path / "x.engine", tmp_path / "repo", "x")
    assert sorted(str(file.relative_to(made)) for file in made.rglob("*.*")) == [
        "1/model.plan",
        "1/model.plan.json",
        "config.pbtxt",
    ]


def test_the_command_refuses_a_runtime_that_triton_has_not(exported: Exported, tmp_path: Path) -> None:
    options = ["--target", "tensorrt", "--runtime", "tensorrt-rtx", "--layout", "triton"]
    for output, message in (((), "output: name the model repository"), (("-o", "repo"), "not of TensorRT-RTX")):
        given = [str(tmp_path / word) if word == "repo" else word for word in output]
        result = CliRunner().invoke(main, [str(exported("llama")), *options, *given])
        assert (result.exit_code, message in result.output) == (2, True)
