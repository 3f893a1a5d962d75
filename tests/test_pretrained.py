"""One call that loads, compiles and warms up; tuned rivers that outlive their process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import river_compile
from river_compile.compiled import TUNED, tuned_digest
from river_compile.errors import ConfigError, InputError
from river_compile.exporters.torch import saved, seam
from river_compile.exporters.torch.linear import Dequantized
from tests.families import VOCABULARY, random_model
from tests.torch_models import as_it_is, prompt

GREEDY: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seam, "compile_piece", as_it_is)
    monkeypatch.setattr("river_compile.backend.lowering_for", lambda *_: Dequantized())
    torch.compiler.reset()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random_model("llama", 3).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def _texts() -> list[torch.Tensor]:
    return [torch.randint(3, VOCABULARY, (40,), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def test_one_call_is_a_compiled_model_that_is_warm(folder: Path) -> None:
    model = river_compile.from_pretrained(folder, tau=2.0, options={"bits": 8})
    assert river_compile.stats(model).decode_depths == {3: 3}
    graphs = river_compile.stats(model).graphs
    expected = random_model("llama", 3).generate(prompt(1, 24), **GREEDY)
    assert torch.equal(model.generate(prompt(1, 24), **GREEDY), expected)
    assert river_compile.stats(model).graphs <= graphs + 1


def test_exact_and_cold(folder: Path) -> None:
    model = river_compile.from_pretrained(str(folder), exact=True, warm_up=False)
    with pytest.raises(InputError, match="not called since"):
        river_compile.stats(model)
    expected = random_model("llama", 3).generate(prompt(1, 9), **GREEDY)
    assert torch.equal(model.generate(prompt(1, 9), **GREEDY), expected)


def test_mistakes_are_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tau: given twice"):
        river_compile.from_pretrained(folder, tau=0.9, options={"tau": 0.8})
    with pytest.raises(ConfigError, match="no_such"):
        river_compile.from_pretrained(folder, options={"no_such": 1})
    with pytest.raises(InputError, match="not a causal language model"):
        river_compile.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no saved river"):
        river_compile.from_pretrained(folder, river=tmp_path)


def test_a_saved_river_is_the_tuned_one_to_the_last_bit(folder: Path, tmp_path: Path) -> None:
    model = random_model("llama", 3)
    assert river_compile.tune(model, _texts()) == 21
    assert river_compile.save_river(model, tmp_path / "river") == 21
    again = random_model("llama", 3)
    assert tuned_digest(again) != tuned_digest(model)
    assert river_compile.load_river(again, tmp_path / "river") == 21
    assert tuned_digest(again) == tuned_digest(model)
    compiled = river_compile.from_pretrained(folder, river=tmp_path / "river", options={"max_depth": 0})
    tuned = torch.compile(model, backend="river", options={"quantizer": "gptq", "max_depth": 0})
    assert torch.equal(compiled.generate(prompt(1, 9), **GREEDY), tuned.generate(prompt(1, 9), **GREEDY))


def test_the_backend_takes_a_saved_river_by_an_option(folder: Path, tmp_path: Path) -> None:
    """By the weights that it was made of: names are not asked, and a graph knows none."""
    model = random_model("llama", 3)
    river_compile.tune(model, _texts())
    river_compile.save_river(model, tmp_path / "river")
    options = {"saved_river": str(tmp_path / "river"), "max_depth": 0}
    again = torch.compile(random_model("llama", 3), backend="river", options=options)
    tuned = torch.compile(model, backend="river", options={"quantizer": "gptq", "max_depth": 0})
    assert torch.equal(again.generate(prompt(1, 9), **GREEDY), tuned.generate(prompt(1, 9), **GREEDY))
    assert river_compile.stats(again).river_layers == 3 and tuned_digest(again) == tuned_digest(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "made for other weights than this model's"),
        ({"quantizer": "lsq"}, "made by gptq, not by lsq"),
        ({"saved_river": "nowhere"}, "no saved river"),
    ],
)
def test_the_option_refuses_what_is_another_models(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    model = random_model("llama", 3)
    river_compile.tune(model, _texts())
    river_compile.save_river(model, tmp_path / "river")
    other = random_model("llama", 3)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.01)
    compiled = torch.compile(other, backend="river", options={"saved_river": str(tmp_path / "river")} | options)
    with pytest.raises(ConfigError, match=f"saved_river: .*{message}"):
        compiled.generate(prompt(1, 9), **GREEDY)


def test_another_models_river_is_refused(tmp_path: Path) -> None:
    model = random_model("llama", 3)
    river_compile.tune(model, _texts())
    river_compile.save_river(model, tmp_path)
    with pytest.raises(InputError, match="made for another model: this one has no"):
        river_compile.load_river(random_model("gpt2", 3), tmp_path)
    other = random_model("llama", 3)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[5, 7] += 1
    with pytest.raises(InputError, match=r"made for other weights than this model's \(model.layers.1.mlp.up_proj"):
        river_compile.load_river(other, tmp_path)
    with pytest.raises(InputError, match="made for other weights"):
        river_compile.load_river(random_model("llama", 3).to(torch.bfloat16), tmp_path)
    assert not list(TUNED.of(other.model.layers[0].mlp.up_proj.weight))


@pytest.mark.parametrize("kind", ["truncated", "foreign", "nonsense"])
def test_a_file_of_another_kind_is_refused(kind: str, tmp_path: Path) -> None:
    model = random_model("llama", 2)
    river_compile.tune(model, _texts())
    river_compile.save_river(model, tmp_path)
    path = tmp_path / saved.FILE
    if kind == "foreign":
        random_model("llama", 2).save_pretrained(tmp_path / "weights")
        path.write_bytes((tmp_path / "weights" / "model.safetensors").read_bytes())
    else:
        path.write_bytes(path.read_bytes()[:-100] if kind == "truncated" else b"nothing of the kind")
    with pytest.raises(InputError, match="no saved river of this release" if kind == "foreign" else "damaged"):
        river_compile.load_river(model, tmp_path)


def test_nothing_tuned_or_changed_since_is_nothing_to_save(tmp_path: Path) -> None:
    model = random_model("llama", 2)
    with pytest.raises(InputError, match="no tuned weights to save"):
        river_compile.save_river(model, tmp_path / "river")
    assert not (tmp_path / "river").exists()
