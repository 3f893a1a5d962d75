"""Weights changed behind torch's back: the river follows them, or says that it cannot."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import river_compile
from river_compile import RiverBackend, RiverConfig
from river_compile.compiled import known_states
from river_compile.errors import ConfigError, InputError
from river_compile.exporters.torch.dispatch import LOOKS
from river_compile.exporters.torch.freshness import samples, traces
from river_compile.exporters.torch.linear import Dequantized
from tests.families import random_model
from tests.torch_models import as_it_is, new_cache, play, prompt, with_river_from

RIVER = RiverConfig(max_depth=0, prefill="river")


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.compiler.reset()


def quick(model: Any, config: RiverConfig = RIVER) -> Any:
    return torch.compile(model, backend=RiverBackend(config, lowering=Dequantized(), compiler=as_it_is))


def copy_in(model: Any, other: Any) -> None:
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        mine.data.copy_(theirs.data)


def add_in(model: Any, other: Any) -> None:
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        mine.data += theirs.data - mine.data


def put(model: Any, other: Any) -> None:
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        mine.data = theirs.data.clone()


def put_twice(model: Any, other: Any) -> None:
    """Memory comes back to where it was."""
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        mine.data = mine.data + 1
        mine.data = theirs.data.clone()


def set_(model: Any, other: Any) -> None:
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            mine.set_(theirs.data.clone())


def new_parameters(model: Any, other: Any) -> None:
    for mine, theirs in zip(model.modules(), other.modules(), strict=True):
        for name, parameter in list(theirs.named_parameters(recurse=False)):
            setattr(mine, name, torch.nn.Parameter(parameter.detach().clone()))
    model.tie_weights()


def load(model: Any, other: Any) -> None:
    model.load_state_dict(other.state_dict())


def assign(model: Any, other: Any) -> None:
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)


def optimize(model: Any, other: Any) -> None:
    """A fused step, which raises no counter, whose result is the other model's weights."""
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        mine.grad = mine.detach() - theirs.detach()
    torch.optim.SGD(model.parameters(), lr=1.0, fused=True).step()


def swap(model: Any, other: Any) -> None:
    """As for an evaluation with averaged weights."""
    for mine, theirs in zip(model.parameters(), copy.deepcopy(other).parameters(), strict=True):
        mine.data, theirs.data = theirs.data, mine.data


CHANGES = [copy_in, add_in, put, put_twice, set_, new_parameters, load, assign, optimize, swap]


