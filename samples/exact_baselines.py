"""The same tokens, faster: what would you pick? Exact mode beside what transformers offers, and beside a 4-bit model.

    python samples/exact_baselines.py hf_folder [--dtype float32] [--prompts 8] [--tokens 64] [--json FILE]

All ways run greedily in PyTorch, one sequence, interleaved prompt by prompt: plain decoding compiled by Inductor (the
reference), `prompt_lookup_num_tokens` of transformers (n-grams alone), its assisted generation with the 4-bit model as
assistant, exact mode, and the 4-bit model alone with what it says otherwise. Prints a Markdown table.
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
from river_compile import RiverConfig
from river_compile.exporters.machine import cpu_name
from river_compile.exporters.quantizers import quantizer
from river_compile.exporters.torch.stack import find_stack
from river_compile.measure.fidelity import hub_tokenizer
from river_compile.reference.river import grow_river


def four_bits(model: Any) -> Any:
    """A copy of a model whose decoder layers multiply with 4-bit weights, on torch's own kernel."""
    quantized = copy.deepcopy(model).to(torch.bfloat16)
    path, stack = find_stack(quantized)
    layers, _ = grow_river(stack, path, RiverConfig(), quantizer("rtn"))
    quantized.set_submodule(path, torch.nn.ModuleList(layers))
    return quantized


def with_compiled_forward(model: Any) -> Any:
    model.forward = torch.compile(model.forward, dynamic=True)
    return model


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
    assistant = with_compiled_forward(four_bits(model))
    target = with_compiled_forward(copy.deepcopy(model))
    exact = torch.compile(model, backend="river", options={"exact": True})
    ways: dict[str, tuple[Any, dict[str, Any]]] = {
        "plain, Inductor": (target, {}),
        "n-grams alone (transformers)": (target, {"prompt_lookup_num_tokens": 8}),
        "assisted by the 4-bit model (transformers)": (target, {"assistant_model": assistant}),
        "exact mode": (exact, {}),
        "4-bit model alone": (assistant, {}),
    }
    settings = {"max_new_tokens": arguments.tokens, "min_new_tokens": arguments.tokens, "do_sample": False}

    def generate(name: str, ids: torch.Tensor) -> torch.Tensor:
        runner, extra = ways[name]
        # Assisted generation changes the assistant's settings for good.
        kept = copy.deepcopy(assistant.generation_config)
        made = runner.generate(ids, attention_mask=torch.ones_like(ids), **settings, **extra)
        assistant.generation_config = kept
        return torch.as_tensor(made[0, ids.shape[1] :])

    for name in ways:
        for ids in (texts[0], texts[-1]):
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
            ratios[name].append(seconds["plain, Inductor"] / seconds[name])
            differing[name] += int((tokens[name] != tokens["plain, Inductor"]).sum())
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
