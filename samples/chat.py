"""Chat with a Hugging Face model compiled with an exit river, all turns on one KV cache.

    python samples/chat.py [MODEL_FOLDER] [--tau 0.95] [--tokens 64] [--once "question"]

The first answer takes a minute, as the model is compiled; `/tau 0.9` changes the threshold at once.
"""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import Any

import torch
from smollm2 import smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, TextStreamer

import river_compile


def answer(model: Any, tokenizer: Any, turns: list[dict[str, str]], cache: DynamicCache, tokens: int) -> str:
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(text, return_tensors="pt")
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    # transformers 5.24 renames the argument.
    named = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    settings = {"max_new_tokens": tokens, "do_sample": False, "streamer": streamer, named: cache}
    output = model.generate(**inputs, **settings)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="folder of a Hugging Face model (default: SmolLM2)")
    parser.add_argument("--tau", type=float, default=0.95)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--once", help="ask this and leave")
    arguments = parser.parse_args()
    folder = arguments.model or smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model = torch.compile(plain, backend="river", options={"tau": arguments.tau})
    turns: list[dict[str, str]] = []
    cache = DynamicCache(config=plain.config)
    while question := arguments.once or input("> "):
        if question.startswith("/tau "):
            river_compile.set_tau(model, float(question.split()[1]))
            continue
        turns.append({"role": "user", "content": question})
        turns.append({"role": "assistant", "content": answer(model, tokenizer, turns, cache, arguments.tokens)})
        print(f"[mean exit depth {river_compile.stats(model).mean_exit_depth:.1f}]")
        if arguments.once:
            break
    print(river_compile.stats(model) if turns else "")


if __name__ == "__main__":
    main()
