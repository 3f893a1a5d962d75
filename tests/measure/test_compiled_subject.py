"""A model compiled with a river under evaluation: exit depths, KV cache and figures, and what a user can get wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import river_compile
from river_compile.backend import RiverBackend
from river_compile.config import RiverConfig
from river_compile.errors import ConfigError, InputError
from river_compile.exporters.torch import seam
from river_compile.exporters.torch.linear import Dequantized
from river_compile.measure.compiled_subject import CompiledSubject
from river_compile.measure.evaluation import evaluate
from river_compile.measure.fidelity import Document, TextTokenizer
from river_compile.measure.subjects import BACKBONE, Setting, TorchSubject
from tests.families import LAYERS, VOCABULARY, random_model
from tests.first_exits import check_first_exits
from tests.torch_models import as_it_is, with_river_from

BYTES = TextTokenizer(lambda text: [ord(c) % VOCABULARY for c in text], lambda ids: "".join(map(chr, ids)), VOCABULARY)
TEXTS = [Document("first", "prose", "The river flows on."), Document("second", "code", "x = [i for i in range(9)]")]
IDS = np.array(BYTES.encode(TEXTS[0].text))


@pytest.fixture(autouse=True)
def pieces_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seam, "compile_piece", as_it_is)
    torch.compiler.reset()


def exact(model: Any, **options: Any) -> CompiledSubject:
    """A subject whose river multiplies in float32, so that it can be judged to the last digits."""
    backend = RiverBackend(RiverConfig(strict=True), lowering=Dequantized(), compiler=as_it_is)
    return CompiledSubject(model, backend=backend, capacity=64, **options)


# gemma2's layers alternate with windows of 8 tokens, gpt2 has transposed weights.
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_forced_depth_reads_what_the_model_with_dequantized_weights_reads(family: str) -> None:
    model = random_model(family)
    subject = exact(model)
    for depth in (0, 2, LAYERS):
        found = subject.read(IDS, Setting(max_depth=depth), stepwise=False)
        expected = TorchSubject(with_river_from(model, depth)).read(IDS, BACKBONE, stepwise=False)
        assert found.depths.tolist() == [depth] * len(IDS)
        assert len(found.seconds) == len(IDS)
        for name in ("keys", "values"):
            assert len(getattr(found, name)) == LAYERS
        pairs = [(found.logits, expected.logits)]
        pairs += list(zip(found.keys + found.values, expected.keys + expected.values, strict=True))
        for ours, theirs in pairs:
            np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.ptp(theirs))


def test_documents_and_settings_share_one_graph_and_leave_nothing_behind() -> None:
    subject = exact(random_model("llama"))
    first = subject.read(IDS, Setting(max_depth=1), stepwise=True)
    subject.read(IDS[::-1].copy(), Setting(tau=0.5), stepwise=True)
    subject.read(IDS[:5], BACKBONE, stepwise=True)
    again = subject.read(IDS, Setting(max_depth=1), stepwise=True)
    np.testing.assert_array_equal(first.logits, again.logits)
    np.testing.assert_array_equal(first.values[-1], again.values[-1])
    assert subject._backend.stats().graphs == 1


def test_the_first_token_exits_where_its_similarity_says() -> None:
    subject = exact(random_model("llama"))
    similarities = subject.read(IDS, BACKBONE, stepwise=False).similarities
    assert similarities is not None
    assert len(check_first_exits(subject, IDS, similarities)) > 1


def test_evaluate_takes_a_module() -> None:
    found = evaluate(random_model("llama"), TEXTS, BYTES, taus=(1.0,), depths=(0, 2), max_tokens=64, speed_rounds=1)
    off, river, half = found.settings
    assert off.top1.value == 1
    assert off.kl.value < 1e-6
    assert off.value_cosine.value == pytest.approx(1, abs=1e-5)
    assert off.exit_histogram == [0] * LAYERS + [found.tokens]
    assert river.exit_histogram == [found.tokens] + [0] * LAYERS
    assert half.exit_histogram == [0, 0, found.tokens, 0, 0]
    assert 0 < half.kl.value < river.kl.value
    assert len(river.value_cosine_by_layer) == len(found.mean_similarity) == LAYERS
    assert 0.5 < river.value_cosine.value < 1
    assert river.speed is not None
    assert found.details["river.quantizer"] == "rtn"


def test_exits_off_is_the_backbone_in_bfloat16_too() -> None:
    """Where one row's products take a way of their own on a CPU."""
    subject = CompiledSubject(random_model("llama", dtype=torch.bfloat16), capacity=64)
    off, eager = (subject.read(IDS, BACKBONE, stepwise=stepwise) for stepwise in (True, False))
    for ours, theirs in zip(
        [off.logits, *off.keys, *off.values], [eager.logits, *eager.keys, *eager.values], strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=0.03 * np.ptp(theirs))


