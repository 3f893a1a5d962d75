"""Models that accelerate has spread over memory and disk are taken over, and run as the plain model does."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from transformers import AutoModelForCausalLM

import river_compile
from river_compile import RiverBackend, RiverConfig
from river_compile.errors import ConfigError, InputError
from river_compile.exporters.torch import offload
from river_compile.exporters.torch.hooked import is_hooked
from river_compile.exporters.torch.linear import Dequantized
from tests.families import random_model
from tests.torch_models import as_it_is, prompt

LAYERS = 3
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
HERE = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0")


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.compiler.reset()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hooked")
    random_model("llama", LAYERS).save_pretrained(path)
    return path


def spread(folder: Path, tmp_path: Path) -> Any:
    """All layers but the first on the disk."""
    places = dict.fromkeys(HERE, "cpu") | {f"model.layers.{index}": "disk" for index in range(1, LAYERS)}
    return AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "theirs").eval()


def in_the_state(folder: Path, tmp_path: Path) -> Any:
    return cpu_offload(AutoModelForCausalLM.from_pretrained(folder).eval())


def on_the_disk(folder: Path, tmp_path: Path) -> Any:
    return disk_offload(AutoModelForCausalLM.from_pretrained(folder).eval(), tmp_path / "theirs")


def compiled(model: Any, **options: Any) -> Any:
    return torch.compile(model, backend=RiverBackend(RiverConfig(**options), lowering=Dequantized(), compiler=as_it_is))


def generate(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.generate(prompt(1, 5), **GREEDY)
    return found


def offloaded(model: Any) -> set[str]:
    return {name.split(".")[2] for name, weight in model.named_parameters() if offload.find(weight) is not None}


@pytest.mark.parametrize(
    "load",
    [pytest.param(way, marks=pytest.mark.slow) for way in (spread, in_the_state)] + [pytest.param(on_the_disk)],
)
def test_a_model_of_accelerate_is_taken_over(load: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    model = load(folder, tmp_path)
    moved = river_compile.offload(model, after=2)
    assert not is_hooked(model)
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert offloaded(model) == {"2"}
    plain, found = AutoModelForCausalLM.from_pretrained(folder).eval(), compiled(model, tau=2.0)
    assert torch.equal(generate(found), generate(plain))
    assert river_compile.stats(found).offloaded_bytes == moved
    assert not river_compile.stats(found).fallbacks
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(again[name], value) for name, value in plain.state_dict().items())


@pytest.mark.slow
def test_a_model_compiled_to_be_offloaded_is_taken_over_when_it_generates(folder: Path, tmp_path: Path) -> None:
    model, plain = spread(folder, tmp_path), AutoModelForCausalLM.from_pretrained(folder).eval()
    assert torch.equal(generate(compiled(model, tau=2.0, offload_after=1)), generate(plain))
    assert offloaded(model) == {"1", "2"}


def test_one_compiled_as_it_is_names_what_to_call(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"call river_compile.offload\(model, after=...\) before it is compiled"):
        generate(compiled(spread(folder, tmp_path), strict=True))


def test_a_plain_model_is_offloaded_before_it_is_compiled() -> None:
    model, plain = random_model("llama", LAYERS), random_model("llama", LAYERS)
    layer = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
    assert river_compile.offload(model, memory=2 * layer) > 0
    assert offloaded(model) == {"2"}
    assert river_compile.offload(model, after=2) == 0
    assert river_compile.offload(model, after=1) > 0
    assert torch.equal(generate(model), generate(plain))
    assert torch.equal(generate(compiled(model, tau=2.0, keep_layers=(2,))), generate(plain))


def test_what_accelerate_has_lost_is_one_clear_error_and_changes_nothing(folder: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "model"
    shutil.copytree(folder, theirs)
    model = spread(theirs, tmp_path)
    (theirs / "model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot be read from where accelerate put it"):
        river_compile.offload(model, after=2)
    assert is_hooked(model)
    shutil.copy(folder / "model.safetensors", theirs)
    assert river_compile.offload(model, after=2) > 0


def test_how_much_stays_is_to_be_said() -> None:
    with pytest.raises(ConfigError, match="say how many layers stay"):
        river_compile.offload(random_model("llama", LAYERS))
