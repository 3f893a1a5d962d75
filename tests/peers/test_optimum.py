"""optimum-onnx: its models take a river, and `ORTModelForCausalLM` generates with the result."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.peers.peer import NEW_TOKENS, PROMPT, Peer, check_river, save_model

OPTIMUM = Peer(
    "optimum",
    (
        "optimum-onnx==0.1.0",
        "optimum==2.1.0",
        "onnxruntime==1.32.0",
        "onnx==1.23.2",
        "torch==2.13.0",
        "transformers==4.57.6",
    ),
)

_GENERATE = """
import json, sys
import torch
from optimum.onnxruntime import ORTModelForCausalLM
model, prompt, new = ORTModelForCausalLM.from_pretrained(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
ids = torch.tensor([prompt])
out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new,
                     min_new_tokens=new, eos_token_id=None, pad_token_id=0)
print(json.dumps(out[0, len(prompt):].tolist()))
"""


def _generated(folder: Path) -> list[int]:
    tokens: list[int] = json.loads(OPTIMUM.run(_GENERATE, folder, json.dumps(PROMPT), NEW_TOKENS))
    return tokens


@pytest.mark.slow
def test_its_models_take_a_river(tmp_path: Path) -> None:
    OPTIMUM.made()
    source = save_model(tmp_path / "hf")
    built, river = tmp_path / "built", tmp_path / "river"
    OPTIMUM.call("optimum-cli", "export", "onnx", "-m", source, "--task", "text-generation-with-past", built)
    river.mkdir()
    for file in built.iterdir():
        if not file.name.startswith("model.onnx"):
            shutil.copy(file, river)
    expected = _generated(built)
    check_river(built / "model.onnx", source, river / "model.onnx", expected, tmp_path)
    assert _generated(river) == expected
