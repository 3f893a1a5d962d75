"""One ONNX file out of whatever a decoder comes as."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from river_compile.config import RiverConfig
from river_compile.errors import ConfigError, RiverError
from river_compile.reports import Agreement, ExportReport, Progress, QualityTexts, TuningTexts

if TYPE_CHECKING:
    import onnx
    import torch

    from river_compile.exporters.onnx.moments import Moments

__all__ = ["Steps", "as_onnx", "export_file"]


def export_file(
    model: str | Path | torch.nn.Module,
    output: str | Path | None,
    config: RiverConfig,
    *,
    tuning: TuningTexts | None,
    quality: QualityTexts | None,
    progress: Progress | None,
    check: bool,
    beside: Callable[[Path], None] | None,
) -> ExportReport:
    """`river_compile.export` into a file, with arguments as there.

    Args:
        beside: is told the ONNX file that the river was grown on, when the river is written, to write more beside it.
    """
    from river_compile.exporters.onnx import onnx_file, rewrite
    from river_compile.exporters.onnx.check import Check
    from river_compile.exporters.onnx.onnxruntime import MatMulNBits
    from river_compile.exporters.quantizers import quantizer
    from river_compile.passes.onnx.cut_logits import cut_logits
    from river_compile.passes.onnx.guard_decisions import guard_decisions
    from river_compile.passes.onnx.widen_products import widen_products

    progress, started = progress or (lambda step, done, total: None), time.perf_counter()
    target = Path(output) if output is not None else _beside(model)
    onnx_file.check_target(target)
    if config.kv_policy != "share":
        raise ConfigError("kv_policy", f"an exported model shares its KV cache; {config.kv_policy!r} is for comparison")
    if config.saved_river is not None:
        raise ConfigError("saved_river", "is for torch.compile; an exported river is saved with its model")
    quantizer(config.quantizer)
    steps = Steps(progress)
    with ExitStack() as stack:
        source, label = as_onnx(model, target.parent, stack, steps)
        with steps("read"):
            proto = onnx_file.load(source)
            onnx_file.check_apart(target, source, proto)
        moments = None
        if tuning is not None:
            with steps("tune", pieces=True):
                config, moments = _tuned(tuning, proto, source, config, progress)
        chosen = quantizer(config.quantizer)
        looks = stack.enter_context(Check(source, proto)) if check else None
        result = rewrite.rewrite(
            proto,
            source.parent,
            config,
            chosen,
            MatMulNBits(config.activations),
            lambda done, total: progress("quantize", done, total),
            moments,
            found=looks.begin if looks is not None else lambda anatomy: None,
            prepare=(widen_products,),
            before_head=(cut_logits, guard_decisions),
        )
        steps.seconds |= result.seconds
        if config.calibration is not None:
            with steps("check calibration"):
                _check_calibration(str(config.calibration), onnx_file.fingerprint(result.model, source.parent))
        notes = list(result.river.notes)

        def look(written: Path) -> None:
            if looks is not None:
                with steps("check"):
                    notes.extend(looks.end(written, result))

        with steps("write", pieces=True):
            writing = partial(progress, "write")
            onnx_file.save(result.model, target, source.parent, config.external_data, writing, look)
        if beside is not None:
            with steps("write beside"):
                beside(source)
    drafts, speeds = (tuning.drafts, tuning.speeds) if tuning is not None else (None, None)
    if evidence := {name: found for name, found in (("exact", drafts), ("speed", speeds)) if found is not None}:
        onnx_file.note(target, {f"river.{name}": json.dumps(found) for name, found in evidence.items()})
    agreement = _agreement(quality, target, config, steps, progress, notes)
    seconds = steps.seconds | {"total": time.perf_counter() - started}
    return ExportReport(
        source=label,
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
        average_bits=result.river.average_bits,
        notes=tuple(notes),
        seconds={name: round(value, 3) for name, value in seconds.items()},
        agreement=agreement,
        drafts=drafts,
        speeds=speeds,
    )


def _tuned(
    tuning: TuningTexts, proto: onnx.ModelProto, source: Path, config: RiverConfig, progress: Progress
) -> tuple[RiverConfig, Moments | None]:
    """The config as the texts would have it, and what an activation-aware quantizer reads in them."""
    from river_compile.exporters.onnx import onnx_file, rewrite
    from river_compile.exporters.onnx.moments import Moments
    from river_compile.exporters.quantizers import quantizer
    from river_compile.passes.quantizer import ActivationAware

    ids = tuning.ids(proto)
    config = tuning.applied(source, ids, config, progress)
    if not isinstance(quantizer(config.quantizer), ActivationAware):
        return config, None
    linears = rewrite.survey(onnx_file.load(source), source.parent, config)[1].quantized
    return config, Moments(source, linears, ids, partial(progress, "read tuning texts"))


class Steps:
    """What an export does, one step after the other: each is told when it begins and ends, and timed.

    Fields:
        seconds: wall time by step; that of a step within another is its own only.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, step: str, pieces: bool = False) -> Iterator[None]:
        """
        Args:
            pieces: whether the step itself tells how much of it is done.
        """
        if not pieces:
            self._progress(step, 0, 1)
        started, inner = time.perf_counter(), sum(self.seconds.values())
        yield
        self.seconds[step] = time.perf_counter() - started - (sum(self.seconds.values()) - inner)
        if not pieces:
            self._progress(step, 1, 1)


