"""Exact decoding on a decoder of numpy alone: the same tokens, whatever is drafted, and the backbone's own cache."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from river_compile.errors import ConfigError
from river_compile.runtime.protocol import State
from river_compile.runtime.sampling import Sampling
from river_compile.runtime.verification import Verdict
from tests.runtime.chi_square import deviation
from tests.runtime.toy import BACKBONE, VOCABULARY, Toy

PROMPTS = [[5, 9, 17, 3], [7], [3, 4, 5, 6, 7, 8, 9], [11, 12], [2, 2, 2], [20, 1], [8, 8, 9], [15]]


def _prompts(most: int = 4) -> st.SearchStrategy[list[list[int]]]:
    return st.lists(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=9), min_size=1, max_size=most)


@given(
    prompts=_prompts(),
    agreement=st.sampled_from([0.0, 0.5, 0.8, 1.0]),
    new=st.integers(1, 40),
    stops=st.sets(st.integers(0, VOCABULARY - 1), max_size=3),
    lookup=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_tokens_are_those_of_plain_decoding(
    prompts: list[list[int]], agreement: float, new: int, stops: set[int], lookup: bool
) -> None:
    toy = Toy(agreement)
    expected = toy.generate(prompts, new, max_depth=4, stop_tokens=list(stops))
    found = toy.generate(prompts, new, exact=True, lookup=lookup, stop_tokens=list(stops))
    assert found.tokens == expected.tokens


@given(prompts=_prompts(1), turns=st.lists(st.lists(st.integers(0, 22), min_size=1, max_size=4), max_size=3))
@settings(max_examples=60, deadline=None)
def test_every_slot_holds_what_the_backbone_wrote_over_several_turns(
    prompts: list[list[int]], turns: list[list[int]]
) -> None:
    toy = Toy(0.7)
    state = toy.start(1)
    text = prompts[0]
    for turn in [[], *turns]:
        text = text + turn
        expected = toy.generate([text], 12, max_depth=4).tokens[0]
        read = state.mask.shape[1]
        before = len(toy.passes)
        made = toy.generate([text], 12, exact=True, state=state).tokens[0]
        assert made == expected
        # What a turn shares with the one before is not read again.
        assert toy.passes[before][0] <= max(len(text) - read, len(turn) + 1)
        text = text + made
        _check_cache(state, text)


def _check_cache(state: State, text: list[int]) -> None:
    """All that has been read is the text, and the backbone wrote it."""
    slots = state.caches["slots"][0]
    shared = min(len(slots), len(text) - 1)
    assert shared >= len(text) - 1
    assert slots[:shared, 0].tolist() == state.ids[0, :shared].tolist() == text[:shared]
    assert (slots[:, 1] == BACKBONE).all()


def test_drafting_pays_in_passes() -> None:
    toy = Toy(0.9)
    toy.generate(PROMPTS[:1], 64, exact=True)
    toy.passes.clear()
    result = toy.generate(PROMPTS[:1], 64, exact=True, lookup=False)
    assert sum(not river for _, river in toy.passes) < 40
    assert 0.6 < result.acceptance < 1
    assert sum(len(new) for step in result.steps for new in step.tokens) == 64
    for step in result.steps[1:]:
        assert len(step.tokens[0]) == step.accepted + 1
        assert step.seconds >= step.draft_seconds + step.verify_seconds


def test_where_drafts_are_refused_decoding_becomes_plain() -> None:
    toy = Toy(0.0)
    toy.generate(PROMPTS[:1], 64, exact=True)
    result = toy.generate(PROMPTS[:1], 200, exact=True, lookup=False)
    assert result.drafted <= 12


def test_a_text_that_repeats_itself_is_drafted_from_without_the_river() -> None:
    toy = Toy(0.3)
    prompt = PROMPTS[0] + toy.generate(PROMPTS[:1], 300, max_depth=4).tokens[0]
    result = toy.generate([prompt], 40, exact=True)
    assert sum(step.looked_up for step in result.steps) > 10
    assert toy.generate([prompt], 40, exact=True, lookup=False).tokens == result.tokens


@pytest.mark.parametrize("fixed", (False, True))
@pytest.mark.parametrize("count", range(1, 9))
def test_sequences_of_a_batch_do_not_wait_for_each_other(count: int, fixed: bool) -> None:
    toy = Toy(0.8)
    toy.fixed_batch = fixed
    expected = toy.generate(PROMPTS[:count], 48, max_depth=4)
    result = toy.generate(PROMPTS[:count], 48, exact=True)
    assert result.tokens == expected.tokens
    stop = expected.tokens[0][5]
    early = toy.generate(PROMPTS[:count], 48, exact=True, stop_tokens=[stop])
    assert early.tokens == toy.generate(PROMPTS[:count], 48, max_depth=4, stop_tokens=[stop]).tokens
    if count > 1:
        assert any(len({len(new) for new in step.tokens}) > 1 for step in result.steps)


def test_near_ties_are_left_to_a_pass_of_one_row() -> None:
    """Rounding as large as the difference of two choices, in passes of several rows alone."""
    noisy = Toy(0.9, noise=1e-5, tied=7)
    expected = noisy.generate(PROMPTS[:3], 64, max_depth=4)
    result = noisy.generate(PROMPTS[:3], 64, exact=True)
    assert result.tokens == expected.tokens
    assert result.near_ties > 0
    assert noisy.experience.tie is not None
    assert 1e-5 < noisy.experience.tie < 2e-4
    noisy.experience.tie = 0.0
    assert noisy.generate(PROMPTS[:3], 64, exact=True).tokens != expected.tokens


DRAWS = 20_000
SAMPLED = {"temperature": 1.5, "top_p": 0.9}


class Recalling(Toy):
    """A toy that is asked for the same texts over and over."""

    def after(self, text: np.ndarray, river: bool) -> np.ndarray:
        return self._recalled(tuple(text[-3:].tolist()), river)

    @functools.cache  # noqa: B019
    def _recalled(self, text: tuple[int, ...], river: bool) -> np.ndarray:
        return super().after(np.array(text), river)


def _deviation(lookup: bool) -> float:
    """How far 20,000 pairs of sampled tokens are from the backbone's distribution, in standard deviations."""
    toy, prompt, batch = Recalling(0.5), [5, 9], 8
    pairs: Counter[tuple[int, int]] = Counter()
    for seed in range(DRAWS // batch):
        made = toy.generate([prompt] * batch, 3, exact=True, seed=seed, lookup=lookup, **SAMPLED)
        pairs.update((tokens[0], tokens[1]) for tokens in made.tokens)
    sampling = Sampling(**SAMPLED)
    return deviation(pairs, lambda tokens: sampling.distribution(toy.after(np.array([*prompt, *tokens]), river=False)))


@pytest.mark.parametrize("lookup", (False, True))
def test_sampling_has_the_backbones_distribution(lookup: bool) -> None:
    assert abs(_deviation(lookup)) < 4


def test_a_sampler_that_keeps_every_draft_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def credulous(drafts: Sequence[int], proposals: Any, scores: Any, choice: Any) -> Verdict:
        return Verdict(len(drafts), choice.draw(choice.distribution(scores(len(drafts)))))

    monkeypatch.setattr("river_compile.runtime.exact.verify_sampled", credulous)
    assert _deviation(False) > 20


def test_a_batch_is_not_continued() -> None:
    toy = Toy()
    with pytest.raises(ConfigError, match="state: continues one sequence"):
        toy.generate(PROMPTS[:2], 2, state=toy.start(2))


@pytest.mark.parametrize("agreement", (0.3, 0.5, 0.7, 0.9, 0.98))
@pytest.mark.parametrize(("draft", "row"), ((0.25, 0.05), (0.35, 0.1), (0.7, 0.02)))
def test_the_draft_length_is_near_the_best_and_never_costs(
    agreement: float, draft: float, row: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.runtime.toy.DRAFT_SECONDS", draft)
    monkeypatch.setattr("tests.runtime.toy.ROW_SECONDS", row)
    toy = Toy(agreement)
    toy.generate([[5, 9, 17]], 100, exact=True, lookup=False)
    result = toy.generate([[5, 9, 1]], 400, exact=True, lookup=False)
    speedup = 399 / sum(step.seconds for step in result.steps[1:])
    kept = result.acceptance if result.drafted > 50 else agreement
    best = max(
        (1 - kept ** (length + 1)) / (1 - min(kept, 0.999)) / (length * draft + 1 + row * length) for length in range(9)
    )
    assert speedup > max(0.9 * best, 0.97)
