"""Is exact decoding exact, and how much faster? The plain model and its river in ONNX Runtime, side by side.

    river-export model.onnx -o model.exact.onnx --exact --tokenizer hf_folder
    python samples/exact.py model.onnx model.exact.onnx hf_folder [--tokens 128] [--prompts 40] [--png FILE]

Prints, over prompts of prose, code, mathematics and chat (half of them held-out texts): how many tokens differ, the
speed-up of exact decoding by its median and its slowest prompt, drafts from the text alone, and the all-quantized model
with its agreement. With --png it draws speed-up against acceptance: measured points of fixed draft lengths over the
formula's curves. Everything is greedy, batch 1, and interleaved prompt by prompt; --json keeps all of it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from river_compile.exporters.machine import cpu_name
from river_compile.measure.drafting import fixed_length, measure_drafts
from river_compile.measure.fidelity import hub_tokenizer, shipped_texts
from river_compile.runtime import Generation, OnnxDecoder

PROSE = (
    "The lighthouse keeper climbed the stairs every evening and",
    "In the autumn of that year the river rose higher than anyone",
    "Bread is one of the oldest prepared foods. It is made from",
    "The history of the bicycle begins with a wooden frame",
    "When the orchestra had tuned its instruments, the conductor",
)
CODE = (
    "def fibonacci(n):\n    ",
    "import json\n\ndef load_config(path):\n    ",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n        ",
    "SELECT name, price FROM products WHERE ",
    "for (int i = 0; i < n; i++) {\n    ",
)
MATHEMATICS = (
    "Theorem. There are infinitely many prime numbers. Proof. Suppose",
    "To solve the equation 3x + 5 = 20, first subtract",
    "The derivative of x^2 is 2x. The derivative of x^3 is",
    "A train travels 60 miles in 1.5 hours. Its average speed is",
    "The sum of the first n odd numbers is n squared, because",
)
CHAT = (
    "What is the capital of France, and what is it known for?",
    "Write a short poem about the sea.",
    "Explain how a lighthouse helps ships at night.",
    "Give me three tips for learning a new language.",
    "How do I boil an egg?",
)
HELD_OUT_TOKENS = 32


@dataclass
class Way:
    """One way to decode: tokens of each prompt, by its number, and seconds of its decode passes."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    drafted: int = 0
    accepted: int = 0
    near_ties: int = 0

    def add(self, number: int, result: Generation) -> None:
        self.tokens[number] = result.tokens[0]
        self.seconds[number] = result.decode_seconds
        self.drafted += result.drafted
        self.accepted += result.accepted
        self.near_ties += result.near_ties

    def ratios(self, base: Way) -> list[float]:
        return [base.seconds[number] / mine for number, mine in self.seconds.items()]

    def differing(self, base: Way) -> int:
        pairs = ((mine, base.tokens[number]) for number, mine in self.tokens.items())
        return sum(a != b for mine, own in pairs for a, b in zip(mine, own, strict=True))


