"""A model compiled with a river, against the model in eager mode with dequantized weights where the river flows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters

from river_compile.backend import RiverBackend
from river_compile.config import RiverConfig
from river_compile.exporters.onnx.kv_cache import cache_argument
from river_compile.exporters.torch.linear import Dequantized
from river_compile.passes.fx.graph import symbols_of, value_of
from tests.families import LAYERS, random_model
from tests.torch_models import (
    CACHES,
    RIVER_EVERYWHERE,
    as_it_is,
    assert_same,
    family_and_cache,
    gemma4_that_shares_keys,
    new_cache,
    play,
    prompt,
    with_river_from,
)

QUICK = [
    *((family, cache) for family in ("llama", "gemma2") for cache in CACHES),
    *((family, "static") for family in ("qwen2", "gpt2")),
    *((family, "dynamic") for family in ("phi3", "gpt_neox")),
]
FEW = 3
"""Layers, of models that are traced often: a first, one within, a last."""

SHAPES = [(1, 1), (1, 2), (3, 2), (1, 100)]


class Case:
    """A family's random model, compiled, and its judges."""

    def __init__(
        self, family: str, config: RiverConfig = RIVER_EVERYWHERE, compiler: Any = as_it_is, layers: int = LAYERS
    ) -> None:
        torch.compiler.reset()
        self.model = random_model(family, layers)
        self.backend = RiverBackend(config, lowering=Dequantized(), compiler=compiler)
        self.compiled = torch.compile(self.model, backend=self.backend)
        self.judges = [with_river_from(self.model, depth) for depth in range(layers + 1)]

    def check(self, depth: int, batch: int, length: int, cache: str, mask: torch.Tensor | None = None) -> None:
        ids = prompt(batch, length)
        self.backend.max_depth = depth
        found = play(self.model, self.compiled, ids, 2, cache, mask)
        assert_same(found, play(self.model, self.judges[depth], ids, 2, cache, mask))


@pytest.mark.parametrize(("family", "cache"), family_and_cache(QUICK))
def test_each_depth_equals_the_model_with_dequantized_weights(family: str, cache: str) -> None:
    """Prompts of three lengths, padded on the left, and what follows them."""
    case = Case(family, layers=FEW)
    mask = torch.tensor([[1] * 10, [0] * 2 + [1] * 8, [0] * 9 + [1]])
    for depth in range(FEW + 1):
        case.check(depth, 3, 10, cache, mask)
    assert not case.backend.stats().fallbacks


@pytest.mark.parametrize(("family", "cache"), family_and_cache([("llama", "dynamic")]))
def test_each_depth_is_the_same_at_prompts_of_every_shape(family: str, cache: str) -> None:
    """Each shape is another graph: one token, one sequence, several."""
    case = Case(family, layers=FEW)
    for batch, length in SHAPES:
        for depth in range(FEW + 1):
            case.check(depth, batch, length, cache)
    assert not case.backend.stats().fallbacks


@pytest.mark.slow
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_each_depth_is_the_same_compiled_by_inductor(family: str, cache: str) -> None:
    case = Case(family, compiler=None)
    for batch, length in [(1, 3), (3, 2)]:
        for depth in (0, 2, LAYERS):
            case.check(depth, batch, length, cache)


def binding(module: torch.fx.GraphModule, values: Any) -> Any:
    """A piece compiler that compiles nothing, but must read every size off the operands as Inductor does."""
    numbers = [n for v in values for n in ([*v.shape, *v.stride()] if isinstance(v, torch.Tensor) else [v])]
    # What a number was made with, whatever it was found equal to since.
    bound = {number.node._expr for number in numbers if isinstance(number, torch.SymInt)}
    unbound = {
        (node.name, symbol)
        for node in module.graph.nodes
        for symbol in symbols_of(value_of(node))
        if symbol not in bound
    }
    assert not unbound
    return module


