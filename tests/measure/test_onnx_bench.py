"""`river-bench` of ONNX models: what is run beside what, from which cache, and what is told of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from river_compile.api import export
from river_compile.config import NEVER, RiverConfig
from river_compile.errors import ConfigError, InputError
from river_compile.measure import onnx_bench
from river_compile.measure.bench_rows import BenchRow, interleave
from river_compile.measure.fidelity import load_tokenizer
from river_compile.measure.onnx_bench import BenchPoint, bench_onnx
from river_compile.measure.onnx_models import open_models
from river_compile.measure.onnx_profile import profile_operators
from river_compile.measure.onnx_ways import Prompt, Way, some_prompts
from river_compile.measure.onnx_weights import ReadWeights
from river_compile.runtime import OnnxDecoder
from tests.conftest import Exported
from tests.contrib_model import ContribDecoder
from tests.families import VOCABULARY, random_model
from tests.signatures import ROOM, VARIANTS
from tests.words import save_word_tokenizer

LAYERS = 2
BANDWIDTH = 1e9
SMALL: dict[str, Any] = {"rounds": 1, "new_tokens": 4, "contexts": (12,), "depths": ()}


@pytest.fixture(autouse=True)
def known_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_bench, "memory_bandwidth", lambda device: BANDWIDTH)


@pytest.fixture(scope="module")
def plain(exported: Exported) -> Path:
    return exported("llama", LAYERS)


@pytest.fixture(scope="module")
def river(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "model.river.onnx"
    export(plain, path, RiverConfig(tau=-1.0, head_bits=8), check=False)
    return path


def _names(point: BenchPoint) -> list[str]:
    return [row.name for row in point.rows]


def test_a_plain_model_gets_a_river_for_the_while(plain: Path) -> None:
    before = sorted(plain.parent.iterdir())
    config = RiverConfig(bits=8, group_size=64)
    settings = SMALL | {"taus": (0.9, -1.0), "depths": (1, 7), "int4": True, "exact": True}
    result = bench_onnx(plain, config=config, **settings)
    assert _names(result.points[0]) == [
        "plain",
        "plain, int4",
        "river, exits off",
        "river, tau 0.9",
        "river, tau -1",
        "river, exit depth 1",
        "all river",
        "exact",
    ]
    assert (result.river["bits"], result.river["group_size"], result.notes) == (8, 64, [])
    assert sorted(plain.parent.iterdir()) == before
    found = {row.name: row for row in result.points[0].rows}
    # 4 bits, the head too, beside a river of 8 bits and a float head.
    assert found["plain, int4"].bytes_per_token < 0.3 * found["plain"].bytes_per_token
    assert found["plain, int4"].bytes_per_token < found["all river"].bytes_per_token


def test_the_quantized_plain_model_says_nearly_the_same(plain: Path, tmp_path: Path) -> None:
    models = open_models(plain, tmp_path, int4=True, progress=lambda step, done, total: None)
    assert models.int4 is not None and models.plain is not None
    graph = onnx.load(models.int4.path, load_external_data=False).graph
    products = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert len(products) == 7 * LAYERS + 1
    bits = {
        a.name: a.i for node in products for a in node.attribute if a.name in ("bits", "block_size", "accuracy_level")
    }
    assert bits == {"bits": 4, "block_size": 32, "accuracy_level": 4}
    ids = some_prompts(VOCABULARY, 1, 8, None)
    expected, found = (decoder.forward(ids, decoder.start(1))[0] for decoder in (models.plain, models.int4))
    assert 0.9 < np.corrcoef(expected.ravel(), found.ravel())[0, 1] < 1


def test_a_river_model_is_beside_itself_without_its_river(river: Path) -> None:
    result = bench_onnx(river, **SMALL | {"batches": (1, 3), "depths": (1,), "rounds": 2})
    assert (result.plain, result.layers, result.notes) == ("the model without its river", LAYERS, [])
    for point in result.points:
        assert (point.reference, point.ratio(point.rows[0])) == ("plain", 1)
        # Without thresholds it is run at its own.
        depths = {row.name: row.mean_depth for row in point.rows[1:]}
        assert depths == {"river, exits off": 2, "river, tau -1": 1, "river, exit depth 1": 1, "all river": 0}
        assert all(len(row.seconds) == 2 for row in point.rows)
        assert all(len(row.depths) == 8 for row in point.rows[1:])


def test_the_json_has_everything_and_no_nan(river: Path) -> None:
    document = json.loads(bench_onnx(river, exact=True, **SMALL).to_json())
    (point,) = document["points"]
    assert (point["batch"], point["context"], point["reference"]) == (1, 12, "plain")
    assert document["bandwidth"] == BANDWIDTH and document["river"]["tau"] == -1
    rows = {row["name"]: row for row in point["rows"]}
    limit = BANDWIDTH / rows["all river"]["bytes_per_token"]
    assert rows["all river"]["byte_limit_tokens_per_second"] == pytest.approx(limit)
    assert rows["exact"]["byte_limit_tokens_per_second"] is None and rows["plain"]["mean_depth"] is None
    assert point["exact"]["tokens"] == 4 and point["exact"]["differing"] == 0


def test_the_original_is_what_the_river_was_made_for(
    plain: Path, river: Path, exported: Exported, tmp_path: Path
) -> None:
    assert bench_onnx(river, plain=plain, **SMALL).plain == str(plain)
    other = onnx.load(plain)
    head = max((t for t in other.graph.initializer), key=lambda tensor: math.prod(tensor.dims))
    head.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(head), head.name))
    onnx.save(other, tmp_path / "other.onnx")
    with pytest.raises(InputError, match=r"other.onnx: is not the model that .* with exits off"):
        bench_onnx(river, plain=tmp_path / "other.onnx", **SMALL)
    with pytest.raises(InputError, match="other inputs and outputs"):
        bench_onnx(river, plain=exported("gpt2"), **SMALL)
    with pytest.raises(InputError, match="has a river itself"):
        bench_onnx(river, plain=river, **SMALL)
    with pytest.raises(InputError, match="it is the plain model itself"):
        bench_onnx(plain, plain=plain, **SMALL)
    with pytest.raises(InputError, match="settings of a river are for a plain model"):
        bench_onnx(river, config=RiverConfig(), **SMALL)


@pytest.mark.parametrize(("tau", "depth"), [(NEVER, None), (0.5, None), (NEVER, 1), (NEVER, 0)])
def test_a_way_writes_what_generation_writes(river: Path, tau: float, depth: int | None) -> None:
    decoder = OnnxDecoder(river)
    ids = some_prompts(VOCABULARY, 2, 300, None)
    prompt = Prompt.read(decoder, ids, 5)
    assert prompt.state.mask.shape == (2, 300)
    way = Way(BenchRow("way", tau, depth), decoder, ReadWeights.of(river))
    for keep in (False, True):
        way.run(prompt, 5, keep)
    # The prompt is the backbone's.
    state = decoder.start(2)
    logits, _ = decoder.backbone(ids, state)
    chosen, depths = [], []
    for _ in range(6):
        chosen.append(logits[:, -1].argmax(-1))
        logits, ran = decoder.forward(chosen[-1][:, None], state, None, tau, depth)
        depths.append(ran)
    np.testing.assert_array_equal(prompt.first, chosen[0])
    np.testing.assert_array_equal(way.written, np.stack(chosen[1:], 1))
    assert way.row.depths == depths[:5] and len(way.row.seconds) == 1


def _packed(weight: Any, bits: int) -> int:
    """Bytes of a quantized weight, [outputs, inputs]: values, and of 32 a float32 scale and a zero point."""
    return int(weight.numel() * (bits / 8 + (4 + bits / 8) / 32))


def test_weights_that_a_pass_reads(plain: Path, river: Path) -> None:
    model = random_model("llama", LAYERS)
    linears = {name: m.weight for name, m in model.named_modules() if type(m).__name__ == "Linear"}
    norms = sum(p.nbytes for name, p in model.named_parameters() if "norm" in name)
    alone, both = ReadWeights.of(plain), ReadWeights.of(river)
    # Beside them only the constants of rotary embedding and mask; the table of embeddings is read by row.
    assert alone.bytes() == pytest.approx(sum(weight.nbytes for weight in linears.values()) + norms, abs=1000)
    assert both.bytes() == pytest.approx(alone.bytes(), abs=1000)
    for in_river in (1, 2):
        quantized = {name: 4 for name in linears if any(f"layers.{LAYERS - 1 - i}." in name for i in range(in_river))}
        quantized["lm_head"] = 8
        saved = sum(linears[name].nbytes - _packed(linears[name], bits) for name, bits in quantized.items())
        # But for what a decision reads, some numbers.
        assert both.bytes() - both.bytes(in_river) == pytest.approx(saved, abs=200)


def test_a_head_that_is_the_embedding_is_read_where_it_is_multiplied(exported: Exported, tmp_path: Path) -> None:
    """The file has its transpose outside the branches, which a runtime computes once."""
    export(exported("gemma2"), tmp_path / "m.onnx", RiverConfig(tau=2.0, head_bits=8))
    model = random_model("gemma2")
    layers = [m.weight for name, m in model.named_modules() if type(m).__name__ == "Linear" and "layers" in name]
    read, head = ReadWeights.of(tmp_path / "m.onnx"), model.get_input_embeddings().weight
    saved = sum(weight.nbytes - _packed(weight, 4) for weight in layers) + head.nbytes - _packed(head, 8)
    assert read.bytes() - read.bytes(len(read.layers)) == pytest.approx(saved, abs=500)


def test_the_cache_is_read_as_well(river: Path) -> None:
    decoder = OnnxDecoder(river)
    prompt = Prompt.read(decoder, some_prompts(VOCABULARY, 2, 12, None), 4)
    keys_and_values, heads, width, float32 = 2, 2, 16, 4
    cache = prompt.cache_bytes(decoder)
    assert cache == LAYERS * keys_and_values * heads * width * float32 * 2 * 12
    way = Way(BenchRow("river, exits off", NEVER), decoder, ReadWeights.of(river))
    way.run(prompt, 2, keep=True)
    way.weigh(cache)
    assert way.row.bytes_per_token == way.weights.bytes() + cache


def test_experts_leave_it_unknown(exported: Exported) -> None:
    assert math.isnan(ReadWeights.of(exported("mixtral")).bytes())


def test_batches_and_contexts_are_two_sweeps(river: Path) -> None:
    result = bench_onnx(river, **SMALL | {"batches": (2, 1), "contexts": (8, 16), "rounds": 1})
    assert [(point.batch, point.context) for point in result.points] == [(2, 8), (1, 8), (2, 16)]
    assert [point.batch for point in result.sweep("batch")] == [1, 2]
    assert [point.context for point in result.sweep("context")] == [8, 16]
    # Where the first place of all could not be measured, the others are still a sweep.
    result.points = result.points[:1] + result.points[2:]
    assert [point.context for point in result.sweep("context")] == [8, 16]
    for name in ("batches", "contexts"):
        with pytest.raises(ConfigError, match="numbers of 1 or more"):
            bench_onnx(river, **SMALL | {name: (0,)})


def _variant(name: str, plain: Path, folder: Path) -> Path:
    model = onnx.load(plain)
    onnx.save(VARIANTS[name](model) or model, folder / "variant.onnx")
    return folder / "variant.onnx"


def test_what_a_model_does_not_take_is_noted(plain: Path, tmp_path: Path) -> None:
    static = _variant("static", plain, tmp_path)
    result = bench_onnx(static, exact=True, **SMALL | {"contexts": (ROOM - 4, ROOM - 3)})
    assert [point.context for point in result.points] == [ROOM - 4]
    assert result.points[0].exact is not None and result.points[0].exact.differing == 0
    assert "skipped" in result.notes[0] and f"context {ROOM - 3}" in result.notes[0]
    single = _variant("one sequence", plain, tmp_path)
    result = bench_onnx(single, **SMALL | {"batches": (1, 2)})
    assert [point.batch for point in result.points] == [1]
    assert "batch 2, context 12: skipped" in result.notes[0] and "1 sequence" in result.notes[0]
    with pytest.raises(InputError, match="nothing of it could be measured"):
        bench_onnx(single, **SMALL | {"batches": (2,)})


def test_a_context_ends_where_positions_do(exported: Exported) -> None:
    """GPT-2's positions are a table of 256 rows."""
    result = bench_onnx(exported("gpt2"), int4=True, **SMALL | {"contexts": (252, 253)})
    assert [point.context for point in result.points] == [252]
    note = next(note for note in result.notes if "skipped" in note)
    assert note.startswith("batch 1, context 253: ")
    # Its linear layers are Gemm, but for the head.
    assert any("16 of 17 linear layers stay" in note for note in result.notes)


