"""Measure how close a river model is to its backbone, and print what a user would want to know first.

    python samples/evaluate.py MODEL.river.onnx TOKENIZER_FOLDER [TEXT_FILE ...]

Without text files it reads six of the held-out documents that come with the package.
"""

from __future__ import annotations

import sys

import river_compile
from river_compile.measure.fidelity import load_tokenizer


def main(model: str, tokenizer: str, *texts: str) -> None:
    found = river_compile.evaluate(
        model, texts or None, load_tokenizer(tokenizer), taus=(0.95,), max_documents=6, speed_rounds=1
    )
    print(f"{found.model}: {found.tokens} tokens of {len(found.texts)} documents")
    for row in found.settings:
        print(
            f"{row.label:10s} chooses the backbone's token in {row.top1.value:.1%} "
            f"({row.top1.low:.1%} to {row.top1.high:.1%}), KL {row.kl.value:.4f}, "
            f"V cosine {row.value_cosine.value:.4f}, after {row.mean_exit_depth:.1f} of {found.layers} layers"
        )


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
