"""Exact decoding as a row of a benchmark in PyTorch: seconds for each token, and whether the tokens are right."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from river_compile.backend import RiverBackend
from river_compile.config import NEVER, RiverConfig
from river_compile.measure.bench_rows import ExactTokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ExactBench"]


class ExactBench:
    """Greedy ``generate`` with and without drafts, on a cache that grows.

    Args:
        backend: of the river; the one that drafts is like it.
        tokens: the prompt, int64 [batch, length].
        new_tokens: to write in a round.
    """

    def __init__(self, model: PreTrainedModel, backend: RiverBackend, tokens: torch.Tensor, new_tokens: int) -> None:
        self._tokens, self._new = tokens, new_tokens
        plain = replace(backend.config, tau=NEVER, max_depth=None, exact=False)
        drafts = replace(backend.config, tau=RiverConfig.tau, max_depth=None, exact=True)
        self._drafts = RiverBackend(drafts, store=backend.store)
        self._exact: Any = torch.compile(model, backend=self._drafts)
        self._expected = self._generate(
            torch.compile(model, backend=RiverBackend(plain, store=backend.store)), new_tokens
        )
        self._made: list[torch.Tensor] = []
        self.seconds: list[float] = []

    def measure(self, keep: bool) -> None:
        """One round: what the tokens take that come after the prompt's own."""
        times = []
        for count in (1, self._new):
            started = time.perf_counter()
            made = self._generate(self._exact, count)
            times.append(time.perf_counter() - started)
        if keep:
            self.seconds.append((times[1] - times[0]) / (self._new - 1))
            self._made.append(made)

    def tokens(self) -> ExactTokens:
        differing = sum(int((made != self._expected).sum()) for made in self._made)
        written = sum(made.numel() for made in self._made)
        acceptance = self._drafts.stats().acceptance
        return ExactTokens(written, differing, None if math.isnan(acceptance) else acceptance)

    def _generate(self, model: Any, count: int) -> torch.Tensor:
        settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
        made = model.generate(self._tokens, attention_mask=torch.ones_like(self._tokens), **settings)
        return torch.as_tensor(made[:, self._tokens.shape[1] :])
