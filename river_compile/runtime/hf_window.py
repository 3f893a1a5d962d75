"""Whether a model of transformers masks by the windows of its layers, or leaves that to the cache."""

from __future__ import annotations

import weakref
from collections.abc import MutableMapping, Sequence
from typing import Any

import torch

__all__ = ["masks_by_window"]

_known: MutableMapping[torch.nn.Module, bool] = weakref.WeakKeyDictionary()


def masks_by_window(model: torch.nn.Module, cache_name: str, windows: Sequence[int | None]) -> bool:
    """Whether a token sees nothing that has left a layer's window, where the cache still holds it.

    Two passes of one token tell, the second with other keys and values in the slot that the windows have just left. The
    cache holds as many slots as the longest window, and one more. What is found is remembered with the model.

    Args:
        model: runs uncompiled.
        cache_name: its argument that takes the cache.
        windows: of each layer of the cache, in tokens; None of a layer without.
    """
    if model not in _known:
        _known[model] = _same_without(model, cache_name, windows)
    return _known[model]


@torch.no_grad()
def _same_without(model: Any, cache_name: str, windows: Sequence[int | None]) -> bool:
    from transformers import DynamicCache

    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    first: Any = DynamicCache()  # type: ignore[no-untyped-call]
    model.forward(token, **{cache_name: first}, use_cache=True)
    length = max(window for window in windows if window is not None)
    found = []
    for outside in (0.0, 1.0):
        cache = DynamicCache()  # type: ignore[no-untyped-call]
        for index, layer in enumerate(first.layers):
            held, values = (
                torch.cat([one, one.new_zeros(*one.shape[:2], length, one.shape[3])], 2)
                for one in (layer.keys, layer.values)
            )
            if (window := windows[index]) is not None:
                held[:, :, : length + 1 - window] *= outside
            cache.update(held, values, index)
        found.append(model.forward(token, **{cache_name: cache}, use_cache=True).logits)
    return bool(torch.equal(*found))
