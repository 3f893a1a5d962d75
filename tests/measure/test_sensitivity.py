"""Sensitivity is what it says, and a budget of bits goes where it saves most."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

import river_compile
from river_compile.config import RiverConfig
from river_compile.errors import ConfigError, InputError
from river_compile.measure.fidelity import Document, TextTokenizer, compare
from river_compile.measure.sensitivity import LinearCost, Sensitivity, choose_bits, measure_sensitivity
from river_compile.measure.tuning import Tuning
from tests.families import LAYERS, VOCABULARY
from tests.oracle import Oracle, Player, session

CHARACTERS = TextTokenizer(lambda text: [ord(c) % VOCABULARY for c in text], str, VOCABULARY)


def _texts() -> list[Document]:
    rng = np.random.default_rng(0)
    return [Document(str(i), "k", "".join(map(chr, rng.integers(3, VOCABULARY, 80)))) for i in range(4)]


def _synthetic(costs: list[float], together: float = 0.2) -> Sensitivity:
    linears = tuple(LinearCost(f"l{i}", i, 100, cost) for i, cost in enumerate(costs))
    return Sensitivity("rtn", 4, 32, 32, 64, together, linears)


def test_bits_go_where_they_save_most() -> None:
    chosen = choose_bits(_synthetic([0.01, 0.1, 0.02, 0.07]), avg_bits=6.0)
    assert chosen == {"l0": 4, "l1": 8, "l2": 4, "l3": 8}


def test_an_average_is_never_exceeded_and_nearly_spent() -> None:
    rng = np.random.default_rng(0)
    for budget in (4.0, 4.3, 5.0, 7.9, 8.0, 12.5, 40.0):
        linears = tuple(LinearCost(f"l{i}", i, int(rng.integers(50, 150)), rng.random()) for i in range(40))
        chosen = choose_bits(Sensitivity("rtn", 4, 32, 16, 64, 0.3, linears), avg_bits=budget)
        widths = {4: 4, 8: 8, "float": 16}
        total = sum(linear.weights for linear in linears)
        average = sum(widths[chosen[linear.name]] * linear.weights for linear in linears) / total
        assert average <= budget + 1e-9
        assert average >= min(budget, 16) - 0.5


def test_a_divergence_is_met_with_few_bits() -> None:
    sensitivity = _synthetic([0.01, 0.1, 0.02, 0.07], together=0.4)
    loose, tight = (choose_bits(sensitivity, max_kl=limit) for limit in (0.25, 0.1))
    assert list(loose.values()).count(8) == 1
    assert list(tight.values()).count(8) == 2
    assert set(choose_bits(sensitivity, max_kl=1e-9).values()) == {"float"}
    assert set(choose_bits(sensitivity, max_kl=1.0).values()) == {4}


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "either"),
        ({"avg_bits": 5.0, "max_kl": 0.1}, "either"),
        ({"avg_bits": 3.0}, "4 or more"),
        ({"max_kl": 0.0}, "above 0"),
    ],
)
def test_budgets_out_of_reach_are_refused(budget: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_bits(_synthetic([0.1]), **budget)


@pytest.fixture(scope="module")
def measured(exported: Callable[[str], Path]) -> Sensitivity:
    ids = [np.array(CHARACTERS.encode(text.text)) for text in _texts()]
    return measure_sensitivity(exported("llama"), RiverConfig(), ids, tokens=128)


def test_the_cost_of_all_together_is_that_of_the_river(
    measured: Sensitivity, exported: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tmp_path / "river.onnx"
    river_compile.export(exported("llama"), path, RiverConfig())
    plain, river = session(exported("llama")), Oracle(exported("llama"), path).at(0)
    costs = []
    for text in (_texts()[0], _texts()[-1]):
        ids = np.array(CHARACTERS.encode(text.text))[:64]
        costs.append(compare(*(Player(s, 1).step(ids[None])["logits"][0] for s in (plain, river)), ids).kl.mean())
    assert measured.tokens == 128
    assert measured.together == pytest.approx(np.mean(costs), rel=1e-3)
    assert len(measured.linears) == LAYERS * 7
    assert all(linear.kl >= 0 for linear in measured.linears)
    assert measured.together / 3 < sum(linear.kl for linear in measured.linears) < 3 * measured.together


def test_a_plan_beats_the_same_bits_spent_the_other_way_round(
    measured: Sensitivity, exported: Callable[[str], Path]
) -> None:
    from river_compile.exporters.onnx.swap import SwappableModel
    from river_compile.measure.sensitivity import divergence

    ids = [np.array(CHARACTERS.encode(text.text)) for text in _texts()]
    batch = np.stack([text[:64] for text in ids])
    model = SwappableModel(exported("llama"), RiverConfig(), ids)
    reversed_costs = replace(
        measured, linears=tuple(replace(linear, kl=1 / max(linear.kl, 1e-9)) for linear in measured.linears)
    )
    costs = []
    for sensitivity in (measured, reversed_costs):
        chosen = choose_bits(sensitivity, avg_bits=5.5)
        weights: dict[str, np.ndarray] = {}
        for linear in model.linears:
            bits = chosen[linear.name]
            weights |= model.quantized(linear, bits) if bits != "float" else {}
        costs.append(divergence(model.logits(batch), model.logits(batch, weights)))
    assert costs[0] < 0.8 * costs[1]


def test_a_sensitivity_file_comes_back_as_it_was(measured: Sensitivity, tmp_path: Path) -> None:
    path = tmp_path / "sensitivity.json"
    path.write_text(measured.to_json())
    assert Sensitivity.load(path) == measured
    assert sum(measured.by_layer.values()) == pytest.approx(sum(measured.by_role.values()))
    path.write_text("{}")
    with pytest.raises(InputError, match="no sensitivity file"):
        Sensitivity.load(path)
    with pytest.raises(ConfigError, match="measured with rtn"):
        measured.check(RiverConfig(quantizer="lsq"))


def test_an_export_with_a_budget_says_what_it_spent(exported: Callable[[str], Path], tmp_path: Path) -> None:
    path, kept = tmp_path / "river.onnx", tmp_path / "sensitivity.json"
    tuning = Tuning(CHARACTERS, _texts(), avg_bits=5.0, sensitivity=kept, tokens=64)
    report = river_compile.export(exported("llama"), path, RiverConfig(quantizer="gptq"), tuning=tuning)
    assert report.quantizer == "gptq"
    assert 4.7 < report.average_bits <= 5.0
    assert Sensitivity.load(kept).quantizer == "gptq"
    nodes = [node for outer in onnx.load(path).graph.node for a in outer.attribute for node in a.g.node]
    bits = {a.i for node in nodes if node.op_type == "MatMulNBits" for a in node.attribute if a.name == "bits"}
    assert bits == {4, 8}


def test_gptq_makes_a_better_river_than_round_to_nearest(exported: Callable[[str], Path], tmp_path: Path) -> None:
    costs = {}
    for name in ("rtn", "gptq"):
        path = tmp_path / f"{name}.onnx"
        tuning = Tuning(CHARACTERS, _texts()) if name == "gptq" else None
        river_compile.export(exported("llama"), path, RiverConfig(quantizer=name, activations="float"), tuning=tuning)
        found = river_compile.evaluate(path, _texts(), CHARACTERS, taus=(), speed_rounds=0)
        costs[name] = found.settings[0].kl.value
    assert costs["gptq"] < 0.7 * costs["rtn"]


def test_float_keeps_a_weight_as_it_is(exported: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "river.onnx"
    report = river_compile.export(exported("llama"), path, RiverConfig(bits_for=(("*down_proj", "float"),)))
    weights = {tensor.name for tensor in onnx.load(path).graph.initializer if tensor.name.endswith(".values")}
    assert len(weights) == LAYERS * 3
    assert report.notes == ()
    assert report.average_bits > 8


def test_gptq_without_texts_is_refused_before_anything_is_written(
    exported: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tmp_path / "river.onnx"
    with pytest.raises(ConfigError, match="needs tuning texts"):
        river_compile.export(exported("llama"), path, RiverConfig(quantizer="gptq"))
    assert not path.exists()


def test_a_budget_of_fidelity_plans_the_head_and_one_of_bits_leaves_it() -> None:
    sensitivity = replace(_synthetic([0.1, 0.1], together=0.2), head=LinearCost("head", 2, 1000, 0.3))
    assert "head" not in choose_bits(sensitivity, avg_bits=4.0)
    assert choose_bits(sensitivity, max_kl=1.0)["head"] == 4
    assert choose_bits(sensitivity, max_kl=0.21)["head"] == 8
    assert choose_bits(sensitivity, max_kl=1e-9)["head"] == "float"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_head_alone_costs_what_its_quantized_twin_does(
    exported: Callable[[str], Path], family: str, tmp_path: Path
) -> None:
    """gpt2's head is tied to the embeddings, which must stay as they are."""
    model = exported(family)
    ids = [np.random.default_rng(i).integers(3, VOCABULARY, 64) for i in range(2)]
    measured = measure_sensitivity(model, RiverConfig(), ids, tokens=128)
    assert measured.head is not None
    assert measured.head.layer == LAYERS
    # Layers whose weights all stay float leave the head as the only difference.
    config = RiverConfig(tau=2.0, activations="float", head_bits=4, bits_for=(("*", "float"),), max_depth=0)
    river_compile.export(model, tmp_path / "m.onnx", config)
    batch = np.stack(ids)
    logits = Player(session(tmp_path / "m.onnx"), 2).step(batch)["logits"]
    plain = Player(session(model), 2).step(batch)["logits"]
    expected = np.mean([_kl_of(first, second) for first, second in zip(plain, logits, strict=True)])
    assert measured.head.kl == pytest.approx(expected, rel=0.02)
    assert measured.head.kl > 0


def _kl_of(reference: np.ndarray, logits: np.ndarray) -> float:
    first, second = (
        rows.astype(np.float64) - np.logaddexp.reduce(rows.astype(np.float64), -1, keepdims=True)
        for rows in (reference, logits)
    )
    return float((np.exp(first) * (first - second)).sum(-1).mean())


def test_a_plan_by_fidelity_sets_the_heads_bits(exported: Callable[[str], Path], tmp_path: Path) -> None:
    tuning = Tuning(CHARACTERS, _texts(), max_kl=100.0)
    river_compile.export(exported("llama"), tmp_path / "m.onnx", RiverConfig(tau=2.0), tuning=tuning)
    written = next(p.value for p in onnx.load(tmp_path / "m.onnx").metadata_props if p.key == "river.config")
    assert '"head_bits": 4' in written
