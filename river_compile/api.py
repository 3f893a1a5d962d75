"""`export`: a decoder in, a decoder with an exit river out."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from river_compile.config import RiverConfig
from river_compile.errors import ConfigError, RiverError
from river_compile.reports import Agreement, ExportReport, Plan, PlannedLinear, Progress, QualityTexts, TuningTexts

if TYPE_CHECKING:
    import torch

    from river_compile.exporters.tensorrt.build import EngineOptions
    from river_compile.exporters.tensorrt.engine import EngineInfo

__all__ = ["build_engine", "export", "plan"]


def export(
    model: str | Path | torch.nn.Module,
    output: str | Path | None = None,
    config: RiverConfig | None = None,
    *,
    tuning: TuningTexts | None = None,
    quality: QualityTexts | None = None,
    progress: Progress | None = None,
    check: bool = True,
) -> ExportReport:
    """Give a decoder an exit river, as an ONNX model for ONNX Runtime.

    Args:
        model: an ONNX file with a KV cache in its signature, a folder (or hub name) of a Hugging Face decoder, or such
            a model itself; the latter two are exported to ONNX first (opset 23).
        output: the file to write; ``<model>.river.onnx`` beside the source if None. It is written whole or not at all.
        config: the settings; the defaults if None.
        tuning: texts for a quantizer that asks for them, and a budget of bits or fidelity to plan bit widths by.
        quality: texts to compare the new river with its backbone on; the outcome goes into the report and into the
            model's metadata, ``river.agreement``. None: it is not compared.
        progress: is told the step and how much of how much of it is done.
        check: look at the result before it takes its name: ONNX's checker, and one tiny pass in ONNX Runtime beside the
            original. Files that fail are not written.

    Returns:
        What was found and made.

    Raises:
        InputError: the source cannot be used; nothing is written.
        ConfigError: the settings do not fit the model, or the quantizer needs tuning texts and there are none.
        MissingExtra: onnxruntime (the quantizer) or transformers is needed and not installed.
        PassError: the result failed the check; it names the passes that ran, the culprit last.
    """
    from river_compile.exporters.onnx import onnx_file, rewrite
    from river_compile.exporters.onnx.check import check_result
    from river_compile.exporters.onnx.moments import Moments
    from river_compile.exporters.onnx.onnxruntime import MatMulNBits
    from river_compile.exporters.quantizers import quantizer
    from river_compile.passes.onnx.widen_products import widen_products
    from river_compile.passes.quantizer import ActivationAware

    config = config or RiverConfig()
    progress, started = progress or (lambda step, done, total: None), time.perf_counter()
    target = Path(output) if output is not None else _beside(model)
    onnx_file.check_target(target)
    if config.kv_policy != "share":
        raise ConfigError("kv_policy", f"an exported model shares its KV cache; {config.kv_policy!r} is for comparison")
    quantizer(config.quantizer)
    steps = _Steps(progress)
    with ExitStack() as stack:
        source, label = _as_onnx(model, target.parent, stack, steps)
        with steps("read"):
            proto = onnx_file.load(source)
            onnx_file.check_apart(target, source, proto)
        moments = None
        if tuning is not None:
            with steps("tune", pieces=True):
                ids = tuning.ids(proto)
                config = tuning.applied(source, ids, config, progress)
                if isinstance(quantizer(config.quantizer), ActivationAware):
                    linears = rewrite.survey(onnx_file.load(source), source.parent, config)[1].quantized
                    reading = partial(progress, "read tuning texts")
                    moments = Moments(source, linears, ids, reading)
        chosen = quantizer(config.quantizer)
        result = rewrite.rewrite(
            proto,
            source.parent,
            config,
            chosen,
            MatMulNBits(config.activations),
            lambda done, total: progress("quantize", done, total),
            moments,
            prepare=(widen_products,),
        )
        steps.seconds |= result.seconds
        if config.calibration is not None:
            with steps("check calibration"):
                _check_calibration(str(config.calibration), onnx_file.fingerprint(result.model, source.parent))
        notes = list(result.river.notes)

        def look(written: Path) -> None:
            if check:
                with steps("check"):
                    notes.extend(check_result(written, source, result))

        with steps("write", pieces=True):
            writing = partial(progress, "write")
            onnx_file.save(result.model, target, source.parent, config.external_data, writing, look)
    drafts = tuning.drafts if tuning is not None else None
    if drafts is not None:
        onnx_file.note(target, {"river.exact": json.dumps(drafts)})
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
    )


class _Steps:
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
    steps: _Steps,
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


def build_engine(
    model: str | Path | torch.nn.Module,
    engine: str | Path,
    config: RiverConfig | None = None,
    options: EngineOptions | None = None,
    *,
    tuning: TuningTexts | None = None,
    onnx_output: str | Path | None = None,
    progress: Progress | None = None,
) -> EngineInfo:
    """Give a decoder an exit river, as a TensorRT engine: `river_compile.exporters.tensorrt.build` for any source.

    Args:
        model: as for `export`.
        engine: the engine to write; its side file goes beside it.
        config: the river's settings; None: `exporters.tensorrt.default_config`.
        tuning: texts for the quantizer "gptq-symmetric"; it may have no budget.

    Raises: as `exporters.tensorrt.build`.
    """
    from river_compile.exporters.onnx import onnx_file
    from river_compile.exporters.tensorrt import build as engines

    progress = progress or (lambda step, done, total: None)
    target = Path(engine)
    with ExitStack() as stack:
        source, _ = _as_onnx(model, target.parent, stack, _Steps(progress))
        kept = Path(onnx_output) if onnx_output is not None else None
        ids = tuning.ids(onnx_file.load(source)) if tuning is not None else ()
        return engines.build(source, target, config, options, tuning_ids=ids, onnx_output=kept, progress=progress)


def plan(
    model: str | Path | torch.nn.Module, config: RiverConfig | None = None, *, progress: Progress | None = None
) -> Plan:
    """What `export` would do, without quantizing or writing.

    Raises: as `export`.
    """
    from river_compile.exporters.onnx import onnx_file, rewrite
    from river_compile.exporters.quantizers import quantizer
    from river_compile.passes.onnx.external_data import tensor_bytes

    config = config or RiverConfig()
    quantizer(config.quantizer)
    started = time.perf_counter()
    steps = _Steps(progress or (lambda step, done, total: None))
    with ExitStack() as stack:
        source, label = _as_onnx(model, None, stack, steps)
        with steps("read"):
            proto = onnx_file.load(source)
            backbone_bytes = sum(map(tensor_bytes, proto.graph.initializer))
        with steps("find_layers"):
            anatomy, river = rewrite.survey(proto, source.parent, config)
    seconds = steps.seconds | {"total": time.perf_counter() - started}
    report = ExportReport(
        source=label,
        output=None,
        layers=len(anatomy.layers),
        found_by=anatomy.found_by,
        kinds=len({layer.kind for layer in anatomy.layers}),
        river_layers=len({linear.layer for linear in river.linears}),
        exit_points=rewrite.exit_points(anatomy, {linear.layer for linear in river.linears}, config),
        backbone_bytes=backbone_bytes,
        river_bytes=river.nbytes,
        added_nodes=0,
        quantizer=config.quantizer,
        average_bits=river.average_bits,
        notes=tuple(river.notes),
        seconds={name: round(value, 3) for name, value in seconds.items()},
    )
    linears = tuple(
        PlannedLinear(
            linear.name, linear.layer, linear.source.inputs, linear.source.outputs, linear.bits, linear.group_size
        )
        for linear in river.planned
    )
    return Plan(report, anatomy.layers, linears)


def _as_onnx(
    model: str | Path | torch.nn.Module, folder: Path | None, stack: ExitStack, steps: _Steps
) -> tuple[Path, str]:
    """The ONNX file to rewrite, made in a temporary folder in ``folder`` if need be, and what to call the source."""
    if isinstance(model, (str, Path)):
        path = Path(model)
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
    source = Path(model) if isinstance(model, (str, Path)) else None
    if source is not None and source.suffix == ".onnx":
        return source.with_suffix(".river.onnx")
    if source is not None and source.is_dir():
        return source / "model.river.onnx"
    if source is not None and source.is_file():
        return source.with_name(source.name + ".river.onnx")
    raise ConfigError("output", f"say where to write: {model if source else type(model).__name__} is no file or folder")
