"""Products of one bfloat16 row: where they are rewritten, and that they stay the same product."""

from __future__ import annotations

import pytest
import torch

from river_compile.backend import RiverBackend
from river_compile.config import RiverConfig
from river_compile.exporters.torch.single_row import lower_single_rows, single_row_product
from river_compile.passes.fx.find_layers import find_layers
from river_compile.passes.fx.grow_river import River
from river_compile.passes.fx.pieces import signature
from river_compile.passes.fx.share_kv import share_kv
from tests.families import random_model
from tests.torch_models import as_it_is, capture, play, prompt


@pytest.mark.parametrize("bias", [False, True])
def test_it_is_the_product_accumulated_in_float32(bias: bool) -> None:
    torch.manual_seed(0)
    activation, weight = torch.randn(1, 1, 512).bfloat16(), torch.randn(96, 512).bfloat16()
    addend = torch.randn(96).bfloat16() if bias else None
    exact = torch.nn.functional.linear(
        activation.double(), weight.double(), None if addend is None else addend.double()
    )
    found = single_row_product(activation, weight, addend)
    assert found.dtype == torch.bfloat16
    assert found.shape == exact.shape
    # Half a unit in the last of bfloat16's eight places, and float32's own error.
    assert ((found.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-4).all()


def test_other_types_and_several_rows_stay() -> None:
    *_, decode = capture("llama", "static")
    plan = share_kv(decode, find_layers(decode), River())
    parameters = [node.name for node in decode.placeholders]
    for piece in plan.pieces:
        before = signature(piece)
        assert lower_single_rows(piece, parameters) == 0
        assert signature(piece) == before


@pytest.mark.parametrize(
    ("family", "cache"), [("llama", "static"), ("qwen2", "dynamic"), ("gpt_neox", "static"), ("gemma2", "dynamic")]
)
def test_a_bfloat16_model_says_what_it_said(family: str, cache: str) -> None:
    """One sequence decodes through the rewritten products, with and without an exit."""
    model = random_model(family, 3).to(torch.bfloat16)
    exact = random_model(family, 3)
    ids = prompt(1, 5)
    expected = play(exact, exact, ids, 4, cache)
    plain = play(model, model, ids, 4, cache)
    torch.compiler.reset()
    backend = RiverBackend(RiverConfig(tau=2.0), compiler=as_it_is)
    found = play(model, torch.compile(model, backend=backend), ids, 4, cache)
    assert not backend.stats().fallbacks
    error = max(float((ours - theirs).abs().max()) for ours, theirs in zip(found, expected, strict=True))
    usual = max(float((ours - theirs).abs().max()) for ours, theirs in zip(plain, expected, strict=True))
    assert error <= 2 * usual
    assert backend.stats().mean_exit_depth == 3


def test_the_products_of_a_decode_graph_are_rewritten(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    def counting(piece: object, weights: object) -> int:
        counts.append(lower_single_rows(piece, weights))  # type: ignore[arg-type]
        return counts[-1]

    monkeypatch.setattr("river_compile.backend.lower_single_rows", counting)
    torch.compiler.reset()
    model = random_model("llama", 2).to(torch.bfloat16)
    play(model, torch.compile(model, backend=RiverBackend(compiler=as_it_is)), prompt(1, 5), 2, "static")
    # Seven in a layer, and the LM head; the river's own products are quantized already.
    assert sum(counts) == 2 * 7 + 1
