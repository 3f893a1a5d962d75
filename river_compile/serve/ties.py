"""Passes over several sequences that choose as passes over one would.

Matrix products of several rows round otherwise than those of one, and attention over padding otherwise than without it.
In float32 that turns a greedy choice only where two tokens lie within some millionths of the logits' range: there the
sequence is read once more, alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from river_compile.runtime.decoder import Decoder
from river_compile.runtime.protocol import Passes, State

__all__ = ["AloneInTies", "measured_tie"]

Pass = Callable[..., tuple[np.ndarray, int | None]]
"""`Passes.forward` or ``backbone``: tokens and a state in, logits and exit depth out."""

# Twice for the two tokens of a margin, twice more since a few rows are a small sample.
_SAFETY = 4.0
_LENGTHS, _STEPS = (9, 2, 5, 17), 3


class AloneInTies(Passes):
    """A decoder whose passes of one token over several sequences decide near ties alone.

    Args:
        decoder: what runs.
        tie: the margin between two choices below which a pass over several sequences decides nothing, in logits.
    """

    def __init__(self, decoder: Passes, tie: float) -> None:
        self._decoder, self.tie = decoder, tie
        self.fixed_batch, self.ragged = decoder.fixed_batch, decoder.ragged
        self.verifies, self.joins, self.coarse = decoder.verifies, decoder.joins, decoder.coarse
        self.clock = decoder.clock

    @property
    def has_river(self) -> bool:
        return self._decoder.has_river

    def room(self, state: State) -> int | None:
        return self._decoder.room(state)

    def forward(
        self,
        ids: np.ndarray,
        state: State,
        mask: np.ndarray | None = None,
        tau: float | None = None,
        max_depth: int | None = None,
        *,
        last_only: bool = False,
    ) -> tuple[np.ndarray, int | None]:
        """As the decoder's: what drafts is checked anyway."""
        return self._decoder.forward(ids, state, mask, tau, max_depth, last_only=last_only)

    def backbone(
        self, ids: np.ndarray, state: State, mask: np.ndarray | None = None, *, last_only: bool = False
    ) -> tuple[np.ndarray, int | None]:
        if mask is not None or last_only:
            return self._decoder.backbone(ids, state, mask, last_only=last_only)
        return self.decided(self._decoder.backbone, ids, state)

    def decided(self, run: Pass, ids: np.ndarray, state: State) -> tuple[np.ndarray, int | None]:
        """A pass, with the logits of near ties from passes of one row. Exact mode leaves those of several tokens to one
        of a single token itself."""
        if len(ids) == 1 or ids.shape[1] > 1:
            return run(ids, state)
        before = self._decoder.mark(state)
        logits, depth = run(ids, state)
        best = np.partition(logits[:, -1], -2, axis=-1)[:, -2:]
        for row in np.flatnonzero(best[:, 1] - best[:, 0] < self.tie):
            alone = State(dict(before.caches), before.mask, before.ids)
            self._decoder.cut(alone, [0], [int(row)])
            logits[row] = run(ids[row : row + 1], alone)[0][0]
        return logits, depth

    def mark(self, state: State) -> Any:
        return self._decoder.mark(state)

    def back(self, state: State, mark: Any) -> None:
        self._decoder.back(state, mark)

    def cut(self, state: State, forget: Any, rows: Any) -> None:
        self._decoder.cut(state, forget, rows)

    def join(self, state: State, other: State) -> None:
        self._decoder.join(state, other)


def measured_tie(decoder: Decoder, vocabulary: int) -> float:
    """By how much logits of joined sequences differ from those of each alone, with a margin; 0 if nothing is joined."""
    if not decoder.joins:
        return 0.0
    tokens = (np.arange(max(_LENGTHS) + _STEPS) * 7 + 3) % vocabulary
    alone, joined, worst = [], None, 0.0
    for length in _LENGTHS:
        state = decoder.start(1)
        decoder.backbone(tokens[None, :length], state)
        alone.append(state)
        twin = State(dict(state.caches), state.mask, state.ids)
        if joined is None:
            joined = twin
        else:
            decoder.join(joined, twin)
    assert joined is not None
    for step in range(_STEPS):
        ids = np.array([[tokens[length + step]] for length in _LENGTHS])
        together = decoder.backbone(ids, joined)[0][:, -1]
        apart = np.stack([decoder.backbone(one[None], state)[0][0, -1] for one, state in zip(ids, alone, strict=True)])
        worst = max(worst, float(np.abs(together - apart).max()))
    return _SAFETY * worst
