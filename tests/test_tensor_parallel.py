"""A model spread over two processes by transformers' tensor parallel plan, compiled with a river."""

from __future__ import annotations

import functools
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DistributedConfig

import river_compile
from river_compile import RiverBackend, RiverConfig, RiverError
from river_compile.errors import InputError
from river_compile.exporters.torch import seam
from river_compile.exporters.torch.graphs import Pass
from river_compile.exporters.torch.linear import Dequantized
from river_compile.measure.plan import plan_river
from river_compile.passes.quantizer import fitting_group
from tests.families import random_model
from tests.ranks import run_ranks
from tests.torch_models import (
    RIVER_EVERYWHERE,
    as_it_is,
    assert_same,
    decoder_layers,
    new_cache,
    play,
    prompt,
    rounded,
)

LAYERS = 3
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


def saved(folder: Path, family: str, **changes: Any) -> Path:
    """A small random model of a family in a folder."""
    random_model(family, LAYERS, **changes).save_pretrained(folder / "model")
    return folder / "model"


def loaded(folder: Path, plan: Any = "auto") -> Any:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, distributed_config=DistributedConfig(tp_plan=plan)
    )
    if plan != "auto":
        for layer in decoder_layers(model):
            layer.self_attn.num_key_value_groups //= 2
    return model.eval()


class Case:
    """A model spread over the processes, compiled, and the judge of each exit depth: the whole model in one process,
    eager, its layers from there on with weights that each process has rounded for itself."""

    def __init__(self, folder: Path, config: RiverConfig = RIVER_EVERYWHERE, plan: Any = "auto", **how: Any) -> None:
        self._folder, self.model = folder, loaded(folder, plan)
        self.backend = RiverBackend(config, **{"lowering": Dequantized(), "compiler": as_it_is, **how})
        self.compiled = torch.compile(self.model, backend=self.backend)

    @functools.cached_property
    def judges(self) -> list[Any]:
        return [self._judge(depth) for depth in range(LAYERS + 1)]

    @torch.no_grad()
    def _judge(self, depth: int) -> Any:
        judge = AutoModelForCausalLM.from_pretrained(self._folder, dtype=torch.float32).eval()
        pairs = zip(decoder_layers(judge)[depth:], decoder_layers(self.model)[depth:], strict=True)
        for whole, layer in pairs:
            spread = dict(layer.named_parameters())
            for name, weight in whole.named_parameters():
                if weight.dim() == 2:
                    weight.copy_(_rounded_by_shards(spread[name]))
        return judge

    def check(self, depth: int, ids: torch.Tensor, cache: str = "dynamic") -> None:
        self.backend.max_depth = depth
        found = play(self.model, self.compiled, ids, 2, cache)
        assert_same(found, play(self.judges[depth], self.judges[depth], ids, 2, cache))


def _rounded_by_shards(weight: torch.Tensor) -> torch.Tensor:
    """A weight of which each process has rounded what it holds; its groups are as wide as divides the shard."""
    if not hasattr(weight, "to_local"):
        return rounded(weight, 4, fitting_group(weight.shape[1], 32))
    shard = weight.to_local()
    mine = rounded(shard, 4, fitting_group(shard.shape[1], 32))
    spread = type(weight).from_local(mine, weight.device_mesh, weight.placements, run_check=False)
    return spread.full_tensor()


