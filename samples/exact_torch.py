"""Exact decoding in PyTorch: is it exact, and how much faster than the same compiled model without exits?

    python samples/exact_torch.py hf_folder [--dtype bfloat16] [--prompts 12] [--tokens 64] [--rounds 3]
    python samples/exact_torch.py hf_folder --prompts 40 --tokens 128 --rounds 1 --rows alike     # or: free

Plain decoding (a river with exits off), exact decoding and the model compiled by Inductor take turns, prompt by prompt,
greedily, with `generate`'s own cache; of a prompt's rounds each way's fastest counts. Prompts are those of
`samples/exact.py`, evenly thinned.

In 16 bits exact decoding drafts where a row comes out the same however many are beside it, and that costs little.
``--rows alike`` takes the form that makes it so whatever it costs, and ``--rows free`` drafts without it and without a
guard: that is what the promise rests on, and what would be without it. Plain decoding has the same products as exact.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
import statistics
import time
from typing import Any

import torch
from exact import some_prompts
from transformers import AutoModelForCausalLM

import river_compile
from river_compile.exporters.machine import cpu_name
from river_compile.exporters.torch import few_rows
from river_compile.measure.fidelity import hub_tokenizer
from river_compile.runtime.exact import Experience


class Unguarded(Experience):
    """What a model's passes cost, where no pass of several rows is ever doubted."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, 0.0 if name == "tie" else value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bits", type=int, default=4, choices=(4, 8))
    parser.add_argument("--rows", choices=("measured", "alike", "free"), default="measured")
    arguments = parser.parse_args()
    few_rows.WORTH = {"measured": few_rows.WORTH, "alike": math.inf, "free": -1.0}[arguments.rows]

    texts = [torch.tensor([ids]) for ids in some_prompts(hub_tokenizer(arguments.folder), arguments.prompts)]
    model = AutoModelForCausalLM.from_pretrained(arguments.folder, dtype=getattr(torch, arguments.dtype))
    settings = {"max_new_tokens": arguments.tokens, "min_new_tokens": arguments.tokens, "do_sample": False}
    unguarded = {"custom_generate": functools.partial(river_compile.exact, experience=Unguarded())}
    extra = {"exact": unguarded if arguments.rows == "free" else {}}
    model.eval()
    options = {"bits": arguments.bits}
    ways = {
        "plain": torch.compile(model, backend="river", options={**options, "tau": 2.0}),
        "exact": torch.compile(model, backend="river", options={**options, "exact": True}),
        "inductor": torch.compile(copy.deepcopy(model)),
    }
    for name, compiled in ways.items():
        for ids in (texts[0], texts[-1]):
            compiled.generate(ids, **settings, **extra.get(name, {}))
    river_compile.reset_stats(ways["exact"])

    ratios, of_inductor, differing = [], [], 0
    for ids in texts:
        seconds, tokens = dict.fromkeys(ways, float("inf")), {}
        for _ in range(arguments.rounds):
            for name, compiled in ways.items():
                start = time.perf_counter()
                tokens[name] = compiled.generate(ids, **settings, **extra.get(name, {}))[0, ids.shape[1] :]
                seconds[name] = min(seconds[name], time.perf_counter() - start)
        ratios.append(seconds["plain"] / seconds["exact"])
        of_inductor.append(seconds["inductor"] / seconds["exact"])
        differing += int((tokens["plain"] != tokens["exact"]).sum())
    print(f"{cpu_name()}, {torch.get_num_threads()} threads, {arguments.dtype}, {arguments.bits}-bit river")
    print(f"rows: {arguments.rows}")
    print(f"speed-up: median {statistics.median(ratios):.2f}x, slowest prompt {min(ratios):.2f}x")
    print(f"over Inductor: median {statistics.median(of_inductor):.2f}x, slowest prompt {min(of_inductor):.2f}x")
    print(f"{differing} of {arguments.tokens * len(texts)} tokens differ")
    print(river_compile.stats(ways["exact"]).exact)


if __name__ == "__main__":
    main()
