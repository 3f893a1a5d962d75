"""ONNX Runtime GenAI: its builder's models take a river, and its generator runs the result in place of the original."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from river_compile.runtime import OnnxDecoder
from tests.peers.peer import NEW_TOKENS, PROMPT, Peer, check_river, save_model

GENAI = Peer(
    "genai",
    (
        "onnxruntime-genai==0.18.0",
        "onnxruntime==1.32.0",
        "onnx==1.23.2",
        "onnx-ir==1.1.0",
        "onnxscript==0.7.2",
        "torch==2.13.0",
        "transformers==5.24.0",
    ),
)

_GENERATE = """
import json, sys
import numpy as np, onnxruntime_genai as og
model, prompt, new = og.Model(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
settings = og.GeneratorParams(model)
settings.set_search_options(max_length=len(prompt) + new, do_sample=False)
generator = og.Generator(model, settings)
generator.append_tokens(np.array([prompt], np.int32))
for _ in range(new):
    generator.generate_next_token()
print(json.dumps([int(token) for token in generator.get_sequence(0)][len(prompt):]))
"""


def _generated(folder: Path) -> list[int]:
    tokens: list[int] = json.loads(GENAI.run(_GENERATE, folder, json.dumps(PROMPT), NEW_TOKENS))
    return tokens


@pytest.mark.slow
@pytest.mark.parametrize("precision", ("fp32", "fp16"))
def test_the_builders_models_take_a_river(tmp_path: Path, precision: str) -> None:
    GENAI.made()
    source = save_model(tmp_path / "hf")
    built, river = tmp_path / "built", tmp_path / "river"
    builder = ["-m", "onnxruntime_genai.models.builder", "-i", source, "-o", built, "-e", "cpu", "-p", precision]
    GENAI.call("python", *builder, "-c", tmp_path / "cache")
    river.mkdir()
    for file in built.iterdir():
        if not file.name.startswith("model.onnx"):
            shutil.copy(file, river)
    # In float16 the builder notes wrong shapes, by which its own generator cannot decode; a river notes none.
    plain = OnnxDecoder(built / "model.onnx").generate([PROMPT], NEW_TOKENS).tokens[0]
    expected = _generated(built) if precision == "fp32" else plain
    check_river(built / "model.onnx", source, river / "model.onnx", expected, tmp_path)
    assert _generated(river) == expected
