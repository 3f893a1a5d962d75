"""A model's settings and counts are its own, however it was compiled, and whichever graph serves it."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import river_compile
from river_compile import RiverBackend, RiverConfig
from river_compile.errors import InputError
from river_compile.exporters.torch import seam
from river_compile.exporters.torch.linear import Dequantized
from tests.families import random_model
from tests.torch_models import as_it_is, play, prompt

OPTIONS: dict[str, Any] = {"tau": 2.0}
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


@pytest.fixture(autouse=True)
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    monkeypatch.setattr(seam, "compile_piece", as_it_is)
    monkeypatch.setattr(seam, "compile_whole", as_it_is)


def wrapped(model: Any) -> Any:
    return torch.compile(model, backend="river", options=OPTIONS)


def in_place(model: Any) -> Any:
    model.compile(backend="river", options=OPTIONS)
    return model


def by_its_method(model: Any) -> Any:
    model.forward = torch.compile(model.forward, backend="river", options=OPTIONS)
    return model


def by_a_copy_of_the_method(model: Any) -> Any:
    """torch.compile(model.forward), called by the user; the model itself is not changed."""
    forward = torch.compile(model.forward, backend="river", options=OPTIONS)
    model.__dict__["generate"] = lambda ids, **_: play(model, forward, ids, 3, "dynamic")
    return model


WAYS = [wrapped, in_place, by_its_method, by_a_copy_of_the_method]


def depths(model: Any) -> dict[int, int]:
    return dict(river_compile.stats(model).decode_depths)


def generate(model: Any) -> Any:
    return model.generate(prompt(1, 5), **GREEDY)


@pytest.mark.parametrize("way", WAYS)
def test_two_models_of_one_form_share_nothing(way: Any) -> None:
    one, two = way(random_model("llama", 2)), way(random_model("llama", 2, seed=5))
    for model in (one, two):
        generate(model)
    assert depths(one) == depths(two) == {2: 3}
    river_compile.set_max_depth(one, 0)
    river_compile.reset_stats(two)
    for model in (one, two, one):
        generate(model)
    assert depths(one) == {0: 6, 2: 3}
    assert depths(two) == {2: 3}
    first, second = river_compile.stats(one), river_compile.stats(two)
    assert first.layers == second.layers == second.river_layers == 2
    assert 0 < first.river_bytes == second.river_bytes
    assert first.backbone_bytes == second.backbone_bytes
    assert first.artifacts >= second.artifacts > 0


@pytest.mark.parametrize("way", WAYS)
def test_settings_stay_when_all_weights_are_exchanged(way: Any) -> None:
    model = way(random_model("llama", 2))
    generate(model)
    river_compile.set_tau(model, -1.0)
    new = copy.deepcopy(random_model("llama", 2, seed=5).state_dict())
    getattr(model, "_orig_mod", model).load_state_dict(new, assign=True)
    river_compile.set_max_depth(model, 0)
    generate(model)
    assert depths(model) == {0: 3, 2: 3}
    river_compile.set_max_depth(model, None)
    generate(model)
    assert depths(model) == {0: 3, 1: 3, 2: 3}
    assert river_compile.stats(model).backbone_bytes == sum(weight.nbytes for weight in model.parameters())


@pytest.mark.parametrize("backend", ["river", RiverBackend(RiverConfig(tau=2.0), lowering=Dequantized())])
def test_a_copy_has_settings_of_its_own(backend: Any) -> None:
    if isinstance(backend, RiverBackend):
        backend = RiverBackend(RiverConfig(tau=2.0), lowering=Dequantized(), compiler=as_it_is)
    options = {"options": OPTIONS} if backend == "river" else {}
    model = torch.compile(random_model("llama", 2), backend=backend, **options)
    generate(model)
    other = copy.deepcopy(model)
    generate(other)
    river_compile.set_max_depth(other, 0)
    generate(other)
    generate(model)
    assert depths(model) == {2: 6}
    assert depths(other) == {0: 3, 2: 3}


def test_one_of_several_weights_exchanged_is_the_same_model() -> None:
    model = wrapped(random_model("llama", 2))
    generate(model)
    river_compile.set_max_depth(model, 0)
    for layer in model._orig_mod.model.layers:
        layer.input_layernorm.weight = nn.Parameter(torch.ones_like(layer.input_layernorm.weight))
    model._orig_mod.model.layers[0].self_attn.q_proj.weight = nn.Parameter(torch.randn(64, 64) * 0.1)
    generate(model)
    assert depths(model) == {0: 3, 2: 3}


def test_embeddings_instead_of_tokens_and_checkpointing() -> None:
    model = random_model("llama", 2)
    model.gradient_checkpointing_enable()
    compiled = wrapped(model)
    embedded = model.get_input_embeddings()(prompt(1, 5)).detach()
    compiled.generate(inputs_embeds=embedded, attention_mask=torch.ones(1, 5, dtype=torch.int64), **GREEDY)
    assert depths(compiled) == {2: 3}
    river_compile.set_max_depth(compiled, 0)
    generate(compiled)
    compiled.generate(inputs_embeds=embedded, attention_mask=torch.ones(1, 5, dtype=torch.int64), **GREEDY)
    assert depths(compiled) == {0: 6, 2: 3}


class Two(nn.Module):
    """A module that holds two models of one form and runs both."""

    def __init__(self) -> None:
        super().__init__()
        self.models = nn.ModuleList([random_model("llama", 2), random_model("llama", 2, seed=5)])


@pytest.mark.parametrize("way", [in_place, by_its_method])
def test_a_model_within_a_module(way: Any) -> None:
    both = Two()
    for model in both.models:
        generate(way(model))
    river_compile.set_max_depth(both.models[1], 0)
    for model in both.models:
        generate(model)
    assert [depths(model) for model in both.models] == [{2: 6}, {0: 3, 2: 3}]
    assert depths(both) == {0: 3, 2: 9}
    with pytest.raises(InputError, match="not compiled"):
        river_compile.stats(random_model("llama", 2))


def test_moved_and_converted_weights_keep_their_settings() -> None:
    model = wrapped(random_model("llama", 2))
    generate(model)
    river_compile.set_max_depth(model, 0)
    model.to(torch.bfloat16).eval()
    generate(model)
    model.float()
    generate(model)
    assert depths(model) == {0: 6, 2: 3}


def test_a_model_that_is_gone_is_not_kept_alive() -> None:
    one, two = wrapped(random_model("llama", 2)), wrapped(random_model("llama", 2, seed=5))
    generate(one)
    generate(two)
    gone = weakref.ref(two._orig_mod.model.layers[0].mlp.up_proj.weight)
    del two
    gc.collect()
    assert gone() is None
    generate(one)
    assert depths(one) == {2: 6}
