"""Exact decoding in PyTorch: is it exact, and how much faster than the same compiled model without exits?

    python samples/exact_torch.py hf_folder [--dtype bfloat16] [--prompts 12] [--tokens 64] [--rounds 3]

Plain decoding (a river with exits off), exact decoding and the model compiled by Inductor take turns, prompt by prompt,
greedily, with `generate`'s own cache; of a prompt's rounds each way's fastest counts. Prompts are those of
`samples/exact.py`, evenly thinned.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch
from exact import some_prompts
from transformers import AutoModelForCausalLM

import river_compile
from river_compile.exporters.machine import cpu_name
from river_compile.measure.fidelity import hub_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bits", type=int, default=4, choices=(4, 8))
    arguments = parser.parse_args()

    texts = [torch.tensor([ids]) for ids in some_prompts(hub_tokenizer(arguments.folder), arguments.prompts)]
    model = AutoModelForCausalLM.from_pretrained(arguments.folder, dtype=getattr(torch, arguments.dtype))
    settings = {"max_new_tokens": arguments.tokens, "min_new_tokens": arguments.tokens, "do_sample": False}
    model.eval()
    options = {"bits": arguments.bits}
    ways = {
        "plain": torch.compile(model, backend="river", options={**options, "tau": 2.0}),
        "exact": torch.compile(model, backend="river", options={**options, "exact": True}),
        "inductor": torch.compile(copy.deepcopy(model)),
    }
    for compiled in ways.values():
        for ids in (texts[0], texts[-1]):
            compiled.generate(ids, **settings)
    river_compile.reset_stats(ways["exact"])

    ratios, of_inductor, differing = [], [], 0
    for ids in texts:
        seconds, tokens = dict.fromkeys(ways, float("inf")), {}
        for _ in range(arguments.rounds):
            for name, compiled in ways.items():
                start = time.perf_counter()
                tokens[name] = compiled.generate(ids, **settings)[0, ids.shape[1] :]
                seconds[name] = min(seconds[name], time.perf_counter() - start)
        ratios.append(seconds["plain"] / seconds["exact"])
        of_inductor.append(seconds["inductor"] / seconds["exact"])
        differing += int((tokens["plain"] != tokens["exact"]).sum())
    print(f"{cpu_name()}, {torch.get_num_threads()} threads, {arguments.dtype}, {arguments.bits}-bit river")
    print(f"speed-up: median {statistics.median(ratios):.2f}x, slowest prompt {min(ratios):.2f}x")
    print(f"over Inductor: median {statistics.median(of_inductor):.2f}x, slowest prompt {min(of_inductor):.2f}x")
    print(f"{differing} of {arguments.tokens * len(texts)} tokens differ")
    print(river_compile.stats(ways["exact"]).exact)


if __name__ == "__main__":
    main()
