"""`export`: a decoder in, a decoder with an exit river out."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from river_compile.config import RiverConfig
from river_compile.errors import ConfigError, InputError

if TYPE_CHECKING:
    import torch

    from river_compile.passes.anatomy import Layer

__all__ = ["ExportReport", "export", "plan"]

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ExportReport:
    """What an export found and made.

    Fields:
        source, output: the files; ``output`` is None after a dry run.
        layers: decoder layers found; ``found_by`` says how: "metadata", "names" or "structure".
        kinds: how many different structures they have.
        river_layers: those with a river twin.
        exit_points: depths after which a token may exit.
        backbone_bytes, river_bytes: size of all weights of the source, and of the river's.
        added_nodes: nodes more than the source has.
        quantizer: what made the river.
        notes: what did not go as asked, a line each.
        seconds: wall time, in all and for each step.
    """

    source: str
    output: str | None
    layers: int
    found_by: str
    kinds: int
    river_layers: int
    exit_points: tuple[int, ...]
    backbone_bytes: int
    river_bytes: int
    added_nodes: int
    quantizer: str
    notes: tuple[str, ...]
    seconds: dict[str, float]

    def to_json(self) -> str:
        """The report as one JSON object."""
        return json.dumps(asdict(self), indent=2)


def export(
    model: str | Path | torch.nn.Module,
    output: str | Path | None = None,
    config: RiverConfig | None = None,
    *,
    progress: Progress | None = None,
) -> ExportReport:
    """Give a decoder an exit river, as an ONNX model for ONNX Runtime.

    Args:
        model: an ONNX file with a KV cache in its signature, a folder (or hub name) of a Hugging Face decoder, or such
            a model itself; the latter two are exported to ONNX first (opset 23).
        output: the file to write; ``<model>.river.onnx`` beside the source if None. It is written whole or not at all.
        config: the settings; the defaults if None.
        progress: is told the step and how much of how much of it is done.

    Returns:
        What was found and made.

    Raises:
        InputError: the source cannot be used; nothing is written.
        ConfigError: the settings do not fit the model.
        MissingExtra: onnxruntime (the quantizer) or transformers is needed and not installed.
    """
    from river_compile.exporters import onnx_file, rewrite
    from river_compile.exporters.onnxruntime import MatMulNBits, quantizer

    config = config or RiverConfig()
    progress = progress or (lambda step, done, total: None)
    started = time.perf_counter()
    chosen = quantizer(config.quantizer)
    with ExitStack() as stack:
        source, label = _as_onnx(model, stack, progress)
        target = Path(output) if output is not None else _beside(label)
        if target.exists() and source.exists() and target.samefile(source):
            raise InputError(f"{target}: output and input are the same file")
        proto = onnx_file.load(source)
        result = rewrite.rewrite(
            proto,
            source.parent,
            config,
            chosen,
            MatMulNBits(config.activations),
            lambda done, total: progress("quantize", done, total),
        )
        written = time.perf_counter()
        onnx_file.save(
            result.model,
            target,
            source.parent,
            config.external_data,
            lambda done, total: progress("write", done, total),
        )
        seconds = result.seconds | {"write": time.perf_counter() - written, "total": time.perf_counter() - started}
    return ExportReport(
        source=str(label),
        output=str(target),
        layers=len(result.anatomy.layers),
        found_by=result.anatomy.found_by,
        kinds=len({layer.kind for layer in result.anatomy.layers}),
        river_layers=len(result.river.twins),
        exit_points=result.exit_points,
        backbone_bytes=result.backbone_bytes,
        river_bytes=result.river.nbytes,
        added_nodes=result.added_nodes,
        quantizer=chosen.name,
        notes=tuple(result.river.notes),
        seconds={name: round(value, 3) for name, value in seconds.items()},
    )


def plan(
    model: str | Path | torch.nn.Module, config: RiverConfig | None = None, *, progress: Progress | None = None
) -> tuple[ExportReport, tuple[Layer, ...]]:
    """What `export` would do, without quantizing or writing: the report, and the anatomy of the decoder.

    Raises: as `export`.
    """
    from river_compile.exporters import onnx_file, rewrite

    config = config or RiverConfig()
    started = time.perf_counter()
    with ExitStack() as stack:
        source, label = _as_onnx(model, stack, progress or (lambda step, done, total: None))
        proto = onnx_file.load(source)
        backbone_bytes = sum(map(onnx_file.tensor_bytes, proto.graph.initializer))
        anatomy, linears, notes = rewrite.survey(proto, source.parent, config)
    report = ExportReport(
        source=str(label),
        output=None,
        layers=len(anatomy.layers),
        found_by=anatomy.found_by,
        kinds=len({layer.kind for layer in anatomy.layers}),
        river_layers=len({linear.layer for linear in linears}),
        exit_points=tuple(
            depth
            for depth in config.exit_points(len(anatomy.layers))
            if any(linear.layer == depth - 1 for linear in linears)
        ),
        backbone_bytes=backbone_bytes,
        river_bytes=sum(linear.nbytes for linear in linears),
        added_nodes=0,
        quantizer=config.quantizer,
        notes=tuple(notes),
        seconds={"total": round(time.perf_counter() - started, 3)},
    )
    return report, anatomy.layers


def _as_onnx(model: str | Path | torch.nn.Module, stack: ExitStack, progress: Progress) -> tuple[Path, Path]:
    """The ONNX file to rewrite, made in a temporary folder if need be, and the path that names it to the user."""
    from river_compile.exporters import hf

    if isinstance(model, (str, Path)):
        path = Path(model)
        if path.is_file() or path.suffix == ".onnx":
            return path, path
        module, label = hf.load_decoder(model), Path(path.name or "model")
        label = path if path.is_dir() else label
    else:
        module, label = model, Path(type(model).__name__)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="river-")))
    progress("export to ONNX", 0, 1)
    hf.export_decoder(module, folder / "model.onnx")
    progress("export to ONNX", 1, 1)
    return folder / "model.onnx", label


def _beside(source: Path) -> Path:
    if source.suffix == ".onnx":
        return source.with_suffix(".river.onnx")
    if source.is_dir():
        return source / "model.river.onnx"
    raise ConfigError("output", f"say where to write: {source} is no file or folder")
