"""Activation-aware river weights of a torch model: closer on the texts, found by the backend, refused when stale."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

import river_compile
from river_compile.backend import RiverBackend
from river_compile.config import RiverConfig
from river_compile.errors import ConfigError, InputError
from river_compile.exporters.quantizers.gptq import gptq
from river_compile.exporters.quantizers.grids import Gptq
from river_compile.exporters.quantizers.rtn import RoundToNearest
from river_compile.exporters.torch.linear import Dequantized
from river_compile.exporters.torch.tuning import Tuned, tune_weights
from tests.families import LAYERS, VOCABULARY, random_model
from tests.torch_models import as_it_is, assert_same, decoder_layers, play, prompt

GPTQ = RiverConfig(tau=2.0, prefill="river", quantizer="gptq")
TEXTS = [np.random.default_rng(seed).integers(3, VOCABULARY, 40) for seed in range(3)]


class Mixer(nn.Module):
    """Products in every form, by modules of no known class: one weight twice, one transposed, one never used."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 64)
        self.first, self.square, self.unused = (nn.Parameter(torch.randn(64, 64)) for _ in range(3))
        self.last = nn.Linear(64, 48)
        self.mix = torch.randn(64, 64) * torch.linspace(0.1, 3, 64)
        self.seen: list[torch.Tensor] = []

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
        states = self.table(input_ids) @ self.mix
        self.seen.append(states)
        return self.last(states @ self.first + states @ self.square.T + functional.linear(states, self.square))


def tuned(model: nn.Module, budget: int = 1 << 30) -> Tuned:
    found = Tuned()
    tune_weights(found, model, dict.fromkeys(model.parameters(), 4), 32, TEXTS, Gptq(), budget=budget)
    return found


def test_tuned_weights_are_closer_on_the_texts_than_rounded_ones() -> None:
    torch.manual_seed(0)
    model = Mixer()
    found = tuned(model)
    with torch.no_grad():
        for text in TEXTS:
            model(torch.from_numpy(text)[None], use_cache=False)
    inputs = torch.cat([states.reshape(-1, 64) for states in model.seen[-len(TEXTS) :]])
    for parameter, transposed in ((model.first, False), (model.square, True)):
        weight = (parameter.T if transposed else parameter).detach().contiguous()
        ours = found.find(parameter, "gptq", transposed, (4, 32)).dequantize()
        theirs = RoundToNearest().quantize(weight.numpy(), 4, 32).dequantize()
        errors = [float((inputs @ (torch.from_numpy(rounded) - weight)).norm()) for rounded in (ours, theirs)]
        assert errors[0] < 0.7 * errors[1]


def test_only_products_are_tuned_and_each_once() -> None:
    model = Mixer()
    found = tuned(model)
    assert [found.stamp(parameter) > 0 for parameter in (model.first, model.square, model.last.weight)] == [True] * 3
    assert found.stamp(model.unused) == found.stamp(model.table.weight) == 0


def test_a_small_budget_reads_the_texts_more_often_to_the_same_weights() -> None:
    model = random_model("llama", 2)
    layers = decoder_layers(model)
    bits = dict.fromkeys(layers.parameters(), 4)
    whole, parts = Tuned(), Tuned()
    steps: list[int] = []
    for into, budget in ((whole, 1 << 30), (parts, 3 * 4 * 64**2)):
        reads = []
        tune_weights(into, model, bits, 32, TEXTS, Gptq(), lambda step, *_, r=reads: r.append(step), budget)
        steps.append(reads.count("read tuning texts"))
    assert steps[1] >= 3 * steps[0]
    assert whole.digest(model.parameters()) == parts.digest(model.parameters())


def compiled(model: Any, config: RiverConfig = GPTQ) -> tuple[Any, RiverBackend]:
    torch.compiler.reset()
    backend = RiverBackend(config, lowering=Dequantized(), compiler=as_it_is)
    return torch.compile(model, backend=backend), backend


