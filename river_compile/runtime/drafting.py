"""How many tokens to draft: by what a draft and a verification cost here, and by what verification has accepted.

A round drafts k tokens and verifies them in one pass of k + 1 rows. The rule is the one that makes the long-run rate of
tokens largest: one more draft pays while the tokens it is expected to add, over the time it adds, exceed the best rate
that a fixed length would reach. Where that is plain decoding's nothing is drafted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

__all__ = ["Costs", "DraftLength", "expected_speedup"]

_LEARNING = 0.1
# How much a pass's time may move its estimate at once: another process on the cores makes outliers.
_OUTLIER = 2.0
_ROW_SHARE = 0.05
_DRAFT_SHARE = 0.4
_BINS = 10
_MEMORY = 0.98
_GUESS_WEIGHT = 4.0
# Of what other texts have taught, as many trials count in a new one: few for how often drafts are accepted, which
# differs from text to text, more for what that hangs on.
_OTHER_TEXTS, _HANGS_ON = 4.0, 12.0
_FIRST_GUESS = 0.85
# Drafts stop by what each is worth, not at a fixed length: a draft that is worth a little less than the best rate costs
# next to nothing, and one too few costs a pass.
_SLACK = 0.8
_FIRST_PROBE, _PROBE_EVERY = 8, 64


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
        return float(self.of_passes(np.array([rows]))[0])

    def of_passes(self, rows: np.ndarray) -> np.ndarray:
        """Seconds of passes of so many rows, float64 like ``rows``: on straight lines between those that were measured.

        Products are often as fast for a few rows as for one, and slower by half from some number on: a line through
        all of them would hide where. More rows cannot be faster; what says so is noise, and is smoothed.
        """
        if not self.rows:
            return np.asarray(1.0 + _ROW_SHARE * (rows - 1))
        known = np.array(sorted(self.rows))
        times = np.array([self.rows[count] for count in known])
        times = (np.maximum.accumulate(times) + np.minimum.accumulate(times[::-1])[::-1]) / 2
        beyond = _ROW_SHARE * times[-1] / (1 + _ROW_SHARE * (known[-1] - 1))
        if len(known) > 1:
            beyond = (times[-1] - times[0]) / (known[-1] - known[0])
        return np.asarray(np.interp(rows, known, times) + beyond * np.maximum(rows - known[-1], 0))


def _towards(mean: float | None, value: float) -> float:
    if mean is None:
        return value
    return mean + _LEARNING * (min(max(value, mean / _OUTLIER), mean * _OUTLIER) - mean)


class _Share:
    """A share of trials, the last fifty or so, begun with a guess that counts as so many trials."""

    def __init__(self, guess: float, weight: float) -> None:
        self._seen, self._kept = weight, weight * guess

    @property
    def value(self) -> float:
        return self._kept / self._seen

    def add(self, kept: bool, expected: float = 1.0) -> None:
        """One more trial; ``expected`` of it makes the share one of what was expected."""
        self._seen = self._seen * _MEMORY + expected
        self._kept = self._kept * _MEMORY + kept

    def loosen(self, weight: float) -> None:
        """Count what was seen as so many trials at most."""
        if self._seen > weight:
            self._seen, self._kept = weight, weight * self.value


class _RiverAcceptance:
    """Share of the river's drafts accepted, given that those before them were: by its top probability once a draft is
    made, and of the next one by how many there are, which differs little from the share of all."""

    def __init__(self, most: int) -> None:
        # What a drafter is sure of is accepted more often than not, even before anything is known.
        guesses = np.clip(0.5 + 0.5 * (np.arange(_BINS) + 0.5) / _BINS, 0, 1)
        self._by_confidence = [_Share(float(guess), _GUESS_WEIGHT) for guess in guesses]
        self._all = _Share(_FIRST_GUESS, _GUESS_WEIGHT)
        self._by_place = [_Share(1.0, _GUESS_WEIGHT) for _ in range(most)]

    def made(self, confidence: np.ndarray) -> np.ndarray:
        return np.array([self._by_confidence[_bin(one)].value for one in confidence])

    def survivals(self, places: Sequence[int]) -> np.ndarray:
        """Probability that drafts at these places, one after the other, are accepted up to each of them."""
        return np.cumprod(np.array([self._all.value * self._by_place[place].value for place in places]))

    def learn(self, confidences: np.ndarray, accepted: int) -> None:
        """One sequence's round: the drafts up to the first rejected one were judged."""
        for place, confidence in enumerate(confidences[: accepted + 1]):
            kept = place < accepted
            expected = self._all.value
            self._by_confidence[_bin(confidence)].add(kept)
            self._all.add(kept)
            self._by_place[place].add(kept, expected)

    def begin(self) -> None:
        known = self._all.value
        # A text as hard as those before it is found out by a few drafts; an easy one would never be, without any.
        self._all = _Share(max(known, (known + _FIRST_GUESS) / 2), _OTHER_TEXTS)
        for share in (*self._by_confidence, *self._by_place):
            share.loosen(_HANGS_ON)


def _bin(confidence: float) -> int:
    return min(int(confidence * _BINS), _BINS - 1)


