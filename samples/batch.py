"""Complete several prompts of different lengths as one batch, with an exit river.

    python samples/batch.py [MODEL_FOLDER] [--tau 0.95] [--tokens 24]

A batch exits when the least similar of its tokens may; the padding on the left has no say.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from smollm2 import smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer

import river_compile

PROMPTS = ["The capital of France is", "Water boils at a temperature of", "The three primary colours are red, blue and"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="folder of a Hugging Face model (default: SmolLM2)")
    parser.add_argument("--tau", type=float, default=0.95)
    parser.add_argument("--tokens", type=int, default=24)
    arguments = parser.parse_args()
    folder = arguments.model or smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model = torch.compile(model, backend="river", options={"tau": arguments.tau})
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    output = model.generate(**inputs, max_new_tokens=arguments.tokens, do_sample=False)
    for text in tokenizer.batch_decode(output, skip_special_tokens=True):
        print(text)
    print(river_compile.stats(model))


if __name__ == "__main__":
    main()
