"""A Hugging Face model loaded, compiled and warmed up in one call; tuned rivers kept from one process to the next."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from river_compile.backend import river as river_backend
from river_compile.compiled import TUNED
from river_compile.config import RiverConfig
from river_compile.errors import ConfigError
from river_compile.exporters.torch import hooked, saved

__all__ = ["from_pretrained", "load_river", "offload", "save_river"]

_WARM_UP_TOKENS, _WARM_UP_NEW = 24, 4


def from_pretrained(
    name: str | Path,
    *,
    tau: float | None = None,
    exact: bool = False,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    river: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    warm_up: bool = True,
) -> Any:
    """A causal language model with an exit river, ready to ``generate``.

    The same as loading it by transformers, ``torch.compile(model, backend="river", options=...)``, and a first
    generation of some tokens, which compiles what later ones run.

    Args:
        name: a folder or a hub name.
        tau: the exit threshold; None: the default. Not with ``exact``, whose drafts are all river.
        exact: the river only drafts: tokens are the model's own.
        dtype: as transformers loads it; None: as it was saved.
        device: where it runs.
        river: a folder that `save_river` wrote; its quantizer is taken.
        options: further fields of `RiverConfig`.
        warm_up: whether to generate some tokens at once; without it the first generation compiles.

    Returns:
        What ``torch.compile`` returns; `stats` and the like take it.

    Raises:
        InputError: there is no such model, it is no causal language model, or the saved river is another model's.
        ConfigError: an option is wrong, or given twice.
        MissingExtra: transformers is not installed.
    """
    given = {"tau": tau, "exact": exact or None}
    settings: dict[str, Any] = {field: value for field, value in given.items() if value is not None}
    for field in settings:
        if field in (options or {}):
            raise ConfigError(field, "given twice: as an argument and among the options")
    settings |= options or {}
    from river_compile.exporters.onnx.hf import load_decoder

    RiverConfig.from_options(settings)
    model = load_decoder(name, dtype).to(device)
    if river is not None:
        load_river(model, river)
        kept = {quantizer for weight in model.parameters() for quantizer, _, _ in TUNED.of(weight)}
        settings.setdefault("quantizer", min(kept))
    compiled: Any = torch.compile(model.requires_grad_(False), backend=river_backend, options=settings)
    if warm_up:
        vocabulary = model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
        ids = torch.arange(_WARM_UP_TOKENS, device=device)[None] % vocabulary
        compiled.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=_WARM_UP_NEW,
            min_new_tokens=_WARM_UP_NEW,
            do_sample=False,
        )
    return compiled


def offload(
    model: torch.nn.Module,
    after: int | None = None,
    *,
    memory: int | None = None,
    folder: str | Path | None = None,
) -> int:
    """Keep the weights of a model's deep decoder layers in a file, and in memory only while they are used.

    The options ``offload_after`` and ``offload_memory`` of ``torch.compile`` do the same when the model first decodes.
    Call this before, for a model that accelerate has spread over memory and disk
    (``from_pretrained(..., device_map=..., offload_folder=...)``): its hooks are removed, and what they held goes into
    the file, or into memory if it belongs to a layer that stays. So a model is loaded that memory cannot hold.

    Args:
        model: on the CPU; its parameters stay parameters, and may be read, written and saved.
        after: how many decoder layers stay in memory.
        memory: instead of it, how many bytes of decoder layers may stay.
        folder: where the file lies; the system's folder for temporary files if None.

    Returns:
        Bytes that went into the file; 0 where they have been before.

    Raises:
        ConfigError: neither or both of ``after`` and ``memory`` are given, or the folder has no room.
        InputError: the model has no list of decoder layers, runs on several devices, or what accelerate holds is gone.
    """
    if after is None and memory is None:
        raise ConfigError("offload_after", "say how many layers stay, or how much memory they may take")
    config = RiverConfig(offload_after=after, offload_memory=memory, offload_folder=folder)
    return hooked.take_over(getattr(model, "_orig_mod", model), config)


def save_river(model: torch.nn.Module, folder: str | Path) -> int:
    """Keep the weights that `tune` has made for a model: ``river.safetensors`` in a folder, a byte a weight.

    Args:
        model: the model, compiled or not.

    Returns:
        How many weights were kept.

    Raises:
        InputError: nothing was tuned for this model, or it was changed since.
        MissingExtra: safetensors is not installed.
    """
    return saved.write(TUNED, _named(model), Path(folder))


def load_river(model: torch.nn.Module, folder: str | Path) -> int:
    """Take weights that `save_river` kept, as if `tune` had just made them; compile with their quantizer.

    Args:
        model: the model that they were made for, compiled or not; what was compiled before stays as it is.

    Returns:
        How many weights were taken.

    Raises:
        InputError: there is no saved river, it is damaged, or it belongs to another model or to other weights.
        MissingExtra: safetensors is not installed.
    """
    return saved.read(TUNED, _named(model), Path(folder))


def _named(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(getattr(model, "_orig_mod", model).named_parameters())
