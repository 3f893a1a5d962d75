"""Prompts to one padded batch, and logits to a token: what every generation loop shares."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from river_compile.errors import ConfigError

__all__ = ["check_sampling", "choose", "pad_left"]


def check_sampling(prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float, top_p: float) -> None:
    if isinstance(prompts, str) or any(isinstance(prompt, (str, int)) for prompt in prompts):
        raise ConfigError("prompts", "must be lists of token ids, one a sequence; a tokenizer makes them of text")
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise ConfigError("prompts", "each needs at least one token")
    if max_new_tokens < 1:
        raise ConfigError("max_new_tokens", f"must be 1 or more, not {max_new_tokens}")
    if not temperature >= 0:
        raise ConfigError("temperature", f"must be 0 (greedy) or more, not {temperature}")
    if not 0 < top_p <= 1:
        raise ConfigError("top_p", f"must lie in (0, 1], not {top_p}")


def pad_left(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    length = max(map(len, prompts))
    ids = np.zeros((len(prompts), length), np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = 1
    return ids, mask


def choose(logits: np.ndarray, temperature: float, top_p: float, sampler: np.random.Generator) -> int:
    """A token by greedy choice, or sampled from the nucleus of mass ``top_p``."""
    if temperature == 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / temperature
    order = np.argsort(-scaled)
    probabilities = np.exp(scaled[order] - scaled[order[0]])
    probabilities /= probabilities.sum()
    kept = int(np.searchsorted(np.cumsum(probabilities), top_p)) + 1
    probabilities = probabilities[:kept] / probabilities[:kept].sum()
    return int(order[sampler.choice(len(probabilities), p=probabilities)])
