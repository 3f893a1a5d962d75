"""The KV cache of the reference runtime: preallocated, and able to have entries missing."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

__all__ = ["KeysWritten", "LayerCache", "RiverCache"]


class KeysWritten(Exception):
    """Raised out of a layer once its keys and values are in the cache: all that `propagate` wants of it."""


class LayerCache(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values of one decoder layer, [1, heads, entries, width], in the order of their tokens.

    Fields:
        seen: tokens that this layer has dealt with: has an entry for, or leaves out for good.
        absent: positions of those left out.
        entries: rows in use, ``seen - len(absent)``.
        stop_when_written: raise `KeysWritten` as soon as the keys and values of a pass are stored.
    """

    is_sliding = False

    def __init__(self, start: list[int], capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._start = start
        self.capacity = capacity
        self.seen = 0
        self.entries = 0
        self.absent: list[int] = []
        self.stop_when_written = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys = key_states.new_empty(1, key_states.shape[1], self.capacity, key_states.shape[3])
        self.values = value_states.new_empty(1, value_states.shape[1], self.capacity, value_states.shape[3])
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the entries of the next tokens and return all there are."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        count = key_states.shape[2]
        end = self.entries + count
        while end > self.capacity:
            self.keys = torch.cat([self.keys, torch.empty_like(self.keys)], dim=2)
            self.values = torch.cat([self.values, torch.empty_like(self.values)], dim=2)
            self.capacity *= 2
        self.keys[:, :, self.entries : end] = key_states
        self.values[:, :, self.entries : end] = value_states
        self.entries = end
        self.seen += count
        if self.stop_when_written:
            raise KeysWritten
        return self.keys[:, :, :end], self.values[:, :, :end]

    def leave_out(self) -> None:
        """The next token never gets an entry here."""
        self.absent.append(self.seen)
        self.seen += 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._start[0] + query_length, 0

    def get_seq_length(self) -> int:
        return self._start[0]

    def get_max_length(self) -> int:
        return -1


class RiverCache(Cache):
    """One `LayerCache` a decoder layer.

    The model is told that the cache ends where the tokens of this pass begin (`begin_pass`), whatever each layer holds:
    with `recompute` a pass brings tokens along that the first layers have already seen.
    """

    def __init__(self, layers: int, capacity: int) -> None:
        self._start = [0]
        self.slots = [LayerCache(self._start, capacity) for _ in range(layers)]
        super().__init__(layers=list(self.slots))

    def begin_pass(self, first: int) -> None:
        """The next pass is fed the tokens from position ``first`` on."""
        self._start[0] = first
