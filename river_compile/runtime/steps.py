"""What a generation tells: its steps, one by one and summed up."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

__all__ = ["Generation", "Step"]


@dataclass(frozen=True)
class Step:
    """One forward pass of a generation; in exact mode one round: drafts, and the pass that verifies them.

    Fields:
        tokens: the new tokens of each sequence: one in plain decoding, one or more in exact mode (none where a near tie
            is left to the next round), none for those that have stopped.
        exit_depth: backbone layers that ran (in exact mode: of the verification); None if the model does not tell.
        seconds: wall time, sampling included.
        drafted, accepted: tokens that were drafted in all sequences, and those of them that verification kept.
        looked_up: how many of the drafted came from the text itself.
        near_ties: sequences whose next token the verification of several rows left to a pass of one row.
        draft_seconds, verify_seconds: of the round's two parts.
        logits: the backbone's behind each new token, float32 [new, vocabulary] for each sequence, where they are kept.
    """

    tokens: tuple[tuple[int, ...], ...]
    exit_depth: int | None
    seconds: float
    drafted: int = 0
    accepted: int = 0
    looked_up: int = 0
    near_ties: int = 0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    logits: tuple[np.ndarray, ...] | None = None


@dataclass
class Generation:
    """What a generation made: new tokens a sequence, without stop tokens; its steps (the first: prefill)."""

    tokens: list[list[int]]
    steps: list[Step] = field(default_factory=list)

    @property
    def exit_depths(self) -> list[int]:
        """Exit depth of each decode step."""
        return [step.exit_depth for step in self.steps[1:] if step.exit_depth is not None]

    @property
    def mean_exit_depth(self) -> float:
        """Mean exit depth over the decode steps; NaN if there is none."""
        return float(np.mean(self.exit_depths)) if self.exit_depths else float("nan")

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second that a sequence gets while it is decoded; NaN if there is no decode step.

        By the median step where each makes one token, as an outlier says nothing of the model; over all steps in exact
        mode, whose rounds differ in length.
        """
        seconds = [step.seconds for step in self.steps[1:]]
        if not seconds:
            return float("nan")
        if not any(step.drafted for step in self.steps):
            return 1 / float(np.median(seconds))
        running = sum(sum(bool(new) for new in step.tokens) * step.seconds for step in self.steps[1:])
        made = sum(len(new) for step in self.steps[1:] for new in step.tokens)
        return made / running if running else float("nan")

    @property
    def decode_seconds(self) -> float:
        """Wall time of all steps but prefill."""
        return sum(step.seconds for step in self.steps[1:])

    @property
    def drafted(self) -> int:
        """Tokens drafted."""
        return sum(step.drafted for step in self.steps)

    @property
    def accepted(self) -> int:
        """Tokens drafted that verification kept."""
        return sum(step.accepted for step in self.steps)

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that verification kept; NaN if none was drafted."""
        return self.accepted / self.drafted if self.drafted else float("nan")

    @property
    def near_ties(self) -> int:
        """Tokens that a pass of one row decided, because two choices lay too close in one of several."""
        return sum(step.near_ties for step in self.steps)
