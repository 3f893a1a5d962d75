"""Cutting back the KV caches of transformers, whatever their layers are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from river_compile.errors import ConfigError

__all__ = ["back", "cut", "is_static", "mark", "move", "prepare", "reserve", "restored", "room", "settle", "windows"]

Span = tuple[int, int, int, int]


def prepare(cache: Any, length: int) -> None:
    """Bring a cache into a form that can be cut back: an empty one keeps all tokens in layers with a window, too.

    A layer that drops what has left the window could not be brought back to where it was. Where it holds all tokens,
    the model has to mask by the window itself (`masks_by_window`).

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
        if _holds_nothing(layer):
            continue
        if type(layer) not in kinds:
            raise ConfigError("exact", f"a cache with layers of class {type(layer).__name__} cannot be cut back")
        if not getattr(layer, "is_sliding", False):
            continue
        if cache.get_seq_length():
            raise ConfigError(
                "exact", "the cache given has layers that drop what has left their window; give an empty one"
            )
        fixed = isinstance(layer, StaticLayer)
        layers[index] = StaticLayer(max(length, *map(_room, layers))) if fixed else DynamicLayer()  # type: ignore[no-untyped-call]
    if getattr(cache, "layer_class_to_replicate", None) is DynamicSlidingWindowLayer:
        cache.layer_class_to_replicate = DynamicLayer


def _holds_nothing(layer: Any) -> bool:
    """Whether it stands for a decoder layer that keeps no keys and values, or reads those of another."""
    return bool(getattr(layer, "is_initialized", False)) and layer.keys is None


def _holding(cache: Any) -> list[Any]:
    return [layer for layer in cache.layers if not _holds_nothing(layer)]


def windows(cache: Any, length: int) -> list[int | None]:
    """Of each layer, the tokens that its window has; None where none is ever left within so many tokens."""
    found = []
    for layer in getattr(cache, "layers", ()):
        window = int(getattr(layer, "sliding_window", 0) or getattr(layer, "max_cache_len", length))
        found.append(window if getattr(layer, "is_sliding", False) and window < length else None)
    return found


def reserve(cache: Any, more: int) -> None:
    """Give the growing layers of a cache that has read the prompts room for so many tokens more, once and for all."""
    from transformers.cache_utils import DynamicLayer

    from river_compile.runtime.hf_layer import ReservedLayer, span_of

    growing = [
        index for index, layer in enumerate(cache.layers) if type(layer) is DynamicLayer and layer.is_initialized
    ]
    if growing:
        length = cache.layers[growing[0]].keys.shape[-2]
        span = span_of(length)
        for index in growing:
            cache.layers[index] = ReservedLayer.of(cache.layers[index], length + more, span)


@contextmanager
def restored(cache: Any) -> Iterator[None]:
    """Give a cache, after what is done within, the layers back that transformers knows, with all that they hold."""
    try:
        yield
    finally:
        for index, layer in enumerate(cache.layers):
            if hasattr(layer, "held"):
                cache.layers[index] = layer.plain()


def settle(cache: Any) -> None:
    """After a pass: all layers are as long as the first of them, and a compiler is to see one length."""
    _fill(cache, int(cache.get_seq_length()))


def _fill(cache: Any, length: int) -> None:
    """Let the reserved layers of a cache be so long."""
    reserved = _reserved(cache)
    if reserved:
        from river_compile.runtime.hf_layer import span_of

        span = span_of(length)
        for layer in reserved:
            layer.span = span


def _reserved(cache: Any) -> list[Any]:
    return [layer for layer in cache.layers if hasattr(layer, "held")]


def _room(layer: Any) -> int:
    return int(getattr(layer, "max_cache_len", 0))


def is_static(cache: Any) -> bool:
    """Whether the cache has one length for good, which its tensors show."""
    return any(hasattr(layer, "max_cache_len") for layer in cache.layers)


def room(cache: Any) -> int | None:
    """How many more tokens a cache can take without being copied; None: any number."""
    if is_static(cache):
        return min(map(_room, _holding(cache))) - int(cache.get_seq_length())
    return min((layer.capacity - len(layer.span) for layer in _reserved(cache)), default=None)


def mark(cache: Any) -> int:
    """What `back` needs."""
    return int(cache.get_seq_length())


def back(cache: Any, marked: int) -> None:
    """Bring a cache back to where `mark` was called."""
    if is_static(cache):
        _crop(cache, int(cache.get_seq_length()) - marked)
    else:
        _fill(cache, marked)


def _crop(cache: Any, tokens: int) -> None:
    # As the layers' own `crop`, which transformers has from 5.24 on: in place, since the length has a fixed address.
    for layer in _holding(cache) if tokens else ():
        layer.cumulative_length.sub_(tokens)


def cut(cache: Any, spans: Sequence[Span], length: int) -> None:
    """Bring a cache to what `State.spans` tells; one of fixed length keeps all its sequences.

    Args:
        length: slots that were filled.
    """
    if is_static(cache):
        for layer in _holding(cache):
            for tensor in (layer.keys, layer.values) if layer.is_initialized else ():
                move(tensor, spans)
        _, filling, first, last = spans[0]
        _crop(cache, length - (filling + last - first))
        return
    for layer in _reserved(cache):
        layer.keep([row for row, *_ in spans])
        for tensor in layer.held:
            move(tensor, [(place, *span[1:]) for place, span in enumerate(spans)])
    _, filling, first, last = spans[0]
    _fill(cache, filling + last - first)


def move(tensor: torch.Tensor, spans: Sequence[Span]) -> None:
    """Bring a cache of fixed length, [sequences, heads, slots, head size], to what spans tell, in place."""
    for row, filling, first, last in spans:
        if filling != first:
            tensor[row, :, filling : filling + last - first] = tensor[row, :, first:last].clone()
