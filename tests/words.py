"""Tokenizers, models and texts whose tokens are words, for all that takes a tokenizer's folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tests.families import VOCABULARY, random_model


def save_word_model(folder: Path) -> Path:
    """A Hugging Face folder: a random model and its tokenizer."""
    random_model("llama").save_pretrained(folder)
    return save_word_tokenizer(folder, eos_token=None)


def save_word_tokenizer(folder: Path, words: int = VOCABULARY, eos_token: str | None = "w2") -> Path:
    """A tokenizer with a word ``w7`` for each token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"w{index}": index for index in range(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token=eos_token).save_pretrained(folder)
    return folder


def save_word_texts(path: Path, count: int = 30, length: int = 12) -> Path:
    """A JSONL file of random words."""
    rng = np.random.default_rng(1)
    lines = [" ".join(f"w{i}" for i in rng.integers(3, VOCABULARY - 1, length)) for _ in range(count)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path
