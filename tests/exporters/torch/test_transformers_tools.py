"""What transformers builds around a model runs its compiled form, or says in one line that it does not."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CompileConfig,
    GenerationConfig,
    Trainer,
    TrainingArguments,
    pipeline,
)

import river_compile
from river_compile import RiverBackend, RiverConfig
from river_compile.exporters.torch.linear import Dequantized
from tests.families import LAYERS
from tests.torch_models import as_it_is
from tests.words import save_word_model, save_word_tokenizer

TEXT = "w5 w9 w17 w33"
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_word_tokenizer(save_word_model(tmp_path_factory.mktemp("hf")))


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.compiler.reset()


def _loaded(folder: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def _backend() -> RiverBackend:
    return RiverBackend(RiverConfig(tau=2.0), lowering=Dequantized(), compiler=as_it_is)


def _expected(folder: Path) -> str:
    model, tokenizer = _loaded(folder)
    inputs = tokenizer(TEXT, return_tensors="pt")
    tokens = model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(tokens))


@pytest.mark.parametrize("way", ("torch.compile", "model.compile"))
def test_a_pipeline_runs_the_compiled_model(folder: Path, way: str) -> None:
    (model, tokenizer), backend = _loaded(folder), _backend()
    if way == "torch.compile":
        model = torch.compile(model, backend=backend)
    else:
        model.compile(backend=backend)
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    made = write(TEXT, return_full_text=False, **GREEDY)[0]["generated_text"]
    assert made.split() == _expected(folder).split()
    assert sum(backend.decode_depths.values()) == GREEDY["max_new_tokens"] - 1


def test_a_compile_config_names_the_backend(folder: Path) -> None:
    """transformers compiles by it on devices that it lists; here it is told to do so on this one."""
    model, tokenizer = _loaded(folder)
    config = CompileConfig(backend=_backend(), mode=None, fullgraph=False)
    config._compile_all_devices = True
    inputs = tokenizer(TEXT, return_tensors="pt")
    tokens = model.generate(**inputs, cache_implementation="static", compile_config=config, **GREEDY)
    assert tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :]) == _expected(folder)
    # The first pass is not compiled; transformers copies the config, the backend with it.
    assert river_compile.stats(model).decode_depths == {LAYERS: GREEDY["max_new_tokens"] - 1}


@pytest.mark.slow
def test_generation_in_batches_runs_past_it_and_says_so_once(folder: Path) -> None:
    (model, tokenizer), backend = _loaded(folder), _backend()
    compiled: Any = torch.compile(model, backend=backend)
    settings = GenerationConfig(**GREEDY, eos_token_id=2, pad_token_id=0)
    ids = tokenizer(TEXT)["input_ids"]
    with pytest.warns(UserWarning, match="generate_batch made no pass through the compiled model"):
        made = compiled.generate_batch(inputs=[ids], generation_config=settings)
    assert tokenizer.decode(next(iter(made.values())).generated_tokens) == _expected(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        compiled.generate_batch(inputs=[ids], generation_config=settings)


def test_a_trainer_evaluates_without_a_river_and_says_so(folder: Path, tmp_path: Path) -> None:
    """Its passes keep no KV cache."""
    (model, _), backend = _loaded(folder), _backend()
    rows = [{"input_ids": torch.arange(3, 11), "labels": torch.arange(3, 11)}] * 4
    arguments = TrainingArguments(output_dir=str(tmp_path), per_device_eval_batch_size=2, report_to=[], use_cpu=True)
    expected = Trainer(model=model, args=arguments, eval_dataset=rows).evaluate()["eval_loss"]
    model.compile(backend=backend)
    with pytest.warns(UserWarning, match="no exit river, compiled by plain Inductor: the graph "):
        found = Trainer(model=model, args=arguments, eval_dataset=rows).evaluate()["eval_loss"]
    assert found == pytest.approx(expected, rel=1e-5)
    assert backend.fallbacks
