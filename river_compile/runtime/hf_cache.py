"""Cutting back the KV caches of transformers, whatever their layers are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from river_compile.errors import ConfigError

__all__ = ["back", "cut", "is_static", "mark", "move", "prepare", "room"]

Span = tuple[int, int, int, int]


def prepare(cache: Any, length: int) -> None:
    """Bring a cache into a form that can be cut back: an empty one keeps all tokens in layers with a window, too.

    transformers masks by the window whatever the cache holds; a layer that drops what has left the window could not be
    brought back to where it was.

    Args:
        length: tokens that a cache of fixed length must have room for.

    Raises:
        ConfigError: a layer is of a kind that cannot be cut back, or has dropped tokens already.
    """
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer

    kinds = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)
    layers = getattr(cache, "layers", None)
    if layers is None:
        raise ConfigError("exact", f"a cache of class {type(cache).__name__} cannot be cut back")
    for index, layer in enumerate(layers):
        if type(layer) not in kinds:
            raise ConfigError("exact", f"a cache with layers of class {type(layer).__name__} cannot be cut back")
        if not getattr(layer, "is_sliding", False):
            continue
        if cache.get_seq_length():
            raise ConfigError(
                "exact", "the cache given has layers that drop what has left their window; give an empty one"
            )
        fixed = isinstance(layer, StaticLayer)
        layers[index] = StaticLayer(max(length, *(_room(layer) for layer in layers))) if fixed else DynamicLayer()  # type: ignore[no-untyped-call]
    if getattr(cache, "layer_class_to_replicate", None) is DynamicSlidingWindowLayer:
        cache.layer_class_to_replicate = DynamicLayer


def _room(layer: Any) -> int:
    return int(getattr(layer, "max_cache_len", 0))


def is_static(cache: Any) -> bool:
    """Whether the cache has one length for good, which its tensors show."""
    return any(hasattr(layer, "max_cache_len") for layer in cache.layers)


def room(cache: Any) -> int | None:
    """How many more tokens a cache of fixed length can take; None: any number."""
    if not is_static(cache):
        return None
    return min(_room(layer) for layer in cache.layers) - int(cache.get_seq_length())


def mark(cache: Any) -> Any:
    """What `back` needs."""
    if is_static(cache):
        return int(cache.get_seq_length())
    return [(layer.keys, layer.values) if layer.is_initialized else None for layer in cache.layers]


def back(cache: Any, marked: Any) -> None:
    """Bring a cache back to where `mark` was called."""
    if is_static(cache):
        _crop(cache, int(cache.get_seq_length()) - marked)
        return
    for layer, held in zip(cache.layers, marked, strict=True):
        if held is not None:
            layer.keys, layer.values = held


def _crop(cache: Any, tokens: int) -> None:
    # As the layers' own `crop`, which transformers has from 5.24 on: in place, since the length has a fixed address.
    for layer in cache.layers if tokens else ():
        layer.cumulative_length.sub_(tokens)


def cut(cache: Any, spans: Sequence[Span], length: int) -> None:
    """Bring a cache to what `State.spans` tells; one of fixed length keeps all its sequences.

    Args:
        length: slots that were filled.
    """
    if is_static(cache):
        for layer in cache.layers:
            for tensor in (layer.keys, layer.values) if layer.is_initialized else ():
                move(tensor, spans)
        _, filling, first, last = spans[0]
        _crop(cache, length - (filling + last - first))
        return
    for layer in cache.layers:
        if layer.is_initialized:
            layer.keys, layer.values = (_kept(tensor, spans) for tensor in (layer.keys, layer.values))


def move(tensor: torch.Tensor, spans: Sequence[Span]) -> None:
    """Bring a cache of fixed length, [sequences, heads, slots, head size], to what spans tell, in place."""
    for row, filling, first, last in spans:
        if filling != first:
            tensor[row, :, filling : filling + last - first] = tensor[row, :, first:last].clone()


def _kept(tensor: torch.Tensor, spans: Sequence[Span]) -> torch.Tensor:
    if len(spans) == 1:
        # Nothing is copied: the next pass puts its own entries behind this view.
        row, _, first, last = spans[0]
        return tensor[row : row + 1, :, first:last]
    # What fills up on the left is masked: any finite numbers do.
    rows = [torch.cat([tensor[row, :, :filling], tensor[row, :, first:last]], 1) for row, filling, first, last in spans]
    return torch.stack(rows)
