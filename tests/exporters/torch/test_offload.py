"""Deep backbone layers in a mapped file: the same tokens, and their memory only while they run."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import river_compile
from river_compile import RiverBackend, RiverConfig
from river_compile.errors import ConfigError, InputError
from river_compile.exporters.torch import offload
from river_compile.exporters.torch.linear import Dequantized
from tests.families import random_model
from tests.mapped_memory import inode, only_where_told, resident
from tests.torch_models import as_it_is, drafts_cost_nothing, play, prompt

LAYERS, STAY = 3, 1
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


@pytest.fixture(autouse=True)
def fresh() -> None:
    """Models of other tests, which have files of one length, are gone."""
    torch.compiler.reset()
    gc.collect()


def quick(model: Any, **options: Any) -> Any:
    # Whether a later model's prompts count as short depends on those before it.
    config = RiverConfig(**{"offload_after": STAY, "prefill": "backbone", **options})
    return torch.compile(model, backend=RiverBackend(config, lowering=Dequantized(), compiler=as_it_is))


def decoded(model: Any, compiled: Any, cache: str = "static") -> list[torch.Tensor]:
    return play(model, compiled, prompt(1, 5), 3, cache)


def deep(model: Any) -> list[torch.nn.Parameter]:
    """The weights of products in the layers that do not stay."""
    return [p for layer in model.model.layers[STAY:] for p in layer.parameters() if p.dim() == 2]


def file_of(model: Any) -> offload.WeightsFile:
    extent = offload.find(deep(model)[0])
    assert extent is not None
    return extent.file


def offloaded(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if offload.find(parameter) is not None}


@pytest.mark.parametrize("cache", ["static", pytest.param("dynamic", marks=pytest.mark.slow)])
def test_every_depth_and_every_exit_computes_the_same(cache: str) -> None:
    found, told = [], []
    for after in (None, STAY):
        torch.compiler.reset()
        model = random_model("llama", LAYERS)
        compiled = quick(model, offload_after=after, prefill="auto")
        for tau, depth in [(2.0, None), (0.9, None), (0.0, None), (2.0, 0), (2.0, 2)]:
            river_compile.set_tau(compiled, tau)
            river_compile.set_max_depth(compiled, depth)
            found.append(decoded(model, compiled, cache))
        told.append(river_compile.stats(compiled))
    plain, offloading = found[: len(found) // 2], found[len(found) // 2 :]
    for here, there in zip(plain, offloading, strict=True):
        assert all(map(torch.equal, here, there))
    here, there = told
    assert here.decode_depths == there.decode_depths
    assert {0, 1, 2, LAYERS} <= here.decode_depths.keys()
    assert here.graphs == there.graphs
    assert (here.offloaded_bytes, there.offloaded_bytes) == (0, sum(weight.nbytes for weight in deep(model)))


def test_what_the_river_reads_stays_in_memory() -> None:
    """Norms, the head and the embedding that it shares, and a layer that has no twin."""
    model = random_model("llama", LAYERS)
    model.lm_head.weight = model.model.embed_tokens.weight
    decoded(model, quick(model, keep_layers=(1,)))
    assert {name.split(".")[2] for name in offloaded(model)} == {"2"}
    assert all(name.endswith("_proj.weight") for name in offloaded(model))


@pytest.mark.parametrize(("memory", "first"), [(0, 0), (9, 0), (10, 1), (34, 2), (35, 3), (99, 3)])
def test_as_many_layers_stay_as_the_memory_given_holds(memory: int, first: int) -> None:
    assert offload.first_offloaded(RiverConfig(offload_memory=memory), [10, 20, 5]) == first


@only_where_told
def test_the_memory_of_deep_layers_goes_when_they_have_run() -> None:
    model = random_model("llama", LAYERS)
    compiled = quick(model, tau=2.0)
    decoded(model, compiled)
    address = file_of(model).address
    assert resident(address) == 0
    # Whoever reads a weight has it in memory, until a pass has run its layer.
    for weight in deep(model):
        weight.sum()
    assert resident(address) >= sum(weight.nbytes for weight in deep(model))
    decoded(model, compiled)
    assert resident(address) == 0


@only_where_told
def test_a_pass_has_one_offloaded_layer_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("llama", 4)
    compiled = quick(model, tau=2.0)
    for _ in range(2):
        decoded(model, compiled)
    address, most = file_of(model).address, []
    drop = offload.Extent.drop

    def looking(extent: offload.Extent) -> None:
        most.append(resident(address))
        drop(extent)

    monkeypatch.setattr(offload.Extent, "drop", looking)
    monkeypatch.setattr(offload.Extent, "prefetch", lambda extent: None)
    decoded(model, compiled)
    layer = sum(weight.nbytes for weight in model.model.layers[1].parameters())
    # A graph that is new lets go of all, none of which is there.
    assert len([size for size in most if size]) == 4 * 3
    assert 0 < max(most) < 2 * layer


def write_with_a_trace(weight: torch.nn.Parameter, value: torch.Tensor) -> None:
    with torch.no_grad():
        weight.copy_(value)


def write_without(weight: torch.nn.Parameter, value: torch.Tensor) -> None:
    weight.data.copy_(value)


@pytest.mark.parametrize("write", [pytest.param(write_with_a_trace, marks=pytest.mark.slow), write_without])
@pytest.mark.parametrize("depth", [0, pytest.param(None, marks=pytest.mark.slow)])
def test_a_change_outlasts_its_memory_and_reaches_backbone_and_river(write: Callable[..., None], depth: Any) -> None:
    model, other = random_model("llama", LAYERS), random_model("llama", LAYERS, seed=5)
    compiled = quick(model)
    decoded(model, compiled)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        write(mine, theirs)
    offload.let_go(model.parameters())
    river_compile.set_max_depth(compiled, depth)
    found = decoded(model, compiled)
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    assert len(offloaded(model)) == len(deep(model))
    judge = quick(other, offload_after=None, max_depth=depth)
    assert all(map(torch.equal, found, decoded(other, judge)))


def test_refresh_reaches_a_change_that_spares_every_sample() -> None:
    model = random_model("llama", LAYERS)
    compiled = quick(model, max_depth=0)
    decoded(model, compiled)
    before = decoded(model, compiled)
    model.model.layers[2].mlp.up_proj.weight.data[0, 1:4] += 9.0
    river_compile.refresh(compiled)
    found = decoded(model, compiled)
    judge = quick(copy.deepcopy(model), max_depth=0, offload_after=None)
    assert all(map(torch.equal, found, decoded(model, judge)))
    assert not any(map(torch.equal, found[1:], before[1:]))


def test_exchanged_weights_are_offloaded_again() -> None:
    model, other = random_model("llama", LAYERS), random_model("llama", LAYERS, seed=5)
    compiled = quick(model, max_depth=0)
    decoded(model, compiled)
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
    assert not offloaded(model)
    found = decoded(model, compiled)
    assert len(offloaded(model)) == len(deep(model))
    assert all(map(torch.equal, found, decoded(other, quick(other, max_depth=0, offload_after=None))))


def test_every_model_that_a_graph_serves_is_offloaded() -> None:
    one, two = random_model("llama", LAYERS), random_model("llama", LAYERS, seed=5)
    backend = RiverBackend(RiverConfig(offload_after=STAY), lowering=Dequantized(), compiler=as_it_is)
    for model in (one, two):
        decoded(model, torch.compile(model, backend=backend))
    assert len(offloaded(one)) == len(offloaded(two)) == len(deep(one))
    assert file_of(one) is not file_of(two)


def test_what_is_done_with_parameters_goes_on(tmp_path: Path) -> None:
    model, plain = random_model("llama", LAYERS), random_model("llama", LAYERS)
    decoded(model, quick(model))
    model.save_pretrained(tmp_path)
    saved = type(model).from_pretrained(tmp_path)
    copied = copy.deepcopy(model)
    assert not offloaded(copied)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    for state in (saved.state_dict(), copied.state_dict(), torch.load(tmp_path / "state.pt"), model.state_dict()):
        assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())
    copied.model.layers[2].mlp.up_proj.weight.data.zero_()
    assert torch.equal(model.model.layers[2].mlp.up_proj.weight, plain.model.layers[2].mlp.up_proj.weight)
    other = random_model("llama", LAYERS, seed=5)
    model.load_state_dict(other.state_dict())
    assert len(offloaded(model)) == len(deep(model))
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_exact_tokens_are_the_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    drafts_cost_nothing(monkeypatch)
    model = random_model("llama", LAYERS)
    expected = model.generate(prompt(1, 5), **GREEDY)
    compiled = quick(model, exact=True)
    assert torch.equal(compiled.generate(prompt(1, 5), **GREEDY), expected)
    assert river_compile.stats(compiled).exact["rounds"] > 0
    assert len(offloaded(model)) == len(deep(model))


def descriptor_of(file: offload.WeightsFile) -> int:
    """A descriptor of the file, which has no name."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.fstat(int(name)).st_ino == inode(file.address):
                return int(name)
    raise AssertionError("no descriptor has the file open")


