"""A model repository of Triton: its configuration is of Triton's own schema, and a server that follows it decodes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

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

PROMPTS = ([5, 9, 17, 33], [40, 3])
NEW = 6
_NUMPY = {"TYPE_FP32": np.float32, "TYPE_INT64": np.int64, "TYPE_FP16": np.float16, "TYPE_BOOL": np.bool_}


def _parsed(text: str) -> Any:
    return text_format.Parse(text, model_config_pb2.ModelConfig())


class Server:
    """What Triton does with a model of a repository, by its configuration alone: inputs are checked against it, states
    are kept for each sequence, and begin as its core begins them."""

    def __init__(self, folder: Path) -> None:
        self.config = _parsed((folder / "config.pbtxt").read_text())
        assert self.config.name == folder.name and self.config.backend == "onnxruntime"
        # Without batching: only then may an input be optional.
        assert self.config.max_batch_size == 0
        self._session = onnxruntime.InferenceSession(folder / "1" / self.config.default_model_filename)
        names = {value.name for value in self._session.get_inputs()}
        states = {state.input_name for state in self.config.sequence_batching.state}
        assert names == states | {value.name for value in self.config.input if not value.optional}
        optional = {value.name for value in self.config.input if value.optional}
        assert optional == {value.name for value in self._session.get_overridable_initializers()}
        self._kept: dict[int, dict[str, np.ndarray]] = {}

    def infer(self, sequence: int, start: bool, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        declared = {value.name: value for value in self.config.input}
        missing = {name for name, value in declared.items() if not value.optional} - set(inputs)
        assert not missing, missing
        scalars = {value.name for value in self._session.get_overridable_initializers() if not value.shape}
        feeds = {}
        for name, array in inputs.items():
            dims = list(declared[name].dims)
            assert array.dtype == _NUMPY[model_config_pb2.DataType.Name(declared[name].data_type)]
            assert len(dims) == array.ndim and all(d in (-1, n) for d, n in zip(dims, array.shape, strict=True))
            feeds[name] = array.reshape(()) if name in scalars else array
        states = self.config.sequence_batching.state
        if start:
            self._kept[sequence] = {state.input_name: self._begun(state) for state in states}
        wanted = [value.name for value in self.config.output]
        made = self._session.run([*wanted, *(state.output_name for state in states)], feeds | self._kept[sequence])
        self._kept[sequence] = {
            state.input_name: array for state, array in zip(states, made[len(wanted) :], strict=True)
        }
        return dict(zip(wanted, made[: len(wanted)], strict=True))

    def _begun(self, state: Any) -> np.ndarray:
        first = state.initial_state[0]
        sizes = [1 if size == -1 else size for size in state.dims]
        assert list(first.dims) == sizes and first.name and first.data_type == state.data_type
        return np.zeros(sizes, _NUMPY[model_config_pb2.DataType.Name(state.data_type)])


class Client:
    """One sequence, as a client of the server decodes it."""

    def __init__(self, server: Server, sequence: int, prompt: list[int], **settings: float) -> None:
        self._server, self._sequence, self._new = server, sequence, prompt
        # The place that a sequence begins with is masked out for good.
        self._mask = [0]
        self._settings = {f"river.{name}": np.array([value], np.float32) for name, value in settings.items()}
        self.tokens: list[int] = []
        self.depths: list[int] = []

    def step(self) -> None:
        start = len(self._mask) == 1
        self._mask += [1] * len(self._new)
        positions = np.cumsum(self._mask) - 1
        inputs = {
            "input_ids": np.array([self._new], np.int64),
            "attention_mask": np.array([self._mask], np.int64),
            "position_ids": positions[None, -len(self._new) :].astype(np.int64),
        }
        inputs = {name: inputs[name] for name in inputs if name in {value.name for value in self._server.config.input}}
        made = self._server.infer(self._sequence, start, inputs | self._settings)
        self.depths.append(made["river.exit_depth"].item())
        self._new = [int(made["logits"][0, -1].argmax())]
        self.tokens += self._new


class _Remote:
    """A server behind Triton's client, as far as an example of the docs asks."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def infer(self, name: str, inputs: list[Any], sequence_id: int, sequence_start: bool) -> Any:
        assert name == self._server.config.name
        arrays = {
            value.name(): np.frombuffer(value._get_content(), _NUMPY[f"TYPE_{value.datatype()}"]).reshape(value.shape())
            for value in inputs
        }
        made = self._server.infer(sequence_id, sequence_start, arrays)
        return SimpleNamespace(as_numpy=made.__getitem__)


def test_the_client_of_the_docs_decodes(exported: Exported, tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "tools.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec(next(example for example in examples(page) if "tritonclient" in example), names)
    river_compile.export(exported("llama"), tmp_path, RiverConfig(tau=0.2), layout="triton")
    remote = _Remote(Server(tmp_path / "model"))
    mask, tokens, made = [0], PROMPTS[0], []
    for _ in range(NEW):
        token, depth = names["infer"](remote, "model", 7, tokens, mask, 0.95)
        assert 0 < depth <= LAYERS
        tokens = [token]
        made.append(token)
    own = OnnxDecoder(tmp_path / "model" / "1" / "model.onnx")
    assert made == own.generate([PROMPTS[0]], NEW, tau=0.95).tokens[0]


@pytest.mark.parametrize("family", ("llama", "gpt2", "gemma3"))
def test_a_server_decodes_several_sequences_by_it(exported: Exported, tmp_path: Path, family: str) -> None:
    report = river_compile.export(exported(family), tmp_path / "repo", RiverConfig(tau=0.2), layout="triton")
    assert report.output == str(tmp_path / "repo" / "model")
    assert [file.name for file in (tmp_path / "repo").iterdir()] == ["model"]
    server, own = Server(tmp_path / "repo" / "model"), OnnxDecoder(tmp_path / "repo" / "model" / "1" / "model.onnx")
    for settings in ({}, {"tau": 2.0}):
        clients = [Client(server, index, prompt, **settings) for index, prompt in enumerate(PROMPTS)]
        for _ in range(NEW):
            for client in clients:
                client.step()
        for client, prompt in zip(clients, PROMPTS, strict=True):
            expected = own.generate([prompt], NEW, tau=settings.get("tau"))
            assert client.tokens == expected.tokens[0]
            assert client.depths == [step.exit_depth for step in expected.steps]
            assert set(client.depths) == {LAYERS} if settings else min(client.depths) < LAYERS


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
    config = _parsed(config_of_engine(_engine("tensorrt", kv_cache), "m"))
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
