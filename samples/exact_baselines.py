"""The same tokens, faster: what would you pick? Exact mode beside what transformers offers, and beside a 4-bit model.

    python samples/exact_baselines.py hf_folder [--dtype float32] [--prompts 8] [--tokens 64] [--json FILE]

All ways run greedily in PyTorch, one sequence, interleaved prompt by prompt, compiled by one backend, so that they
differ by how they decode alone: plain decoding with exits off (the reference), `prompt_lookup_num_tokens` of
transformers (n-grams alone), its assisted generation with the all-river model as the 4-bit assistant, exact mode, and
that 4-bit model alone with what it says otherwise. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from exact import some_prompts
from transformers import AutoModelForCausalLM

import river_compile
from river_compile.config import NEVER
from river_compile.exporters.machine import cpu_name
from river_compile.measure.fidelity import hub_tokenizer

PLAIN = "plain, exits off"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--dtype", default="float32", choices=("bfloat16", "float32"))
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    # Passes of one token, of several, and of the prompt, for two models: Dynamo stops at eight graphs by itself.
    torch._dynamo.config.recompile_limit = 64
    texts = [torch.tensor([ids]) for ids in some_prompts(hub_tokenizer(arguments.folder), arguments.prompts)]
    model = AutoModelForCausalLM.from_pretrained(arguments.folder, dtype=getattr(torch, arguments.dtype)).eval()
    plain = torch.compile(model, backend="river", options={"tau": NEVER})
    exact = torch.compile(model, backend="river", options={"exact": True})
    four_bits = torch.compile(model, backend="river", options={"max_depth": 0, "prefill": "river"})
    ways: dict[str, tuple[Any, dict[str, Any]]] = {
        PLAIN: (plain, {}),
        "n-grams alone (transformers)": (plain, {"prompt_lookup_num_tokens": 8}),
        "assisted by the 4-bit model (transformers)": (plain, {"assistant_model": four_bits}),
        "exact mode": (exact, {}),
        "4-bit model alone": (four_bits, {}),
    }
    settings = {"max_new_tokens": arguments.tokens, "min_new_tokens": arguments.tokens, "do_sample": False}

    def generate(name: str, ids: torch.Tensor) -> torch.Tensor:
        runner, extra = ways[name]
        # Assisted generation changes the assistant's settings for good.
        kept = copy.deepcopy(model.generation_config)
        made = runner.generate(ids, attention_mask=torch.ones_like(ids), **settings, **extra)
        model.generation_config = kept
        return torch.as_tensor(made[0, ids.shape[1] :])

    # What a prompt has compiled, such as passes of as many tokens as an n-gram brings, is not to be timed.
    for ids in texts:
        for name in ways:
            generate(name, ids)
    ratios: dict[str, list[float]] = {name: [] for name in ways}
    differing = dict.fromkeys(ways, 0)
    for ids in texts:
        seconds, tokens = {}, {}
        for name in ways:
            start = time.perf_counter()
            tokens[name] = generate(name, ids)
            seconds[name] = time.perf_counter() - start
        for name in ways:
            ratios[name].append(seconds[PLAIN] / seconds[name])
            differing[name] += int((tokens[name] != tokens[PLAIN]).sum())
    total = arguments.tokens * len(texts)
    print(f"{cpu_name()}, {torch.get_num_threads()} threads, {arguments.dtype}, {len(texts)} prompts\n")
    print("| | speed-up, median (slowest prompt) | tokens that differ |\n| --- | --- | --- |")
    for name in ways:
        median, slowest = statistics.median(ratios[name]), min(ratios[name])
        print(f"| {name} | {median:.2f}x ({slowest:.2f}x) | {differing[name]} of {total} |")
    print(f"\n{river_compile.stats(exact).exact}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"cpu": cpu_name(), "ratios": ratios, "differing": differing}, indent=2))


if __name__ == "__main__":
    main()
