"""Are pairs of tokens distributed as they should be?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np

Distribution = Callable[[list[int]], np.ndarray]
"""Probabilities of the token after some tokens, [vocabulary]."""


def deviation(pairs: Counter[tuple[int, int]], distribution: Distribution) -> float:
    """Pearson's chi-square of pairs of tokens drawn one after the other, against the exact probabilities of each pair:
    how many of its standard deviations it lies above its mean. Pairs that are rare are one cell.

    A pair that has no probability makes it infinite.
    """
    draws, left = pairs.total(), Counter(pairs)
    statistic, cells, rest_seen, rest_wanted = 0.0, 0, 0, 0.0
    first = distribution([])
    for token in np.flatnonzero(first).tolist():
        second = distribution([token])
        for other in np.flatnonzero(second).tolist():
            wanted, seen = draws * first[token] * second[other], left.pop((token, other), 0)
            if wanted < 5:
                rest_seen, rest_wanted = rest_seen + seen, rest_wanted + wanted
                continue
            statistic, cells = statistic + (seen - wanted) ** 2 / wanted, cells + 1
    if left:
        return float("inf")
    if rest_wanted:
        statistic += (rest_seen - rest_wanted) ** 2 / rest_wanted
    # With as many degrees of freedom as there are cells.
    return float((statistic - cells) / np.sqrt(2 * cells))
