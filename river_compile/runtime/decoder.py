"""The generation loop, for whatever runs a decoder: one forward pass at a time, and tokens chosen on top of it."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from river_compile.config import RiverConfig
from river_compile.runtime.sampling import check_sampling, choose, pad_left

__all__ = ["Decoder", "Generation", "State", "Step"]


@dataclass
class State:
    """The KV cache, on the device, by the name of the input it goes into; and which cached tokens are real."""

    caches: dict[str, Any]
    mask: np.ndarray


@dataclass(frozen=True)
class Step:
    """One forward pass of a generation.

    Fields:
        tokens: the token chosen for each sequence; None for those that have stopped.
        exit_depth: backbone layers that ran; None if the model does not tell.
        seconds: wall time of the pass, sampling included.
    """

    tokens: tuple[int | None, ...]
    exit_depth: int | None
    seconds: float


@dataclass
class Generation:
    """What a generation made: new tokens a sequence, without stop tokens; its forward passes (the first: prefill)."""

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
        """Decode steps a second, by the median step; NaN if there is none."""
        seconds = [step.seconds for step in self.steps[1:]]
        return 1 / float(np.median(seconds)) if seconds else float("nan")


class Decoder(ABC):
    """A decoder with a KV cache, whatever runs it: one forward pass at a time, and generation on top of it."""

    @abstractmethod
    def start(self, batch: int) -> State:
        """The state before the first token: an empty KV cache for ``batch`` sequences."""

    @abstractmethod
    def forward(
        self,
        ids: np.ndarray,
        state: State,
        mask: np.ndarray | None = None,
        tau: float | None = None,
        max_depth: int | None = None,
    ) -> tuple[np.ndarray, int | None]:
        """Run tokens through the model and move the state on; logits and exit depth."""

    @abstractmethod
    def check_request(self, batch: int, tokens: int) -> None:
        """
        Raises:
            ConfigError: the model does not take so many sequences, or its cache does not hold so many tokens.
        """

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int = 64,
        *,
        tau: float | None = None,
        max_depth: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop_tokens: Sequence[int] = (),
        seed: int | None = None,
        on_step: Callable[[Step], None] | None = None,
    ) -> Generation:
        """Continue one or more prompts; `stream` with the steps collected.

        Args:
            prompts: token ids, one list a sequence; shorter ones are padded on the left.
            temperature: 0 is greedy; otherwise tokens are sampled, from the smallest set of at least ``top_p``.
            stop_tokens: end a sequence; they are not part of the result.
            seed: makes sampling repeatable.
            on_step: is told each step as it is made.

        Raises:
            ConfigError: an argument has a value it cannot have.
        """
        result = Generation([[] for _ in prompts])
        for step in self.stream(
            prompts,
            max_new_tokens,
            tau=tau,
            max_depth=max_depth,
            temperature=temperature,
            top_p=top_p,
            stop_tokens=stop_tokens,
            seed=seed,
        ):
            result.steps.append(step)
            for sequence, token in zip(result.tokens, step.tokens, strict=True):
                if token is not None and token not in stop_tokens:
                    sequence.append(token)
            if on_step is not None:
                on_step(step)
        return result

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int = 64,
        *,
        tau: float | None = None,
        max_depth: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop_tokens: Sequence[int] = (),
        seed: int | None = None,
    ) -> Iterator[Step]:
        """Yield one step a forward pass until every sequence has stopped. Arguments and errors: see `generate`."""
        check_sampling(prompts, max_new_tokens, temperature, top_p)
        RiverConfig(tau=RiverConfig.tau if tau is None else tau, max_depth=max_depth)
        sampler = np.random.default_rng(seed)
        ids, mask = pad_left(prompts)
        # The last token is chosen and not read.
        self.check_request(len(prompts), ids.shape[1] + max_new_tokens - 1)
        state = self.start(len(prompts))
        stopped = np.zeros(len(prompts), bool)
        for _ in range(max_new_tokens):
            started = time.perf_counter()
            logits, depth = self.forward(ids, state, mask, tau, max_depth)
            chosen = np.array([choose(row, temperature, top_p, sampler) for row in logits[:, -1]], np.int64)
            seconds = time.perf_counter() - started
            yield Step(tuple(None if done else int(t) for t, done in zip(chosen, stopped, strict=True)), depth, seconds)
            stopped |= np.isin(chosen, list(stop_tokens))
            if stopped.all():
                return
            ids, mask = chosen[:, None], np.ones((len(prompts), 1), np.int64)
