"""Which quantizer, and how many bits: all-river fidelity of SmolLM2 on held-out text, and what each linear layer costs.

    python samples/quantizers.py [MODEL.onnx] [--tokenizer FOLDER] [--documents N] [--output FOLDER]

The weights of a plain ONNX model are replaced by dequantized ones, which is what an exported all-float-activation river
computes; every grid has integer zero points, or is symmetric. What is measured is kept in the output folder, so that an
interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from rich.console import Console
from rich.table import Table

from river_compile.cli.console import progress_bars
from river_compile.config import RiverConfig
from river_compile.exporters.onnx import onnx_file
from river_compile.exporters.onnx.swap import SwappableModel
from river_compile.measure.fidelity import bootstrap, compare, load_tokenizer, shipped_texts, tokenize, vector_cosines
from river_compile.measure.sensitivity import Sensitivity, choose_bits, sensitivity_of
from river_compile.measure.tuning import Tuning

SINGLE = ("rtn", "kquant", "hqq", "lsq", "gptq-symmetric", "gptq")
BUDGETS = (5.0, 4.5, 5.5, 6.0)
Plan = Callable[[str], Any]


class Bench:
    """The backbone's answers on the held-out texts, and the measure of any exchange of weights."""

    def __init__(self, model: SwappableModel, documents: list[Any]) -> None:
        self.model, self.documents = model, documents
        self.reference = [model.read(document.ids) for document in documents]

    def measure(self, weights: dict[str, np.ndarray]) -> dict[str, Any]:
        measures, values, keys = [], [], []
        for document, (logits, caches) in zip(self.documents, self.reference, strict=True):
            found, others = self.model.read(document.ids, weights)
            measures.append(compare(logits, found, document.ids))
            cosines = np.stack([vector_cosines(a, b) for a, b in zip(caches, others, strict=True)])
            keys.append(cosines[0::2].mean(axis=0))
            values.append(cosines[1::2].mean(axis=0))
        return {
            name: vars(bootstrap(per_document))
            for name, per_document in {
                "top1": [m.top1 for m in measures],
                "kl": [m.kl for m in measures],
                "keys": keys,
                "values": values,
            }.items()
        }


def plans(quantizer: str, sensitivity: Sensitivity | None) -> dict[str, Plan]:
    """Bits for a linear layer's name, by a label."""
    found: dict[str, Plan] = {f"{quantizer}, 4 bits": lambda name: 4}
    if sensitivity is not None:
        for budget in BUDGETS:
            chosen = choose_bits(sensitivity, avg_bits=budget)
            found[f"{quantizer}, {budget} bits planned"] = chosen.__getitem__
        found[f"{quantizer}, 8 bits in down_proj"] = lambda name: 8 if "down_proj" in name else 4
        found["8 bits"] = lambda name: 8
    return found


def average(model: SwappableModel, plan: Plan) -> float:
    bits = [(linear.weights, plan(linear.name)) for linear in model.linears]
    return sum(size * (32 if b == "float" else b) for size, b in bits) / sum(size for size, _ in bits)


def complete(rows: dict[str, Any], quantizer: str, file: Path) -> bool:
    return file.exists() and all(label in rows for label in plans(quantizer, Sensitivity.load(file)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=Path(".cache/smollm2.onnx"))
    parser.add_argument("--tokenizer", default=".cache/smollm2")
    parser.add_argument("--documents", type=int, default=18, help="held-out documents, evenly spread (default 18)")
    parser.add_argument("--tokens", type=int, default=256, help="tokens that sensitivity is measured on (default 256)")
    parser.add_argument("--tuning-documents", type=int, default=104, help="for gptq, evenly spread (default 104: all)")
    parser.add_argument("--quantizers", default=",".join(SINGLE), help=f"comma-separated (default {','.join(SINGLE)})")
    parser.add_argument("--output", type=Path, default=Path(".cache/quantizers"))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(arguments.tokenizer)
    ids = Tuning(tokenizer).ids(onnx_file.load(arguments.model))
    ids = [ids[i] for i in np.linspace(0, len(ids) - 1, min(len(ids), arguments.tuning_documents)).round().astype(int)]
    heldout = tokenize(shipped_texts("heldout"), tokenizer, tokenizer.vocabulary)
    heldout = [heldout[i] for i in np.linspace(0, len(heldout) - 1, arguments.documents).round().astype(int)]
    kept = arguments.output / f"table.{arguments.documents}.json"
    rows: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    config, bench = RiverConfig(), None
    with progress_bars(False) as progress:
        for quantizer in arguments.quantizers.split(","):
            file = arguments.output / f"sensitivity.{quantizer}.json"
            planned = quantizer == SINGLE[-1]
            if f"{quantizer}, 4 bits" in rows and (not planned or complete(rows, quantizer, file)):
                continue
            own = replace(config, quantizer=quantizer)
            model = SwappableModel(
                arguments.model,
                own,
                ids,
                lambda done, total: progress("read tuning texts", done, total),
                with_cache=True,
                keep=planned,
            )
            bench = Bench(model, heldout) if bench is None else bench
            bench.model = model
            if planned and not file.exists():
                measured = sensitivity_of(model, own.group_size, ids, tokens=arguments.tokens, progress=progress)
                file.write_text(measured.to_json())
            for label, plan in plans(quantizer, Sensitivity.load(file) if planned else None).items():
                if label in rows:
                    continue
                weights: dict[str, np.ndarray] = {}
                for done, linear in enumerate(model.linears):
                    progress(label, done, len(model.linears))
                    bits = plan(linear.name)
                    weights |= model.quantized(linear, bits) if bits != "float" else {}
                rows[label] = bench.measure(weights) | {"bits": average(model, plan)}
                kept.write_text(json.dumps(rows, indent=1))
                progress(label, 1, 1)
    show(rows, sum(len(document.ids) for document in heldout))


def show(rows: dict[str, Any], tokens: int) -> None:
    table = Table(title=f"All river against the backbone, {tokens} held-out tokens, block 32, float activations")
    for column in ("river", "bits", "top-1", "KL", "K cosine", "V cosine"):
        table.add_column(column, justify="left" if column == "river" else "right")
    for label, row in rows.items():
        top1 = row["top1"]
        table.add_row(
            label,
            f"{row['bits']:.2f}",
            f"{top1['value']:.3f} ({top1['low']:.3f}-{top1['high']:.3f})",
            f"{row['kl']['value']:.4f}",
            f"{row['keys']['value']:.4f}",
            f"{row['values']['value']:.4f}",
        )
    Console(width=118).print(table)


if __name__ == "__main__":
    main()