def test_exact_decoding_is_left_out_where_it_cannot_be(plain: Path, tmp_path: Path) -> None:
    last = _variant("logits of the last token", plain, tmp_path)
    result = bench_onnx(last, exact=True, **SMALL)
    assert "exact" not in _names(result.points[0])
    assert "no logits but the last token's" in result.notes[0]
    contrib = ContribDecoder().save(tmp_path / "contrib.onnx")
    result = bench_onnx(contrib, exact=True, **SMALL | {"batches": (1, 2)})
    assert ["exact" in _names(point) for point in result.points] == [True, False]
    assert "sequences of one length only" in result.notes[0]


def test_a_river_that_took_operators_apart_asks_for_the_original(tmp_path: Path) -> None:
    contrib = ContribDecoder().save(tmp_path / "contrib.onnx")
    export(contrib, tmp_path / "river.onnx", check=False)
    notes = bench_onnx(tmp_path / "river.onnx", **SMALL).notes
    assert len(notes) == 1 and "name it with --plain" in notes[0]
    assert bench_onnx(tmp_path / "river.onnx", plain=contrib, **SMALL).notes == []


def test_without_a_plain_model_ratios_are_to_exits_off(
    river: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model: onnx.ModelProto, *, river: bool) -> onnx.ModelProto:
        raise ValueError("cannot be folded")

    monkeypatch.setattr("river_compile.measure.onnx_models.only_twin", refuse)
    result = bench_onnx(river, int4=True, **SMALL)
    assert (result.plain, result.points[0].reference) == ("", "river, exits off")
    assert "cannot be folded" in result.notes[0] and "no plain model to quantize" in result.notes[1]


