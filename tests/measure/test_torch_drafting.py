"""A river made for drafting in PyTorch: what is tried, what is chosen, and what becomes of the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import river_compile
from river_compile.config import RiverConfig
from river_compile.errors import InputError
from river_compile.exporters.torch import seam
from river_compile.exporters.torch.tuning import Tuned
from river_compile.measure import torch_drafting
from river_compile.runtime.hf_exact import HfPasses
from tests.families import VOCABULARY, random_model
from tests.torch_models import as_it_is

TEXTS = [np.random.default_rng(seed).integers(3, VOCABULARY, 80) for seed in range(2)]


@pytest.fixture(scope="module")
def chosen() -> Iterator[tuple[Any, Any, dict[str, torch.Tensor]]]:
    """The model, the plan, and its weights as they were. Pieces are not compiled: Inductor is slow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seam, "compile_piece", as_it_is)
        patch.setattr(torch_drafting, "NEW_TOKENS", 24)
        model = random_model("llama", 2)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        yield model, river_compile.tune_exact(model, TEXTS, RiverConfig(group_size=64)), before
        torch.compiler.reset()


def test_the_settings_are_those_of_the_fastest(chosen: Any) -> None:
    _, plan, _ = chosen
    assert plan.best.measured == max(point.measured for point in plan.points)
    assert {4.0, 8.0} < {point.bits for point in plan.points}
    assert all(point.head_bits == 8 for point in plan.points)
    assert plan.options["exact"] is True
    assert RiverConfig.from_options(plan.options) == plan.config
    assert plan.config.group_size == 64


def test_every_river_is_measured_and_none_changes_a_token(chosen: Any) -> None:
    _, plan, _ = chosen
    for point in plan.points:
        assert point.differing == 0
        assert point.measured > 0
        assert point.draft_ms > 0
        assert 0 < point.verify_ms[1] <= point.verify_ms[5]
        assert point.acceptance
    closest = max(plan.points, key=lambda point: point.bits)
    coarsest = min(plan.points, key=lambda point: point.bits)
    assert np.mean(closest.acceptance) >= np.mean(coarsest.acceptance)


def test_the_model_stays_as_it_was(chosen: Any) -> None:
    model, plan, before = chosen
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    ids = torch.tensor([[5, 9, 17, 4]])
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    expected = model.generate(ids, **settings)
    compiled: Any = torch.compile(model, backend="river", options=plan.options)
    assert torch.equal(compiled.generate(ids, **settings), expected)


def test_a_weight_is_tuned_once_for_a_number_of_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[tuple[int, int]] = []
    keep = Tuned.keep

    def noted(self: Tuned, parameter: Any, quantizer: str, transposed: bool, weight: Any) -> None:
        kept.append((id(parameter), weight.bits))
        keep(self, parameter, quantizer, transposed, weight)

    monkeypatch.setattr(Tuned, "keep", noted)
    model = random_model("llama", 2)
    configs = [RiverConfig(bits=4), RiverConfig(bits=4, bits_for=(("*.down_proj", 8),))]
    made = [config.quantizer for config in torch_drafting._tuned(model, TEXTS, configs, lambda step, done, total: None)]
    assert made == ["gptq", "gptq"]
    assert len(kept) == len(set(kept)) == 2 * 7 + 2


def test_a_model_in_training_is_refused() -> None:
    with pytest.raises(InputError, match="training mode"):
        river_compile.tune_exact(random_model("llama", 2).train(), TEXTS)


def test_where_nothing_can_be_drafted_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """In 16 bits passes of several rows must round as passes of one do, or all is decoded plainly."""
    monkeypatch.setattr(seam, "compile_piece", as_it_is)
    passes = HfPasses.backbone

    def rounded(self: HfPasses, ids: Any, state: Any, mask: Any = None) -> Any:
        logits, depth = passes(self, ids, state, mask)
        return logits * (1.0 if ids.shape[1] == 1 else 1.01), depth

    monkeypatch.setattr(HfPasses, "backbone", rounded)
    model = random_model("llama", 2).to(torch.bfloat16)
    torch.compiler.reset()
    with pytest.warns(UserWarning, match="decoded plainly"), pytest.raises(InputError, match="nothing is drafted"):
        river_compile.tune_exact(model, TEXTS)


def test_texts_that_are_too_short_are_refused() -> None:
    with pytest.raises(InputError, match="no tuning text has"):
        river_compile.tune_exact(random_model("llama", 2), [np.arange(3, 9)])
