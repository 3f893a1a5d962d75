"""What becomes of the K and V of the layers that a token skips: one class a KV policy.

A policy never decides whether a token exits (`monotone` bounds how late it may); it is asked at every layer, before the
layer runs and instead of a layer that the token skips. All of them run the same layers from the same list.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from river_compile.reference.cache import KeysWritten, LayerCache

__all__ = ["POLICIES", "Call", "LayerParts", "Mask", "Monotone", "Policy", "Propagate", "Recompute", "Share"]

Call = dict[str, Any]

_BY_KEY = ("attention_mask", "alibi", "position_bias")
_BY_ROW = ("position_embeddings", "position_ids", "cache_position")


@dataclass(frozen=True)
class LayerParts:
    """A decoder layer in its three forms, which share all weights that they can.

    Fields:
        backbone: the model's own layer.
        river: its 4-bit twin; None where the config keeps the backbone.
        keys_only: the layer without the products that its keys and values do not depend on.
        wraps: whether the layer returns a tuple with the hidden state first.
    """

    backbone: nn.Module
    river: nn.Module | None
    keys_only: nn.Module
    wraps: bool

    def run(self, module: nn.Module, hidden: torch.Tensor, call: Call) -> torch.Tensor:
        """The hidden state after the layer in one of its forms, [1, rows, width]."""
        result = module(hidden, **call)
        return result[0] if self.wraps else result  # type: ignore[no-any-return]


class Policy(Protocol):
    """One KV policy, with what it remembers of the sequence that it was made for."""

    name: str

    def first_token(self, slots: list[LayerCache]) -> int:
        """The first position to feed in the pass that follows: the new token's, or earlier."""
        ...

    def latest_exit(self, layers: int) -> int:
        """The depth at which the new token has to exit."""
        ...

    def enter(self, slot: LayerCache, hidden: torch.Tensor, call: Call, end: int) -> tuple[torch.Tensor, Call]:
        """What to run the backbone layer on, given what the layer before hands on, in a pass up to position ``end``."""
        ...

    def skip(self, parts: LayerParts, slot: LayerCache, hidden: torch.Tensor, call: Call) -> torch.Tensor:
        """Deal with a layer that the token, having exited, does not run; returns the hidden state to hand on."""
        ...

    def exited(self, hidden: torch.Tensor, depth: int, position: int) -> None:
        """A pass has left the backbone at this depth (all layers count as one) with this hidden state."""
        ...


class _Plain:
    """One token a pass, nothing remembered."""

    def first_token(self, slots: list[LayerCache]) -> int:
        return slots[0].seen

    def latest_exit(self, layers: int) -> int:
        return layers

    def enter(self, slot: LayerCache, hidden: torch.Tensor, call: Call, end: int) -> tuple[torch.Tensor, Call]:
        return hidden, call

    def exited(self, hidden: torch.Tensor, depth: int, position: int) -> None:
        pass


class Share(_Plain):
    """River-LLM: the token flows on through the river, which writes where the backbone would have."""

    name = "share"

    def skip(self, parts: LayerParts, slot: LayerCache, hidden: torch.Tensor, call: Call) -> torch.Tensor:
        return parts.run(parts.river or parts.backbone, hidden, call)


class Propagate(_Plain):
    """CALM: each skipped layer's K and V are projected from the exit hidden state."""

    name = "propagate"

    def skip(self, parts: LayerParts, slot: LayerCache, hidden: torch.Tensor, call: Call) -> torch.Tensor:
        slot.stop_when_written = True
        try:
            parts.keys_only(hidden, **call)
        except KeysWritten:
            pass
        finally:
            slot.stop_when_written = False
        return hidden


