"""Helpers of the torch.compile tests: captured graphs, the plain piece compiler, and the judge of a river model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import fx
from transformers import DynamicCache, StaticCache
from transformers.pytorch_utils import Conv1D

from river_compile.config import RiverConfig
from river_compile.exporters.onnx.kv_cache import cache_argument
from river_compile.passes.fx.graph import FxGraph, import_graph
from river_compile.runtime.drafting import Costs, DraftLength
from river_compile.runtime.exact import Experience
from tests.families import FAMILIES, VOCABULARY, random_model

# Tests run in as many workers as there are cores.
torch.set_num_threads(1)

CACHES = ("dynamic", "static")
# transformers' own code: bloom raises with a static cache in eager mode too, mpt slices by values and breaks the graph.
WITHOUT_STATIC_CACHE = ("bloom", "mpt")
MAX_LENGTH = 128


def family_and_cache(quick: Collection[tuple[str, str]]) -> list[Any]:
    """Every family with every cache that it has; what is not named as quick runs with the slow tests."""
    pairs = [(f, c) for f in FAMILIES for c in CACHES if c == "dynamic" or f not in WITHOUT_STATIC_CACHE]
    return [pytest.param(*pair, marks=() if pair in quick else pytest.mark.slow) for pair in pairs]


def as_it_is(module: fx.GraphModule, values: Sequence[Any]) -> Callable[..., Any]:
    """A piece compiler that compiles nothing: the passes and the dispatch are what is tested, and Inductor is slow."""
    return module


def drafts_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let exact decoding draft: small models are all overhead, and by what their passes cost it would not."""
    sizes = [(count, river) for count in range(1, 9) for river in (True, False)]

    def experience(model: Any) -> Experience:
        return Experience(0.0, {size: DraftLength(Costs(1e-6, {1: 1.0, 4: 1.1}), 3) for size in sizes})

    monkeypatch.setattr("river_compile.exact_generate._experience_of", experience)
    monkeypatch.setattr("river_compile.exact_generate.time", SimpleNamespace(perf_counter=lambda: 0.0))


def capture(family: str, cache: str, layers: int = 4) -> list[FxGraph]:
    """The graphs of a prompt and three decode passes, as Dynamo hands them to a backend."""
    graphs = []

    def backend(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        weights = [n.name for n, v in zip(placeholders, inputs, strict=True) if isinstance(v, torch.nn.Parameter)]
        graphs.append(import_graph(module, weights))
        return module.forward

    torch.compiler.reset()
    model = random_model(family, layers)
    play(model, torch.compile(model, backend=backend), prompt(2, 5), steps=3, cache=cache)
    return graphs


def gemma4_that_shares_keys() -> Any:
    """Four layers with inputs of their own, the last two without keys of theirs."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    heads = {"head_dim": 16, "global_head_dim": 16, "sliding_window": 8, "num_kv_shared_layers": 2}
    own = {"hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": VOCABULARY}
    kinds = ["sliding_attention", "full_attention"] * 2
    config = hf.Gemma4TextConfig(vocab_size=VOCABULARY, num_hidden_layers=4, layer_types=kinds, **sizes, **heads, **own)
    return hf.Gemma4ForCausalLM(config).eval()


def gemma3n_that_shares_keys() -> Any:
    """As Gemma 4, and three streams in one hidden state, and factors of low rank."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": [128] * 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    heads = {"head_dim": 16, "sliding_window": 8, "num_kv_shared_layers": 2, "laurel_rank": 8, "altup_num_inputs": 3}
    own = {"hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": VOCABULARY}
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 2, "activation_sparsity_pattern": [0.0] * 4}
    config = hf.Gemma3nTextConfig(vocab_size=VOCABULARY, num_hidden_layers=4, **kinds, **sizes, **heads, **own)
    return hf.Gemma3nForCausalLM(config).eval()


def prompt(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def new_cache(model: Any, kind: str) -> Any:
    return StaticCache(config=model.config, max_cache_len=MAX_LENGTH) if kind == "static" else DynamicCache()


@torch.no_grad()
def play(
    model: Any,
    forward: Callable[..., Any],
    ids: torch.Tensor,
    steps: int,
    cache: str | Any,
    mask: torch.Tensor | None = None,
    before: Callable[[int], None] = lambda step: None,
) -> list[torch.Tensor]:
    """Logits of a prompt and of some following tokens, which do not depend on the model: [batch, vocabulary] each."""
    state = new_cache(model, cache) if isinstance(cache, str) else cache
    mask = torch.ones_like(ids) if mask is None else mask
    found = []
    tokens = ids
    for step in range(steps + 1):
        before(step)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        extra = {cache_argument(model): state}
        extra |= {"position_ids": positions} if "position_ids" in _parameters(model) else {}
        logits = forward(tokens, attention_mask=mask, use_cache=True, **extra).logits
        found.append(logits[:, -1].clone())
        tokens = prompt(ids.shape[0], 1, seed=step + 1)
        mask = torch.cat([mask, torch.ones_like(tokens)], 1)
    return found


def _parameters(model: Any) -> Sequence[str]:
    import inspect

    return list(inspect.signature(model.forward).parameters)


def decoder_layers(model: torch.nn.Module) -> torch.nn.ModuleList:
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return max(lists, key=lambda found: sum(p.numel() for p in found.parameters()))


@torch.no_grad()
def with_river_from(model: Any, depth: int, bits: int = 4, group_size: int = 32) -> Any:
    """The judge: a copy in eager mode whose layers from ``depth`` on have their linear weights rounded and dequantized,
    by a grid computed here."""
    judge = copy.deepcopy(model)
    for layer in decoder_layers(judge)[depth:]:
        for module in layer.modules():
            weight = getattr(module, "weight", None)
            if isinstance(module, Conv1D):
                weight.copy_(rounded(weight.T, bits, group_size).T)
            # A router of experts has a matrix without being a torch.nn.Linear.
            elif isinstance(weight, torch.nn.Parameter) and weight.dim() == 2:
                weight.copy_(rounded(weight, bits, group_size))
    return judge


def rounded(weight: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    groups = weight.float().reshape(weight.shape[0], -1, group_size)
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    step = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(torch.float32).tiny)
    zero = (-low / step).round()
    return (((groups / step + zero).round().clamp(0, 2**bits - 1) - zero) * step).reshape(weight.shape)


def assert_same(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], tolerance: float = 1e-4) -> None:
    """Every logit agrees to ``tolerance`` of the logits' range."""
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert torch.isfinite(theirs).all()
        bound = tolerance * float(theirs.max() - theirs.min())
        difference = float((ours - theirs).abs().max())
        assert difference <= bound, f"step {step}: {difference} > {bound}"


RIVER_EVERYWHERE = RiverConfig(tau=2.0, prefill="river")