def prompts(tokenizer: Any, count: int) -> list[list[int]]:
    """Token ids: chat and other prompts first, then the beginnings of held-out texts, as many of each."""
    chats = []
    if getattr(tokenizer, "chat_template", None):
        for text in CHAT:
            turn = [{"role": "user", "content": text}]
            chats.append(tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"])
    else:
        chats = [tokenizer(text)["input_ids"] for text in CHAT]
    own = [*chats, *(tokenizer(text)["input_ids"] for text in (*PROSE, *CODE, *MATHEMATICS))]
    held_out = [tokenizer(text.text)["input_ids"][:HELD_OUT_TOKENS] for text in shipped_texts("heldout")]
    half = count // 2
    step = max(1, len(held_out) // half)
    return [*own[: count - half], *held_out[::step][:half]]


def some_prompts(tokenizer: Any, count: int) -> list[list[int]]:
    """So many of 40 prompts, evenly thinned."""
    every = prompts(tokenizer, 40)
    return every[:: max(1, len(every) // count)][:count]


def compare(plain: OnnxDecoder, river: OnnxDecoder, texts: Sequence[Sequence[int]], tokens: int) -> dict[str, Way]:
    """Every way for every prompt, one after the other, so that a busy moment strikes all alike."""
    ways: dict[str, Way] = {name: Way() for name in ("plain", "exact", "text alone", "all quantized")}
    how: dict[str, tuple[OnnxDecoder, dict[str, Any]]] = {
        "plain": (plain, {"exact": False}),
        "exact": (river, {"exact": True}),
        "text alone": (plain, {"exact": True}),
        "all quantized": (river, {"exact": False, "max_depth": 0}),
    }
    for decoder, settings in how.values():
        decoder.generate([texts[0]], 16, **settings)
    for number, text in enumerate(texts):
        for name, (decoder, settings) in how.items():
            # The other ways are there to compare with: every fourth prompt shows what they are.
            if name in ("plain", "exact") or number % 4 == 0:
                ways[name].add(number, decoder.generate([text], tokens, **settings))
    return ways


def draw(path: Path, curves: dict[str, Any]) -> None:
    """Speed-up against acceptance, by draft length: points that were measured, over the formula's curves."""
    import matplotlib

    matplotlib.use("agg")
    import numpy as np
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7.5, 4.8), layout="constrained")
    shares = np.linspace(0.3, 1, 60)
    costs = curves["verify_ms"]
    for place, length in enumerate(curves["lengths"]):
        colour = f"C{place}"
        tokens = [sum(share**count for count in range(length + 1)) for share in shares]
        seconds = length * curves["draft_ms"] + float(np.interp(length + 1, list(costs), list(costs.values())))
        axis.plot(shares, [made * costs[1] / seconds for made in tokens], color=colour, label=f"{length} drafts")
        axis.plot(*curves["points"][place], "o", color=colour)
    axis.plot(*curves["adaptive"], "k*", markersize=13, label="chosen as it goes")
    axis.axhline(1, color="#888888", linewidth=0.8)
    axis.set_xlabel("acceptance of a draft")
    axis.set_ylabel("speed-up over plain decoding")
    axis.set_title(curves["title"])
    axis.legend()
    figure.savefig(path, dpi=130)


def fixed_lengths(
    plain: OnnxDecoder, river: OnnxDecoder, texts: Sequence[Sequence[int]], tokens: int
) -> dict[str, Any]:
    """Acceptance and speed-up at fixed draft lengths, and what passes take."""
    point = measure_drafts(river, texts, river.defaults, float("nan"))
    lengths, points = (1, 2, 4, 8), []
    for length in lengths:
        acceptance, ratios = [], []
        for text in texts:
            base = plain.generate([text], tokens, exact=False)
            with fixed_length(river, length):
                found = river.generate([text], tokens, exact=True, lookup=False)
            acceptance.append(found.acceptance)
            ratios.append(base.decode_seconds / found.decode_seconds)
        points.append((statistics.fmean(acceptance), statistics.median(ratios)))
    return {"lengths": lengths, "points": points, "draft_ms": point.draft_ms, "verify_ms": point.verify_ms}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plain", type=Path)
    parser.add_argument("river", type=Path)
    parser.add_argument("tokenizer")
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--png", type=Path)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    plain, river = OnnxDecoder(given.plain), OnnxDecoder(given.river)
    texts = prompts(hub_tokenizer(given.tokenizer), given.prompts)
    ways = compare(plain, river, texts, given.tokens)
    base, exact = ways["plain"], ways["exact"]
    console = Console(width=110, highlight=False)
    table = Table(title=f"{given.river.name}: {len(texts)} prompts, {given.tokens} tokens each; {cpu_name()}")
    for column in ("", "speed-up, median", "slowest prompt", "tokens that differ", "accepted"):
        table.add_column(column, justify="left" if not column else "right")
    for name, way in ways.items():
        ratios = way.ratios(base)
        accepted = f"{way.accepted / way.drafted:.0%} of {way.drafted}" if way.drafted else "-"
        differing = f"{way.differing(base)} of {sum(map(len, way.tokens.values()))}"
        table.add_row(name, f"{statistics.median(ratios):.2f}x", f"{min(ratios):.2f}x", differing, accepted)
    console.print(table)
    console.print(f"near ties left to a pass of one row: {exact.near_ties}; margin: {river.experience.tie:.1e}")
    differing = exact.differing(base)
    output = f"{differing} TOKENS DIFFER" if differing else "same output"
    console.print(f"{statistics.median(exact.ratios(base)):.2f} times faster, {output}")
    if given.json is not None:
        found = {name: asdict(way) | {"ratios": way.ratios(base)} for name, way in ways.items()}
        given.json.write_text(json.dumps({"cpu": cpu_name(), "tokens": given.tokens, "ways": found}) + "\n")
    if given.png is not None:
        curves = fixed_lengths(plain, river, texts[:: max(1, len(texts) // 8)], given.tokens // 2)
        curves["adaptive"] = (exact.accepted / max(exact.drafted, 1), statistics.median(exact.ratios(base)))
        curves["title"] = f"{given.river.stem}, {cpu_name()}"
        draw(given.png, curves)


if __name__ == "__main__":
    main()