def test_operators_are_those_of_each_row(plain: Path, river: Path) -> None:
    result = bench_onnx(river, plain=plain, operators=True, **SMALL | {"contexts": (12, 20)})
    assert [one.name for one in result.operators] == ["plain", "river, exits off", "all river"]
    original, off, all_river = result.operators
    products = sum(node.op_type == "MatMul" for node in onnx.load(plain).graph.node)
    assert original.calls["MatMul"] == off.calls["MatMul"] == products
    assert "MatMulNBits" not in original.calls and "MatMulNBits" not in off.calls
    # ONNX Runtime makes one product of those that read the same: query, key and value; gate and up.
    assert all_river.calls["MatMulNBits"] in (4 * LAYERS + 1, 7 * LAYERS + 1)
    for one in result.operators:
        assert "If" not in one.calls and list(one.spent.values()) == sorted(one.spent.values(), reverse=True)
        assert 0 < sum(one.spent.values()) + one.between <= one.seconds * (1 + 1e-9)
    assert json.loads(result.to_json())["operators"][2]["calls"] == all_river.calls
    assert bench_onnx(river, plain=plain, **SMALL).operators == []


def test_prompts_are_texts_where_there_is_a_tokenizer(river: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save_word_tokenizer(tmp_path / "words", eos_token=None))
    first, second = some_prompts(VOCABULARY, 2, 40, tokenizer)
    text = some_prompts(VOCABULARY, 1, 100_000, tokenizer)[0]
    np.testing.assert_array_equal(first, text[:40])
    assert first.shape == second.shape == (40,)
    foreign = load_tokenizer(save_word_tokenizer(tmp_path / "foreign", words=500, eos_token=None))
    with pytest.raises(InputError, match="do not belong together"):
        bench_onnx(river, tokenizer=foreign, **SMALL)


def test_rounds_are_interleaved_and_the_first_warms_up() -> None:
    called: list[tuple[str, bool]] = []
    ways = [lambda keep, name=name: called.append((name, keep)) for name in "ab"]
    interleave(ways, 2, lambda step, done, total: None)
    assert called == [("a", False), ("b", False), *[("a", True), ("b", True)] * 2]


def test_profiling_leaves_the_decoder_as_it_was(river: Path) -> None:
    decoder = OnnxDecoder(river)
    prompt = Prompt.read(decoder, np.array([[5, 9, 17, 33]]), 4)
    profile_operators(Way(BenchRow("row", NEVER, LAYERS), decoder, ReadWeights.of(river)), prompt, 4)
    assert not decoder.session.get_session_options().enable_profiling
