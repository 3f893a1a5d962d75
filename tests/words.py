"""A model folder and texts whose tokens are words, for all that takes a tokenizer's folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tests.families import VOCABULARY, random_model


def save_word_model(folder: Path) -> Path:
    """A Hugging Face folder: a random model, and a tokenizer with a word ``w7`` for each token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    random_model("llama").save_pretrained(folder)
    words = {f"w{i}": i for i in range(VOCABULARY - 1)} | {"[UNK]": VOCABULARY - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)
    return folder


def save_word_texts(path: Path, count: int = 30, length: int = 12) -> Path:
    """A JSONL file of random words."""
    rng = np.random.default_rng(1)
    lines = [" ".join(f"w{i}" for i in rng.integers(3, VOCABULARY - 1, length)) for _ in range(count)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path
