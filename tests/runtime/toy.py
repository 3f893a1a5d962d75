"""A decoder of numpy alone, for the generation loops: its cache tells of each slot what was read and who wrote it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from river_compile.runtime.decoder import Decoder
from river_compile.runtime.protocol import State

VOCABULARY = 23
BACKBONE, RIVER = 1, 2
DRAFT_SECONDS, ROW_SECONDS = 0.25, 0.05


class Toy(Decoder):
    """The next token hangs on the last three; the river agrees with the backbone for a share of all texts.

    Args:
        agreement: that share.
        noise: a pass of several rows rounds otherwise than one of a single row, by this much.
        tied: every so many texts have two first choices that lie closer than any rounding.
    """

    has_river = True

    def __init__(self, agreement: float = 0.8, noise: float = 0.0, tied: int = 0) -> None:
        self.agreement, self.noise, self.tied = agreement, noise, tied
        self.passes: list[tuple[int, bool]] = []
        self.seconds = 0.0
        self.clock = lambda: self.seconds

    def check_request(self, batch: int, tokens: int) -> None:
        pass

    def start(self, batch: int) -> State:
        nothing = np.zeros((batch, 0), np.int64)
        return State({"slots": np.zeros((batch, 0, 2), np.int64)}, nothing, nothing)

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
        return self._run(ids, state, mask, river=max_depth == 0)

    def backbone(
        self, ids: np.ndarray, state: State, mask: np.ndarray | None = None, *, last_only: bool = False
    ) -> tuple[np.ndarray, int | None]:
        return self._run(ids, state, mask, river=False)

    def _run(
        self, ids: np.ndarray, state: State, mask: np.ndarray | None, *, river: bool
    ) -> tuple[np.ndarray, int | None]:
        self.passes.append((ids.shape[1], river))
        self.seconds += DRAFT_SECONDS if river else 1 + ROW_SECONDS * (ids.shape[1] - 1)
        writer = np.full_like(ids, RIVER if river else BACKBONE)
        before = state.caches["slots"].shape[1]
        state.caches = {"slots": np.concatenate([state.caches["slots"], np.stack([ids, writer], -1)], 1)}
        state.read(ids, np.ones_like(ids) if mask is None else mask)
        logits = np.zeros((*ids.shape, VOCABULARY), np.float32)
        for row in range(len(ids)):
            for place in range(ids.shape[1]):
                seen = state.caches["slots"][row, : before + place + 1, 0]
                logits[row, place] = self.after(seen[state.mask[row, : len(seen)] == 1], river)
        if ids.shape[1] > 1:
            logits += self.noise * np.random.default_rng(len(self.passes)).uniform(-1, 1, logits.shape)
        return logits.astype(np.float32), 0 if river else 4

    def after(self, text: np.ndarray, river: bool) -> np.ndarray:
        """Logits after a text, float [vocabulary]."""
        seed = [int(token) for token in text[-3:]]
        random = np.random.default_rng(seed)
        logits = random.normal(size=VOCABULARY) * 3
        if self.tied and sum(seed) % self.tied == 0:
            first, second = np.argsort(-logits)[:2]
            logits[second] = logits[first] - 1e-7 * (1 + sum(seed) % 3)
        if river and random.random() > self.agreement:
            logits = np.roll(logits, 1)
        return logits

    def cut(self, state: State, forget: Sequence[int], rows: Sequence[int]) -> None:
        spans = state.spans(forget, rows)
        slots = state.caches["slots"]
        state.caches = {
            "slots": np.stack(
                [
                    np.concatenate([np.zeros((filling, 2), np.int64), slots[row, first:last]])
                    for row, filling, first, last in spans
                ]
            )
        }
        state.keep(spans)
