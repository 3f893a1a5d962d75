"""Architectures beyond the ones tested closely: the whole rewrite at every depth, once each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from river_compile.api import export
from river_compile.config import RiverConfig
from river_compile.errors import InputError
from river_compile.exporters.onnx.hf import export_decoder
from tests.conftest import Exported
from tests.families import NAMED, NOT_EXPORTED, VOCABULARY, exported_layers, families_that_export, random_model
from tests.oracle import assert_every_depth
from tests.torch_models import gemma3n_that_shares_keys, gemma4_that_shares_keys


@pytest.mark.parametrize("family", families_that_export(*NAMED))
def test_each_depth_equals_the_plain_model_with_dequantized_weights(
    exported: Exported, family: str, tmp_path: Path
) -> None:
    layers = exported_layers(family)
    original, river = exported(family, layers), tmp_path / "m.onnx"
    report = export(original, river, RiverConfig(tau=2.0, activations="float"))
    assert report.layers == report.river_layers == layers
    # Longer than the sliding window of eight that some of them have.
    assert_every_depth(original, river, lengths=(12, 1, 2))


def test_a_decoder_whose_cache_has_room_for_an_encoders_too(tmp_path: Path) -> None:
    """Decoders by way of BERT keep an `EncoderDecoderCache`, half of which is of no use to them."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
    config = hf.MegatronBertConfig(vocab_size=VOCABULARY, is_decoder=True, max_position_embeddings=64, **sizes)
    torch.manual_seed(0)
    export_decoder(hf.MegatronBertForCausalLM(config).eval(), tmp_path / "model.onnx")
    report = export(tmp_path / "model.onnx", tmp_path / "m.onnx", RiverConfig(tau=2.0, activations="float"))
    assert report.river_layers == 2
    assert_every_depth(tmp_path / "model.onnx", tmp_path / "m.onnx", lengths=(5, 1, 2))


@pytest.mark.skipif(not hasattr(hf, "Gemma4TextConfig"), reason="an older transformers")
@pytest.mark.parametrize(
    "model_of", [gemma4_that_shares_keys, pytest.param(gemma3n_that_shares_keys, marks=pytest.mark.slow)]
)
def test_layers_that_have_inputs_of_their_own_and_read_the_keys_of_others(
    model_of: Callable[[], Any], tmp_path: Path
) -> None:
    """Embeddings for each layer are made before the first one; the last two layers keep no keys and values."""
    export_decoder(model_of(), tmp_path / "model.onnx")
    report = export(tmp_path / "model.onnx", tmp_path / "m.onnx", RiverConfig(tau=2.0, activations="float"))
    assert report.layers == report.river_layers == 4
    assert_every_depth(tmp_path / "model.onnx", tmp_path / "m.onnx", lengths=(12, 1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("family", NOT_EXPORTED)
def test_what_torch_cannot_export_is_one_clear_line(family: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="torch cannot export the model to ONNX: ") as caught:
        export_decoder(random_model(family), tmp_path / "model.onnx")
    assert "\n" not in str(caught.value)
