"""optimum-onnx: its models take a river, and `ORTModelForCausalLM` generates with the result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from river_compile.cli.export import main as river_export
from river_compile.runtime import OnnxDecoder
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
OTHER = [40, 3, 8, 21]

_GENERATE = """
import json, sys
import torch
from optimum.onnxruntime import ORTModelForCausalLM
prompts, new, binding = json.loads(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "binding"
model = ORTModelForCausalLM.from_pretrained(sys.argv[1], use_io_binding=binding)
assert model.use_io_binding == binding
ids = torch.tensor(prompts)
out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new,
                     min_new_tokens=new, eos_token_id=None, pad_token_id=0)
print(json.dumps(out[:, ids.shape[1]:].tolist()))
"""

_PIPELINE = """
import sys
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer, pipeline
model = ORTModelForCausalLM.from_pretrained(sys.argv[1])
write = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(sys.argv[1]))
print(write("w5 w9 w17 w33", max_new_tokens=8, do_sample=False, return_full_text=False)[0]["generated_text"])
"""


def _generated(folder: Path, prompts: list[list[int]], how: str = "plain") -> list[list[int]]:
    tokens: list[list[int]] = json.loads(OPTIMUM.run(_GENERATE, folder, json.dumps(prompts), NEW_TOKENS, how))
    return tokens


@pytest.mark.slow
def test_its_folders_take_a_river(tmp_path: Path) -> None:
    OPTIMUM.made()
    source = save_model(tmp_path / "hf")
    built, river = tmp_path / "built", tmp_path / "river"
    OPTIMUM.call("optimum-cli", "export", "onnx", "-m", source, "--task", "text-generation-with-past", built)
    expected = _generated(built, [PROMPT, OTHER])
    check_river(built, source, river / "model.onnx", expected[0], tmp_path)
    for how in ("plain", "binding"):
        assert _generated(river, [PROMPT, OTHER], how) == expected


@pytest.mark.slow
def test_what_is_made_of_a_hugging_face_folder_loads_with_its_tokenizer(tmp_path: Path) -> None:
    """With exits, and in a pipeline: as our own runtime decodes it."""
    OPTIMUM.made()
    source = save_model(tmp_path / "hf")
    made = CliRunner().invoke(river_export, [str(source), "--tau", "0.2", "-o", str(tmp_path / "river")])
    assert made.exit_code == 0, made.output
    own = OnnxDecoder(tmp_path / "river" / "model.onnx").generate([PROMPT], NEW_TOKENS)
    assert own.mean_exit_depth < 4
    for how in ("plain", "binding"):
        assert _generated(tmp_path / "river", [PROMPT], how) == own.tokens
    text = OPTIMUM.run(_PIPELINE, tmp_path / "river")
    assert text.split() == [f"w{token}" for token in own.tokens[0]]
