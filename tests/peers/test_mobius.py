"""mobius-onnx: its models take a river, with a cache that grows and with one of fixed length."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from river_compile.errors import ConfigError
from river_compile.runtime import OnnxDecoder
from tests.peers.peer import NEW_TOKENS, PROMPT, Peer, check_river, save_model

MOBIUS = Peer(
    "mobius",
    (
        "mobius-onnx==0.1.0",
        "onnx==1.23.2",
        "onnx-ir==1.1.0",
        "onnxscript==0.7.2",
        "torch==2.13.0",
        "transformers==5.24.0",
    ),
)
_ROOM = 32


@pytest.mark.slow
@pytest.mark.parametrize("options", ((), ("--optimize",), ("--static-cache", "--max-seq-len", _ROOM)))
def test_its_models_take_a_river(tmp_path: Path, options: tuple[object, ...]) -> None:
    """It brings no runtime of its own: what its models should say, the model that they were made of says."""
    MOBIUS.made()
    source = save_model(tmp_path / "hf")
    MOBIUS.call("mobius", "build", "--config", source, tmp_path / "built", *options)
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        tokens = AutoModelForCausalLM.from_pretrained(source).generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=None,
        )
    expected = tokens[0, len(PROMPT) :].tolist()
    check_river(tmp_path / "built" / "model.onnx", source, tmp_path / "m.onnx", expected, tmp_path)
    if "--static-cache" in options:
        with pytest.raises(ConfigError, match=rf"holds {_ROOM} tokens"):
            OnnxDecoder(tmp_path / "m.onnx").generate([PROMPT], _ROOM)
