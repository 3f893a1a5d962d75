"""Attention of few rows: a row comes out as in a pass of its own, to the last bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from river_compile.exporters.torch.attention import attend_by_row
from river_compile.exporters.torch.forms import MOST


def _operands(rows: int, keys: int, dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn((1, heads, length, 32), generator=generator).to(dtype)
        for heads, length in ((6, rows), (2, keys), (2, keys))
    )
    mask = torch.ones((1, 1, rows, keys), dtype=torch.bool).tril(keys - rows)
    return query, key, value, mask


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(2, MOST),
    past=st.integers(0, 70),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    as_bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_a_row_is_the_same_as_alone(rows: int, past: int, dtype: torch.dtype, as_bias: bool, seed: int) -> None:
    query, key, value, mask = _operands(rows, past + rows, dtype, seed)
    given_mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min) if as_bias else mask
    found = attend_by_row(query, key, value, given_mask, 0.2, True, True)
    for row in range(rows):
        end = past + row + 1
        alone = functional.scaled_dot_product_attention(
            query[:, :, row : row + 1], key[:, :, :end], value[:, :, :end], scale=0.2, enable_gqa=True
        )
        assert torch.equal(found[:, :, row : row + 1], alone)


@pytest.mark.parametrize("rows", [1, 3, MOST + 1])
@pytest.mark.parametrize("grows", [False, True])
def test_it_is_the_attention_that_it_replaces(rows: int, grows: bool) -> None:
    query, key, value, mask = _operands(rows, 40, torch.bfloat16, 0)
    # The first two keys are padding.
    mask = mask & (torch.arange(40) >= 2)
    expected = functional.scaled_dot_product_attention(
        query.float(), key.float(), value.float(), mask, scale=0.2, enable_gqa=True
    )
    found = attend_by_row(query, key, value, mask, 0.2, True, grows)
    torch.testing.assert_close(found.float(), expected, atol=2e-2, rtol=2e-2)


def test_rows_that_see_those_behind_them_keep_all_keys() -> None:
    query, key, value, mask = _operands(4, 12, torch.bfloat16, 1)
    seen = torch.ones_like(mask)
    expected = functional.scaled_dot_product_attention(query, key, value, seen, scale=0.2, enable_gqa=True)
    found = attend_by_row(query, key, value, seen, 0.2, True, True)
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)
    assert not torch.equal(found, attend_by_row(query, key, value, mask, 0.2, True, True))