def test_a_compiled_module_is_read_as_the_original() -> None:
    compiled = torch.compile(random_model("llama"), backend="river")
    found = evaluate(compiled, TEXTS, BYTES, taus=(), max_tokens=64, speed_rounds=0)
    assert found.settings[0].mean_exit_depth == 0


def test_readings_are_kept_by_weights_and_config(tmp_path: Path) -> None:
    one, same, other = random_model("llama"), random_model("llama"), random_model("llama", seed=1)
    config = RiverConfig()
    prints = [CompiledSubject(model, config).fingerprint() for model in (one, same, other)]
    prints.append(CompiledSubject(one, RiverConfig(group_size=64)).fingerprint())
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_a_module_that_was_tuned_is_measured_and_told_apart() -> None:
    model, config = random_model("llama"), RiverConfig(quantizer="gptq")
    before = CompiledSubject(model, config).fingerprint()
    river_compile.tune(model, [np.array(BYTES.encode(text.text)) for text in TEXTS], config)
    assert CompiledSubject(model, config).fingerprint() != before
    rows = []
    for quantizer in ("gptq", "rtn"):
        torch.compiler.reset()
        chosen = RiverConfig(quantizer=quantizer)
        found = evaluate(model, TEXTS, BYTES, taus=(), max_tokens=64, config=chosen, speed_rounds=0)
        rows.append(found.settings[0])
    assert rows[0].kl.value < 0.7 * rows[1].kl.value


class NoDecoder(torch.nn.Module):
    pass


def test_users_mistakes_are_one_clear_line(tmp_path: Path) -> None:
    model = random_model("llama")
    (tmp_path / "empty").mkdir()
    nothing_to_twin = RiverConfig(bits_for=(("*", "float"),))
    wrong = RiverConfig(kv_policy="mask")
    cases: list[tuple[type[Exception], str, Any, dict[str, Any]]] = [
        (InputError, "no river: no decoder layer can be given a river twin", model, {"config": nothing_to_twin}),
        (ConfigError, "kv_policy", model, {"config": wrong}),
        (ConfigError, "quantizer: 'gptq' knows its inputs", model, {"config": RiverConfig(quantizer="gptq")}),
        (ConfigError, "quantizer: 'best' is none of", model, {"config": RiverConfig(quantizer="best")}),
        (ConfigError, "dtype: is for a folder", model, {"dtype": "float32"}),
        (ConfigError, "threads: is ONNX Runtime's", model, {"threads": 1}),
        (ConfigError, "config: is of a Hugging Face model", tmp_path / "a.onnx", {"config": wrong}),
        (ConfigError, "config: is not for a subject", exact(model), {"config": wrong}),
        (ConfigError, "dtype: 'int8' is none of", tmp_path / "empty", {"dtype": "int8"}),
        (InputError, "no config.json", tmp_path / "empty", {}),
        (InputError, "not a causal language model", NoDecoder().eval(), {}),
        (InputError, "training mode", random_model("llama").train(), {}),
        (InputError, "longer than the 64", exact(model), {"max_tokens": 512}),
    ]
    long = [Document("long", "prose", "x" * 100)]
    for kind, message, subject, options in cases:
        with pytest.raises(kind, match=message) as caught:
            evaluate(subject, long, BYTES, taus=(), speed_rounds=0, **options)
        assert "\n" not in str(caught.value)