def _agreement(
    quality: QualityTexts | None,
    target: Path,
    config: RiverConfig,
    steps: Steps,
    progress: Progress,
    notes: list[str],
) -> Agreement | None:
    """What was measured, noted in the model as well; why it was not goes into the notes: the model is written."""
    if quality is None:
        return None
    from river_compile.exporters.onnx import onnx_file

    try:
        with steps("measure agreement", pieces=True):
            agreement = quality.measured(target, config, progress)
        onnx_file.note(target, {"river.agreement": json.dumps(asdict(agreement))})
    except RiverError as error:
        notes.append(f"agreement not measured: {error}")
        return None
    return agreement


def _check_calibration(text: str, fingerprint: str) -> None:
    if json.loads(text).get("model_sha256") != fingerprint:
        raise ConfigError(
            "calibration", "it was made with another model or river: other weights, or other settings than its tau"
        )


def as_onnx(
    model: str | Path | torch.nn.Module, folder: Path | None, stack: ExitStack, steps: Steps
) -> tuple[Path, str]:
    """The ONNX file to rewrite, made in a temporary folder in ``folder`` if need be, and what to call the source."""
    if isinstance(model, (str, Path)):
        path = _onnx_in(Path(model))
        if path.is_file() or path.suffix == ".onnx":
            return path, str(path)
        with steps("load model"):
            from river_compile.exporters.onnx import hf

            module, label = hf.load_decoder(model), str(model)
    else:
        module, label = model, type(model).__name__
    temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".river-", dir=folder)))
    with steps("export to ONNX"):
        from river_compile.exporters.onnx import hf

        hf.export_decoder(module, temporary / "model.onnx")
    return temporary / "model.onnx", label


def _beside(model: str | Path | torch.nn.Module) -> Path:
    source = _onnx_in(Path(model)) if isinstance(model, (str, Path)) else None
    if source is not None and source.suffix == ".onnx":
        return source.with_suffix(".river.onnx")
    if source is not None and source.is_dir():
        return source / "model.river.onnx"
    if source is not None and source.is_file():
        return source.with_name(source.name + ".river.onnx")
    raise ConfigError("output", f"say where to write: {model if source else type(model).__name__} is no file or folder")


def _onnx_in(path: Path) -> Path:
    """The ONNX file that a folder of optimum or GenAI means; else the path as it is."""
    from river_compile.exporters.onnx.folder import ModelFolder

    found = ModelFolder.of(path) if path.is_dir() else None
    return path if found is None or found.kind == "hf" else path / found.model