@torch.no_grad()
def with_tuned_river(model: Any) -> Any:
    """The judge: a copy in eager mode with GPTQ's weights, of moments that hooks on its own linear layers gather."""
    judge = copy.deepcopy(model)
    sums: dict[nn.Module, torch.Tensor] = {}
    linears = [m for layer in decoder_layers(model) for m in layer.modules() if isinstance(m, (nn.Linear, Conv1D))]
    copies = [m for layer in decoder_layers(judge) for m in layer.modules() if isinstance(m, (nn.Linear, Conv1D))]
    for text in TEXTS:
        hooks = []
        for module in linears:

            def add(module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
                rows = inputs[0].reshape(-1, inputs[0].shape[-1])
                sums[module] = sums.get(module, torch.zeros(())) + rows.T @ rows

            hooks.append(module.register_forward_pre_hook(add))
        model(torch.from_numpy(text)[None], use_cache=False)
        for hook in hooks:
            hook.remove()
    tokens = sum(map(len, TEXTS))
    for module, other in zip(linears, copies, strict=True):
        transposed = isinstance(module, nn.Linear)
        weight = (module.weight.T if transposed else module.weight).contiguous().numpy()
        rounded = torch.from_numpy(gptq(weight, (sums[module] / tokens).numpy(), 4, 32).dequantize())
        other.weight.copy_(rounded.T if transposed else rounded)
    return judge


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_river_is_the_model_with_tuned_weights(family: str) -> None:
    model = random_model(family)
    count = river_compile.tune(model, TEXTS, GPTQ)
    assert count == LAYERS * {"llama": 7, "gpt2": 4}[family]
    forward, backend = compiled(model)
    backend.max_depth = 0
    found = play(model, forward, prompt(2, 5), 2, "static")
    assert_same(found, play(model, with_tuned_river(model), prompt(2, 5), 2, "static"), tolerance=1e-3)
    assert not backend.stats().fallbacks


@pytest.mark.parametrize("options", [{"head_bits": 8}, {"exact": True}], ids=("a head of 8 bits", "exact"))
def test_the_head_of_a_tuned_river_is_rounded(options: dict[str, Any]) -> None:
    """No texts are read for it, and a head that drafts has 8 bits without being asked for."""
    model = random_model("llama")
    river_compile.tune(model, TEXTS, GPTQ)
    forward, backend = compiled(model, replace(GPTQ, **options))
    play(model, forward, prompt(2, 5), 2, "static")
    assert not backend.stats().fallbacks
    assert backend.stats().river_layers == LAYERS


def test_a_model_that_was_not_tuned_for_this_river_is_refused() -> None:
    model = random_model("llama", 2)
    for config in (GPTQ, RiverConfig(quantizer="gptq", group_size=64, prefill="river")):
        forward, _ = compiled(model, config)
        with pytest.raises(ConfigError, match=r"quantizer: 'gptq'.*river_compile\.tune\(model, ids, config\) first"):
            play(model, forward, prompt(1, 3), 1, "dynamic")
        river_compile.tune(model, TEXTS, GPTQ)


def test_a_weight_changed_after_tuning_is_refused_until_tuned_again() -> None:
    model = random_model("llama", 2)
    river_compile.tune(model, TEXTS, GPTQ)
    forward, backend = compiled(model)
    backend.max_depth = 0
    play(model, forward, prompt(1, 3), 1, "dynamic")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(0.5)
    with pytest.raises(ConfigError, match="changed since they were tuned"):
        play(model, forward, prompt(1, 3), 1, "dynamic")
    river_compile.tune(model, TEXTS, GPTQ)
    found = play(model, forward, prompt(1, 3), 1, "dynamic")
    assert torch.isfinite(found[-1]).all()


def test_layers_and_weights_that_stay_float_are_not_tuned() -> None:
    model = random_model("llama")
    config = RiverConfig(
        quantizer="gptq", prefill="river", keep_layers=(0,), bits_for=(("*v_proj", "float"), ("layers.2", 8))
    )
    assert river_compile.tune(torch.compile(model), TEXTS, config) == 3 * 6
    forward, backend = compiled(model, config)
    play(model, forward, prompt(1, 3), 1, "dynamic")
    assert backend.stats().river_layers == LAYERS - 1


def test_users_mistakes_are_one_clear_line() -> None:
    model = random_model("llama", 2)
    broken = random_model("llama", 2)
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight.fill_(float("nan"))
    cases: list[tuple[type[Exception], str, Any]] = [
        (ConfigError, "'rtn' looks at weights alone", lambda: river_compile.tune(model, TEXTS, RiverConfig())),
        (InputError, "no tuning texts", lambda: river_compile.tune(model, [])),
        (InputError, "a row of token ids", lambda: river_compile.tune(model, [TEXTS[0][None]])),
        (InputError, "a row of token ids", lambda: river_compile.tune(model, [np.array([0.5])])),
        (InputError, "no list of repeated decoder layers", lambda: river_compile.tune(nn.Linear(2, 2).eval(), TEXTS)),
        (InputError, "training mode", lambda: river_compile.tune(random_model("llama", 2).train(), TEXTS)),
        (InputError, "not finite", lambda: river_compile.tune(broken, TEXTS)),
    ]
    for kind, message, call in cases:
        with pytest.raises(kind, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