@pytest.mark.parametrize("change", CHANGES)
def test_the_river_follows_weights_changed_between_generations(change: Callable[[Any, Any], None]) -> None:
    model, other = random_model("llama", 2), random_model("llama", 2, seed=5)
    compiled = quick(model)
    play(model, compiled, prompt(1, 3), 2, "static")
    change(model, other)
    found = play(model, compiled, prompt(1, 3), 2, "static")
    judge = with_river_from(other, 0)
    for ours, theirs in zip(found, play(other, judge, prompt(1, 3), 2, "static"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("change", [put, set_, load, new_parameters])
def test_the_river_follows_weights_changed_in_the_middle_of_one(change: Callable[[Any, Any], None]) -> None:
    model, other = random_model("llama", 2), random_model("llama", 2, seed=5)
    judged, judge = with_river_from(model, 0), with_river_from(other, 0)
    compiled = quick(model)
    play(model, compiled, prompt(1, 3), 2, "static")
    cache, cache_of_judge = new_cache(model, "static"), new_cache(model, "static")
    for step in range(5):
        ids = prompt(1, 3 if step == 0 else 1, seed=step)
        at = torch.arange(3)[None] if step == 0 else torch.tensor([[2 + step]])
        if step == 3:
            change(model, other)
        with torch.no_grad():
            ours = compiled(ids, position_ids=at, past_key_values=cache, use_cache=True).logits
            theirs = (judged if step < 3 else judge)(
                ids, position_ids=at, past_key_values=cache_of_judge, use_cache=True
            ).logits
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("change", [copy_in, optimize])
def test_a_change_of_all_weights_without_a_trace_is_seen_within_some_passes(change: Callable[[Any, Any], None]) -> None:
    model, other = random_model("llama", 2), random_model("llama", 2, seed=5)
    compiled, cache = quick(model), new_cache(model, "static")

    @torch.no_grad()
    def decode(by: Any, position: int, into: Any) -> torch.Tensor:
        ids, at = prompt(1, 1, seed=position), torch.tensor([[position]])
        logits: torch.Tensor = by(ids, position_ids=at, past_key_values=into, use_cache=True).logits
        return logits

    for position in range(3):
        decode(compiled, position, cache)
    change(model, other)
    for position in range(3, 3 + LOOKS):
        decode(compiled, position, cache)
    expected = decode(with_river_from(other, 0), position + 1, copy.deepcopy(cache))
    torch.testing.assert_close(decode(compiled, position + 1, cache), expected, rtol=1e-3, atol=1e-3)


def test_a_change_that_spares_one_weights_samples_is_seen_by_anothers() -> None:
    model = random_model("llama", 2)
    compiled = quick(model)
    play(model, compiled, prompt(1, 3), 2, "static")
    layer = model.model.layers[1].mlp
    before = samples([layer.up_proj.weight])
    layer.up_proj.weight.data[0, 1:4] += 9.0
    assert all(map(torch.equal, samples([layer.up_proj.weight]), before))
    layer.down_proj.weight.data.mul_(0.5)
    found = play(model, compiled, prompt(1, 3), 2, "static")
    for ours, theirs in zip(found, play(model, with_river_from(model, 0), prompt(1, 3), 2, "static"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_refresh_makes_the_river_anew_after_a_change_that_spares_every_sample() -> None:
    model = random_model("llama", 2)
    compiled = quick(model)
    with pytest.raises(InputError, match="not compiled"):
        river_compile.refresh(model)
    play(model, compiled, prompt(1, 3), 2, "static")
    model.model.layers[1].mlp.up_proj.weight.data[0, 1:4] += 9.0
    river_compile.refresh(compiled)
    found = play(model, compiled, prompt(1, 3), 2, "static")
    for ours, theirs in zip(found, play(model, with_river_from(model, 0), prompt(1, 3), 2, "static"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_nothing_is_quantized_anew_while_the_weights_stay() -> None:
    model = random_model("llama", 2)
    compiled = quick(model)
    play(model, compiled, prompt(1, 3), 2, "static")
    store = known_states(compiled)[0].store
    before, held = store.epoch, {id(entry) for found in store._held.values() for entry in found.values()}
    for cache in ("static", "dynamic", "static"):
        play(model, compiled, prompt(1, 3), 4, cache)
    assert (store.epoch, {id(entry) for found in store._held.values() for entry in found.values()}) == (before, held)


@pytest.mark.parametrize("change", [copy_in, put])
def test_tuned_weights_are_refused_after_a_change(change: Callable[[Any, Any], None]) -> None:
    model, other = random_model("llama", 2), random_model("llama", 2, seed=5)
    config = RiverConfig(quantizer="gptq", max_depth=0)
    texts = [torch.arange(3, 40)]
    river_compile.tune(model, texts, config)
    compiled = quick(model, config)
    play(model, compiled, prompt(1, 3), 2, "static")
    change(model, other)
    for _ in range(2):
        with pytest.raises(ConfigError, match="the weights were changed since they were tuned"):
            play(model, compiled, prompt(1, 3), 2, "static")
    river_compile.tune(model, texts, config)
    play(model, compiled, prompt(1, 3), 2, "static")
    river_compile.refresh(compiled)
    with pytest.raises(ConfigError, match="the weights were changed since they were tuned"):
        play(model, compiled, prompt(1, 3), 2, "static")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_samples_come_from_all_rows_and_columns(dtype: torch.dtype) -> None:
    for shape in ((64, 64), (576, 1536), (3, 7), (1,)):
        weight = torch.zeros(shape).to(dtype)
        assert 0 < len(samples([weight])[0]) <= 80
        for form in (weight, weight.T if weight.dim() == 2 else weight):
            before = samples([form])
            assert all(map(torch.equal, samples([form]), before))
            form[..., form.shape[-1] // 2 :] = 1
            assert len(form) < 2 or not all(map(torch.equal, samples([form]), before))
            form[...] = 0


def test_a_tensor_made_for_inference_has_no_counter() -> None:
    with torch.inference_mode():
        weight = torch.ones(2)
    assert traces([weight]) == traces([weight])
