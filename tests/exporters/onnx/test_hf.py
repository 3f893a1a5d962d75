"""Hugging Face folders that hold no decoder: one line says what they hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers as hf
from safetensors.torch import load_file, save_file

from river_compile.api import plan
from river_compile.errors import InputError
from river_compile.exporters.onnx.hf import load_decoder
from tests.families import random_model

_SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_BART = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("attention_heads", 2))}


def _refused(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        plan(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    random_model("llama").save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.mark.parametrize(
    "model",
    (
        lambda: hf.BartForConditionalGeneration(hf.BartConfig(d_model=32, vocab_size=64, **_BART)),
        lambda: hf.T5ForConditionalGeneration(hf.T5Config(d_model=32, d_ff=64, num_layers=1, vocab_size=64)),
    ),
)
def test_an_encoder_decoder_model(model: Callable[[], hf.PreTrainedModel], tmp_path: Path) -> None:
    """Some of them load as a decoder with embeddings at random, since those are stored with the encoder."""
    model().save_pretrained(tmp_path)
    assert "an encoder-decoder model (" in _refused(tmp_path)


def test_an_encoder_of_text(tmp_path: Path) -> None:
    hf.BertForMaskedLM(hf.BertConfig(vocab_size=64, **_SMALL)).save_pretrained(tmp_path)
    assert _refused(tmp_path) == "the model keeps no KV cache: it is an encoder, or set up as one"


def test_layers_that_keep_no_keys(tmp_path: Path) -> None:
    """Lightning attention has a state of one size, and transformers' cache an empty layer for it."""
    sizes = _SMALL | {"num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 2, "vocab_size": 64}
    kinds = ["linear_attention", "full_attention"]
    hf.MiniMaxForCausalLM(hf.MiniMaxConfig(layer_types=kinds, **sizes)).save_pretrained(tmp_path)
    assert "of the model's KV cache hold no key and value" in _refused(tmp_path)


def test_an_encoder_of_images(tmp_path: Path) -> None:
    hf.ViTModel(hf.ViTConfig(**_SMALL)).save_pretrained(tmp_path)
    assert "not a causal language model, or a 'vit' model that cannot be loaded" in _refused(tmp_path)


def test_weights_that_are_missing(llama: Path) -> None:
    """transformers would make them up."""
    weights = load_file(llama / "model.safetensors")
    lost = [name for name in weights if "layers.1.mlp" in name]
    save_file(
        {name: w for name, w in weights.items() if name not in lost}, llama / "model.safetensors", {"format": "pt"}
    )
    assert f"{len(lost)} weights of the model are missing, such as model.layers.1.mlp.down_proj" in _refused(llama)


@pytest.mark.parametrize("method", ("gptq", "awq"))
def test_a_quantized_model(llama: Path, method: str) -> None:
    config = json.loads((llama / "config.json").read_text())
    settings = {"quant_method": method, "bits": 4, "group_size": 32}
    (llama / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    assert f"already quantized ({method}), so start from the float model" in _refused(llama)


@pytest.mark.parametrize(
    ("name", "content", "why"),
    (
        ("model.gguf", "GGUF", "model.gguf is a GGUF file"),
        ("onnx/model.onnx", "", "no weights of a Hugging Face model, but ONNX: give the file, "),
        ("adapter_config.json", "{}", "an adapter (LoRA) without its base model"),
        ("model.safetensors", "", "no Hugging Face model: it has no config.json"),
    ),
)
def test_a_folder_that_holds_something_else(tmp_path: Path, name: str, content: str, why: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    assert why in _refused(tmp_path)


def test_no_folder(tmp_path: Path) -> None:
    assert "no such file or folder" in _refused(tmp_path / "none")


def test_a_decoder_is_loaded_whole(llama: Path) -> None:
    loaded, saved = load_decoder(llama).state_dict(), load_file(llama / "model.safetensors")
    assert all((loaded[name] == weight).all() for name, weight in saved.items())
