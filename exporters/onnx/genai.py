"""What ONNX Runtime GenAI reads beside the models: ``genai_config.json``."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import onnx

from river_compile.exporters.onnx.folder import GENAI_CONFIG, genai_config
from river_compile.exporters.onnx.shared_weights import shared_tensors
from river_compile.passes.onnx.external_data import place_of

__all__ = ["draft_by", "without_graph_capture"]

# Names of one switch, by execution provider.
_GRAPH_CAPTURE = ("enable_cuda_graph", "enable_graph_capture", "enableGraphCapture")
# A fixed length: one that GenAI adapts was slower on SmolLM2 (1.36x against 1.49x, one run; docs/tools.md).
_DRAFT_TOKENS = 4


def without_graph_capture(folder: Path) -> bool:
    """Switch off the recording of whole passes, as CUDA graphs are: a pass that may exit is not always the same.

    Returns:
        Whether it was on.
    """
    config = genai_config(folder)
    found = False
    options = config["model"]["decoder"].get("session_options") or {}
    for settings in (settings for provider in options.get("provider_options", ()) for settings in provider.values()):
        for name in _GRAPH_CAPTURE:
            if isinstance(settings, dict) and settings.get(name, "0") != "0":
                settings[name], found = "0", True
    if found:
        _write(folder, config)
    return found


def draft_by(folder: Path, drafter: str) -> None:
    """Let GenAI decode speculatively (0.18 and later): the decoder verifies what a second model drafts.

    Args:
        folder: with a ``genai_config.json`` that names the decoder.
        drafter: an ONNX file in it with the decoder's signature. Where the decoder runs on a device, weights of both
            that lie outside, at the same place, are listed as shared initializers, which GenAI holds once.
    """
    config = genai_config(folder)
    decoder = config["model"]["decoder"]
    # On a CPU, whose sessions map the file, GenAI 0.18 stops at such a list.
    options = decoder.get("session_options") or {}
    on_device = any(name.lower() != "cpu" for provider in options.get("provider_options", ()) for name in provider)
    shared = _common(folder / decoder.get("filename", "model.onnx"), folder / drafter) if on_device else []
    draft = copy.deepcopy(decoder) | {"filename": drafter}
    for section in (decoder, draft):
        if shared:
            section["shared_initializers"] = shared
    config["model"]["draft"] = draft
    config["speculative"] = {"max_draft_tokens": _DRAFT_TOKENS}
    _write(folder, config)


def _common(decoder: Path, drafter: Path) -> list[dict[str, Any]]:
    """Weights at one place that both models read, as GenAI lists them."""
    theirs = {tensor.name: tensor for tensor in shared_tensors(onnx.load(str(decoder), load_external_data=False))}
    listed = []
    for tensor in shared_tensors(onnx.load(str(drafter), load_external_data=False)):
        other = theirs.get(tensor.name)
        if other is None or place_of(other) != place_of(tensor):
            continue
        place = place_of(tensor)
        listed.append(
            {
                "name": tensor.name,
                "data_file": place.location,
                "offset": str(place.offset),
                "length": str(place.length),
                "data_type": tensor.data_type,
                "shape": list(tensor.dims),
            }
        )
    return listed


def _write(folder: Path, config: dict[str, Any]) -> None:
    (folder / GENAI_CONFIG).write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")