# With a window of 8 tokens, masks have sizes of their own.
@pytest.mark.parametrize(
    ("family", "window"),
    [
        ("gemma2", 8),
        pytest.param("gemma2", 4096, marks=pytest.mark.slow),
        pytest.param("gemma3", 8, marks=pytest.mark.slow),
        pytest.param("mistral", 8, marks=pytest.mark.slow),
    ],
)
def test_each_piece_can_bind_every_size_that_it_needs(family: str, window: int) -> None:
    torch.compiler.reset()
    model = random_model(family)
    for part in model.modules():
        if hasattr(part, "config"):
            part.config.sliding_window = window
    backend = RiverBackend(RiverConfig(tau=2.0, strict=True), lowering=Dequantized(), compiler=binding)
    ids = prompt(2, 6)
    ids[0, :3] = 0
    how = {"attention_mask": (ids != 0).long(), "max_new_tokens": 8, "do_sample": False}
    expected = model.generate(ids, **how)
    assert torch.equal(torch.compile(model, backend=backend).generate(ids, **how), expected)


@pytest.mark.slow
@pytest.mark.parametrize("cache", CACHES)
def test_inductor_compiles_each_kind_of_piece_once(cache: str) -> None:
    counters["aot_autograd"].clear()
    case = Case("llama", compiler=None)
    for depth in (0, 1, LAYERS):
        case.check(depth, 1, 3, cache)
    stats = case.backend.stats()
    # Prefix, backbone layer, river layer, suffix: four for each graph at most, whatever the number of layers.
    assert stats.graphs >= 2
    assert stats.artifacts <= 4 * stats.graphs
    assert not stats.fallbacks
    # The next process finds each of them on disk.
    assert counters["aot_autograd"]["total"] >= stats.artifacts
    assert not counters["aot_autograd"]["autograd_cache_bypass"]


def test_the_twins_differ_by_more_than_the_tolerance() -> None:
    """Otherwise none of the tests above could fail."""
    model = random_model("llama")
    backbone, river = (play(model, judge, prompt(1, 3), 1, "dynamic") for judge in (model, with_river_from(model, 0)))
    for ours, theirs in zip(backbone, river, strict=True):
        assert float((ours - theirs).abs().max()) > 20 * 1e-4 * float(ours.max() - ours.min())


def test_exits_off_gives_the_same_greedy_tokens_over_64_steps() -> None:
    case = Case("llama", RiverConfig(tau=1.5))
    settings_ = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
    expected = case.model.generate(prompt(1, 4), **settings_)
    assert torch.equal(case.compiled.generate(prompt(1, 4), **settings_), expected)
    assert set(case.backend.stats().decode_depths) == {LAYERS}


def contents(cache: Any, length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(layer.keys[:, :, :length].clone(), layer.values[:, :, :length].clone()) for layer in cache.layers]


@pytest.fixture(scope="module", params=CACHES)
def kept(request: pytest.FixtureRequest) -> tuple[Case, str]:
    return Case("llama", layers=FEW), request.param


@given(depths=st.lists(st.integers(0, FEW), min_size=2, max_size=8), chunk=st.sampled_from([1, 1, 2]))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_each_cache_slot_is_written_once_by_one_twin(kept: tuple[Case, str], depths: list[int], chunk: int) -> None:
    """After any schedule of depths over several calls on one cache, the cache holds, at each layer and position, what
    that call's twin computes, and no later call touches it."""
    case, kind = kept
    ours, theirs = new_cache(case.model, kind), new_cache(case.model, kind)
    name, length = cache_argument(case.model), 0
    for step, depth in enumerate(depths):
        ids = prompt(1, chunk, seed=step)
        before = contents(ours, length) if length else []
        mask = torch.ones(1, length + chunk, dtype=torch.int64)
        positions = torch.arange(length, length + chunk)[None]
        case.backend.max_depth = depth
        arguments = {"attention_mask": mask, "position_ids": positions, "use_cache": True}
        with torch.no_grad():
            case.compiled(ids, **{name: ours}, **arguments)
            case.judges[depth](ids, **{name: theirs}, **arguments)
        for (old_keys, old_values), (keys, values) in zip(before, contents(ours, length), strict=bool(before)):
            assert torch.equal(old_keys, keys)
            assert torch.equal(old_values, values)
        length += chunk
        found, expected = contents(ours, length), contents(theirs, length)
        assert_same([k for k, _ in found] + [v for _, v in found], [k for k, _ in expected] + [v for _, v in expected])
        for (keys, values), layer in zip(found, ours.layers, strict=True):
            assert keys.shape[2] == values.shape[2] == length
            if kind == "static":
                assert not layer.keys[:, :, length:].any()


