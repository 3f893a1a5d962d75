"""Whether a tensor is still what it was."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["versions"]


def versions(parameters: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """A number for each tensor that grows when it is changed in place; a tensor made for inference has none."""
    return tuple(-1 if tensor.is_inference() else tensor._version for tensor in parameters)
