"""A layer of transformers' KV cache that grows without being copied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from river_compile.exporters.torch import seam

__all__ = ["ReservedLayer", "span_of"]

# Code is compiled anew for another number of slots, and on a CPU those that are never written cost nothing.
_LEAST = 2048
_LEAST_ELSEWHERE = 256


class ReservedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A `DynamicLayer` whose keys and values are the first slots of larger tensors.

    A pass writes its entries behind those there are, where the layers of transformers copy all of them; to cut entries
    off is to count less. The tensors' strides never change, so compiled code that takes one length takes all.

    Fields:
        held: keys and values, [sequences, heads, capacity, head size] each.
        span: how many slots are filled, as the length of a tensor [slots, 0]: a compiler takes that for a size. One
            object for all layers of a cache, so that it is one size.
    """

    held: tuple[torch.Tensor, torch.Tensor]
    span: torch.Tensor

    @classmethod
    def of(cls, layer: DynamicLayer, capacity: int, span: torch.Tensor) -> ReservedLayer:
        """A layer with what another one holds, and room for so many tokens or more."""
        assert layer.keys is not None and layer.values is not None
        made = cls.__new__(cls)
        made.__dict__ |= {name: value for name, value in vars(layer).items() if name not in ("keys", "values")}
        least = _LEAST if layer.keys.device.type == "cpu" else _LEAST_ELSEWHERE
        slots = max(least, 1 << (capacity - 1).bit_length())
        made.held = (_reserved(layer.keys, slots), _reserved(layer.values, slots))
        made.span = span
        return made

    @property
    def capacity(self) -> int:
        return int(self.held[0].shape[-2])

    def plain(self) -> DynamicLayer:
        """A layer as transformers has it, with views of what this one holds."""
        made = DynamicLayer.__new__(DynamicLayer)
        made.__dict__ |= {name: value for name, value in vars(self).items() if name not in ("held", "span")}
        made.keys, made.values = (tensor[:, :, : len(self.span)] for tensor in self.held)
        return made

    def get_seq_length(self) -> int:
        return self.span.shape[0]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *arguments: Any, **settings: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        before = self.span.shape[0]
        after = before + key_states.shape[-2]
        keys, values = self.held
        keys[:, :, before:after] = key_states
        values[:, :, before:after] = value_states
        self.span = self.span.new_empty((after, 0))
        return keys[:, :, :after], values[:, :, :after]

    def keep(self, rows: Sequence[int]) -> None:
        """Drop the sequences that are not named."""
        if list(rows) != list(range(self.held[0].shape[0])):
            self.held = tuple(tensor[list(rows)] for tensor in self.held)  # type: ignore[assignment]


def span_of(length: int) -> torch.Tensor:
    """A span that compilers take for one of any length."""
    return seam.of_any_length(torch.empty(length, 0))


def _reserved(tensor: torch.Tensor, slots: int) -> torch.Tensor:
    made = tensor.new_empty((*tensor.shape[:2], slots, tensor.shape[3]))
    made[:, :, : tensor.shape[2]] = tensor
    return made