class _TextAcceptance:
    """Of tokens that followed the same n-gram before: whether the first is accepted, and each next one after it."""

    def __init__(self) -> None:
        self._first, self._following = _Share(0.5, _GUESS_WEIGHT / 2), _Share(0.8, _GUESS_WEIGHT)

    def survivals(self, count: int) -> np.ndarray:
        """Probability that so many tokens are accepted up to each of them."""
        shares = [self._following.value if place else self._first.value for place in range(count)]
        return np.cumprod(np.array(shares))

    def learn(self, drafts: int, accepted: int) -> None:
        for place in range(min(accepted + 1, drafts)):
            (self._following if place else self._first).add(place < accepted)

    def begin(self) -> None:
        for share in (self._first, self._following):
            share.loosen(_OTHER_TEXTS)

    def forget(self) -> None:
        """A text that has stopped repeating itself may begin again."""
        self._first.add(True)


class DraftLength:
    """Decides after each draft whether another one pays; learns from each round.

    Args:
        costs: what passes take.
        most: drafts in a round at most.
    """

    def __init__(self, costs: Costs, most: int) -> None:
        self.costs, self.most = costs, most
        self._river, self._text = _RiverAcceptance(most), _TextAcceptance()
        self._passed_over = 0
        self._since_draft, self._patience = 0, _FIRST_PROBE

    def begin(self) -> None:
        """A new text: what others have taught is where it starts from, and counts little beside its own."""
        self._river.begin()
        self._text.begin()
        self._since_draft, self._patience = 0, _FIRST_PROBE

    @property
    def rate(self) -> float:
        """Tokens a second of each sequence that the best fixed draft length would make, at least plain decoding's.

        By what is known of acceptance and costs, not by what the last rounds happened to reach: a lucky round would
        make all that follow look too slow to be worth a draft.
        """
        counts = np.arange(self.most + 1)
        tokens = 1 + np.append(0.0, np.cumsum(self._river.survivals(range(self.most))))
        return float(np.max(tokens / (counts * self.costs.of_draft() + self.costs.of_passes(counts + 1))))

    def survival(self, confidence: np.ndarray) -> np.ndarray:
        """Probability that verification accepts drafts of these top probabilities, float [sequences]."""
        return self._river.made(confidence)

    def pays(self, survival: np.ndarray, drafted: int, room: int) -> bool:
        """Whether another draft pays, by itself or with some more behind it.

        Args:
            survival: probability that all drafts so far are accepted, float [sequences].
            drafted: how many there are.
            room: how many there may be, by what is left to generate.
        """
        if drafted >= min(self.most, room):
            return False
        if drafted == 0 and self._since_draft >= self._patience:
            # What speaks against drafting may be out of date; asking costs less and less often.
            self._patience = min(2 * self._patience, _PROBE_EVERY)
            return True
        places = range(drafted, min(self.most, room))
        gains = float(survival.mean()) * np.cumsum(self._river.survivals(places))
        more = np.arange(len(places) + 1)
        passes = self.costs.of_passes(1 + drafted + more)
        costs = more[1:] * self.costs.of_draft() + passes[1:] - passes[0]
        return bool(np.any(gains > max(_SLACK * self.rate, 1 / self.costs.of_pass(1)) * costs))

    def text_drafts(self, found: int, room: int) -> int:
        """How many of the tokens found in the text are worth a row each; 0 where the river's drafts are better."""
        counts = np.arange(1, min(found, self.most, room) + 1)
        best, reached = 0, self.rate
        if len(counts):
            tokens = 1 + np.cumsum(self._text.survivals(len(counts)))
            rates = tokens / self.costs.of_passes(counts + 1)
            best = int(counts[rates.argmax()]) if rates.max() > reached else 0
        self._passed_over = 0 if best or not found else self._passed_over + 1
        if self._passed_over == _FIRST_PROBE:
            self._text.forget()
        return best

    def learn(self, accepted: np.ndarray, drafts: np.ndarray, confidences: np.ndarray, *, from_text: bool) -> None:
        """One round.

        Args:
            accepted, drafts: of each sequence, int [sequences].
            confidences: top probabilities of the drafts, float [sequences, most of them].
        """
        for row, count in enumerate(drafts):
            if from_text:
                self._text.learn(int(count), int(accepted[row]))
            else:
                self._river.learn(confidences[row, :count], int(accepted[row]))
        if drafts.any() and not from_text:
            self._since_draft = 0
            if drafts.max() > 1:
                self._patience = _FIRST_PROBE
        else:
            self._since_draft += 1


def expected_speedup(
    acceptance: Sequence[float], plain: float, draft: float, verify: Callable[[int], float]
) -> tuple[float, int]:
    """Speed-up of exact decoding over plain decoding at the best fixed draft length, and that length.

    A round of k drafts makes 1 + sum over j of the product of the first j acceptances tokens, and takes k drafts and a
    backbone pass of k + 1 rows.

    Args:
        acceptance: by place in the round.
        plain, draft: time of a pass of one row, and of a draft.
        verify: time of a backbone pass of so many rows.
    """
    best, length, tokens, survival = 1.0, 0, 1.0, 1.0
    for count, accepted in enumerate(acceptance, 1):
        survival *= accepted
        tokens += survival
        speedup = tokens * plain / (count * draft + verify(count + 1))
        if speedup > best:
            best, length = speedup, count
    return best, length
