"""The float model that all peers start from, and what each tool makes of it, kept from one run to the next."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from smollm2 import smollm2

from side_by_side.environments import CACHE, OURS, Environment, run

__all__ = ["SHAPES", "Commands", "Models", "float_model", "random_model"]

# Of random weights: what a shape's speed is, and nothing about its text.
SHAPES: dict[str, dict[str, Any]] = {
    "1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "tiny": {
        "vocab_size": 49152,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 1024,
    },
}

# What makes a model: of the float model's folder, models made before by their names, and the path to write.
Commands = Callable[[Path, Callable[[str], Path], Path], Sequence[Sequence[object]]]


def float_model(shape: str | None) -> tuple[Path, Path]:
    """The folder of the float model with its tokenizer, and the one for what is made of it."""
    base = CACHE / "peers" / (shape or "smollm2")
    return (_random_folder(shape, base / "hf") if shape else smollm2(CACHE / "smollm2")), base


def random_model(shape: str) -> Any:
    """A model of a shape in eval mode, float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPES[shape], tie_word_embeddings=True, dtype="float32")).eval()


def _random_folder(shape: str, folder: Path) -> Path:
    if (folder / "config.json").exists():
        return folder
    from transformers import AutoTokenizer

    part = _part(folder)
    random_model(shape).save_pretrained(part)
    # Any tokenizer will do; tools look for one.
    AutoTokenizer.from_pretrained(smollm2(CACHE / "smollm2")).save_pretrained(part)
    part.rename(folder)
    return folder


def _part(path: Path) -> Path:
    """An empty folder beside a path, for what is there whole or not at all."""
    part = path.with_name(path.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    return part


class Models:
    """Made on first use.

    Args:
        source: the float model's folder.
        folder: where models lie, each in a folder of its own.
        recipes: by name, the environment and the commands of a model.
        anew: make what an earlier run left once more.
    """

    def __init__(
        self, source: Path, folder: Path, recipes: dict[str, tuple[Environment, Commands]], *, anew: bool = False
    ) -> None:
        self._source, self._folder, self._recipes = source, folder, recipes
        self._old = set(recipes) if anew else set()

    def made(self, name: str) -> Path:
        """The folder of a model.

        Raises:
            PeerError: a tool cannot be installed, or refuses.
        """
        if not name:
            return self._source
        folder = self._folder / name
        if name in self._old or not folder.exists():
            environment, commands = self._recipes[name]
            part = _part(folder)
            for module, *arguments in commands(self._source, self.made, part):
                cwd = Path(__file__).resolve().parents[1] if environment == OURS else None
                run([environment.python(), "-m", module, *arguments], "no model", cwd)
            shutil.rmtree(folder, ignore_errors=True)
            part.rename(folder)
            self._old.discard(name)
        return folder
