"""KV caches of transformers in exact decoding: whatever is read, taken back and cut, they hold what they should."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, LlamaConfig, StaticCache

from river_compile.runtime import hf_cache
from river_compile.runtime.hf_layer import ReservedLayer

LAYERS, HEADS, SIZE, ROOM = 2, 2, 3, 64
CONFIG = LlamaConfig(
    num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=HEADS, hidden_size=HEADS * SIZE
)


def entries(sequences: int, tokens: int, layer: int, first: int) -> torch.Tensor:
    """Different numbers for every entry that is ever read: [sequences, heads, tokens, size]."""
    count = sequences * HEADS * tokens * SIZE
    return (torch.arange(count, dtype=torch.float64) + 1000 * layer + 10 * first).reshape(
        sequences, HEADS, tokens, SIZE
    )


def read(cache: Any, sequences: int, tokens: int, number: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    found = []
    for layer in range(LAYERS):
        new = entries(sequences, tokens, layer, 31 * number)
        found.append(cache.update(new, -new, layer))
    return found


@settings(deadline=None)
@given(
    sequences=st.integers(1, 3),
    rounds=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 4), st.integers(0, 2)), max_size=6),
    data=st.data(),
)
def test_it_holds_what_was_read_and_not_taken_back(
    sequences: int, rounds: list[tuple[int, int, int]], data: st.DataObject
) -> None:
    """Against lists of entries: reads, drafts that are taken back, and sequences that forget different numbers."""
    cache = DynamicCache(config=CONFIG)
    hf_cache.prepare(cache, ROOM)
    expected: list[list[torch.Tensor]] = [[] for _ in range(sequences)]

    def note(tokens: int, number: int) -> None:
        for row in range(len(expected)):
            new = entries(len(expected), tokens, 0, 31 * number)[row]
            expected[row] += [new[:, token] for token in range(tokens)]

    with hf_cache.restored(cache):
        read(cache, sequences, 4, 0)
        note(4, 0)
        hf_cache.reserve(cache, ROOM)
        for number, (tokens, drafts, most) in enumerate(rounds, 1):
            marked = hf_cache.mark(cache)
            for draft in range(drafts):
                read(cache, len(expected), 1, 100 * number + draft)
                hf_cache.settle(cache)
            hf_cache.back(cache, marked)
            read(cache, len(expected), tokens, number)
            hf_cache.settle(cache)
            note(tokens, number)
            kept = sorted(data.draw(st.sets(st.integers(0, len(expected) - 1), min_size=1)))
            forget = [data.draw(st.integers(0, min(most, tokens))) for _ in kept]
            width = len(expected[0])
            length = width - min(forget)
            spans = [(row, length - (width - gone), 0, width - gone) for row, gone in zip(kept, forget, strict=True)]
            hf_cache.cut(cache, spans, width)
            padding = [torch.full((HEADS, SIZE), torch.nan)] * most
            expected = [[*padding[:filling], *expected[row][first:last]] for row, filling, first, last in spans]
    for layer in range(LAYERS):
        held = cache.layers[layer]
        assert not isinstance(held, ReservedLayer)
        assert held.keys.shape[:3] == (len(expected), HEADS, len(expected[0]))
        for row, tokens in enumerate(expected):
            wanted = torch.stack(tokens, 1)
            real = ~torch.isnan(wanted)
            assert torch.equal(held.keys[row][real], (wanted + 1000 * layer)[real])
            assert torch.equal(held.values[row][real], -(wanted + 1000 * layer)[real])


def test_nothing_is_copied_but_what_is_new() -> None:
    cache = DynamicCache(config=CONFIG)
    hf_cache.prepare(cache, ROOM)
    with hf_cache.restored(cache):
        read(cache, 1, 4, 0)
        hf_cache.reserve(cache, ROOM)
        addresses = [layer.held[0].data_ptr() for layer in cache.layers]
        for number in range(1, 9):
            keys, _ = read(cache, 1, 2, number)[0]
            assert keys.data_ptr() == addresses[0]
            hf_cache.settle(cache)
            hf_cache.cut(cache, [(0, 0, 0, 4 + number)], 4 + number + 1)
        assert cache.get_seq_length() == 12
    assert [layer.keys.data_ptr() for layer in cache.layers] == addresses


def test_afterwards_it_is_a_cache_as_transformers_has_it() -> None:
    cache = DynamicCache(config=CONFIG)
    hf_cache.prepare(cache, ROOM)
    kinds = [type(layer) for layer in cache.layers]
    with pytest.raises(RuntimeError, match="broken off"), hf_cache.restored(cache):
        read(cache, 2, 4, 0)
        hf_cache.reserve(cache, ROOM)
        read(cache, 2, 1, 1)
        raise RuntimeError("broken off")
    assert [type(layer) for layer in cache.layers] == kinds
    cache.crop(-2)
    cache.reorder_cache(torch.tensor([1, 0]))
    read(cache, 2, 1, 2)
    assert cache.get_seq_length() == 4


def test_it_has_room_for_what_was_asked() -> None:
    cache = DynamicCache(config=CONFIG)
    assert hf_cache.room(cache) is None
    read(cache, 1, 4, 0)
    hf_cache.reserve(cache, 4996)
    assert hf_cache.room(cache) == 8192 - 4
    long = DynamicCache(config=CONFIG)
    read(long, 1, 3000, 0)
    hf_cache.reserve(long, 10)
    assert hf_cache.room(long) >= 10
    fixed = StaticCache(config=CONFIG, max_cache_len=16)
    read(fixed, 1, 4, 0)
    assert hf_cache.room(fixed) == 12
    assert np.all([layer.keys.shape[-2] == 16 for layer in fixed.layers])
