"""Rounds in which all workers decode the same prompt one after the other, and readings of the same texts."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np

from river_compile.measure.fidelity import Interval, bootstrap
from side_by_side.environments import PeerError

__all__ = ["Measured", "Player", "SideBySide", "groups"]

_T = TypeVar("_T")
_PAUSE = 0.3


class Player(Protocol):
    """A worker, as far as rounds need it."""

    def decode(self, prompt: list[int], tokens: int) -> tuple[list[int], float]: ...

    def choices(self, ids: list[int], prompt: int) -> list[int]: ...

    def status(self) -> tuple[int | None, str]: ...


@dataclass
class Measured:
    """What was measured of a peer, beside the reference in the same rounds.

    Fields:
        title: what it is.
        seconds, of_reference: from the first new token to the last, its own and the reference's, by round.
        tokens, differing: new tokens of all rounds, and how many of them are not the reference's at their places.
        agrees: for each text, whether it chooses the reference's token at each position, bool [positions].
        resident: bytes, after the last round; None if not told.
        note: in a few words.
        failure: why it is not measured, or not to the end.
    """

    title: str
    seconds: list[float] = field(default_factory=list)
    of_reference: list[float] = field(default_factory=list)
    tokens: int = 0
    differing: int = 0
    agrees: list[np.ndarray] = field(default_factory=list)
    resident: int | None = None
    note: str = ""
    failure: str = ""

    def rate(self, tokens: int) -> float:
        """Tokens a second, of rounds of so many new tokens: the median."""
        return (tokens - 1) / statistics.median(self.seconds)

    @property
    def ratios(self) -> list[float]:
        """How many times as fast as the reference, by round."""
        return [base / own for base, own in zip(self.of_reference, self.seconds, strict=True)]

    def agreement(self) -> Interval | None:
        """Share of positions where it chooses what the reference chooses; the interval resamples texts."""
        return bootstrap([found.astype(float) for found in self.agrees]) if self.agrees else None


def groups(names: Sequence[str], reference: str, together: int | None) -> Iterator[list[str]]:
    """So many peers at a time, the reference with each; all at once if None."""
    others = [name for name in names if name != reference]
    size = together or max(len(others), 1)
    for start in range(0, max(len(others), 1), size):
        yield [reference, *others[start : start + size]]


class SideBySide:
    """Players that take turns.

    One that fails takes no further part, and its result says why.

    Args:
        players, results: by name; the results are added to.
        reference: the player that the others are compared with.
        pause: seconds before each turn, in which threads of the last one stop waiting for more.
        progress: is told what is done next.

    Raises (from each method):
        PeerError: the reference fails, so that there is nothing to compare with.
    """

    def __init__(
        self,
        players: Mapping[str, Player],
        results: Mapping[str, Measured],
        reference: str,
        *,
        pause: float = _PAUSE,
        progress: Callable[[str], None] = lambda what: None,
    ) -> None:
        self._players, self._results, self._reference = dict(players), results, reference
        self._pause, self._progress = pause, progress
        self._shuffle = random.Random(0)

    def decode(self, prompt: list[int], tokens: int, *, keep: bool) -> None:
        """A round: all continue a prompt, in an order of its own, since what ran just before leaves its mark."""
        order = self._shuffle.sample(sorted(self._players), len(self._players))
        found = self._each("decode", order, lambda player: player.decode(prompt, tokens))
        expected, of_reference = found[self._reference]
        for name, (made, seconds) in found.items() if keep else ():
            result = self._results[name]
            result.seconds.append(seconds)
            result.of_reference.append(of_reference)
            result.tokens += tokens
            result.differing += tokens - sum(own == other for own, other in zip(made, expected, strict=False))

    def look(self) -> None:
        """Memory in use, and what engines note."""
        for name, (resident, note) in self._each("look", list(self._players), lambda player: player.status()).items():
            self._results[name].resident, self._results[name].note = resident, note

    def read(self, texts: Iterable[np.ndarray], lead: int) -> None:
        """Choices of the next token on texts, int64 [tokens] each: after ``lead`` tokens and after each further one."""
        found: dict[str, list[np.ndarray]] = {}
        for ids in texts:
            choices = self._each(
                "read", list(self._players), lambda player, ids=ids: player.choices(ids.tolist(), lead)
            )
            expected = np.array(choices[self._reference])
            for name, chosen in choices.items():
                found.setdefault(name, []).append(np.array(chosen) == expected)
        for name in self._players:
            self._results[name].agrees = found.get(name, [])

    def _each(self, what: str, order: Sequence[str], ask: Callable[[Player], _T]) -> dict[str, _T]:
        found = {}
        for name in order:
            self._progress(f"{what}: {name}")
            time.sleep(self._pause)
            try:
                found[name] = ask(self._players[name])
            except PeerError as error:
                if name == self._reference:
                    raise
                self._results[name].failure = str(error)
                del self._players[name]
        return found
