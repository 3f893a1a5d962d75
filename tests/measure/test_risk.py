"""The bound holds: in simulation, where the true risk is known, and by its formula, where it can be worked out."""

from __future__ import annotations

import math

import numpy as np
import pytest

from river_compile.errors import ConfigError
from river_compile.measure.risk import check_risk, fixed_sequence, hoeffding_bentkus, least_documents

MAX_RISK, CONFIDENCE = 0.1, 0.95
DRAWS, DOCUMENTS = 1000, 200
# Thresholds from the safest down: the true risk crosses the bound just after the fifth.
TRUE_RISK = np.array([0.01, 0.03, 0.05, 0.07, 0.0999, 0.1001, 0.12, 0.15, 0.2, 0.3])


def _losses(kind: str) -> np.ndarray:
    """Mean losses, [draws, thresholds]; one document's losses go together over thresholds, as they do in a model."""
    rng = np.random.default_rng(7)
    shared = rng.random((DRAWS, DOCUMENTS, 1))
    if kind == "all or nothing":
        return (shared < TRUE_RISK).mean(axis=1)
    # Uniform losses with the true risk as their mean.
    return (2 * TRUE_RISK * shared).mean(axis=1)


@pytest.mark.parametrize("kind", ("all or nothing", "spread out"))
def test_the_true_risk_exceeds_the_bound_in_at_most_five_percent_of_draws(kind: str) -> None:
    p_values = hoeffding_bentkus(_losses(kind), DOCUMENTS, MAX_RISK)
    certified = fixed_sequence(p_values, CONFIDENCE)
    chosen_risk = np.where(certified > 0, TRUE_RISK[np.maximum(certified - 1, 0)], 0.0)
    sampling_error = 3 * math.sqrt(0.05 * 0.95 / DRAWS)
    assert (chosen_risk > MAX_RISK).mean() <= 0.05 + sampling_error
    # The bound is not bought by never choosing anything.
    assert (certified >= 2).mean() > 0.9


def test_choosing_by_the_mean_loss_alone_would_break_the_bound() -> None:
    """The simulation can tell: without the p-value the chosen threshold is too bold in every other draw."""
    below = np.cumprod(_losses("all or nothing") <= MAX_RISK, axis=1).sum(axis=1)
    assert (TRUE_RISK[np.maximum(below - 1, 0)] > MAX_RISK).mean() > 0.3


def test_p_values_at_the_bound_are_valid() -> None:
    """Under the hypothesis itself, P(p <= u) <= u."""
    rng = np.random.default_rng(3)
    means = rng.binomial(DOCUMENTS, MAX_RISK, 20_000) / DOCUMENTS
    p_values = hoeffding_bentkus(means, DOCUMENTS, MAX_RISK)
    for level in (0.01, 0.05, 0.2):
        assert (p_values <= level).mean() <= level


def test_without_loss_the_p_value_is_the_chance_of_no_loss() -> None:
    assert hoeffding_bentkus(np.array(0.0), 50, 0.02) == pytest.approx(0.98**50)


def test_the_smaller_of_the_two_bounds_counts() -> None:
    """5 losses in 100 at a risk of 0.1, where Bentkus is the sharper; 1 in 10 at 0.5, where Hoeffding is."""
    for count, documents, risk, sharper in ((5, 100, 0.1, "bentkus"), (1, 10, 0.5, "hoeffding")):
        mean = count / documents
        tail = sum(math.comb(documents, k) * risk**k * (1 - risk) ** (documents - k) for k in range(count + 1))
        entropy = mean * math.log(mean / risk) + (1 - mean) * math.log((1 - mean) / (1 - risk))
        bounds = {"bentkus": math.e * tail, "hoeffding": math.exp(-documents * entropy)}
        assert min(bounds, key=lambda name: bounds[name]) == sharper
        assert hoeffding_bentkus(np.array(mean), documents, risk) == pytest.approx(bounds[sharper])


def test_a_loss_at_or_above_the_bound_is_never_evidence() -> None:
    assert (hoeffding_bentkus(np.array([0.1, 0.5, 1.0]), 1000, 0.1) > 0.5).all()


def test_testing_stops_at_the_first_that_cannot_be_rejected() -> None:
    assert fixed_sequence(np.array([0.01, 0.2, 0.01]), 0.95) == 1
    assert fixed_sequence(np.array([[0.01, 0.05, 0.01], [0.06, 0.0, 0.0]]), 0.95).tolist() == [3, 0]


@pytest.mark.parametrize(("max_risk", "expected"), [(0.02, 149), (0.05, 59), (0.1, 29)])
def test_the_least_number_of_documents(max_risk: float, expected: int) -> None:
    assert least_documents(max_risk, 0.95) == expected
    p_values = [float(hoeffding_bentkus(np.array(0.0), n, max_risk)) for n in (expected - 1, expected)]
    assert p_values[0] > 0.05 >= p_values[1]


@pytest.mark.parametrize(("risk", "confidence"), [(0, 0.9), (1, 0.9), (-0.1, 0.9), (float("nan"), 0.9), (0.1, 1.0)])
def test_risk_and_confidence_lie_between_0_and_1(risk: float, confidence: float) -> None:
    with pytest.raises(ConfigError, match=r"must lie in \(0, 1\)"):
        check_risk(risk, confidence)
