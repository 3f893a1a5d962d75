"""Streams that are decoded together: a row each of one KV cache, joining and leaving between tokens."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from river_compile.runtime.exact import Drafting, Experience, exact_steps
from river_compile.runtime.protocol import Passes, State
from river_compile.runtime.steps import Step
from river_compile.serve.stream import Stream
from river_compile.serve.ties import Pass

__all__ = ["ExactGroup", "Group", "PlainGroup"]


class Group(ABC):
    """Streams, and the state whose rows they are, in their order."""

    def __init__(self, passes: Passes) -> None:
        self.streams: list[Stream] = []
        self._passes = passes
        self._state: State | None = None

    def add(self, stream: Stream, state: State) -> None:
        """Take a stream in, with the state of its own that has read all of its tokens but the last."""
        if self._state is None:
            self._state = state
        else:
            self._passes.join(self._state, state)
        self.streams.append(stream)

    def settle(self) -> None:
        """Let the streams go that have ended, or that nobody waits for any more; their rows are free at once."""
        self._keep([row for row, stream in enumerate(self.streams) if stream.reason is None and not stream.cancelled])

    @abstractmethod
    def step(self) -> Step:
        """One pass, or one round, over all streams."""

    def _keep(self, rows: Sequence[int]) -> None:
        if len(rows) == len(self.streams):
            return
        self.streams = [self.streams[row] for row in rows]
        if not rows:
            self._state = None
        elif self._state is not None:
            self._passes.cut(self._state, [0] * len(rows), rows)


class PlainGroup(Group):
    """One token of each stream a pass.

    Args:
        run: the pass.
    """

    def __init__(self, passes: Passes, run: Pass) -> None:
        super().__init__(passes)
        self._run = run

    def step(self) -> Step:
        assert self._state is not None
        started = time.perf_counter()
        ids = np.array([stream.tokens[-1:] for stream in self.streams], np.int64)
        logits, depth = self._run(ids, self._state)
        chosen = [stream.sampling.choose(row[-1]) for stream, row in zip(self.streams, logits, strict=True)]
        for stream, token, row in zip(self.streams, chosen, logits, strict=True):
            stream.take([token], row[-1:])
        return Step(tuple((token,) for token in chosen), depth, time.perf_counter() - started)


@dataclass
class _Choices:
    """How each of some streams chooses, and when it ends."""

    streams: Sequence[Stream]
    greedy: bool
    random: np.random.Generator = field(default_factory=np.random.default_rng)

    def scores(self, tokens: Sequence[int], logits: np.ndarray, place: int) -> np.ndarray:
        """Logarithms of a stream's own probabilities, so that all have one distribution of them."""
        if self.greedy:
            return logits
        with np.errstate(divide="ignore"):
            return np.asarray(np.log(self.streams[place].sampling.distribution(logits)))

    def distribution(self, scores: np.ndarray) -> np.ndarray:
        probabilities = np.exp(scores.astype(np.float64))
        return np.asarray(probabilities / probabilities.sum())

    def draw(self, probabilities: np.ndarray) -> int:
        return int(self.random.choice(len(probabilities), p=probabilities))

    def uniform(self) -> float:
        return float(self.random.random())

    def ends(self, tokens: Sequence[int], place: int) -> bool:
        return self.streams[place].ending(tokens) is not None


class ExactGroup(Group):
    """Rounds of exact mode: the river drafts, one pass over all streams verifies.

    A round's generator holds for the streams it began with; when one joins or is cancelled another begins, where the
    state stands.

    Args:
        drafting: how drafts are made.
        experience: what exact mode has learnt of the decoder.
        greedy: whether all streams are; otherwise all are sampled.
    """

    def __init__(self, passes: Passes, drafting: Drafting, experience: Experience, *, greedy: bool) -> None:
        super().__init__(passes)
        self._drafting, self._experience, self._greedy = drafting, experience, greedy
        self._rounds: Iterator[Step] | None = None
        self._members: list[Stream] = []

    def add(self, stream: Stream, state: State) -> None:
        self._rounds = None
        super().add(stream, state)

    def step(self) -> Step:
        if self._rounds is None:
            self._rounds, self._members = self._begin(), list(self.streams)
        step = next(self._rounds)
        for place, (stream, new) in enumerate(zip(self._members, step.tokens, strict=True)):
            if new:
                stream.take(new, None if step.logits is None else step.logits[place])
        return step

    def settle(self) -> None:
        # The round has cut off those that ended, unless all have.
        self.streams = [stream for stream in self.streams if stream.reason is None]
        if not self.streams:
            self._rounds = self._state = None
        elif any(stream.cancelled for stream in self.streams):
            self._rounds = None
            super().settle()

    def _begin(self) -> Iterator[Step]:
        assert self._state is not None
        told = any(stream.request.logprobs is not None for stream in self.streams)
        return exact_steps(
            self._passes,
            self._state,
            [stream.tokens[-1] for stream in self.streams],
            [stream.tokens[:-1] for stream in self.streams],
            max(stream.request.max_tokens - stream.made for stream in self.streams),
            replace(self._drafting, keep_logits=told),
            _Choices(list(self.streams), self._greedy),
            self._experience,
        )
