"""One request under way: its tokens, and what is told of them as they are made."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from river_compile.runtime.sampling import Sampling
from river_compile.serve.settings import GenerationRequest

__all__ = ["Event", "Reason", "Stream", "Token"]

Reason = Literal["stop", "length"]


@dataclass(frozen=True)
class Token:
    """A new token; where probabilities are asked for, its logarithm and those of the likeliest."""

    id: int
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Event:
    """New tokens, and whether the stream has ended with them: why, or by what error."""

    tokens: tuple[Token, ...] = ()
    reason: Reason | None = None
    error: str | None = None


class Stream:
    """A request under way.

    Args:
        stop_tokens: end it, and are not told.
        emit: is told each event, by the engine's thread; it must not wait for anything.
    """

    def __init__(self, request: GenerationRequest, stop_tokens: Collection[int], emit: Callable[[Event], None]) -> None:
        self.request = request
        self.tokens = list(request.prompt)
        self.sampling = Sampling(request.temperature, request.top_p, request.seed)
        self.reason: Reason | None = None
        self.cancelled, self.outcome = False, "cancelled"
        self.submitted = time.perf_counter()
        self._stop_tokens, self._emit = frozenset(stop_tokens), emit

    @property
    def made(self) -> int:
        """New tokens so far, a stop token included."""
        return len(self.tokens) - len(self.request.prompt)

    def ending(self, tokens: Sequence[int]) -> Reason | None:
        """Why the stream ends with these tokens, the prompt included; None: it goes on."""
        if tokens[-1] in self._stop_tokens:
            return "stop"
        return "length" if len(tokens) - len(self.request.prompt) >= self.request.max_tokens else None

    def take(self, new: Sequence[int], logits: np.ndarray | None) -> None:
        """Add new tokens and tell of them.

        Args:
            logits: those that each was chosen by, float32 [new, vocabulary]; None: they are not at hand, nor asked for.
        """
        told = []
        for place, token in enumerate(new):
            self.tokens.append(token)
            self.reason = self.ending(self.tokens)
            if self.reason != "stop":
                told.append(self._token(token, None if logits is None else logits[place]))
        self._emit(Event(tuple(told), self.reason))

    def fail(self, error: str) -> None:
        """End it by an error."""
        self.cancelled = True
        self._emit(Event(error=error))

    def _token(self, token: int, logits: np.ndarray | None) -> Token:
        if self.request.logprobs is None or logits is None:
            return Token(token)
        shifted = logits.astype(np.float64) - logits.max()
        logprobs = shifted - np.log(np.exp(shifted).sum())
        count = min(self.request.logprobs, len(logprobs))
        best = np.argpartition(-logprobs, count - 1)[:count] if count else np.zeros(0, np.int64)
        best = best[np.argsort(-logprobs[best], kind="stable")]
        return Token(token, float(logprobs[token]), tuple((int(one), float(logprobs[one])) for one in best))
