"""The statistics of a calibrated threshold: Learn-then-Test with fixed-sequence testing.

Sources: Angelopoulos, Bates, Candes, Jordan and Lei, "Learn then Test", arXiv 2110.01052 (the procedure); Bates,
Angelopoulos, Lei, Malik and Jordan, "Distribution-free, risk-controlling prediction sets", arXiv 2101.02703 (the
Hoeffding-Bentkus inequality). Pure numpy.
"""

from __future__ import annotations

import math

import numpy as np

from river_compile.errors import ConfigError

__all__ = ["check_risk", "fixed_sequence", "hoeffding_bentkus", "least_documents"]


def check_risk(max_risk: float, confidence: float) -> None:
    """Both lie strictly between 0 and 1.

    Raises:
        ConfigError: one of them does not.
    """
    for field, value in (("max_risk", max_risk), ("confidence", confidence)):
        if not isinstance(value, (int, float)) or not 0 < value < 1:
            raise ConfigError(field, f"must lie in (0, 1), not {value}")


def hoeffding_bentkus(mean_loss: np.ndarray, documents: int, max_risk: float) -> np.ndarray:
    """P-values for "the risk is above ``max_risk``", valid at any number of documents.

    The smaller of two bounds on how likely a mean loss this low is under that hypothesis: Hoeffding's
    ``exp(-n h(min(mean, a), a))``, with h the relative entropy of two coins, and Bentkus's ``e P(Bin(n, a) <= ceil(n
    mean))``.

    Args:
        mean_loss: mean over documents of losses in [0, 1], any shape.
        documents: how many there are.

    Returns:
        P-values of the same shape.
    """
    mean = np.asarray(mean_loss, np.float64)
    low = np.minimum(mean, max_risk)
    with np.errstate(divide="ignore", invalid="ignore"):
        first = np.where(low > 0, low * np.log(low / max_risk), 0.0)
        second = np.where(low < 1, (1 - low) * np.log((1 - low) / (1 - max_risk)), 0.0)
    hoeffding = np.exp(-documents * (first + second))
    # A mean that is a whole number of losses but for rounding must not be taken for the next one.
    counts = np.clip(np.ceil(documents * mean - 1e-9), 0, documents).astype(int)
    bentkus = math.e * _binomial_cdf(documents, max_risk)[counts]
    return np.asarray(np.minimum(np.minimum(hoeffding, bentkus), 1.0))


def _binomial_cdf(count: int, chance: float) -> np.ndarray:
    """P(Bin(count, chance) <= k) for k = 0 .. count."""
    logs = np.array([math.lgamma(k + 1) for k in range(count + 1)])
    k = np.arange(count + 1)
    log_mass = logs[-1] - logs - logs[::-1] + k * math.log(chance) + (count - k) * math.log1p(-chance)
    return np.asarray(np.minimum(np.cumsum(np.exp(log_mass)), 1.0))


def fixed_sequence(p_values: np.ndarray, confidence: float) -> np.ndarray:
    """How many hypotheses, tested in their order until one cannot be rejected, are rejected.

    No correction for their number is needed: the chance that any true one is rejected is at most 1 - confidence.

    Args:
        p_values: float [..., hypotheses], in an order fixed before the data were seen.

    Returns:
        int [...]: the first so many are rejected.
    """
    rejected = np.asarray(p_values) <= 1 - confidence
    return np.asarray(np.cumprod(rejected, axis=-1).sum(axis=-1))


def least_documents(max_risk: float, confidence: float) -> int:
    """Documents without which no threshold can be certified, not even one that loses nothing.

    With no loss at all the p-value is ``(1 - max_risk) ** documents``.
    """
    return math.ceil(math.log(1 - confidence) / math.log1p(-max_risk) - 1e-9)
