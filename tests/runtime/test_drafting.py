"""How many tokens are drafted, by costs and acceptance; rounds are drawn, nothing is decoded."""

import numpy as np
import pytest

from river_compile.runtime.drafting import Costs, DraftLength

PLAIN = {1: 40.0, 3: 44.0, 5: 62.0}
STEP = {1: 40.0, 2: 42.0, 3: 44.0, 4: 62.0, 5: 64.0, 8: 70.0}


def rounds(costs: Costs, acceptance: float, most: int = 12, confidence: float = 0.95, count: int = 400) -> list[int]:
    """Draft lengths of the last half of so many rounds, in which each draft is accepted with this probability."""
    length, generator, lengths = DraftLength(costs, most), np.random.default_rng(0), []
    for _ in range(count):
        drafted, survival = 0, np.ones(1)
        while length.pays(survival, drafted, most):
            drafted += 1
            survival = survival * length.survival(np.array([confidence]))
        kept = generator.random(drafted) < acceptance
        accepted = drafted if kept.all() else int(kept.argmin())
        length.learn(np.array([accepted]), np.array([drafted]), np.full((1, drafted), confidence), from_text=False)
        lengths.append(drafted)
    return lengths[count // 2 :]


def speedup(length: DraftLength, acceptance: float, seed: int, tokens: int = 128) -> float:
    """Over plain decoding, of a new text: each draft's own probability of being accepted lies around this one."""
    generator, seconds, made = np.random.default_rng(seed), 0.0, 0
    length.begin()
    while made < tokens:
        chances: list[float] = []
        survival = np.ones(1)
        while length.pays(survival, len(chances), tokens - made - 1):
            chances.append(generator.beta(2 * acceptance, 2 * (1 - acceptance)))
            survival = survival * length.survival(np.array(chances[-1:]))
        kept = generator.random(len(chances)) < chances
        accepted = len(chances) if kept.all() else int(kept.argmin())
        seconds += len(chances) * length.costs.of_draft() + length.costs.of_pass(1 + len(chances))
        counts = np.array([accepted]), np.array([len(chances)])
        length.learn(*counts, np.array([chances]), from_text=False)
        made += 1 + accepted
    return tokens * length.costs.of_pass(1) / seconds


@pytest.mark.parametrize("draft", [8.0, 20.0])
@pytest.mark.parametrize("acceptance", [0.1, 0.5])
def test_a_hard_text_after_easy_ones_costs_little(acceptance: float, draft: float) -> None:
    found = []
    for seed in range(8):
        length = DraftLength(Costs(draft, dict(PLAIN)), 12)
        for _ in range(3):
            speedup(length, 0.95, seed)
        found.append(speedup(length, acceptance, seed))
    assert min(found) > 0.95 and np.median(found) > 0.97


def test_an_easy_text_after_hard_ones_is_drafted_for() -> None:
    found, alone = [], []
    for seed in range(8):
        length = DraftLength(Costs(12.0, dict(PLAIN)), 12)
        alone.append(speedup(length, 0.97, seed))
        for _ in range(3):
            speedup(length, 0.3, seed)
        found.append(speedup(length, 0.97, seed))
    assert np.median(found) > 0.9 * np.median(alone) > 1.4


def test_a_pass_costs_what_was_measured_and_between_on_a_straight_line() -> None:
    costs = Costs(15.0, dict(PLAIN))
    assert costs.of_passes(np.arange(1, 7)) == pytest.approx([40, 42, 44, 53, 62, 67.5])


def test_more_rows_are_never_faster() -> None:
    costs = Costs(15.0, {1: 40.0, 3: 60.0, 5: 50.0})
    passes = costs.of_passes(np.arange(1, 20))
    assert (np.diff(passes) >= 0).all()
    assert costs.of_pass(3) == costs.of_pass(5) == 55


def test_drafts_stop_before_the_rows_that_cost_much() -> None:
    """Three rows cost little more than one here, four half as much again."""
    lengths = rounds(Costs(15.0, dict(STEP)), acceptance=0.85)
    assert np.mean([length == 2 for length in lengths]) > 0.8


def test_a_step_is_crossed_where_what_lies_behind_it_pays() -> None:
    lengths = rounds(Costs(2.0, dict(STEP)), acceptance=0.97)
    assert np.median(lengths) > 6


@pytest.mark.parametrize(("draft", "acceptance"), [(38.0, 0.9), (15.0, 0.3)])
def test_where_drafting_does_not_pay_there_is_a_probe_now_and_then(draft: float, acceptance: float) -> None:
    lengths = rounds(Costs(draft, dict(STEP)), acceptance)
    assert 0 < np.mean([length > 0 for length in lengths]) < 0.05
    assert max(lengths) <= 2


def test_costs_follow_what_passes_take() -> None:
    costs = Costs(15.0, dict(PLAIN))
    for _ in range(60):
        costs.learn_pass(2, 60.0)
    assert costs.of_pass(2) > 50
