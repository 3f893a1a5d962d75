"""A model spread over two processes by transformers' tensor parallel plan, compiled with a river."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DistributedConfig

import river_compile
from river_compile import RiverBackend, RiverConfig
from river_compile.exporters.torch.graphs import Pass
from river_compile.exporters.torch.linear import Dequantized
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
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, distributed_config=DistributedConfig(tp_plan=plan)
    ).eval()


class Case:
    """A model spread over the processes, compiled, and the judge of each exit depth: the whole model in one process,
    eager, its layers from there on with weights that each process has rounded for itself."""

    def __init__(self, folder: Path, config: RiverConfig = RIVER_EVERYWHERE, plan: Any = "auto", **how: Any) -> None:
        self.model = loaded(folder, plan)
        self.backend = RiverBackend(config, **{"lowering": Dequantized(), "compiler": as_it_is, **how})
        self.compiled = torch.compile(self.model, backend=self.backend)
        self.judges = [self._judge(folder, depth) for depth in range(LAYERS + 1)]

    @torch.no_grad()
    def _judge(self, folder: Path, depth: int) -> Any:
        judge = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
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


@pytest.mark.parametrize(
    ("family", "changes", "plan"),
    [
        pytest.param("llama", ODD, "auto", id="llama"),
        pytest.param("qwen2", {"tie_word_embeddings": True}, "auto", id="qwen2"),
    ],
)
def test_each_depth_equals_the_whole_model_with_the_weights_that_each_process_rounded(
    family: str, changes: dict[str, Any], plan: Any, tmp_path: Path
) -> None:
    found = run_ranks(depths, saved(tmp_path, family, **changes), plan, folder=tmp_path)
    # Exits off, then each depth, two decode passes each.
    assert found == [{0: 2, 1: 2, 2: 2, LAYERS: 4}] * 2
