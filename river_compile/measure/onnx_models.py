"""The ONNX models that a benchmark sets side by side: the plain one, its river, and its quantized self."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from river_compile.api import export
from river_compile.config import RiverConfig
from river_compile.errors import InputError, MissingExtra, RiverError
from river_compile.exporters.onnx import onnx_file
from river_compile.exporters.onnx.onnxruntime import INT8_ACCURACY
from river_compile.passes.onnx.only_twin import only_twin
from river_compile.runtime import OnnxDecoder

__all__ = ["Models", "context_limit", "open_models"]

Progress = Callable[[str, int, int], None]

# What passes write otherwise before they grow a river, by its names.
_RESTATED = re.compile(r"(^|/)residual_\d+$|/wide(\.\d+)?/Cast$")
_TOLERANCE = 2e-2
_CONTEXTS = ("max_position_embeddings", "n_positions")


@dataclass
class Models:
    """Models that are run side by side.

    Fields:
        river: has a river.
        plain: the model that it was made for; None where there is none to compare with.
        origin: where the plain model is from, in words.
        int4: the plain model with 4-bit weights, if that was asked for and made.
        notes: what is to be said of them.
    """

    river: OnnxDecoder
    plain: OnnxDecoder | None = None
    origin: str = ""
    int4: OnnxDecoder | None = None
    notes: list[str] = field(default_factory=list)


def open_models(
    model: Path,
    folder: Path,
    *,
    plain: Path | None = None,
    config: RiverConfig | None = None,
    int4: bool = False,
    device: str = "cpu",
    threads: int | None = None,
    progress: Progress,
) -> Models:
    """Open a model beside its river, made in ``folder``; or a river model beside what it was made for.

    Args:
        model: an ONNX decoder, with a river or without.
        folder: a temporary one, for what has to be made.
        plain: of a river model, the original; None: it is taken out of the river model.
        config: of the river that a plain model gets.

    Raises:
        InputError: there is no decoder, ``plain`` is not what the river was made for, or a plain model cannot get one.
        ConfigError: ``plain`` or ``config`` say of a model what it tells itself.
        MissingExtra: onnxruntime is not installed.
    """
    opened = OnnxDecoder(model, device, threads)
    if opened.has_river:
        if config is not None:
            raise InputError(f"{model}: has its river; settings of a river are for a plain model")
        models = Models(opened)
        _find_plain(models, plain, folder, progress)
    else:
        if plain is not None:
            raise InputError(f"{model}: has no river, so it is the plain model itself; --plain goes with a river model")
        river = folder / "model.river.onnx"
        export(model, river, config, progress=progress)
        models = Models(OnnxDecoder(river, device, threads), opened, "the model itself")
    if int4 and models.plain is not None:
        models.int4 = _quantized(models.plain, models.river.exported_config, folder, models.notes, progress)
    elif int4:
        models.notes.append("plain int4: there is no plain model to quantize")
    return models


def _find_plain(models: Models, given: Path | None, folder: Path, progress: Progress) -> None:
    river = models.river
    if given is not None:
        models.plain, models.origin = _like(river, given), str(given)
        if models.plain.has_river:
            raise InputError(f"{given}: has a river itself; --plain is the model before it got one")
        _check_same(river, models.plain)
        return
    path = folder / "plain.onnx"
    progress("take the river out", 0, 1)
    try:
        stripped = only_twin(onnx.load(str(river.path), load_external_data=False), river=False)
        restated = any(_RESTATED.search(node.name) for node in stripped.graph.node)
        onnx_file.save(stripped, path, river.path.parent)
        plain = _like(river, path)
        _check_same(river, plain)
    except (RiverError, ValueError, RuntimeError) as error:
        why = " ".join(str(error).split())
        models.notes.append(f"there is no plain model, so ratios are to the river model with exits off: {why}")
        return
    progress("take the river out", 1, 1)
    models.plain, models.origin = plain, "the model without its river"
    if restated:
        models.notes.append(
            "plain: operators that were taken apart for the river stay apart, and the original may be faster; "
            "name it with --plain"
        )


def _like(decoder: OnnxDecoder, path: Path) -> OnnxDecoder:
    return OnnxDecoder(path, decoder.device, decoder.threads)


def _check_same(river: OnnxDecoder, plain: OnnxDecoder) -> None:
    """With exits off a river computes what its plain model does.

    Raises:
        InputError: it does not.
    """
    problem = f"{plain.path}: is not the model that {river.path} was made for"
    if river.signature != plain.signature:
        raise InputError(f"{problem}: other inputs and outputs")
    ids = np.resize([3, 4, 5, 6], (river.signature.batch or 1, river.signature.step or 4))
    expected, _ = plain.forward(ids, plain.start(len(ids)))
    found, _ = river.backbone(ids, river.start(len(ids)))
    if found.shape != expected.shape or np.abs(found - expected).max() > _TOLERANCE * np.ptp(expected):
        raise InputError(f"{problem}: with exits off it computes something else")


def _quantized(
    plain: OnnxDecoder, settings: Mapping[str, Any], folder: Path, notes: list[str], progress: Progress
) -> OnnxDecoder | None:
    """A plain model with 4-bit weights as ONNX Runtime's own quantizer makes them, in groups as large as the river's;
    None, and a note, if it finds none to quantize."""
    progress("quantize the plain model", 0, 1)
    made = _nbits_quantizer()(
        onnx.load(str(plain.path)),
        bits=4,
        block_size=settings.get("group_size", RiverConfig.group_size),
        accuracy_level=INT8_ACCURACY if settings.get("activations", RiverConfig.activations) == "int8" else None,
    )
    before = _constant_products(made.model.model.graph)
    made.process()
    left = _constant_products(made.model.model.graph)
    progress("quantize the plain model", 1, 1)
    if left == before:
        notes.append("plain int4: onnxruntime's quantizer finds no MatMul with a constant weight")
        return None
    if left:
        notes.append(f"plain int4: {left} of {before} linear layers stay as they are; the quantizer takes MatMul only")
    path = folder / "plain.int4.onnx"
    onnx_file.save(made.model.model, path, None, external=True)
    return _like(plain, path)


def _nbits_quantizer() -> Any:
    """ONNX Runtime's; its module sets up logging for the whole program when it is imported, which is undone."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    try:
        from onnxruntime.quantization import matmul_nbits_quantizer
    except ImportError as error:
        raise MissingExtra("onnxruntime", "cpu", f"quantizing the plain model ({error})") from error
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers
    return matmul_nbits_quantizer.MatMulNBitsQuantizer


def _constant_products(graph: onnx.GraphProto) -> int:
    constants = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2}
    return sum(node.op_type in ("MatMul", "Gemm") and node.input[1] in constants for node in graph.node)


def context_limit(model: Path) -> int | None:
    """Tokens that a model was made for, as a config beside it tells; None if none does."""
    for name in ("config.json", "genai_config.json"):
        try:
            config: Any = json.loads((model.parent / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        parts = [part for key in ("text_config", "model") if isinstance(part := config.get(key), dict)]
        told = [part.get(name) for part in (config, *parts) for name in (*_CONTEXTS, "context_length")]
        if numbers := [number for number in told if isinstance(number, int)]:
            return numbers[0]
    return None
