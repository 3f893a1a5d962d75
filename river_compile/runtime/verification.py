"""What of a draft is kept: greedy agreement, or speculative sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from river_compile.runtime.sampling import Choice

__all__ = ["Verdict", "verify_greedy", "verify_sampled"]


@dataclass(frozen=True)
class Verdict:
    """Of one sequence: how many drafts are accepted, and the token after them; None where a near tie leaves that to a
    pass of one row."""

    accepted: int
    following: int | None


def verify_greedy(drafts: Sequence[int], scores: Callable[[int], np.ndarray], tie: float = 0.0) -> Verdict:
    """Accept drafts while they are the backbone's first choice.

    A pass of several rows rounds otherwise than one of a single row, so a choice between two tokens that lie closer
    than ``tie`` is not taken from it.

    Args:
        scores: the backbone's after so many drafts, float32 [vocabulary].
        tie: margin between the first and the second choice below which nothing is decided.
    """
    for place in range(len(drafts) + 1):
        row = scores(place)
        first = int(row.argmax())
        if tie > 0 and _margin(row, first) < tie:
            return Verdict(place, None)
        if place == len(drafts) or first != drafts[place]:
            return Verdict(place, first)
    raise AssertionError("there is a row more than drafts")


def _margin(row: np.ndarray, first: int) -> float:
    return float(row[first] - max(row[:first].max(initial=-np.inf), row[first + 1 :].max(initial=-np.inf)))


def verify_sampled(
    drafts: Sequence[int],
    proposals: Sequence[np.ndarray | None],
    scores: Callable[[int], np.ndarray],
    choice: Choice,
) -> Verdict:
    """Speculative sampling (Leviathan et al., 2211.17192, theorem 3.5): what is kept is distributed as the backbone's.

    A draft x is accepted with probability min(1, p(x) / q(x)); in place of the first that is rejected a token is drawn
    from max(p - q, 0), normalized.

    Args:
        proposals: q, the distribution that each draft was drawn from, float64 [vocabulary]; None: it was certain.
        scores: as in `verify_greedy`; p is their distribution.
    """
    for place, (draft, proposal) in enumerate(zip(drafts, proposals, strict=True)):
        wanted = choice.distribution(scores(place))
        proposed = 1.0 if proposal is None else proposal[draft]
        if choice.uniform() * proposed < wanted[draft]:
            continue
        rest = wanted.copy()
        if proposal is None:
            rest[draft] = 0
        else:
            rest = np.maximum(rest - proposal, 0)
        total = rest.sum()
        # Where both distributions are equal but for rounding, nothing is left over; the backbone's own does then.
        return Verdict(place, choice.draw(rest / total if total > 0 else wanted))
    return Verdict(len(drafts), choice.draw(choice.distribution(scores(len(drafts)))))
