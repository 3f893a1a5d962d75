"""Small random models of real architectures, shared by all tests: a sample of what exists, not of what is supported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf

VOCABULARY = 128
LAYERS = 4

_TOKENS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2}
_LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    **_TOKENS,
}
_SMALL_HEADS = {**_LLAMA_LIKE, "head_dim": 16}

FAMILIES: dict[str, Callable[[int], Any]] = {
    "llama": lambda n: hf.LlamaConfig(num_hidden_layers=n, **_LLAMA_LIKE),
    "mistral": lambda n: hf.MistralConfig(num_hidden_layers=n, sliding_window=None, **_LLAMA_LIKE),
    "qwen2": lambda n: hf.Qwen2Config(num_hidden_layers=n, **_LLAMA_LIKE),
    "phi3": lambda n: hf.Phi3Config(num_hidden_layers=n, **_LLAMA_LIKE),
    "gpt2": lambda n: hf.GPT2Config(n_layer=n, n_embd=64, n_head=4, n_positions=256, **_TOKENS),
    "opt": lambda n: hf.OPTConfig(
        num_hidden_layers=n,
        hidden_size=64,
        ffn_dim=128,
        num_attention_heads=4,
        max_position_embeddings=256,
        word_embed_proj_dim=64,
        pad_token_id=0,
        **_TOKENS,
    ),
    "gpt_neox": lambda n: hf.GPTNeoXConfig(
        num_hidden_layers=n,
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        max_position_embeddings=256,
        **_TOKENS,
    ),
    "gemma": lambda n: hf.GemmaConfig(num_hidden_layers=n, **{**_SMALL_HEADS, "num_key_value_heads": 1}),
    "falcon": lambda n: hf.FalconConfig(num_hidden_layers=n, hidden_size=64, num_attention_heads=4, **_TOKENS),
    "gemma2": lambda n: hf.Gemma2Config(num_hidden_layers=n, sliding_window=8, **_SMALL_HEADS),
    "gemma3": lambda n: hf.Gemma3TextConfig(num_hidden_layers=n, sliding_window=8, **_SMALL_HEADS),
    "qwen3": lambda n: hf.Qwen3Config(num_hidden_layers=n, **_SMALL_HEADS),
    "bloom": lambda n: hf.BloomConfig(n_layer=n, hidden_size=64, n_head=4, **_TOKENS),
    "gptj": lambda n: hf.GPTJConfig(n_layer=n, n_embd=64, n_head=4, rotary_dim=8, n_positions=256, **_TOKENS),
    "phi": lambda n: hf.PhiConfig(num_hidden_layers=n, **_LLAMA_LIKE),
    "starcoder2": lambda n: hf.Starcoder2Config(num_hidden_layers=n, **_LLAMA_LIKE),
    "stablelm": lambda n: hf.StableLmConfig(num_hidden_layers=n, **_LLAMA_LIKE),
    "cohere": lambda n: hf.CohereConfig(num_hidden_layers=n, **_LLAMA_LIKE),
    "olmo2": lambda n: hf.Olmo2Config(num_hidden_layers=n, **_LLAMA_LIKE),
    "mixtral": lambda n: hf.MixtralConfig(
        num_hidden_layers=n, num_local_experts=4, num_experts_per_tok=2, sliding_window=None, **_LLAMA_LIKE
    ),
    "mpt": lambda n: hf.MptConfig(n_layers=n, d_model=64, n_heads=4, max_seq_len=256),
}

NAMED = ("llama", "mistral", "qwen2", "phi3", "gpt2", "opt", "gpt_neox", "gemma", "falcon")
"""The families that every lowering is checked on at every depth; the others are checked where it is cheap."""

CLOSELY_EXPORTED = (*NAMED, "gemma2", "bloom", "mixtral")
"""The families that ONNX is made of in many tests, with four layers; of the others with two, since exports are slow."""

NOT_EXPORTED = ("mpt",)
"""Families whose code torch.export itself refuses at dynamic lengths."""


ALIKE = ("starcoder2", "stablelm", "cohere")
"""Families whose layers have nothing that those of other families here have not: they are exported in slow tests."""


def families_that_export(*left_out: str) -> list[Any]:
    """All families that ONNX can be made of, as parameters of a test."""
    names = [family for family in FAMILIES if family not in (*left_out, *NOT_EXPORTED)]
    return [pytest.param(family, marks=pytest.mark.slow if family in ALIKE else ()) for family in names]


def exported_layers(family: str) -> int:
    """Decoder layers that a test of every family exports."""
    return LAYERS if family in CLOSELY_EXPORTED else 2


def random_model(
    family: str, layers: int = LAYERS, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> Any:
    """A random model in eval mode, with ``changes`` of its config. Weights are twice the usual size and norms off 1, so
    that layers really differ."""
    torch.manual_seed(seed)
    config = FAMILIES[family](layers)
    config.vocab_size = VOCABULARY
    for name, value in changes.items():
        setattr(config, name, value)
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2.0)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.to(dtype)
