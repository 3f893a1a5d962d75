"""What is handed to TensorRT computes the right thing: it runs in ONNX Runtime, and equals that one's own river."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from packaging.version import Version

from river_compile.api import export
from river_compile.errors import ConfigError, InputError
from river_compile.exporters.tensorrt.build import KV_CACHES, EngineOptions, RiverOnnx, default_config, write_onnx
from river_compile.measure.fidelity import Document, TextTokenizer
from river_compile.measure.tuning import Tuning
from tests.families import LAYERS, VOCABULARY, families_that_export
from tests.oracle import Player, assert_close, session
from tests.static_player import ReferenceSession, StaticPlayer

Exported = Callable[[str], Path]

CLOSELY = ("llama", "qwen2", "gpt2", "gpt_neox")
LENGTH = 40
NEVER = {"tau": 2.0, "max_depth": LAYERS}


class Case:
    """A family's river for ONNX Runtime (MatMulNBits) and the one for TensorRT, of the same symmetric grid."""

    def __init__(self, original: Path, folder: Path, kv_cache: str, dtype: str = "float32", bits: int = 4) -> None:
        config = default_config(tau=2.0, bits=bits)
        export(original, folder / "spine.onnx", config)
        self.original = original
        self.made: RiverOnnx = write_onnx(
            original,
            folder / "tensorrt.onnx",
            config,
            EngineOptions(kv_cache=kv_cache, dtype=dtype, max_length=LENGTH),
        )
        self.spine = session(folder / "spine.onnx")
        self.session = session(self.made.path)

    def players(self, batch: int) -> tuple[StaticPlayer, Player]:
        return StaticPlayer(self.session, batch, NEVER), Player(self.spine, batch)


@pytest.fixture(scope="module", params=[(family, form) for family in CLOSELY for form in KV_CACHES], ids="-".join)
def case(request: pytest.FixtureRequest, exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family, form = request.param
    return Case(exported(family), tmp_path_factory.mktemp("tensorrt"), form)


@pytest.mark.parametrize("depth", range(LAYERS + 1))
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 20), (3, 2)])
def test_every_depth_equals_the_river_of_onnx_runtime(case: Case, depth: int, batch: int, length: int) -> None:
    rng = np.random.default_rng(depth)
    ours, spine = case.players(batch)
    for tokens in (length, 1, 2):
        ids = rng.integers(3, VOCABULARY, (batch, tokens))
        found = ours.step(ids, max_depth=depth)
        assert_close(found, spine.step(ids, max_depth=depth))
        assert found["river.exit_depth"] == depth


@pytest.mark.slow
@pytest.mark.parametrize("kv_cache", KV_CACHES)
@pytest.mark.parametrize("family", families_that_export(*CLOSELY))
def test_every_depth_of_every_family_equals_the_river_of_onnx_runtime(
    exported: Exported, tmp_path: Path, family: str, kv_cache: str
) -> None:
    case = Case(exported(family), tmp_path, kv_cache)
    for depth in range(LAYERS + 1):
        rng = np.random.default_rng(depth)
        ours, spine = case.players(2)
        for tokens in (12, 1, 2):
            ids = rng.integers(3, VOCABULARY, (2, tokens))
            assert_close(ours.step(ids, max_depth=depth), spine.step(ids, max_depth=depth))


@pytest.mark.parametrize("tau", (-1.0, 0.3, 0.6, 0.8))
def test_exits_are_decided_alike_padding_left_out(case: Case, tau: float) -> None:
    rng = np.random.default_rng(3)
    mask = np.array([[1] * 6, [0] * 2 + [1] * 4, [0] * 5 + [1]])
    ours, spine = case.players(3)
    for step in range(4):
        ids, real = rng.integers(3, VOCABULARY, (3, 1)), None
        if step == 0:
            ids, real = rng.integers(3, VOCABULARY, (3, 6)), mask
        found, expected = ours.step(ids, real, tau=tau), spine.step(ids, real, tau=tau)
        assert found["river.exit_depth"] == expected["river.exit_depth"]
        assert_close(_real(found, ours.mask), _real(expected, spine.mask))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_each_layer_can_have_a_threshold_of_its_own(exported: Exported, tmp_path: Path, family: str) -> None:
    offsets = (0.0, -0.3, 0.05, 0.0)
    config = default_config(tau_offsets=offsets)
    export(exported(family), tmp_path / "spine.onnx", config)
    options = EngineOptions(dtype="float32", max_length=LENGTH)
    made = write_onnx(exported(family), tmp_path / "tensorrt.onnx", config, options)
    assert made.defaults["river.tau_offsets"] == pytest.approx(offsets)
    depths = set()
    for tau in (-1.0, 0.5, 0.7, 0.8):
        settings = {"tau": tau, "max_depth": LAYERS, "tau_offsets": offsets}
        ours, spine = StaticPlayer(session(made.path), 2, settings), Player(session(tmp_path / "spine.onnx"), 2)
        rng = np.random.default_rng(0)
        for tokens in (6, 1, 1):
            ids = rng.integers(3, VOCABULARY, (2, tokens))
            found, expected = ours.step(ids), spine.step(ids, tau=tau)
            assert_close(found, expected)
            depths.add(found["river.exit_depth"].item())
            assert found["river.exit_depth"] == expected["river.exit_depth"]
    assert len(depths) > 1


