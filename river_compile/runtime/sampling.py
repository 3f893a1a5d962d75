"""Prompts to one padded batch, and logits to a token: what every generation loop shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from river_compile.errors import ConfigError

__all__ = ["Choice", "Sampling", "check_request", "pad_left"]


class Choice(Protocol):
    """How tokens are chosen, and when a sequence ends."""

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        ...

    def scores(self, tokens: Sequence[int], logits: np.ndarray, place: int) -> np.ndarray:
        """What logits, float32 [vocabulary], become after the tokens of the sequence in this place of the batch."""
        ...

    def distribution(self, scores: np.ndarray) -> np.ndarray:
        """The probabilities that a token is drawn with, float64 [vocabulary]; only where it is not greedy."""
        ...

    def draw(self, probabilities: np.ndarray) -> int:
        """A token of a distribution, float64 [vocabulary]."""
        ...

    def uniform(self) -> float:
        """A random number in [0, 1)."""
        ...

    def ends(self, tokens: Sequence[int], place: int) -> bool:
        """Whether the sequence in this place of the batch ends with its last token."""
        ...


@dataclass(frozen=True)
class Sampling:
    """A token by greedy choice, or from the nucleus of mass ``top_p``.

    Fields:
        temperature: 0 is greedy.
        top_p: tokens are sampled from the smallest set of at least this probability.
        seed: makes sampling repeatable.
        stop_tokens: end a sequence.

    Raises:
        ConfigError: a field has a value it cannot have.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop_tokens: frozenset[int] = frozenset()
    random: np.random.Generator = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ConfigError("temperature", f"must be 0 (greedy) or more, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ConfigError("top_p", f"must lie in (0, 1], not {self.top_p}")
        object.__setattr__(self, "random", np.random.default_rng(self.seed))

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def scores(self, tokens: Sequence[int], logits: np.ndarray, place: int) -> np.ndarray:
        return logits

    def distribution(self, scores: np.ndarray) -> np.ndarray:
        scaled = scores.astype(np.float64) / self.temperature
        probabilities = np.exp(scaled - scaled.max())
        probabilities /= probabilities.sum()
        if self.top_p < 1:
            order = np.argsort(-probabilities)
            kept = int(np.searchsorted(np.cumsum(probabilities[order]), self.top_p)) + 1
            probabilities[order[kept:]] = 0
            probabilities /= probabilities.sum()
        return np.asarray(probabilities)

    def uniform(self) -> float:
        return float(self.random.random())

    def ends(self, tokens: Sequence[int], place: int) -> bool:
        return tokens[-1] in self.stop_tokens

    def draw(self, probabilities: np.ndarray) -> int:
        return int(self.random.choice(len(probabilities), p=probabilities))

    def choose(self, logits: np.ndarray) -> int:
        """A token after logits, float32 [vocabulary]."""
        return int(logits.argmax()) if self.greedy else self.draw(self.distribution(logits))


def check_request(prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raises ConfigError where prompts are no token ids, or there is nothing to generate."""
    if isinstance(prompts, str) or any(isinstance(prompt, (str, int)) for prompt in prompts):
        raise ConfigError("prompts", "must be lists of token ids, one a sequence; a tokenizer makes them of text")
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise ConfigError("prompts", "each needs at least one token")
    if max_new_tokens < 1:
        raise ConfigError("max_new_tokens", f"must be 1 or more, not {max_new_tokens}")


def pad_left(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask, int64 [prompts, longest]; the mask is 0 where a shorter prompt is filled up."""
    length = max(map(len, prompts))
    ids = np.zeros((len(prompts), length), np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = 1
    return ids, mask
