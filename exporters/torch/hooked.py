"""Models whose weights accelerate moves in and out (``device_map``, ``offload_folder``), taken over into files of ours.

Its hooks load a layer's weights before the layer runs, into new memory each time, and its parameters have no data
meanwhile: nothing that compiles a whole pass can work with that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from river_compile.config import RiverConfig
from river_compile.errors import ConfigError, InputError
from river_compile.exporters.torch.offload import first_offloaded, give_back, is_supported, move, write
from river_compile.exporters.torch.stack import find_stack, is_linear

__all__ = ["is_hooked", "take_over"]


@dataclass(frozen=True)
class _Absent:
    """A tensor that accelerate holds: whose it is, by which name, and how to get it."""

    module: torch.nn.Module
    name: str
    value: torch.Tensor
    weights: Mapping[str, torch.Tensor]
    key: str

    def load(self) -> torch.Tensor:
        """The tensor, on the CPU.

        Raises:
            InputError: accelerate's file is gone or damaged.
        """
        try:
            loaded = self.weights[self.key]
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{self.name} cannot be read from where accelerate put it: {reason}") from error
        if loaded.shape != self.value.shape:
            raise InputError(
                f"{self.name} is {tuple(loaded.shape)} where accelerate put it, not {tuple(self.value.shape)}"
            )
        return loaded.detach().to("cpu", self.value.dtype).contiguous()

    def put(self, tensor: torch.Tensor) -> None:
        if self.name in self.module._buffers:
            self.module._buffers[self.name] = tensor
        else:
            self.module._parameters[self.name] = torch.nn.Parameter(tensor, self.value.requires_grad)


def is_hooked(model: torch.nn.Module | None) -> bool:
    """Whether hooks of accelerate move some of a model's tensors."""
    return model is not None and any(hasattr(module, "_hf_hook") for module in model.modules())


def take_over(model: torch.nn.Module, config: RiverConfig) -> int:
    """Put the weights of the deep layers' products into a file, and remove accelerate's hooks if there are any: what
    they hold goes into that file, or into memory if it is no such weight.

    Args:
        config: says how many layers stay, and where the file lies.

    Returns:
        Bytes that went into the file; 0 where they have been before.

    Raises:
        LayersNotFound: the model has no list of decoder layers.
        InputError: the model is not on the CPU, or on several devices, or what accelerate holds cannot be read.
        ConfigError: there is no room for the file, its folder cannot be written, or this system cannot do it.
    """
    if not is_supported():
        raise ConfigError("offload_after", "this operating system has no madvise")
    if any(parameter.device.type not in ("cpu", "meta") for parameter in model.parameters()):
        raise InputError("offloading needs the model on the CPU")
    _, stack = find_stack(model)
    sizes = [sum(parameter.nbytes for parameter in layer.parameters()) for layer in stack]
    first = first_offloaded(config, sizes)
    folder = None if config.offload_folder is None else Path(config.offload_folder)
    own = [[(module, "weight") for module in layer.modules() if is_linear(module)] for layer in stack[first:]]
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    deep = [[place for place in layer if uses[id(place[0]._parameters["weight"])] == 1] for layer in own]
    moved = _fetch(model, deep, folder) if is_hooked(model) else 0
    return moved + move([[getattr(*place) for place in layer] for layer in deep], folder)


def _fetch(model: torch.nn.Module, deep: Sequence[Sequence[tuple[torch.nn.Module, str]]], folder: Path | None) -> int:
    """Take what accelerate holds; bytes that went into a file."""
    absent = {(id(one.module), one.name): one for one in _absent(model)}
    layers = [[one for module, name in layer if (one := absent.get((id(module), name))) is not None] for layer in deep]
    filed = [one for layer in layers for one in layer]
    kept = [one for one in absent.values() if not any(one is other for other in filed)]
    loaded = [one.load() for one in kept]
    places: list[Any] = []
    if filed:
        file, places = write(((one.load() for one in layer) for layer in layers), folder)
    # From here on nothing fails: a model is taken over whole or left as it was.
    _remove_hooks(model)
    for one, tensor in zip(kept, loaded, strict=True):
        one.put(tensor)
    for one, place in zip(filed, places, strict=True):
        one.put(file.tensor(place, one.value.shape, one.value.dtype))
    if callable(tie := getattr(model, "tie_weights", None)):
        tie()
    give_back()
    return sum(one.value.nbytes for one in filed)


def _absent(model: torch.nn.Module) -> Iterator[_Absent]:
    for module in model.modules():
        for hook in _hooks(module):
            if torch.device(hook.execution_device or "cpu").type != "cpu":
                raise InputError("accelerate runs this model on several devices; offloading needs it on the CPU alone")
            if not hook.offload:
                continue
            for key, value in _tensors(module, hook.place_submodules):
                inner, _, name = key.rpartition(".")
                if value.is_meta:
                    yield _Absent(module.get_submodule(inner), name, value, hook.weights_map, key)


def _tensors(module: torch.nn.Module, recurse: bool) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(recurse=recurse)
    yield from module.named_buffers(recurse=recurse)


def _hooks(module: torch.nn.Module) -> list[Any]:
    """The hooks of a module that move tensors."""
    hook = getattr(module, "_hf_hook", None)
    return [
        one for one in getattr(hook, "hooks", [hook]) if hasattr(one, "execution_device") and hasattr(one, "offload")
    ]


def _remove_hooks(model: torch.nn.Module) -> None:
    from accelerate.hooks import remove_hook_from_module

    for module in model.modules():
        for hook in _hooks(module):
            # Else it would load all that it holds once more.
            hook.offload = False
    remove_hook_from_module(model, recurse=True)
    # What tells transformers, and whoever wants to move the model, that accelerate holds it.
    for name in ("hf_device_map", "to", "cuda"):
        model.__dict__.pop(name, None)