def _real(outputs: dict[str, np.ndarray], mask: np.ndarray) -> dict[str, np.ndarray]:
    """Outputs without what padding tokens compute: nobody reads it, and attention to nothing may differ."""
    shown = {name: value for name, value in outputs.items() if name != "river.exit_depth"}
    for name, value in shown.items():
        tokens = mask[:, :, None] if name == "logits" else mask[:, None, :, None]
        shown[name] = np.where(tokens[:, -value.shape[1] :] if name == "logits" else tokens, value, 0)
    return shown


def test_attention_and_cache_stand_outside_the_branches(case: Case) -> None:
    graph = onnx.load(case.made.path, load_external_data=False).graph
    branches = [attribute.g for node in graph.node if node.op_type == "If" for attribute in node.attribute]
    assert len(branches) == 2 * 2 * LAYERS
    inside = {node.op_type for branch in branches for node in branch.node}
    outside = [node.op_type for node in graph.node]
    assert inside.isdisjoint({"Softmax", "TensorScatter", "Attention"})
    assert outside.count("Softmax") == LAYERS


def test_node_names_are_unique_in_the_whole_model_and_settings_are_ordinary_inputs(case: Case) -> None:
    graph = onnx.load(case.made.path, load_external_data=False).graph
    names: list[str] = []

    def collect(part: onnx.GraphProto) -> None:
        for node in part.node:
            names.append(node.name)
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    collect(attribute.g)

    collect(graph)
    assert len(set(names)) == len(names) and all(names)
    stored = {tensor.name for tensor in graph.initializer}
    assert {"river.tau", "river.max_depth"} <= {value.name for value in graph.input} - stored
    assert case.made.defaults == {"river.tau": 2.0, "river.max_depth": LAYERS}


def test_eight_bits_equal_the_river_of_onnx_runtime(exported: Exported, tmp_path: Path) -> None:
    case = Case(exported("llama"), tmp_path, "static", bits=8)
    ours, spine = case.players(2)
    for ids in (np.array([[5, 6, 7], [8, 9, 10]]), np.array([[11], [12]])):
        assert_close(ours.step(ids, max_depth=0), spine.step(ids, max_depth=0))


def test_float16_stays_near_float32_and_keeps_positions_wide(exported: Exported, tmp_path: Path) -> None:
    case = Case(exported("llama"), tmp_path, "static", dtype="float16")
    graph = onnx.load(case.made.path, load_external_data=False).graph
    types = {value.name: value.type.tensor_type.elem_type for value in [*graph.input, *graph.output]}
    assert {types[past] for past, _ in case.made.caches} == {onnx.TensorProto.FLOAT16} == {types["logits"]}
    angles = [node for node in graph.node if node.op_type in ("Cos", "Sin")]
    assert angles and not any("float16" in name for node in angles for name in node.input)
    ours, spine = case.players(2)
    for ids in (np.array([[5, 6, 7], [8, 9, 10]]), np.array([[11], [12]])):
        found, expected = ours.step(ids), spine.step(ids)
        assert_close(found, expected, tolerance=5e-3)
        assert found["river.exit_depth"] == LAYERS