@only_where_told
def test_a_file_that_was_cut_is_an_error_before_the_pass() -> None:
    model = random_model("llama", LAYERS)
    compiled = quick(model)
    decoded(model, compiled)
    os.ftruncate(descriptor_of(file_of(model)), 4096)
    for _ in range(2):
        with pytest.raises(InputError, match="was cut to 4096 of its"):
            decoded(model, compiled)
    torch.compiler.reset()
    with pytest.raises(InputError, match="was cut to 4096 of its"):
        decoded(model, quick(model, strict=True))


def test_no_file_is_left_behind(tmp_path: Path) -> None:
    model = random_model("llama", LAYERS)
    assert offload.move([deep(model)], tmp_path) == sum(weight.nbytes for weight in deep(model))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offload_after": -1}, "offload_after: must be a whole number"),
        ({"offload_after": 2, "offload_memory": 10}, "offload_memory: offload_after says how many layers stay"),
        ({"offload_after": 2, "offload_folder": "missing/folder"}, "offload_folder: missing/folder: No such file"),
    ],
)
def test_what_cannot_be_is_one_clear_error(options: dict[str, Any], message: str) -> None:
    model = random_model("llama", LAYERS)
    with pytest.raises(ConfigError, match=message):
        decoded(model, quick(model, **options))
    assert not offloaded(model)


def test_a_folder_in_memory_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(offload, "is_in_memory", lambda folder: folder == tmp_path)
    config, notes = RiverConfig(offload_after=0, offload_folder=tmp_path), dict[str, None]()
    assert offload.offload(config, [deep(random_model("llama", LAYERS))], [1], notes) > 0
    assert "offloading saves nothing" in "".join(notes)
