"""The evaluator, on a small model with a river: against direct computation, across runtimes, and interrupted."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import river_compile
from river_compile.backend import RiverBackend
from river_compile.config import RiverConfig
from river_compile.errors import ConfigError, InputError
from river_compile.exporters.torch.linear import Dequantized
from river_compile.measure.compiled_subject import CompiledSubject
from river_compile.measure.evaluation import evaluate
from river_compile.measure.fidelity import Document, TextTokenizer, compare
from river_compile.measure.subjects import BACKBONE, OnnxSubject, Reading, Setting, TorchSubject
from tests.families import LAYERS, VOCABULARY, random_model
from tests.first_exits import check_first_exits
from tests.oracle import Oracle, Player, session
from tests.torch_models import as_it_is

BYTES = TextTokenizer(lambda text: [ord(c) % VOCABULARY for c in text], lambda ids: "".join(map(chr, ids)), VOCABULARY)
TEXTS = [Document("first", "prose", "The river flows on."), Document("second", "code", "x = [i for i in range(9)]")]


@pytest.fixture(scope="module")
def river(exported: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("eval") / "llama.river.onnx"
    river_compile.export(exported("llama"), path, RiverConfig(tau=0.5, activations="float"))
    return path


def test_all_river_agrees_with_the_oracle_as_computed_directly(river: Path, exported: Callable[[str], Path]) -> None:
    found = evaluate(river, TEXTS, BYTES, taus=(), speed_rounds=0)
    oracle = Oracle(exported("llama"), river)
    expected = []
    for text in TEXTS:
        ids = np.array(BYTES.encode(text.text))
        plain, quantized = (
            Player(s, 1).step(ids[None])["logits"][0] for s in (session(exported("llama")), oracle.at(0))
        )
        expected.append(compare(plain, quantized, ids))
    row = found.settings[0]
    assert row.label == "all river"
    assert row.top1.value == pytest.approx(np.concatenate([e.top1 for e in expected]).mean())
    assert row.kl.value == pytest.approx(np.concatenate([e.kl for e in expected]).mean(), rel=1e-2)
    assert row.perplexity.value == pytest.approx(np.exp(np.concatenate([e.nll for e in expected]).mean()), rel=1e-3)
    assert row.exit_histogram == [found.tokens, 0, 0, 0, 0]
    assert set(row.top1_by_kind) == {"prose", "code"}
    assert 0.5 < row.value_cosine.value < 1
    assert len(row.value_cosine_by_layer) == LAYERS


def test_a_threshold_above_reach_is_the_backbone_itself(river: Path) -> None:
    row = evaluate(river, TEXTS, BYTES, taus=(1.0,), depths=(), speed_rounds=0).settings[0]
    assert row.top1.value == 1
    assert row.kl.value < 1e-6
    assert row.value_cosine.value == pytest.approx(1, abs=1e-5)
    assert row.exit_histogram[-1] == sum(row.exit_histogram)


def test_a_setting_that_is_named_twice_is_measured_once(river: Path) -> None:
    found = evaluate(river, TEXTS, BYTES, taus=(0.9, 0.9), depths=(0, 2, 0), speed_rounds=1)
    assert [row.label for row in found.settings] == ["tau 0.9", "all river", "exit depth 2"]


def test_exit_depths_follow_the_similarities_that_are_reported(river: Path) -> None:
    """The first token, which no earlier exit has touched, leaves where torch says that its similarity first lies above;
    thresholds lie between the similarities, so that every depth occurs."""
    ids = np.array(BYTES.encode(TEXTS[0].text))
    similarities = TorchSubject(random_model("llama")).read(ids, BACKBONE, stepwise=False).similarities
    assert similarities is not None
    seen = check_first_exits(OnnxSubject(river), ids, similarities)
    assert len(seen) > 1
    assert LAYERS in seen


def test_torch_and_onnx_tell_the_same_backbone(river: Path) -> None:
    ids = np.array(BYTES.encode(TEXTS[1].text))
    onnx, torch = OnnxSubject(river), TorchSubject(random_model("llama"))
    assert (onnx.layers, onnx.vocabulary) == (torch.layers, torch.vocabulary) == (LAYERS, VOCABULARY)
    ours, theirs = (subject.read(ids, BACKBONE, stepwise=False) for subject in (onnx, torch))
    np.testing.assert_allclose(ours.logits, theirs.logits, atol=1e-4 * np.ptp(theirs.logits))
    for pair in ("keys", "values"):
        for a, b in zip(getattr(ours, pair), getattr(theirs, pair), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4 * np.ptp(b))
    assert ours.similarities is not None
    assert theirs.similarities is not None
    # The probe sees the outputs of layers only, so it has no similarity of the first; torch shows no last layer.
    np.testing.assert_allclose(ours.similarities[1:-1], theirs.similarities[1:-1], atol=1e-4)


def test_a_torch_river_is_measured_by_the_same_code_to_the_same_figures(river: Path) -> None:
    """The same weights rounded to nearest, once in a compiled torch model and once in the exported one."""
    backend = RiverBackend(RiverConfig(strict=True), lowering=Dequantized(), compiler=as_it_is)
    torch.compiler.reset()
    subjects = CompiledSubject(random_model("llama"), backend=backend, capacity=64), OnnxSubject(river)
    ours, theirs = (evaluate(subject, TEXTS, BYTES, taus=(), speed_rounds=0) for subject in subjects)
    first, second = ours.settings[0], theirs.settings[0]
    assert first.kl.value > 1e-4
    assert first.top1.value == second.top1.value
    assert first.kl.value == pytest.approx(second.kl.value, rel=1e-2)
    np.testing.assert_allclose(first.value_cosine_by_layer, second.value_cosine_by_layer, atol=1e-5)
    assert first.exit_histogram == second.exit_histogram


def test_steps_and_one_pass_are_the_same_reading(river: Path) -> None:
    subject, ids = OnnxSubject(river), np.array(BYTES.encode(TEXTS[0].text))
    whole, steps = (subject.read(ids, Setting(max_depth=2), stepwise=stepwise) for stepwise in (False, True))
    np.testing.assert_allclose(whole.logits, steps.logits, atol=1e-4 * np.ptp(whole.logits))
    np.testing.assert_allclose(whole.values[-1], steps.values[-1], atol=1e-4)
    assert whole.depths.tolist() == steps.depths.tolist() == [2] * len(ids)
    assert len(steps.seconds) == len(ids)


@dataclass
class Interrupted:
    """A subject that breaks down after some readings."""

    inner: OnnxSubject
    left: int
    reads: int = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def read(self, ids: np.ndarray, setting: Setting, *, stepwise: bool) -> Reading:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        self.reads += 1
        return self.inner.read(ids, setting, stepwise=stepwise)


def test_an_interrupted_run_goes_on_where_it_stopped(river: Path, tmp_path: Path) -> None:
    def run(subject: Any) -> Any:
        return evaluate(subject, TEXTS, BYTES, taus=(0.5,), speed_rounds=0, cache=tmp_path)

    subject = OnnxSubject(river)
    with pytest.raises(KeyboardInterrupt):
        run(Interrupted(subject, left=4))
    second = Interrupted(subject, left=99)
    resumed = run(second)
    # Two documents cost three readings each: backbone, threshold, all river. One document and a reading were done.
    assert second.reads == 3 * 2 - 3
    third = Interrupted(subject, left=0)
    assert run(third).to_json() == resumed.to_json()
    fresh = evaluate(subject, TEXTS, BYTES, taus=(0.5,), speed_rounds=0)
    assert fresh.to_json() == resumed.to_json()


def test_another_model_does_not_read_this_ones_cache(
    river: Path, exported: Callable[[str], Path], tmp_path: Path
) -> None:
    other = tmp_path / "other.onnx"
    river_compile.export(exported("llama"), other, RiverConfig(bits=8, activations="float"))
    first, second = (
        evaluate(path, TEXTS, BYTES, taus=(), speed_rounds=0, cache=tmp_path / "cache").settings[0]
        for path in (river, other)
    )
    assert second.kl.value < first.kl.value / 20


def test_speed_is_measured_beside_the_backbone(river: Path) -> None:
    found = evaluate(river, TEXTS, BYTES, taus=(0.5,), speed_rounds=2)
    for row in found.settings:
        assert row.speed is not None
        assert row.speed.tokens_per_second > 0
        assert row.speed.ratio.low <= row.speed.ratio.value <= row.speed.ratio.high


def test_exact_decoding_writes_what_the_backbone_writes(river: Path) -> None:
    found = evaluate(river, TEXTS, BYTES, taus=(0.5,), speed_rounds=1).exact
    assert found is not None
    assert (found.documents, found.tokens, found.differing) == (len(TEXTS), len(TEXTS) * 48, 0)
    assert found.ratio.low <= found.ratio.value <= found.ratio.high
    assert evaluate(river, TEXTS, BYTES, taus=(0.5,), speed_rounds=0).exact is None


def test_the_report_is_one_json_object_without_nan(river: Path) -> None:
    fields = json.loads(evaluate(river, TEXTS, BYTES, taus=(0.5,), speed_rounds=0).to_json())
    assert fields["tokens"] == sum(len(text.text) for text in TEXTS)
    assert fields["similarity_correlation"][0] is None
    assert fields["details"]["river.quantizer"] == "rtn"
    assert "".join(fields["example"]["tokens"]) == TEXTS[0].text


def test_users_mistakes_are_one_clear_line(river: Path, exported: Callable[[str], Path]) -> None:
    foreign = TextTokenizer(BYTES.encode, BYTES.decode, 50257)
    cases: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (InputError, "do not belong together", lambda: evaluate(river, TEXTS, foreign)),
        (InputError, "no river model", lambda: evaluate(exported("llama"), TEXTS, BYTES)),
        (InputError, "too few", lambda: evaluate(river, [Document("a", "a", "x")], BYTES)),
        (ConfigError, "tau", lambda: evaluate(river, TEXTS, BYTES, taus=(1.5,))),
        (ConfigError, "layers", lambda: evaluate(river, TEXTS, BYTES, depths=(LAYERS + 1,))),
        (ConfigError, "at least one", lambda: evaluate(river, TEXTS, BYTES, taus=(), depths=())),
        (ConfigError, "confidence", lambda: evaluate(river, TEXTS, BYTES, taus=(), confidence=2, speed_rounds=0)),
    ]
    for kind, message, call in cases:
        with pytest.raises(kind, match=re.escape(message)) as caught:
            call()
        assert "\n" not in str(caught.value)
