"""Exact decoding in ONNX Runtime, against the plain model in the same runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from river_compile.api import export
from river_compile.config import RiverConfig
from river_compile.runtime import OnnxDecoder, State
from river_compile.runtime.drafting import Costs, DraftLength
from river_compile.runtime.exact import Experience
from tests.contrib_model import ContribDecoder
from tests.families import LAYERS, VOCABULARY
from tests.signatures import ROOM, VARIANTS

Exported = Callable[[str], Path]

PROMPTS = [[5, 9, 17, 33], [7], [3, 4, 5, 6, 7, 8, 9], [11, 12]]
# 4 bits are drafts that are often refused; 8 bits are hardly ever.
CLOSE, COARSE = RiverConfig(bits=8), RiverConfig(bits=4)


def eager(decoder: OnnxDecoder, batch: int = 1) -> OnnxDecoder:
    """The decoder, as if drafts cost next to nothing: small models are all overhead, and would not draft at all."""
    costs = Costs(1e-6, {1: 1.0, 9: 1.1})
    sizes = [(count, river) for count in range(1, batch + 1) for river in (True, False)]
    decoder.experience = Experience(0.0, {size: DraftLength(costs, 8) for size in sizes})
    decoder.clock = lambda: 0.0
    return decoder


@pytest.fixture(scope="module")
def river(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, RiverConfig], Path]:
    folder = tmp_path_factory.mktemp("exact")

    def made(family: str, config: RiverConfig) -> Path:
        path = folder / f"{family}.{config.bits}.onnx"
        if not path.exists():
            export(exported(family), path, config)
        return path

    return made


@pytest.mark.parametrize("config", (CLOSE, COARSE), ids=("8 bits", "4 bits"))
# gemma2's layers alternate with windows of 8 tokens; gpt2 has learned positions; bloom has none.
@pytest.mark.parametrize("family", ("llama", "gemma2", "gpt2", "bloom"))
def test_tokens_are_the_plain_models(
    exported: Exported, river: Callable[..., Path], family: str, config: RiverConfig
) -> None:
    plain, decoder = OnnxDecoder(exported(family)), eager(OnnxDecoder(river(family, config)), 4)
    for prompts in (PROMPTS[:1], PROMPTS[2:3], PROMPTS):
        expected = plain.generate(prompts, 40)
        found = decoder.generate(prompts, 40, exact=True)
        assert found.tokens == expected.tokens
        assert found.drafted > 10
        assert found.acceptance > (0.7 if config is CLOSE else 0.3)


def test_a_cache_of_one_length_is_cut_by_position_alone(exported: Exported, tmp_path: Path) -> None:
    original = tmp_path / "model.onnx"
    onnx.save(VARIANTS["static"](onnx.load(exported("llama"))), original)
    export(original, tmp_path / "m.onnx", CLOSE)
    plain, decoder = OnnxDecoder(original), eager(OnnxDecoder(tmp_path / "m.onnx"), 4)
    for prompts in (PROMPTS[:1], PROMPTS):
        longest = ROOM - max(map(len, prompts)) + 1
        found = decoder.generate(prompts, longest, exact=True)
        assert found.tokens == plain.generate(prompts, longest).tokens
        assert found.drafted > 4


def test_tau_and_depth_shape_the_drafts_alone(exported: Exported, river: Callable[..., Path]) -> None:
    decoder = OnnxDecoder(river("llama", COARSE))
    expected = OnnxDecoder(exported("llama")).generate(PROMPTS[:1], 24).tokens
    for how in ({"tau": 0.5}, {"max_depth": 2}, {"tau": 0.0, "max_depth": 3}):
        found = eager(decoder).generate(PROMPTS[:1], 24, exact=True, **how)
        assert found.tokens == expected
        assert set(found.exit_depths) == {LAYERS}


def test_an_export_can_ask_for_it(exported: Exported, tmp_path: Path) -> None:
    export(exported("llama"), tmp_path / "m.onnx", RiverConfig(bits=4, exact=True, lookup=False, max_depth=1))
    decoder = eager(OnnxDecoder(tmp_path / "m.onnx"))
    found = decoder.generate(PROMPTS[:1], 24)
    assert found.drafted > 0
    assert not any(step.looked_up for step in found.steps)
    assert found.tokens == OnnxDecoder(exported("llama")).generate(PROMPTS[:1], 24).tokens
    assert not decoder.generate(PROMPTS[:1], 24, exact=False).drafted


def test_a_plain_model_drafts_from_the_text_alone(exported: Exported) -> None:
    plain = OnnxDecoder(exported("llama"))
    text = PROMPTS[0] + plain.generate(PROMPTS[:1], 60).tokens[0]
    expected = plain.generate([text], 60).tokens
    assert eager(plain).generate([text], 60, exact=True).tokens == expected


def test_a_batch_whose_sequences_cannot_differ_in_length_is_decoded_plainly(tmp_path: Path) -> None:
    """GroupQueryAttention takes no padding on the left, and several tokens behind others for one sequence only."""
    original, target = ContribDecoder().save(tmp_path / "model.onnx"), tmp_path / "m.onnx"
    export(original, target, CLOSE)
    plain, decoder = OnnxDecoder(original), eager(OnnxDecoder(target), 3)
    prompts = [[5, 9, 17], [7, 7, 7], [3, 4, 5]]
    together = decoder.generate(prompts, 20, exact=True)
    assert (together.tokens, together.drafted) == (plain.generate(prompts, 20).tokens, 0)
    assert decoder.generate(prompts[:1], 20, exact=True).tokens == plain.generate(prompts[:1], 20).tokens


@given(
    turns=st.lists(
        st.tuples(st.lists(st.integers(3, VOCABULARY - 1), min_size=1, max_size=5), st.integers(1, 12), st.booleans()),
        min_size=1,
        max_size=4,
    )
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_slot_holds_the_backbones_keys_and_values(
    exported: Exported, river: Callable[..., Path], turns: list[tuple[list[int], int, bool]]
) -> None:
    """After any turns, each taking up the text before it or replacing its end, with drafts kept and refused."""
    plain, decoder = OnnxDecoder(exported("llama")), eager(OnnxDecoder(river("llama", COARSE)))
    state, text = decoder.start(1), []
    for new, count, rewrites in turns:
        text = (text[: len(text) // 2] if rewrites else text) + new
        text = text + decoder.generate([text], count, exact=True, state=state).tokens[0]
        _check_cache(plain, state, text)


def _check_cache(plain: OnnxDecoder, state: State, text: list[int]) -> None:
    shared = min(state.ids.shape[1], len(text) - 1)
    assert shared == len(text) - 1
    assert state.ids[0, :shared].tolist() == text[:shared]
    expected = plain.start(1)
    for token in state.ids[0]:
        plain.forward(np.array([[token]]), expected)
    for name, value in expected.caches.items():
        theirs, ours = value.numpy(), state.caches[name].numpy()
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.ptp(theirs))


def test_caches_are_cut_the_same_way_for_a_batch_as_for_each_alone(exported: Exported) -> None:
    decoder = OnnxDecoder(exported("llama"))
    random = np.random.default_rng(0)
    ids = random.integers(3, VOCABULARY, (3, 9))
    state = decoder.start(3)
    decoder.forward(ids, state)
    decoder.cut(state, [0, 4, 2], [0, 1, 2])
    decoder.cut(state, [1, 0], [2, 1])
    assert state.mask.tolist() == [[1] * 6, [0] + [1] * 5]
    assert state.ids.tolist() == [ids[2, :6].tolist(), [0, *ids[1, :5]]]
    next_ids = np.array([[7], [8]])
    together, _ = decoder.forward(next_ids, state)
    for row, (text, token) in enumerate(((ids[2, :6], 7), (ids[1, :5], 8))):
        alone, _ = decoder.forward(np.array([[*text, token]]), decoder.start(1))
        np.testing.assert_allclose(together[row, -1], alone[0, -1], atol=1e-4)