@pytest.mark.skipif(Version(onnx.__version__) < Version("1.23"), reason="onnx's evaluator does not know bfloat16")
@pytest.mark.parametrize("kv_cache", KV_CACHES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_bfloat16_stays_near_float32(exported: Exported, tmp_path: Path, family: str, kv_cache: str) -> None:
    options = EngineOptions(kv_cache=kv_cache, dtype="bfloat16", max_length=12)
    narrow = write_onnx(exported(family), tmp_path / "narrow.onnx", default_config(tau=2.0), options)
    options = dataclasses.replace(options, dtype="float32")
    wide = write_onnx(exported(family), tmp_path / "wide.onnx", default_config(tau=2.0), options)
    for depth in (0, 2, LAYERS):
        ours = StaticPlayer(ReferenceSession(narrow.path), 2, NEVER)
        exact = StaticPlayer(session(wide.path), 2, NEVER)
        for ids in (np.array([[5, 6, 7], [8, 9, 10]]), np.array([[11], [12]])):
            found, expected = ours.step(ids, max_depth=depth), exact.step(ids, max_depth=depth)
            assert found["logits"].dtype == ml_dtypes.bfloat16
            assert found.pop("river.exit_depth") == expected.pop("river.exit_depth") == depth
            for name, value in expected.items():
                # Eight bits of fraction, some ten roundings deep; a wrong node is off by a tenth of the range or more.
                error = np.asarray(found[name], np.float64) - value
                assert np.sqrt(np.mean(error**2)) <= 2.5e-2 * np.ptp(value), name


@pytest.mark.parametrize("kv_cache", KV_CACHES)
def test_the_plain_model_in_the_same_form_equals_the_original(
    exported: Exported, tmp_path: Path, kv_cache: str
) -> None:
    options = EngineOptions(river=False, kv_cache=kv_cache, dtype="float32", max_length=LENGTH)
    made = write_onnx(exported("gpt_neox"), tmp_path / "plain.onnx", default_config(), options)
    ours, plain = StaticPlayer(session(made.path), 2, {}), Player(session(exported("gpt_neox")), 2)
    for ids in (np.array([[5, 6, 7], [8, 9, 10]]), np.array([[11], [12]])):
        assert_close(ours.step(ids), plain.step(ids))


def test_a_grid_with_zero_points_is_refused(exported: Exported, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="symmetric grids only"):
        write_onnx(
            exported("llama"), tmp_path / "x.onnx", default_config(quantizer="rtn"), EngineOptions(dtype="float32")
        )
    assert not list(tmp_path.iterdir())


def test_a_model_of_another_type_is_refused(exported: Exported, tmp_path: Path) -> None:
    options = EngineOptions(dtype="float16", max_length=LENGTH, river=False)
    half = write_onnx(exported("llama"), tmp_path / "half.onnx", default_config(), options).path
    with pytest.raises(ConfigError, match=r"dtype: .*computes in float16"):
        write_onnx(half, tmp_path / "x.onnx", default_config(), EngineOptions(dtype="bfloat16"))
    with pytest.raises(InputError, match="no KV cache that grows"):
        write_onnx(half, tmp_path / "x.onnx", default_config(), EngineOptions())


@pytest.mark.parametrize("kv_cache", KV_CACHES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_river_tuned_on_texts_and_with_a_head_is_the_same_here(
    exported: Exported, family: str, kv_cache: str, tmp_path: Path
) -> None:
    original = exported(family)
    rng = np.random.default_rng(0)
    texts = [Document(str(i), "k", "".join(map(chr, rng.integers(3, VOCABULARY, 200)))) for i in range(4)]
    tuning = Tuning(TextTokenizer(lambda text: [ord(c) % VOCABULARY for c in text], str, VOCABULARY), texts)
    config = default_config(tau=2.0, quantizer="gptq-symmetric", head_bits=4)
    export(original, tmp_path / "spine.onnx", config, tuning=tuning)
    options = EngineOptions(kv_cache=kv_cache, dtype="float32", max_length=LENGTH)
    ids = tuning.ids(onnx.load(original, load_external_data=False))
    made = write_onnx(original, tmp_path / "tensorrt.onnx", config, options, tuning_ids=ids)
    plain = write_onnx(original, tmp_path / "plain.onnx", default_config(tau=2.0), options)
    spine = session(tmp_path / "spine.onnx")
    for depth in (0, 2, LAYERS):
        batch = np.random.default_rng(depth).integers(3, VOCABULARY, (2, 9))
        found, untuned = (
            StaticPlayer(session(model.path), 2, NEVER).step(batch, max_depth=depth) for model in (made, plain)
        )
        assert_close(found, Player(spine, 2).step(batch, max_depth=depth))
        assert (np.abs(found["logits"] - untuned["logits"]).max() > 1e-3) == (depth < LAYERS)


def test_a_quantizer_that_asks_for_texts_gets_them_or_is_refused(exported: Exported, tmp_path: Path) -> None:
    config = default_config(quantizer="gptq-symmetric")
    with pytest.raises(ConfigError, match="quantizer: 'gptq-symmetric' needs tuning texts"):
        write_onnx(exported("llama"), tmp_path / "x.onnx", config, EngineOptions(max_length=LENGTH))
