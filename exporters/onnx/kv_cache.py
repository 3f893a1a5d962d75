"""What the installed transformers calls a model's KV cache: ``past_key_values``, or ``cache`` from 5.24 on."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

__all__ = ["CACHE_ARGUMENTS", "cache_argument", "cache_of"]

CACHE_ARGUMENTS = ("cache", "past_key_values")


def cache_argument(model: nn.Module) -> str:
    """The argument of a model's forward that takes the KV cache; of what it wraps, where its own forward names none."""
    for module in model.modules():
        known = inspect.signature(module.forward).parameters
        found = next((name for name in CACHE_ARGUMENTS if name in known), None)
        if found is not None:
            return found
    return CACHE_ARGUMENTS[-1]


def cache_of(output: Any) -> Any:
    """The KV cache that a model returned; None if there is none."""
    return next((getattr(output, name) for name in CACHE_ARGUMENTS if getattr(output, name, None) is not None), None)
