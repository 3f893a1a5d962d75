"""The generation loop, for whatever runs a decoder: one forward pass at a time, and tokens chosen on top of it."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np

from river_compile.config import RiverConfig
from river_compile.errors import ConfigError
from river_compile.runtime.exact import Drafting, Experience, exact_steps
from river_compile.runtime.protocol import Passes, State
from river_compile.runtime.sampling import Sampling, check_request, pad_left
from river_compile.runtime.steps import Generation, Step

__all__ = ["Decoder"]


class Decoder(Passes):
    """A decoder with a KV cache, and generation on top of its forward passes."""

    @abstractmethod
    def start(self, batch: int) -> State:
        """The state before the first token: an empty KV cache for ``batch`` sequences."""

    @abstractmethod
    def check_request(self, batch: int, tokens: int) -> None:
        """
        Raises:
            ConfigError: the model does not take so many sequences, or its cache does not hold so many tokens.
        """

    @property
    def exported_config(self) -> Mapping[str, Any]:
        """The settings that the model was exported with, by the fields of `RiverConfig`; as far as it tells."""
        return {}

    @property
    def defaults(self) -> RiverConfig:
        """How `generate` decodes where it is not told: as the model was exported."""
        noted = self.exported_config
        return RiverConfig(**{name: noted[name] for name in ("exact", "lookup") if name in noted})

    @cached_property
    def experience(self) -> Experience:
        """What exact mode has learnt of this decoder."""
        return Experience()

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
        exact: bool | None = None,
        lookup: bool | None = None,
        state: State | None = None,
        on_step: Callable[[Step], None] | None = None,
    ) -> Generation:
        """Continue one or more prompts; `stream` with the steps collected.

        Args:
            prompts: token ids, one list a sequence; shorter ones are padded on the left.
            tau, max_depth: exit settings, the model's own if None. In exact mode they shape the drafts, which are all
                river if neither is given.
            temperature: 0 is greedy; otherwise tokens are sampled, from the smallest set of at least ``top_p``.
            stop_tokens: end a sequence; they are not part of the result.
            seed: makes sampling repeatable.
            exact: the river only drafts, and the backbone verifies: the tokens are the backbone's (greedy), or are
                distributed as the backbone's (sampled). None: as the model was exported.
            lookup: in exact mode, whether tokens of the text itself are drafts where it repeats. None: as exported.
            state: of an earlier generation: what of the prompt it has read already is not read again. It moves on with
                this generation. One sequence only.
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
            exact=exact,
            lookup=lookup,
            state=state,
        ):
            result.steps.append(step)
            for sequence, new in zip(result.tokens, step.tokens, strict=True):
                sequence += [token for token in new if token not in stop_tokens]
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
        exact: bool | None = None,
        lookup: bool | None = None,
        state: State | None = None,
    ) -> Iterator[Step]:
        """Yield a step for each pass, or round, until every sequence has stopped. Arguments and errors: `generate`."""
        check_request(prompts, max_new_tokens)
        RiverConfig(tau=RiverConfig.tau if tau is None else tau, max_depth=max_depth)
        sampling = Sampling(temperature, top_p, seed, frozenset(stop_tokens))
        defaults = self.defaults
        exact = defaults.exact if exact is None else exact
        lookup = defaults.lookup if lookup is None else lookup
        ids, mask = pad_left(prompts)
        # The last token is chosen and not read.
        self.check_request(len(prompts), ids.shape[1] + max_new_tokens - 1)
        if state is None:
            state = self.start(len(prompts))
        else:
            ids, mask = self._continue(state, ids, mask)
        started = time.perf_counter()
        if exact:
            logits, depth = self.backbone(ids, state, mask, last_only=True)
        else:
            logits, depth = self.forward(ids, state, mask, tau, max_depth, last_only=True)
        first = [sampling.choose(row) for row in logits[:, -1]]
        yield Step(tuple((token,) for token in first), depth, time.perf_counter() - started)
        if exact and self.verifies and (len(prompts) == 1 or self.ragged):
            drafting = Drafting(
                tau, 0 if tau is None and max_depth is None else max_depth, lookup, river=self.has_river
            )
            left = max_new_tokens - 1
            yield from exact_steps(self, state, first, prompts, left, drafting, sampling, self.experience)
        else:
            # Where sequences cannot differ in length they cannot accept different numbers of drafts; and where a pass
            # tells of its last token only, nothing can be verified.
            run = self.backbone if exact else partial(self.forward, tau=tau, max_depth=max_depth)
            yield from _plain_steps(run, state, first, max_new_tokens - 1, sampling)

    def _continue(self, state: State, ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cut a state back to what it has in common with a prompt; what is left to read, one token at least."""
        if len(ids) != 1 or len(state.ids) != 1:
            raise ConfigError("state", "continues one sequence; a batch starts anew")
        read = state.ids[0]
        shared = min(len(read), ids.shape[1] - 1)
        differing = np.flatnonzero(read[:shared] != ids[0, :shared])
        shared = int(differing[0]) if len(differing) else shared
        if len(read) > shared:
            self.cut(state, [len(read) - shared], [0])
        return ids[:, shared:], mask[:, shared:]


def _plain_steps(
    run: Callable[[np.ndarray, State], tuple[np.ndarray, int | None]],
    state: State,
    first: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
) -> Iterator[Step]:
    chosen = np.array(first, np.int64)
    stopped = np.isin(chosen, list(sampling.stop_tokens))
    for _ in range(max_new_tokens):
        if stopped.all():
            return
        started = time.perf_counter()
        logits, depth = run(chosen[:, None], state)
        chosen = np.array([sampling.choose(row) for row in logits[:, -1]], np.int64)
        made = tuple(() if done else (int(token),) for token, done in zip(chosen, stopped, strict=True))
        yield Step(made, depth, time.perf_counter() - started)
        stopped |= np.isin(chosen, list(sampling.stop_tokens))
