"""The LM head's twin: who leaves the backbone takes it, and nobody else."""

from __future__ import annotations

import copy

import pytest
import torch

from river_compile.backend import RiverBackend
from river_compile.config import RiverConfig
from river_compile.exporters.torch.linear import Dequantized
from tests.families import random_model
from tests.torch_models import as_it_is, assert_same, play, prompt, rounded, with_river_from

LAYERS = 3


def _judge(model: torch.nn.Module, depth: int, bits: int) -> torch.nn.Module:
    judge = with_river_from(model, depth)
    if depth < LAYERS:
        head = judge.get_output_embeddings()
        # Its weight may be the embedding's, which stays.
        other = copy.deepcopy(head)
        other.weight = torch.nn.Parameter(rounded(head.weight.detach(), bits, 32), requires_grad=False)
        judge.set_output_embeddings(other)
    return judge  # type: ignore[no-any-return]


# gemma2's head is its embedding, and what it says is bent by a tanh.
@pytest.mark.parametrize(
    ("bits", "family", "cache"),
    [
        (4, "llama", "dynamic"),
        pytest.param(8, "llama", "static", marks=pytest.mark.slow),
        pytest.param(8, "gemma2", "dynamic", marks=pytest.mark.slow),
        (4, "gemma2", "static"),
        (8, "gpt2", "dynamic"),
        pytest.param(4, "gpt2", "static", marks=pytest.mark.slow),
    ],
)
def test_a_token_that_exits_takes_the_quantized_head(family: str, cache: str, bits: int) -> None:
    torch.compiler.reset()
    model = random_model(family, LAYERS)
    backend = RiverBackend(
        RiverConfig(tau=2.0, prefill="river", head_bits=bits), lowering=Dequantized(), compiler=as_it_is
    )
    compiled = torch.compile(model, backend=backend)
    ids = prompt(1, 6)
    for depth in (0, 2, LAYERS):
        backend.max_depth = depth
        assert_same(play(model, compiled, ids, 2, cache), play(model, _judge(model, depth, bits), ids, 2, cache))
    assert not backend.stats().fallbacks


def test_it_is_another_head() -> None:
    model = random_model("llama", LAYERS)
    ids = prompt(1, 6)
    with pytest.raises(AssertionError):
        assert_same(
            play(model, _judge(model, 0, 4), ids, 1, "dynamic"),
            play(model, with_river_from(model, 0), ids, 1, "dynamic"),
        )


def test_a_changed_head_is_quantized_anew() -> None:
    torch.compiler.reset()
    model = random_model("llama", LAYERS)
    backend = RiverBackend(RiverConfig(tau=2.0, head_bits=8), lowering=Dequantized(), compiler=as_it_is)
    compiled = torch.compile(model, backend=backend)
    backend.max_depth = 0
    ids = prompt(1, 6)
    before = play(model, compiled, ids, 2, "dynamic")[1:]
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2)
    found = play(model, compiled, ids, 2, "dynamic")[1:]
    assert_same(found, play(model, _judge(model, 0, 8), ids, 2, "dynamic")[1:], 0.3)
    assert not torch.equal(found[0], before[0])
