"""The comparison of KV policies: what its rows say, and that it can be interrupted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from river_compile.config import RiverConfig
from river_compile.errors import ConfigError, InputError, RiverError
from river_compile.measure.fidelity import Document, TextTokenizer
from river_compile.measure.kv_comparison import Comparison, PolicySetting, compare_policies
from river_compile.measure.plots import draw_policies
from river_compile.reference import ReferenceDecoder
from tests.families import LAYERS, VOCABULARY, random_model

TOKENIZER = TextTokenizer(lambda text: [int(word) for word in text.split()], str, VOCABULARY)
PROMPT, LENGTH, DOCUMENTS = 4, 12, 2
TAUS = (1.0, -1.0)


def _texts(length: int = LENGTH) -> list[Document]:
    rng = np.random.default_rng(5)
    return [
        Document(f"text {i}", "numbers", " ".join(map(str, rng.integers(3, VOCABULARY, length))))
        for i in range(DOCUMENTS)
    ]


@pytest.fixture(scope="module")
def decoder() -> ReferenceDecoder:
    return ReferenceDecoder(random_model("llama"), RiverConfig())


@pytest.fixture(scope="module")
def comparison(decoder: ReferenceDecoder) -> Comparison:
    return compare_policies(decoder, _texts(), TOKENIZER, taus=TAUS, prompt_tokens=PROMPT, rounds=2)


def test_there_is_a_row_for_each_policy_and_threshold_and_the_two_end_points(comparison: Comparison) -> None:
    rows = [(point.policy, point.tau) for point in comparison.points]
    policies = ("share", "propagate", "mask", "recompute", "monotone")
    assert rows == [(None, None), (None, None), *((policy, tau) for policy in policies for tau in TAUS)]
    assert [point.label for point in comparison.points[:2]] == ["backbone", "all river"]
    assert comparison.tokens == DOCUMENTS * (LENGTH - PROMPT)


def test_a_policy_that_never_exits_is_the_backbone(comparison: Comparison) -> None:
    for point in comparison.points:
        if point.label == "backbone" or point.tau == 1.0:
            assert (point.exit_depth, point.top1.value, point.kl.value) == (LAYERS, 1.0, pytest.approx(0.0, abs=1e-9))


def test_a_policy_that_exits_at_once_is_measured_against_the_backbone(
    comparison: Comparison, decoder: ReferenceDecoder
) -> None:
    """The row of share, by hand: all tokens after the prompt exit after the first layer."""
    agree = []
    for document in _texts():
        ids = TOKENIZER.encode(document.text)
        rows = []
        for tau in (2.0, -1.0):
            state = decoder.start()
            decoder.logits(ids[:PROMPT], state)
            rows.append([int(decoder.logits([t], state, tau=tau)[0][0, -1].argmax()) for t in ids[PROMPT:]])
        agree += [a == b for a, b in zip(*rows, strict=True)]
    point = next(point for point in comparison.points if point.policy == "share" and point.tau == -1.0)
    assert point.exit_depth == 1
    assert point.top1.value == pytest.approx(np.mean(agree))


def test_times_are_beside_the_backbones_in_the_same_run(comparison: Comparison) -> None:
    backbone = comparison.points[0]
    assert backbone.speedup is not None
    assert (backbone.speedup.low, backbone.speedup.value, backbone.speedup.high) == (1.0, 1.0, 1.0)
    for point in comparison.points:
        assert point.milliseconds is not None
        assert point.milliseconds > 0
        assert point.speedup is not None
        assert point.speedup.low <= point.speedup.value <= point.speedup.high
    assert json.loads(comparison.to_json())["rounds"] == 2


def test_an_interrupted_comparison_goes_on_where_it_stopped(decoder: ReferenceDecoder, tmp_path: Path) -> None:
    calls: list[str] = []
    original = decoder.start

    def start(*args: object, **kwargs: object) -> object:
        calls.append(str(kwargs.get("policy")))
        return original(*args, **kwargs)  # type: ignore[arg-type]

    decoder.start = start  # type: ignore[method-assign, assignment]
    try:
        arguments = {"policies": ("share",), "taus": TAUS, "prompt_tokens": PROMPT, "rounds": 0, "cache": tmp_path}
        first = compare_policies(decoder, _texts(), TOKENIZER, **arguments)  # type: ignore[arg-type]
        read = len(calls)
        next(tmp_path.glob("*.npz")).unlink()
        assert compare_policies(decoder, _texts(), TOKENIZER, **arguments) == first  # type: ignore[arg-type]
    finally:
        decoder.start = original  # type: ignore[method-assign]
    assert read == DOCUMENTS * 5, "each setting once, and the backbone to compare with"
    assert len(calls) == read + 2, "only what was lost, and the backbone to compare it with"


def test_the_plot_is_drawn_where_there_are_times(
    comparison: Comparison, decoder: ReferenceDecoder, tmp_path: Path
) -> None:
    draw_policies(comparison, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    untimed = compare_policies(decoder, _texts(), TOKENIZER, policies=(), taus=(), prompt_tokens=PROMPT, rounds=0)
    with pytest.raises(RiverError, match="made with no round of timing"):
        draw_policies(untimed, tmp_path / "none.png")


def test_bad_requests_are_one_clear_line(decoder: ReferenceDecoder) -> None:
    for wrong, message in (
        ({"policies": ("skip",)}, "kv_policy: 'skip' is none of"),
        ({"taus": (2.0,)}, "tau: must lie in"),
        ({"prompt_tokens": 0}, "prompt_tokens: must be 1 or more"),
        ({"max_tokens": 8}, "max_tokens: must be more than the prompt's 8"),
        ({"max_documents": 0}, "max_documents: must be 1 or more"),
    ):
        with pytest.raises(ConfigError, match=message):
            compare_policies(decoder, _texts(), TOKENIZER, **wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no text has more tokens than the prompt's 8"):
        compare_policies(decoder, _texts(5), TOKENIZER)


def test_settings_are_named_as_a_reader_would() -> None:
    names = [PolicySetting("share").label, PolicySetting("share", max_depth=0).label, PolicySetting("mask", 0.9).label]
    assert names == ["backbone", "all river", "mask 0.9"]
