"""Greedy decoding of a Hugging Face model, whichever way it is called: what the benchmarks time."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from river_compile.errors import MissingExtra
from river_compile.exporters.onnx.kv_cache import cache_argument

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["PROMPT", "decode", "load_with_prompt", "wait"]

PROMPT = "Explain in a few sentences how a lighthouse helps ships at night."


def load_with_prompt(
    folder: str | Path, dtype: torch.dtype, device: str, prompt: str = PROMPT, batch: int = 1
) -> tuple[PreTrainedModel, torch.Tensor]:
    """A model without gradients, and a prompt as int64 [batch, tokens]; any 16 tokens if it has no tokenizer.

    Raises:
        MissingExtra: transformers is not installed.
        InputError: as `load_decoder`.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingExtra("transformers", "hf", "reading a Hugging Face model") from error
    from river_compile.exporters.onnx.hf import load_decoder

    model: Any = load_decoder(folder, dtype).to(device)
    model.requires_grad_(False)
    try:
        ids = AutoTokenizer.from_pretrained(str(folder))(prompt, return_tensors="pt")["input_ids"]
    except (OSError, ValueError):
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, model.config.get_text_config().vocab_size, (1, 16), generator=generator)
    return model, ids.expand(batch, -1).contiguous().to(device)


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    forward: Callable[..., Any],
    tokens: torch.Tensor,
    new_tokens: int,
    on_token: Callable[[], None] = lambda: None,
) -> list[float]:
    """Read a prompt and go on for some tokens, with a static cache; the seconds of each decode pass.

    Args:
        forward: the model as it is called, compiled or not.
        tokens: int64 [batch, tokens].
        on_token: called when the prompt's token is there, and after each decode pass.
    """
    from transformers import StaticCache

    # One size for all: a new cache length would be a new graph.
    cache = StaticCache(config=model.config, max_cache_len=tokens.shape[1] + max(new_tokens, 128))
    kept = {cache_argument(model): cache}
    logits = forward(tokens, use_cache=True, **kept).logits
    times = []
    for _ in range(new_tokens):
        token = logits[:, -1:].argmax(-1)
        wait(tokens.device)
        on_token()
        started = time.perf_counter()
        logits = forward(token, use_cache=True, **kept).logits
        wait(tokens.device)
        times.append(time.perf_counter() - started)
    on_token()
    return times


def wait(device: torch.device) -> None:
    """Let a GPU finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
