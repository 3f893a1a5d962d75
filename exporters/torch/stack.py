"""The decoder layers of a Hugging Face model: the list to put other layers into."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from river_compile.errors import LayersNotFound

__all__ = ["find_stack", "is_linear", "twin_of"]


def find_stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers and its qualified name: the list with the most weights among those of one class.

    Raises:
        LayersNotFound: the model holds no list of at least two modules of one class with linear layers in them.
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) >= 2
        and len({type(member) for member in module}) == 1
        and any(is_linear(inner) for inner in module[0].modules())
    ]
    if not found:
        raise LayersNotFound("the model has no list of repeated decoder layers")
    return max(found, key=lambda item: sum(weight.numel() for weight in item[1].parameters()))


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a product with a weight: torch's linear layer, or the transposed one of transformers."""
    if isinstance(module, nn.Linear):
        return True
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def twin_of(layer: nn.Module, replace: Callable[[str, nn.Module], nn.Module | None]) -> nn.Module:
    """A copy of a layer that shares every weight with it, save those of the modules that ``replace`` exchanges.

    Args:
        replace: is asked for each linear layer, by its name within the decoder layer; None keeps it.
    """
    shared: dict[int, Any] = {id(tensor): tensor for tensor in [*layer.parameters(), *layer.buffers()]}
    shared |= {id(module.config): module.config for module in layer.modules() if hasattr(module, "config")}
    twin = copy.deepcopy(layer, shared)
    for name, module in list(layer.named_modules()):
        if not is_linear(module):
            continue
        other = replace(name, module)
        if other is not None:
            parent, _, leaf = name.rpartition(".")
            setattr(twin.get_submodule(parent), leaf, other)
    return twin.eval()
