"""The whole way on a real model: SmolLM2-135M to ONNX, an exit river for it, and what that brings.

    python samples/demo.py [--rounds N] [--output FOLDER]

Prints text, speed, exit depth and agreement of the backbone, of the fully quantized model and of the river at several
thresholds, interleaved in one run, and draws the exit depths.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from rich.console import Console
from rich.table import Table
from smollm2 import smollm2

import river_compile
from river_compile import RiverConfig
from river_compile.runtime import OnnxDecoder

QUESTION = "What is the capital of France?"
TAUS = (0.98, 0.95, 0.9)
NEW_TOKENS = 32
# Exact decoding drafts with 8 bits, which are nearly always accepted; `river-export --exact` chooses by measuring.
CONFIGS = {
    "river.exact": RiverConfig(exact=True, bits=8, head_bits=8),
    "river": RiverConfig(tau=TAUS[-1]),
    "river.head8": RiverConfig(tau=TAUS[-1], head_bits=8),
    "river.w4a16": RiverConfig(tau=TAUS[-1], activations="float"),
}
PASSAGE = """A lighthouse is a tower built to send out light from a system of lamps and lenses, and to serve as a beacon
for pilots at sea or on inland waterways. Lighthouses mark dangerous coastlines, reefs, rocks and safe entries to
harbours. Once widely used, the number of working lighthouses has declined because of the cost of keeping them and the
spread of electronic navigation, which is cheaper and often more exact."""

console = Console(width=130, highlight=False)


@dataclass
class Variant:
    """A row of the table: a model, how it exits, and what was measured of it."""

    name: str
    decoder: OnnxDecoder
    tau: float | None = None
    max_depth: int | None = None
    seconds: list[float] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    rounds: list[list[int]] = field(default_factory=list)
    agreement: float = float("nan")
    config: RiverConfig = field(default_factory=RiverConfig)
    exact: bool = False
    acceptance: float = float("nan")

    def generate(self, prompt: list[int]) -> None:
        """One round. Tokens after the stop token are generated as well, so that every row times as many."""
        settings = {"exact": True} if self.exact else {"exact": False, "tau": self.tau, "max_depth": self.max_depth}
        result = self.decoder.generate([prompt], NEW_TOKENS, **settings)
        self.acceptance = result.acceptance
        self.rounds.append(result.tokens[0])
        self.seconds.append(1 / result.tokens_per_second)
        self.depths += result.exit_depths

    def teacher_forced(self, tokens: list[int]) -> np.ndarray:
        """The choice after each token of a text, one token a pass, so that each decides for itself where to exit."""
        state = self.decoder.start(1)
        chosen = []
        for token in tokens:
            logits, _ = self.decoder.forward(np.array([[token]]), state, tau=self.tau, max_depth=self.max_depth)
            chosen.append(int(logits[0, -1].argmax()))
        return np.array(chosen)


@contextmanager
def timed(what: str) -> Iterator[None]:
    started = time.perf_counter()
    with console.status(what):
        yield
    console.print(f"{what}: {time.perf_counter() - started:.0f} s")


def exported(cache: Path) -> tuple[Path, dict[str, Path]]:
    """The plain model, and the river models by the names of their configs."""
    plain = cache / "smollm2.onnx"
    rivers = {name: cache / f"smollm2.{name}.onnx" for name in CONFIGS}
    if not plain.exists():
        with timed("Reading SmolLM2-135M and exporting it to ONNX (opset 23, about a minute and a half)"):
            from river_compile.exporters.onnx.hf import export_decoder, load_decoder

            part = cache / "part"
            part.mkdir(parents=True, exist_ok=True)
            export_decoder(load_decoder(smollm2(cache / "smollm2")), part / plain.name)
            for file in part.glob("*.data"):
                file.rename(cache / file.name)
            (part / plain.name).rename(plain)
    with timed("Growing the river"):
        reports = [river_compile.export(plain, rivers[name], config) for name, config in CONFIGS.items()]
    report = reports[1]
    console.print(
        f"{report.layers} decoder layers, found by {report.found_by}; river {report.river_bytes / 1e6:.0f} MB "
        f"beside a backbone of {report.backbone_bytes / 1e6:.0f} MB; {report.added_nodes} nodes added"
    )
    return plain, rivers


def variants(plain: Path, rivers: dict[str, Path]) -> list[Variant]:
    backbone, (drafter, with_river, with_head, with_float) = OnnxDecoder(plain), map(OnnxDecoder, rivers.values())
    head = CONFIGS["river.head8"]
    return [
        Variant("backbone (plain model)", backbone),
        Variant("exact: the river only drafts", drafter, tau=2.0, config=CONFIGS["river.exact"], exact=True),
        Variant("river, exits off", with_river, tau=2.0),
        *(Variant(f"river, tau {tau}", with_river, tau=tau) for tau in TAUS),
        Variant("river, exit depth 4", with_river, tau=2.0, max_depth=4),
        Variant("all 4-bit", with_river, max_depth=0),
        Variant("river, exit depth 4, 8-bit head", with_head, tau=2.0, max_depth=4, config=head),
        Variant("all 4-bit, 8-bit head", with_head, max_depth=0, config=head),
        Variant("river, exit depth 4, W4A16", with_float, tau=2.0, max_depth=4),
        Variant("all 4-bit, W4A16", with_float, max_depth=0),
    ]


def bandwidth() -> float:
    """Bytes a second that this machine reads from memory, all cores, best of a few passes over 1 GB."""
    import torch

    block = torch.ones(1 << 28)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        block.sum()
        times.append(time.perf_counter() - started)
    return block.numel() * 4 / min(times)


def bytes_per_token(depth: float, layers: int, sizes: tuple[int, int, int]) -> float:
    """Weights read for one token: ``depth`` backbone layers, river layers after them, and the LM head."""
    backbone, river, head = sizes
    return depth * backbone / layers + (layers - depth) * river / layers + head


def weigh(plain: Path, config: RiverConfig) -> tuple[int, int, int]:
    """Bytes of all backbone layers, of the river, and of the LM head that a token takes after its exit (the tied
    embedding, or its twin)."""
    from river_compile.api import plan

    planned, without_head = plan(plain, config), plan(plain, replace(config, head_bits="float"))
    import onnx

    from river_compile.passes.onnx.external_data import tensor_bytes

    sizes = {
        tensor.name: tensor_bytes(tensor) for tensor in onnx.load(plain, load_external_data=False).graph.initializer
    }
    inside = {name for layer in planned.layers for name in layer.weights}
    head = max(size for name, size in sizes.items() if name not in inside)
    river = without_head.report.river_bytes
    return sum(sizes[name] for name in inside), river, (planned.report.river_bytes - river) or head


def draw(rows: list[Variant], layers: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    shown = [row for row in rows if row.name.startswith("river, tau")]
    figure, axes = pyplot.subplots(len(shown), 1, sharex=True, figsize=(8, 2 * len(shown)), layout="constrained")
    for axis, row in zip(axes, shown, strict=True):
        counts = np.bincount(row.depths, minlength=layers + 1)
        axis.bar(range(layers + 1), counts / counts.sum(), color="#2878b5")
        axis.set_title(f"{row.name.removeprefix('river, ')}: mean exit depth {np.mean(row.depths):.1f}", fontsize=10)
        axis.set_ylabel("share of tokens")
    axes[-1].set_xlabel(f"exit depth (backbone layers run, of {layers})")
    figure.suptitle("SmolLM2-135M: where tokens leave the backbone")
    figure.savefig(path, dpi=120)


def _until(tokenizer: Any, tokens: list[int]) -> str:
    stop = tokens.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in tokens else len(tokens)
    return str(tokenizer.decode(tokens[:stop]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds of generation (default 5)")
    parser.add_argument(
        "--output", type=Path, default=Path(".cache"), help="folder for models and plot (default .cache)"
    )
    arguments = parser.parse_args()
    cache = arguments.output
    cache.mkdir(parents=True, exist_ok=True)
    from transformers import AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    plain, rivers = exported(cache)

    tokenizer = AutoTokenizer.from_pretrained(smollm2(cache / "smollm2"))
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, tokenize=False
    )
    prompt = tokenizer(chat)["input_ids"]
    passage = tokenizer(PASSAGE)["input_ids"]
    shuffle = random.Random(0)
    rows = variants(plain, rivers)
    with timed(f"Generating {arguments.rounds} times {NEW_TOKENS} tokens with each of {len(rows)}, interleaved"):
        for _ in range(arguments.rounds + 1):
            # In a new order each round, since what ran just before leaves its mark on the memory.
            for row in shuffle.sample(rows, len(rows)):
                row.generate(prompt)
    with timed(f"Reading a passage of {len(passage)} tokens with each"):
        expected = rows[0].teacher_forced(passage)
        for row in rows:
            row.agreement = float((row.teacher_forced(passage) == expected).mean())

    layers = rows[1].decoder.layers
    assert layers is not None
    weights = {config: weigh(plain, config) for config in {row.config for row in rows}}
    speed = bandwidth()
    table = Table(
        title=f"SmolLM2-135M float32, ONNX Runtime, CPU, batch 1, decode; "
        f"agreement over {len(passage)} tokens; memory {speed / 1e9:.1f} GB/s"
    )
    for column in ("", "tokens/s", "ratio", "mean exit depth", "top-1 agreement", "byte limit tokens/s", "reached"):
        table.add_column(column, justify="left" if not column else "right")
    for row in rows:
        depth = float(np.mean(row.depths)) if row.depths else float(layers)
        # The first round is warm-up.
        rate = 1 / statistics.median(row.seconds[1:])
        ratio = statistics.median(base / own for base, own in zip(rows[0].seconds[1:], row.seconds[1:], strict=True))
        limit = speed / bytes_per_token(depth, layers, weights[row.config])
        # A pass of exact decoding makes several tokens, and a draft reads other weights than its verification.
        bound = ("-", "-") if row.exact else (f"{limit:.0f}", f"{rate / limit:.0%}")
        table.add_row(row.name, f"{rate:.1f}", f"{ratio:.2f}x", f"{depth:.1f}", f"{row.agreement:.0%}", *bound)
    exact = rows[1]
    gain = statistics.median(base / own for base, own in zip(rows[0].seconds[1:], exact.seconds[1:], strict=True))
    same = "same output" if exact.rounds == rows[0].rounds else "OTHER OUTPUT: this is a bug"
    console.print(f"[bold]{gain:.2f} times faster, {same}[/bold] (exact; {exact.acceptance:.0%} of drafts accepted)")
    console.print(table)
    console.print(f"[bold]{QUESTION}[/bold]")
    for row in rows:
        console.print(f"  {row.name:32s} {_until(tokenizer, row.rounds[-1])!r}")
    picture = cache / "exit_depths.png"
    draw(rows, layers, picture)
    console.print(f"Exit depths: {picture}")


if __name__ == "__main__":
    main()
