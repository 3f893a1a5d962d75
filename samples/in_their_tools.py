"""Time folders of river-export in the tool that they are for, beside the original: all rounds interleaved in one run.

    python samples/in_their_tools.py genai|optimum TOKENIZER.json ORIGINAL_FOLDER FOLDER... [--rounds N] [--tokens N]

It needs nothing but the tool itself, so it runs in the environment where that is installed: onnxruntime-genai, or
optimum-onnx with its transformers; both bring `tokenizers`. Printed for each folder: tokens a second, the ratio to the
first folder (median over rounds of the round's ratio), the share of tokens that are the first folder's, and where the
tool tells them, the mean exit depth and the share of drafts that were accepted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

PROMPTS = (
    "The capital of France is",
    "A lighthouse is a tower built to send out light, and",
    "def fibonacci(n):\n    ",
    "If a train leaves at nine o'clock and travels for three hours, it arrives",
)


class GenAI:
    """A model in ONNX Runtime GenAI."""

    def __init__(self, folder: Path) -> None:
        import onnxruntime_genai

        self._tool = onnxruntime_genai
        self._model = onnxruntime_genai.Model(str(folder))
        self.depths: list[int] = []
        self.drafts = [0, 0]

    def generate(self, prompt: list[int], new: int) -> list[int]:
        settings = self._tool.GeneratorParams(self._model)
        # No text ends early, so that all are as long.
        settings.set_search_options(max_length=len(prompt) + new, min_length=len(prompt) + new, do_sample=False)
        generator = self._tool.Generator(self._model, settings)
        generator.append_tokens(np.array([prompt], np.int32))
        while not generator.is_done():
            generator.generate_next_token()
            self._note_depth(generator)
        drafted = generator.get_speculative_stats() if hasattr(generator, "get_speculative_stats") else {}
        self.drafts[0] += drafted.get("draft_tokens_accepted", 0)
        self.drafts[1] += drafted.get("draft_tokens_evaluated", 0)
        return [int(token) for token in generator.get_sequence(0)][len(prompt) :]

    def _note_depth(self, generator: Any) -> None:
        try:
            self.depths.append(int(generator.get_output("river.exit_depth")[0]))
        except RuntimeError:
            # Not a river, or one that only drafts.
            return


class Optimum:
    """A model in optimum."""

    def __init__(self, folder: Path) -> None:
        from optimum.onnxruntime import ORTModelForCausalLM

        self._model = ORTModelForCausalLM.from_pretrained(folder)
        self.depths: list[int] = []
        self.drafts = [0, 0]

    def generate(self, prompt: list[int], new: int) -> list[int]:
        import torch

        ids = torch.tensor([prompt])
        settings = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0}
        out = self._model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
        tokens: list[int] = out[0, len(prompt) :].tolist()
        return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", choices=("genai", "optimum"))
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    given = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(given.tokenizer))
    prompts = [tokenizer.encode(prompt).ids for prompt in PROMPTS]
    models = [{"genai": GenAI, "optimum": Optimum}[given.tool](folder) for folder in given.folders]
    texts = [[model.generate(prompt, given.tokens) for prompt in prompts] for model in models]
    seconds: list[list[float]] = [[] for _ in models]
    for _ in range(given.rounds):
        for model, times in zip(models, seconds, strict=True):
            started = time.perf_counter()
            for prompt in prompts:
                model.generate(prompt, given.tokens)
            times.append(time.perf_counter() - started)
    made = len(prompts) * given.tokens
    print(f"{'folder':24} {'tokens/s':>9} {'ratio':>7} {'same':>6} {'depth':>6} {'accepted':>9}")
    for folder, model, times, text in zip(given.folders, models, seconds, texts, strict=True):
        ratio = statistics.median(first / own for first, own in zip(seconds[0], times, strict=True))
        pairs = [(a, b) for x, y in zip(text, texts[0], strict=True) for a, b in zip(x, y, strict=True)]
        depth = f"{statistics.mean(model.depths):.1f}" if model.depths else "-"
        accepted = f"{model.drafts[0] / model.drafts[1]:.0%}" if model.drafts[1] else "-"
        same = sum(a == b for a, b in pairs) / len(pairs)
        speed = made / statistics.median(times)
        print(f"{folder.name:24} {speed:9.1f} {ratio:6.2f}x {same:6.0%} {depth:>6} {accepted:>9}")


if __name__ == "__main__":
    main()