# Of 96 inputs a process holds 48: groups of 32 would cross the boundary.
ODD = {"hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}


def depths(rank: int, folder: Path, plan: Any) -> Any:
    case = Case(folder, plan=plan)
    eager = play(case.model, case.model, prompt(2, 5), 2, "dynamic")
    case.backend.max_depth = None
    assert_same(play(case.model, case.compiled, prompt(2, 5), 2, "dynamic"), eager, 1e-5)
    for depth in range(LAYERS + 1):
        case.check(depth, prompt(2, 5))
    stats = case.backend.stats()
    assert not stats.fallbacks, stats.fallbacks
    assert stats.river_layers == LAYERS
    assert stats.replaced_bytes < stats.backbone_bytes < 0.8 * sum(p.nbytes for p in case.model.parameters())
    return dict(stats.decode_depths)


# One head of keys and values is in every process. So says no plan of transformers', whose own code then takes it for
# more heads than there are.
ONE_HEAD = {f"model.layers.*.self_attn.{name}_proj": "replicate" for name in "kv"}


@pytest.mark.parametrize(
    ("family", "changes", "plan"),
    [
        pytest.param("llama", ODD, "auto", id="llama"),
        pytest.param("qwen2", {"tie_word_embeddings": True}, "auto", id="tied_and_biased", marks=pytest.mark.slow),
        pytest.param("llama", {"num_key_value_heads": 1}, ONE_HEAD, id="replicated_kv", marks=pytest.mark.slow),
        *(
            pytest.param(family, {}, "auto", id=family, marks=pytest.mark.slow)
            for family in ("phi3", "olmo2", "gpt_neox", "mixtral", "gemma2", "qwen3", "starcoder2", "cohere")
        ),
    ],
)
def test_each_depth_equals_the_whole_model_with_the_weights_that_each_process_rounded(
    family: str, changes: dict[str, Any], plan: Any, tmp_path: Path
) -> None:
    found = run_ranks(depths, saved(tmp_path, family, **changes), plan, folder=tmp_path)
    # Exits off, then each depth, two decode passes each.
    assert found == [{0: 2, 1: 2, 2: 2, LAYERS: 4}] * 2


def caches_after_mixed_depths(rank: int, folder: Path, kind: str, schedule: list[int]) -> Any:
    case = Case(folder)
    ours, theirs = new_cache(case.model, kind), new_cache(case.judges[0], kind)

    now = dict.fromkeys(("depth",), 0)

    def depth(step: int) -> None:
        case.backend.max_depth = now["depth"] = schedule[step]

    def judge(*arguments: Any, **how: Any) -> Any:
        return case.judges[now["depth"]](*arguments, **how)

    steps = len(schedule) - 1
    found = play(case.model, case.compiled, prompt(2, 4), steps, ours, before=depth)
    assert_same(found, play(case.judges[0], judge, prompt(2, 4), steps, theirs, before=depth))
    length = 4 + steps
    for mine, whole in zip(ours.layers, theirs.layers, strict=True):
        heads = mine.keys.shape[1]
        for a, b in ((mine.keys, whole.keys), (mine.values, whole.values)):
            assert_same([a[:, :, :length]], [b[:, rank * heads : (rank + 1) * heads, :length]])
            assert a[:, :, :length].abs().sum(-1).all()
    assert not case.backend.stats().fallbacks
    return heads


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_both_caches_are_complete_after_tokens_of_mixed_depths(kind: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama", **ODD)
    assert run_ranks(caches_after_mixed_depths, folder, kind, [3, 0, 2, 1, 3, 0], folder=tmp_path) == [1, 1]


def exits_of_noise(rank: int, folder: Path) -> Any:
    """The first process decides by its own similarities; the second's are noise, and it was given other settings."""
    case = Case(folder, RiverConfig(tau=2.0))
    case.compiled.generate(prompt(1, 4), **GREEDY)
    similarity, noise = Pass.similarity, torch.Generator().manual_seed(0)
    if rank:
        Pass.similarity = lambda this, index: similarity(this, index) + float(torch.randn((), generator=noise))
    found = []
    for tau, max_depth in ((0.3, None), (0.7, None), (0.9, 2), (2.0, None)):
        river_compile.set_tau(case.compiled, tau + rank)
        river_compile.set_max_depth(case.compiled, 1 if rank else max_depth)
        river_compile.reset_stats(case.compiled)
        tokens = case.compiled.generate(prompt(1, 4), **GREEDY)
        found.append((dict(river_compile.stats(case.compiled).decode_depths), tokens.tolist()))
    return found


def test_all_exit_together_whatever_the_others_compute(tmp_path: Path) -> None:
    first, second = run_ranks(exits_of_noise, saved(tmp_path, "llama"), folder=tmp_path)
    assert first == second
    assert len({depth for found, _ in first for depth in found}) > 1
    assert set(first[-1][0]) == {LAYERS}


def exact_by_name(rank: int, folder: Path) -> Any:
    """By the backend's name, its pieces not compiled. The second process's clock runs wild."""
    seam.compile_piece = as_it_is
    clock, model = time.perf_counter, loaded(folder)
    expected = model.generate(prompt(1, 4), **{**GREEDY, "max_new_tokens": 24})
    compiled = torch.compile(model, backend="river", options={"exact": True})
    time.perf_counter = lambda: clock() * (1 + 9 * rank * math.sin(1e4 * clock()))
    found = compiled.generate(prompt(1, 4), **{**GREEDY, "max_new_tokens": 24})
    assert torch.equal(found, expected)
    stats = river_compile.stats(compiled)
    rounds = {name: stats.exact[name] for name in ("rounds", "drafted", "accepted")}
    return found.tolist(), rounds, stats.backbone_bytes, stats.river_bytes


@pytest.mark.slow
def test_exact_decoding_gives_the_plain_tokens_by_the_same_rounds_in_all(tmp_path: Path) -> None:
    """And each holds as many bytes as a plan of it says."""
    folder = saved(tmp_path, "llama")
    first, second = run_ranks(exact_by_name, folder, folder=tmp_path)
    assert first == second
    _, rounds, backbone, river = first
    assert rounds["drafted"] > 0
    sizes = plan_river(folder, 1e9, ranks=2, config=RiverConfig(head_bits=8)).sizes
    assert sizes.backbone == pytest.approx(backbone, rel=0.01)
    assert sizes.added == pytest.approx(river, rel=0.15)


def one_cannot_quantize(rank: int, folder: Path) -> Any:
    if rank:
        Dequantized.pack = _broken
    case = Case(folder)
    eager = play(case.model, case.model, prompt(1, 3), 1, "dynamic")
    assert_same(play(case.model, case.compiled, prompt(1, 3), 1, "dynamic"), eager, 1e-5)
    strict = Case(folder, RiverConfig(prefill="river", strict=True))
    with pytest.raises(RiverError) as caught:
        play(strict.model, strict.compiled, prompt(1, 3), 0, "dynamic")
    return [*case.backend.stats().fallbacks, str(caught.value)]


def _broken(*_: Any) -> Any:
    raise MemoryError("no room")


@pytest.mark.slow
def test_where_one_cannot_have_a_river_none_has_and_all_say_why(tmp_path: Path) -> None:
    first, second = run_ranks(one_cannot_quantize, saved(tmp_path, "llama"), folder=tmp_path)
    assert second == ["the passes failed with MemoryError: no room"] * 2
    assert first == ["the passes failed with MemoryError: no room (in process 1 of 2)"] * 2


def one_fails_in_a_pass(rank: int, folder: Path) -> Any:
    case = Case(folder)
    play(case.model, case.compiled, prompt(1, 3), 0, "dynamic")
    if rank:
        Pass.tail = _broken
    play(case.model, case.compiled, prompt(1, 3), 0, "dynamic")


def test_where_one_fails_in_a_pass_all_end_with_one_line(tmp_path: Path) -> None:
    first, second = run_ranks(one_fails_in_a_pass, saved(tmp_path, "llama"), folder=tmp_path)
    assert second == "a pass failed in process 1 of 2, and all have to end: MemoryError: no room"
    assert first.startswith("a pass failed in process 0 of 2, and all have to end: RuntimeError: ")


def changed_weights(rank: int, folder: Path) -> Any:
    case = Case(folder)
    case.check(0, prompt(1, 3))
    with torch.no_grad():
        case.model.model.layers[1].mlp.down_proj.weight.mul_(0.5)
    judge = case.judges[0]
    with torch.no_grad():
        judge.model.layers[1].mlp.down_proj.weight.mul_(0.5)
    case.check(0, prompt(1, 3))
    with pytest.raises(InputError, match="spread over several processes"):
        river_compile.tune(case.model, [torch.arange(3, 9)])


@pytest.mark.slow
def test_a_changed_weight_is_quantized_anew_and_none_is_tuned(tmp_path: Path) -> None:
    assert run_ranks(changed_weights, saved(tmp_path, "llama"), folder=tmp_path) == [None, None]