def test_the_flag_is_sticky_and_follows_the_least_similarity() -> None:
    case = Case("llama", RiverConfig(prefill="river"))
    seen: dict[int, list[torch.Tensor]] = {}
    hooks = [
        layer.register_forward_hook(lambda m, a, o, i=i: seen.setdefault(i, []).append((a[0], o)))
        for i, layer in enumerate(case.model.model.layers)
    ]
    play(case.model, case.model, prompt(2, 3), 0, "dynamic")
    for hook in hooks:
        hook.remove()
    least = []
    for index in range(LAYERS - 1):
        before, after = (t if isinstance(t, torch.Tensor) else t[0] for t in seen[index][0])
        least.append(float(torch.nn.functional.cosine_similarity(before, after, dim=-1).min()))
    torch.compiler.reset()
    for tau in sorted({-1.0, *(value - 1e-4 for value in least), *(value + 1e-4 for value in least), 2.0}):
        case.backend.tau = tau
        case.backend.prefill_depths.clear()
        play(case.model, case.compiled, prompt(2, 3), 0, "dynamic")
        expected = next((index + 1 for index, value in enumerate(least) if value > tau), LAYERS)
        assert dict(case.backend.prefill_depths) == {expected: 1}


def test_a_changed_weight_is_quantized_anew() -> None:
    case = Case("llama", layers=FEW)
    case.check(0, 1, 2, "dynamic")
    with torch.no_grad():
        case.model.model.layers[1].mlp.up_proj.weight.mul_(0.5)
    case.judges = [with_river_from(case.model, depth) for depth in range(FEW + 1)]
    case.check(0, 1, 2, "dynamic")
    replacement = torch.nn.Parameter(torch.randn_like(case.model.model.layers[2].mlp.up_proj.weight) * 0.1)
    case.model.model.layers[2].mlp.up_proj.weight = replacement
    case.judges = [with_river_from(case.model, depth) for depth in range(FEW + 1)]
    case.check(0, 1, 2, "dynamic")


class Twice(torch.nn.Module):
    """A weight that multiplies two activations, the second its own result."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, torch.nn.Parameter(torch.randn(linear.out_features) * 0.1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        once = torch.nn.functional.linear(hidden, self.weight, self.bias)
        return torch.nn.functional.linear(once, self.weight, self.bias)


@pytest.mark.parametrize("bias", [False, True])
def test_products_that_read_one_another_and_weights_read_twice_are_all_quantized(bias: bool) -> None:
    """Factors of low rank, as in adapters that are not merged; in o_proj's place one weight is used for both."""
    case = Case("llama", layers=FEW)
    for layer in case.model.model.layers:
        inner, outer = layer.mlp.gate_proj.in_features, layer.mlp.gate_proj.out_features
        for name in ("gate_proj", "up_proj"):
            factors = torch.nn.Linear(inner, 32, bias=bias), torch.nn.Linear(32, outer, bias=bias)
            setattr(layer.mlp, name, torch.nn.Sequential(*factors))
        layer.self_attn.o_proj = Twice(layer.self_attn.o_proj)
    case.judges = [with_river_from(case.model, depth) for depth in range(FEW + 1)]
    for depth in range(FEW + 1):
        case.check(depth, 2, 5, "dynamic")
    assert case.backend.stats().river_layers == FEW
    assert not case.backend.stats().fallbacks


@pytest.mark.skipif(not hasattr(hf, "Gemma4TextConfig"), reason="an older transformers")
@pytest.mark.parametrize("cache", CACHES)
def test_layers_that_have_inputs_of_their_own_and_read_the_keys_of_others(cache: str) -> None:
    """Gemma 4: each layer gets embeddings of its own, and the last two read what layers before them have cached."""
    model = gemma4_that_shares_keys()
    backend = RiverBackend(RIVER_EVERYWHERE, lowering=Dequantized(), compiler=as_it_is)
    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend)
    for depth in (0, 1, 3, 4):
        backend.max_depth = depth
        judge = with_river_from(model, depth)
        assert_same(play(model, compiled, prompt(2, 5), 2, cache), play(model, judge, prompt(2, 5), 2, cache))
    assert backend.stats().river_layers == 4
    assert not backend.stats().fallbacks
