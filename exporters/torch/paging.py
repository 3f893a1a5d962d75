"""Offloaded weights while a graph runs: a layer's come in while the layer before runs, and go when it has run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from river_compile.exporters.torch.freshness import samples
from river_compile.exporters.torch.offload import Extent, WeightsFile, find, join

__all__ = ["Gate", "Paged", "PagedCall"]

Run = Callable[[list[Any]], None]
"""Runs a piece on the list of all values."""


class Call(Protocol):
    """A compiled piece in its place; ``weights`` are the places of the parameters that it reads."""

    @property
    def weights(self) -> tuple[int, ...]: ...

    def __call__(self, values: list[Any]) -> None: ...


@dataclass(frozen=True)
class PagedCall:
    """A call that has the next one's weights read ahead, and lets go its own.

    Fields:
        own, following: what it reads of files, and what the next call does.
        held: the places of its own, and where they lie.
        notes: whether to note samples of the weights, which cost little while they are in memory.
    """

    call: Call
    own: Sequence[Extent]
    following: Sequence[Extent]
    held: Sequence[tuple[int, Extent]]
    notes: bool

    def __call__(self, values: list[Any]) -> None:
        for extent in self.following:
            extent.prefetch()
        self.call(values)
        if self.notes:
            for place, extent in self.held:
                extent.file.noted[extent.start] = samples([values[place]])[0]
        for extent in self.own:
            extent.drop()


class Paged:
    """What of a model lies in files, for one graph.

    Args:
        chains: calls in the order in which they run, of the river and of the backbone. What is in both is read ahead of
            as in the last.
        arguments: the graph's inputs.
        watched: the weights that the river was made of.
        notes: whether its passes note samples of the weights that they read.
    """

    def __init__(
        self,
        chains: Sequence[Sequence[Call]],
        arguments: Sequence[Any],
        watched: Sequence[torch.Tensor],
        *,
        notes: bool,
    ) -> None:
        self._calls: dict[int, PagedCall] = {}
        for chain in chains:
            held = [[(i, found) for i in call.weights if (found := find(arguments[i])) is not None] for call in chain]
            spans = [join(extent for _, extent in one) for one in held]
            for call, mine, own, following in zip(chain, held, spans, [*spans[1:], []], strict=True):
                if own or following:
                    self._calls[id(call)] = PagedCall(call, own, following, mine, notes)
        self._files: Collection[WeightsFile] = {
            extent.file.address: extent.file for call in self._calls.values() for extent in call.own
        }.values()
        self._in_memory = [i for i, weight in enumerate(watched) if find(weight) is None]
        self._watched = [(extent, samples([w])[0]) for w in watched if (extent := find(w)) is not None]
        for extent, sample in self._watched:
            extent.file.noted[extent.start] = sample

    def __bool__(self) -> bool:
        return bool(self._files)

    def check(self) -> None:
        """Whether the files are whole.

        Raises:
            InputError: one was cut.
        """
        for file in self._files:
            file.check()

    def in_memory(self, watched: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Those of the river's weights that are in no file."""
        return [watched[i] for i in self._in_memory] if self._watched else watched

    def calls(self, calls: Sequence[Run]) -> tuple[Run, ...]:
        """Those calls, with paging where they read offloaded weights or come before one that does."""
        return tuple(self._calls.get(id(call), call) for call in calls)

    def is_unchanged(self) -> bool:
        """Whether the samples of the river's weights last noted are those of when this was made."""
        return all(torch.equal(extent.file.noted[extent.start], sample) for extent, sample in self._watched)


class Gate:
    """What passes in several threads go through, so that no weight is moved while one of them reads it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._passes = 0

    def __enter__(self) -> None:
        """A pass begins; it waits while weights are moved."""
        with self._changed:
            self._passes += 1

    def __exit__(self, *raised: object) -> None:
        with self._changed:
            self._passes -= 1
            self._changed.notify_all()

    @contextmanager
    def closed(self) -> Iterator[None]:
        """No pass is under way, and none begins.

        Requires: this thread has none under way.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._passes == 0)
            yield
