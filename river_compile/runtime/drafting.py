"""How many tokens to draft: by what a draft and a verification cost here, and by what verification has accepted.

A round drafts k tokens and verifies them in one pass of k + 1 rows. The rule is the one that makes the long-run rate of
tokens largest: one more draft pays while the tokens it is expected to add, over the time it adds, exceed the rate that
rounds have reached so far. Without any draft that rate is plain decoding's, so where drafting does not pay nothing is
drafted.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

__all__ = ["Costs", "DraftLength"]

_LEARNING = 0.1
# How much a pass's time may move its estimate at once: another process on the cores makes outliers.
_OUTLIER = 2.0
_ROW_SHARE = 0.05
_DRAFT_SHARE = 0.4
_BINS = 10
_PRIOR_WEIGHT = 8.0
_PROBE_EVERY = 48
_DRIFT = 0.01


@dataclass
class Costs:
    """Seconds of a draft pass and of a backbone pass by its rows, as an exponentially weighted mean of those seen.

    Fields:
        draft: None: not measured yet.
        rows: by the number of rows of each sequence.
    """

    draft: float | None = None
    rows: dict[int, float] = field(default_factory=dict)

    def learn_draft(self, seconds: float) -> None:
        self.draft = _towards(self.draft, seconds)

    def learn_pass(self, rows: int, seconds: float) -> None:
        self.rows[rows] = _towards(self.rows.get(rows), seconds)

    def of_draft(self) -> float:
        """A guess where none was measured: a 4-bit layer reads a quarter of the bytes or less."""
        return self.draft if self.draft is not None else _DRAFT_SHARE * self.of_pass(1)

    def of_pass(self, rows: int) -> float:
        """By the row counts measured: linear between them, and at a small share of a pass for each row beyond."""
        if not self.rows:
            return 1.0 + _ROW_SHARE * (rows - 1)
        known = sorted(self.rows)
        # More rows cannot be faster; what says so is noise.
        times = np.maximum.accumulate([self.rows[count] for count in known])
        if rows <= known[-1] and rows >= known[0]:
            return float(np.interp(rows, known, times))
        nearest = 0 if rows < known[0] else -1
        return float(times[nearest] * (1 + _ROW_SHARE * (rows - 1)) / (1 + _ROW_SHARE * (known[nearest] - 1)))


def _towards(mean: float | None, value: float) -> float:
    if mean is None:
        return value
    return mean + _LEARNING * (min(max(value, mean / _OUTLIER), mean * _OUTLIER) - mean)


class _Acceptance:
    """Share of drafts accepted, by the drafter's top probability and by their place in the round."""

    def __init__(self, most: int) -> None:
        middles = (np.arange(_BINS) + 0.5) / _BINS
        # What a drafter is sure of is accepted more often than not even before anything is known.
        self._seen = np.full(_BINS, _PRIOR_WEIGHT)
        self._kept = _PRIOR_WEIGHT * np.clip(0.3 + 0.7 * middles, 0, 1)
        self.places = np.full(most, 0.75)

    def of(self, confidence: np.ndarray) -> np.ndarray:
        bins = np.clip((confidence * _BINS).astype(int), 0, _BINS - 1)
        return np.asarray(self._kept[bins] / self._seen[bins])

    def learn(self, confidences: np.ndarray, accepted: int) -> None:
        """One sequence's round: the drafts up to the first rejected one were judged."""
        for place, confidence in enumerate(confidences[: accepted + 1]):
            kept = float(place < accepted)
            bin_ = min(int(confidence * _BINS), _BINS - 1)
            # Forgetting keeps the text of now in view: about the last hundred drafts of a bin.
            self._seen[bin_] = self._seen[bin_] * 0.99 + 1
            self._kept[bin_] = self._kept[bin_] * 0.99 + kept
            self.places[place] += _LEARNING * (kept - self.places[place])


class DraftLength:
    """Decides after each draft whether another one pays; learns from each round.

    Args:
        costs: what passes take.
        most: drafts in a round at most.
    """

    def __init__(self, costs: Costs, most: int) -> None:
        self.costs, self.most = costs, most
        self._river, self._text = _Acceptance(most), _Acceptance(most)
        self._tokens = self._seconds = 0.0
        self._since_draft = 0

    @property
    def rate(self) -> float:
        """Tokens a second of each sequence that rounds have reached lately, at least plain decoding's."""
        plain = 1 / self.costs.of_pass(1)
        return max(plain, self._tokens / self._seconds) if self._seconds else plain

    def survival(self, confidence: np.ndarray) -> np.ndarray:
        """Probability that verification accepts drafts of these top probabilities, float [sequences]."""
        return self._river.of(confidence)

    def pays(self, survival: np.ndarray, drafted: int, room: int) -> bool:
        """Whether another draft pays.

        Args:
            survival: probability that all drafts so far are accepted, float [sequences].
            drafted: how many there are.
            room: how many there may be, by what is left to generate.
        """
        if drafted >= min(self.most, room):
            return False
        if drafted == 0 and self._since_draft >= _PROBE_EVERY:
            return True
        gain = float(survival.mean()) * self._river.places[drafted]
        cost = self.costs.of_draft() + self.costs.of_pass(drafted + 2) - self.costs.of_pass(drafted + 1)
        return bool(gain > self.rate * cost)

    def text_drafts(self, found: int, room: int) -> int:
        """How many of the tokens found in the text are worth a row each; 0 where the river's drafts are better."""
        best, survival, expected = 0, 1.0, 1.0
        reached = self.rate
        for count in range(1, min(found, self.most, room) + 1):
            survival *= self._text.places[count - 1]
            expected += survival
            rate = expected / self.costs.of_pass(count + 1)
            if rate < reached:
                break
            best, reached = count, rate
        if not best:
            # A text that has stopped repeating itself may begin again: what is not tried drifts back to being tried.
            self._text.places += _DRIFT * (0.5 - self._text.places)
        return best

    def learn(
        self, accepted: np.ndarray, drafts: np.ndarray, confidences: np.ndarray, seconds: float, *, from_text: bool
    ) -> None:
        """One round.

        Args:
            accepted, drafts: of each sequence, int [sequences].
            confidences: top probabilities of the drafts, float [sequences, most of them].
            seconds: of the whole round.
        """
        kept = 1 - _LEARNING
        self._tokens = self._tokens * kept + float(accepted.mean()) + 1
        self._seconds = self._seconds * kept + seconds
        table = self._text if from_text else self._river
        for row, count in enumerate(drafts):
            table.learn(confidences[row, :count], int(accepted[row]))
        self._since_draft = 0 if drafts.any() and not from_text else self._since_draft + 1
