"""What `find_layers` finds, in the words that both graph kinds share."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Anatomy", "CacheSlot", "Layer"]


@dataclass(frozen=True)
class CacheSlot:
    """One tensor of the KV cache of one decoder layer: the name it is read by and the name it is written by."""

    past: str
    present: str


@dataclass(frozen=True)
class Layer:
    """One decoder layer.

    Fields:
        index: place in the stack, from 0.
        hidden_in, hidden_out: names of the hidden state before and after the layer, [batch, sequence, width].
        nodes: names of the layer's nodes, in execution order.
        caches: the KV cache slots that it reads and writes.
        side_inputs: names of everything else that it reads and that is neither weight nor constant: mask, cos, sin.
        side_outputs: names of what others read of it besides hidden state and cache.
        weights: names of the constants that it reads.
        kind: layers of one kind have the same structure and the same weight shapes.
    """

    index: int
    hidden_in: str
    hidden_out: str
    nodes: tuple[str, ...]
    caches: tuple[CacheSlot, ...]
    side_inputs: tuple[str, ...]
    side_outputs: tuple[str, ...]
    weights: tuple[str, ...]
    kind: int

    @property
    def outputs(self) -> tuple[str, ...]:
        """All that the layer hands on: hidden state, cache, side outputs."""
        return (self.hidden_out, *(slot.present for slot in self.caches), *self.side_outputs)


@dataclass(frozen=True)
class Anatomy:
    """The decoder's anatomy: its layers in order, and how they were found: "metadata", "names" or "structure"."""

    layers: tuple[Layer, ...]
    found_by: str
