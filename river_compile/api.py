"""`export`: a decoder in, a decoder with an exit river out."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, cast

from river_compile.config import LAYOUTS, RiverConfig
from river_compile.errors import ConfigError
from river_compile.export_file import Steps, as_onnx, export_file
from river_compile.export_folder import export_folder, folder_for
from river_compile.reports import ExportReport, Plan, PlannedLinear, Progress, QualityTexts, TuningTexts
from river_compile.triton import export_repository

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
    keep_original: bool = False,
    layout: str = LAYOUTS[0],
) -> ExportReport:
    """Give a decoder an exit river, as an ONNX model for ONNX Runtime.

    Args:
        model: an ONNX file with a KV cache in its signature; a folder of a Hugging Face decoder, or its hub name, which
            is exported to ONNX first (opset 23); a folder of optimum or of ONNX Runtime GenAI; or a Hugging Face model
            itself.
        output: the file to write; ``<model>.river.onnx`` beside the source if None. Or, for a folder and a hub name, a
            folder, if the name does not end in ``.onnx``: it gets what the tool that made the source loads, in its
            names (a Hugging Face folder: optimum's), and a model card. Either is written whole or not at all.
        config: the settings; the defaults if None.
        tuning: texts for a quantizer that asks for them, and a budget of bits or fidelity to plan bit widths by.
        quality: texts to compare the new river with its backbone on; the outcome goes into the report and into the
            model's metadata, ``river.agreement``. None: it is not compared.
        progress: is told the step and how much of how much of it is done.
        check: look at the result before it takes its name: ONNX's checker, and one tiny pass in ONNX Runtime beside the
            original. Files that fail are not written.
        keep_original: into a folder, write the original graph too, as ``original.onnx``, on the same file of weights.
        layout: "tool": as above. "triton": ``output`` is a model repository of Triton Inference Server, and the model
            goes into a folder of its own in it, with its configuration.

    Returns:
        What was found and made.

    Raises:
        InputError: the source cannot be used; nothing is written.
        ConfigError: the settings do not fit the model, or the quantizer needs tuning texts and there are none.
        MissingExtra: onnxruntime (the quantizer) or transformers is needed and not installed.
        PassError: the result failed the check; it names the passes that ran, the culprit last.
    """
    config = config or RiverConfig()
    if layout not in LAYOUTS:
        raise ConfigError("layout", f"must be one of {', '.join(LAYOUTS)}, not {layout!r}")
    if layout == "triton":
        if keep_original:
            raise ConfigError("keep_original", "is for a tool's folder; a repository serves one model of a name")
        repository = None if output is None else Path(output)
        return export_repository(
            model, repository, config, tuning=tuning, quality=quality, progress=progress, check=check
        )
    source = folder_for(model, output)
    if source is None:
        if keep_original:
            raise ConfigError(
                "keep_original", "is for a folder: beside a file, the original stays what and where it is"
            )
        return export_file(
            model, output, config, tuning=tuning, quality=quality, progress=progress, check=check, beside=None
        )
    return export_folder(
        cast("str | Path", model),
        source,
        Path(cast("str | Path", output)),
        config,
        tuning=tuning,
        quality=quality,
        progress=progress,
        check=check,
        keep_original=keep_original,
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
        source, _ = as_onnx(model, target.parent, stack, Steps(progress))
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
    steps = Steps(progress or (lambda step, done, total: None))
    with ExitStack() as stack:
        source, label = as_onnx(model, None, stack, steps)
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