class Mask(_Plain):
    """D-LLM: skipped layers have no entry for the token, and later tokens do not see it there."""

    name = "mask"

    def enter(self, slot: LayerCache, hidden: torch.Tensor, call: Call, end: int) -> tuple[torch.Tensor, Call]:
        if not slot.absent:
            return hidden, call
        changed = {}
        for name in _BY_KEY:
            over_keys = call.get(name)
            if isinstance(over_keys, torch.Tensor):
                left = torch.ones(over_keys.shape[-1], dtype=torch.bool)
                left[slot.absent] = False
                changed[name] = over_keys[..., left]
        return hidden, call | changed

    def skip(self, parts: LayerParts, slot: LayerCache, hidden: torch.Tensor, call: Call) -> torch.Tensor:
        slot.leave_out()
        return hidden


class Monotone(_Plain):
    """SkipDecode: no token exits later than one before it did, so nothing that it looks for is ever missing."""

    name = "monotone"

    def __init__(self) -> None:
        self._cap: int | None = None

    def latest_exit(self, layers: int) -> int:
        return layers if self._cap is None else self._cap

    def skip(self, parts: LayerParts, slot: LayerCache, hidden: torch.Tensor, call: Call) -> torch.Tensor:
        slot.leave_out()
        return hidden

    def exited(self, hidden: torch.Tensor, depth: int, position: int) -> None:
        self._cap = depth if self._cap is None else min(self._cap, depth)


class Recompute(_Plain):
    """EE-LLM: an exited token waits with its hidden state; the next token that goes deeper takes it along.

    Tokens wait in the order of their positions and ever shallower, so the ones that a layer has not seen are always the
    last ones: they run through it as one block with the new token, in one pass over its weights.
    """

    name = "recompute"

    def __init__(self) -> None:
        self._waiting: torch.Tensor | None = None
        self._plain_mask: tuple[int, bool] = (0, False)

    def first_token(self, slots: list[LayerCache]) -> int:
        return slots[-1].seen

    def enter(self, slot: LayerCache, hidden: torch.Tensor, call: Call, end: int) -> tuple[torch.Tensor, Call]:
        rows = end - slot.seen
        given = hidden.shape[1]
        if rows < given:
            hidden = hidden[:, given - rows :]
        elif rows > given:
            assert self._waiting is not None
            hidden = torch.cat([self._waiting[:, slot.seen : end - given], hidden], dim=1)
        return hidden, self._last_rows(call, rows)

    def _last_rows(self, call: Call, rows: int) -> Call:
        changed: Call = {name: _rows_of(call[name], rows) for name in _BY_ROW if call.get(name) is not None}
        mask = call.get("attention_mask")
        if isinstance(mask, torch.Tensor):
            changed["attention_mask"] = None if rows == 1 and self._sees_all(mask) else mask[..., -rows:, :]
        return call | changed

    def _sees_all(self, mask: torch.Tensor) -> bool:
        """Whether the last token sees every entry, so that it needs no mask; looked up once a pass."""
        if self._plain_mask[0] != id(mask):
            last = mask[..., -1, :]
            self._plain_mask = id(mask), bool(last.all() if last.dtype == torch.bool else (last == 0).all())
        return self._plain_mask[1]

    def skip(self, parts: LayerParts, slot: LayerCache, hidden: torch.Tensor, call: Call) -> torch.Tensor:
        return hidden

    def exited(self, hidden: torch.Tensor, depth: int, position: int) -> None:
        end = position + 1
        if self._waiting is None or self._waiting.shape[1] < end:
            grown = hidden.new_empty(1, max(2 * end, 256), hidden.shape[2])
            if self._waiting is not None:
                grown[:, : self._waiting.shape[1]] = self._waiting
            self._waiting = grown
        self._waiting[:, end - hidden.shape[1] : end] = hidden
        self._plain_mask = 0, False


def _rows_of(value: Any, rows: int) -> Any:
    """The last rows of a side input that has one a token: [1, tokens, ...] or [tokens], or a tuple of such."""
    if isinstance(value, tuple):
        return tuple(_rows_of(item, rows) for item in value)
    return value[:, -rows:] if value.dim() > 1 else value[-rows:]


POLICIES: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (Share, Propagate, Mask, Recompute, Monotone)  # type: ignore[type-abstract]
}
