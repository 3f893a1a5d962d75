"""What every runtime offers a generation loop: a KV cache, forward passes over it, and cutting it back."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Passes", "State"]


@dataclass
class State:
    """A KV cache and what it holds.

    Fields:
        caches: on the device, by the name of the input they go into.
        mask: which cached tokens are real, int64 [sequences, cached].
        ids: the tokens, int64 [sequences, cached]; 0 where the mask is.
    """

    caches: dict[str, Any]
    mask: np.ndarray
    ids: np.ndarray

    def read(self, ids: np.ndarray, mask: np.ndarray) -> None:
        """Note tokens as read, int64 [sequences, new] both."""
        self.mask = np.concatenate([self.mask, mask], axis=1)
        self.ids = np.concatenate([self.ids, ids * mask], axis=1)

    def spans(self, forget: Sequence[int], rows: Sequence[int]) -> list[tuple[int, int, int, int]]:
        """Which slots stay when sequences forget their last tokens, see `Passes.cut`.

        Returns:
            Of each sequence that stays: its row, how many slots of padding it gets on the left, and the first and last
            slot (exclusive) that it keeps. All come to one length, the least that holds every real token.
        """
        ends = [self.mask.shape[1] - count for count in forget]
        starts = [int(self.mask[row, :end].argmax()) if end else 0 for row, end in zip(rows, ends, strict=True)]
        length = max(end - start for start, end in zip(starts, ends, strict=True))
        return [(row, max(length - end, 0), max(end - length, 0), end) for row, end in zip(rows, ends, strict=True)]

    def keep(self, spans: Sequence[tuple[int, int, int, int]]) -> None:
        """Bring mask and ids to what `spans` tells; the caches are the runtime's to bring there."""

        def kept(values: np.ndarray, row: int, filling: int, first: int, last: int) -> np.ndarray:
            return np.concatenate([np.zeros(filling, np.int64), values[row, first:last]])

        self.mask, self.ids = (np.stack([kept(values, *span) for span in spans]) for values in (self.mask, self.ids))

    def take_in(self, other: State) -> None:
        """Add the mask and ids of another state's sequences; the caches are the runtime's to join."""
        length = max(self.mask.shape[1], other.mask.shape[1])

        def filled(values: np.ndarray) -> np.ndarray:
            return np.pad(values, ((0, 0), (length - values.shape[1], 0)))

        self.mask = np.concatenate([filled(self.mask), filled(other.mask)])
        self.ids = np.concatenate([filled(self.ids), filled(other.ids)])


class Passes(ABC):
    """Forward passes of a decoder with a KV cache, whatever runs it.

    ``clock`` tells seconds: what passes cost is measured by it. ``fixed_batch``: no sequence can leave a state.
    ``ragged``: sequences of a state may differ in length, the shorter ones padded on the left. ``verifies``: a pass of
    several tokens gives logits for each. ``joins``: states can be joined. ``coarse``: keys and values have so few
    digits that their rounding, where passes of several rows round otherwise than those of one, can turn later choices.
    """

    fixed_batch: bool = False
    ragged: bool = True
    verifies: bool = True
    joins: bool = False
    coarse: bool = False
    clock: Callable[[], float] = staticmethod(time.perf_counter)

    @property
    @abstractmethod
    def has_river(self) -> bool:
        """Whether there is a river, and so exit settings."""

    def room(self, state: State) -> int | None:
        """How many more tokens a state can take; None: any number."""
        return None

    @abstractmethod
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
        """Run tokens through the model and move the state on.

        Args:
            ids: int64 [sequences, new].
            state: its KV cache is replaced by one that holds these tokens as well.
            mask: int64 [sequences, new], 0 for padding; all real if None.
            tau, max_depth: override the model's defaults for this pass.
            last_only: only the last token's logits are wanted; a runtime may leave out the others, which cost much
                where the prompt is long.

        Returns:
            Logits, float32 [sequences, new, vocabulary], and the exit depth if the model tells it.
        """

    @abstractmethod
    def backbone(
        self, ids: np.ndarray, state: State, mask: np.ndarray | None = None, *, last_only: bool = False
    ) -> tuple[np.ndarray, int | None]:
        """`forward` with exits off, whatever the model's defaults."""

    def mark(self, state: State) -> Any:
        """What `back` needs to bring a state back to where it is now."""
        return State(dict(state.caches), state.mask, state.ids)

    def back(self, state: State, mark: Any) -> None:
        """Bring a state back, as if nothing had been read since the mark, which may be used again."""
        state.caches, state.mask, state.ids = dict(mark.caches), mark.mask, mark.ids

    @abstractmethod
    def cut(self, state: State, forget: Sequence[int], rows: Sequence[int]) -> None:
        """Cut the state back, as if the tokens forgotten had never been read.

        Sequences that forget more than others move to the right: what they lack is padding on the left.

        Args:
            forget: how many of its last tokens each sequence that stays forgets.
            rows: the sequences that stay, in their order.
        """

    def join(self, state: State, other: State) -> None:
        """Take the sequences of another state in, behind those that are there; only where it ``joins``.

        The shorter ones get padding on the left. The other state is not to be used any more.
        """
        raise NotImplementedError
