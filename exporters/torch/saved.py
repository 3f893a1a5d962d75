"""Tuned river weights as a file: safetensors, with a hash of the backbone's weights that they stand for."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from river_compile.config import RiverConfig
from river_compile.errors import ConfigError, InputError, MissingExtra
from river_compile.exporters.torch import seam
from river_compile.exporters.torch.tuning import Tuned
from river_compile.passes.quantizer import QuantizedWeight

__all__ = ["FILE", "adopt", "read", "write"]

FILE = "river.safetensors"
_FORMAT = "1"
_OPTION = "saved_river"
_PARTS = ("values", "scales", "zero_points")


def write(tuned: Tuned, parameters: Mapping[str, torch.Tensor], folder: Path) -> int:
    """Write what is held for some parameters; a file that was there is replaced when the new one is whole.

    Args:
        parameters: by the names under which `read` will find them.

    Returns:
        How many weights were written.

    Raises:
        InputError: there is none.
        MissingExtra: safetensors is not installed.
    """
    arrays: dict[str, np.ndarray] = {}
    facts: dict[str, dict[str, Any]] = {}
    for name, parameter in parameters.items():
        for number, (quantizer, transposed, weight) in enumerate(tuned.of(parameter)):
            key = f"{name}/{number}"
            arrays |= {f"{key}/{part}": np.ascontiguousarray(getattr(weight, part)) for part in _PARTS}
            facts[key] = {
                "parameter": name,
                "quantizer": quantizer,
                "transposed": transposed,
                "bits": weight.bits,
                "backbone": _hash(parameter),
            }
    if not facts:
        raise InputError("no tuned weights to save: call river_compile.tune(model, ids, config) first")
    numpy_files = _safetensors()
    folder.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=folder, suffix=".part")
    os.close(handle)
    try:
        numpy_files.save_file(arrays, part, metadata={"river": _FORMAT, "weights": json.dumps(facts)})
        os.replace(part, folder / FILE)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise
    return len(facts)


def read(tuned: Tuned, parameters: Mapping[str, torch.Tensor], folder: Path) -> int:
    """Hold the weights of a file for some parameters, as if they had been tuned.

    Returns:
        How many there are.

    Raises:
        InputError: there is no such file, it is damaged or of another kind, or it belongs to other weights.
        MissingExtra: safetensors is not installed.
    """
    path, facts = _opened(folder)
    missing = [fact["parameter"] for fact in facts.values() if fact["parameter"] not in parameters]
    if missing:
        raise InputError(f"{path}: made for another model: this one has no {missing[0]}")
    for fact in facts.values():
        if fact["backbone"] != _hash(parameters[fact["parameter"]]):
            raise InputError(f"{path}: made for other weights than this model's ({fact['parameter']} differs)")
    _keep(tuned, path, facts, [(key, parameters[fact["parameter"]]) for key, fact in facts.items()])
    return len(facts)


def adopt(tuned: Tuned, parameters: Iterable[torch.Tensor], folder: Path, quantizer: str) -> str:
    """Hold the weights of a file for those parameters that they were made of, whatever these are called.

    Args:
        quantizer: of the settings; the default one gives way to the file's.

    Returns:
        The file's quantizer.

    Raises:
        ConfigError: there is no such file, it is damaged, another quantizer made it, or none of it belongs to these
            parameters.
    """
    try:
        path, facts = _opened(folder)
    except InputError as error:
        raise ConfigError(_OPTION, str(error)) from error
    made_by = min(fact["quantizer"] for fact in facts.values())
    if quantizer not in (made_by, RiverConfig.quantizer):
        raise ConfigError(_OPTION, f"{path}: made by {made_by}, not by {quantizer}")
    wide = [parameter for parameter in parameters if parameter.dim() >= 2]
    new = [parameter for parameter in wide if not any(name == made_by for name, _, _ in tuned.of(parameter))]
    hashes = [_hash(parameter) for parameter in new]
    chosen = [
        (key, parameter)
        for parameter, backbone in zip(new, hashes, strict=True)
        for key, fact in facts.items()
        if fact["backbone"] == backbone
    ]
    if not chosen and len(new) == len(wide):
        raise ConfigError(_OPTION, f"{path}: made for other weights than this model's")
    _keep(tuned, path, facts, chosen)
    return str(made_by)


def _keep(
    tuned: Tuned, path: Path, facts: Mapping[str, Mapping[str, Any]], chosen: Iterable[tuple[str, torch.Tensor]]
) -> None:
    """Hold weights of a file, each by its key there, for the parameters that go with the keys."""
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        for key, parameter in chosen:
            values, scales, zero_points = (file.get_tensor(f"{key}/{part}") for part in _PARTS)
            weight = QuantizedWeight(values, scales, zero_points, facts[key]["bits"])
            tuned.keep(parameter, facts[key]["quantizer"], facts[key]["transposed"], weight)


def _opened(folder: Path) -> tuple[Path, dict[str, dict[str, Any]]]:
    """The file in a folder, and what it tells of its weights, by their keys; the weights themselves are not read.

    Raises:
        InputError: there is none, or it is damaged or of another kind.
        MissingExtra: safetensors is not installed.
    """
    path = folder / FILE
    if not path.is_file():
        raise InputError(f"{folder}: no saved river ({FILE}) here")
    _safetensors()
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            metadata, held = file.metadata() or {}, set(file.keys())
        if metadata.get("river") != _FORMAT:
            raise InputError(f"{path}: no saved river of this release ({metadata.get('river', 'no note of one')})")
        facts = json.loads(metadata["weights"])
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: damaged: {error}") from error
    if any(f"{key}/{part}" not in held for key in facts for part in _PARTS):
        raise InputError(f"{path}: damaged: it lacks weights that it tells of")
    return path, facts


def _hash(parameter: torch.Tensor) -> str:
    """Of shape, type and every byte."""
    data = seam.shard_of(parameter).detach().cpu().contiguous()
    digest = hashlib.sha256(repr((tuple(data.shape), str(data.dtype))).encode())
    digest.update(data.view(torch.uint8).numpy().data if data.dim() else data.reshape(1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise MissingExtra("safetensors", "hf", "a saved river") from error
    return safetensors.numpy
