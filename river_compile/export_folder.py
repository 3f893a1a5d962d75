"""A folder of one of the public tools in, a folder that the same tool loads out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from river_compile.config import NEVER, RiverConfig
from river_compile.errors import ConfigError, InputError
from river_compile.export_file import export_file
from river_compile.model_card import model_card
from river_compile.reports import ExportReport, Progress, QualityTexts, TuningTexts

if TYPE_CHECKING:
    from river_compile.exporters.onnx.folder import ModelFolder

__all__ = ["export_folder", "folder_for"]

_ORIGINAL, _RIVER, _DRAFTER = "original.onnx", "river.onnx", "draft.onnx"
_TOOLS = {"genai": "ONNX Runtime GenAI", "optimum": "optimum", "hf": "optimum"}


def folder_for(model: object, output: str | Path | None) -> ModelFolder | None:
    """The folder that a model is, if a folder is to be made of it; None if a file is.

    Raises:
        InputError: a folder is asked for, and the source is of no kind that makes one.
    """
    from river_compile.exporters.onnx.file_problems import problem_of_folder
    from river_compile.exporters.onnx.folder import ModelFolder

    if output is None or Path(output).suffix == ".onnx" or not isinstance(model, (str, Path)):
        return None
    path = Path(model)
    if path.is_file() or path.suffix == ".onnx":
        return None
    found = ModelFolder.of(path) if path.is_dir() else None
    if found is None and (why := problem_of_folder(path)):
        raise InputError(f"{model}: {why}")
    return found or ModelFolder.on_the_hub(str(model))


def export_folder(
    model: str | Path,
    source: ModelFolder,
    output: Path,
    config: RiverConfig,
    *,
    tuning: TuningTexts | None,
    quality: QualityTexts | None,
    progress: Progress | None,
    check: bool,
    keep_original: bool,
) -> ExportReport:
    """`river_compile.export` into a folder, with arguments as there.

    Weights lie in one file beside the river's graph. Exact decoding in GenAI takes two models: the original graph keeps
    the config's name, and a drafter of river layers alone stands beside it, both on the same weights; the river itself
    stays for this package's own runtime.
    """
    from river_compile.exporters.onnx import folder as folders
    from river_compile.exporters.onnx import genai, onnx_file
    from river_compile.exporters.onnx.shared_weights import save_sharing
    from river_compile.passes.onnx.only_twin import only_twin

    folders.check_folder_target(output, source)
    if config.external_data is False:
        raise ConfigError("external_data", "weights of a folder lie in a file of their own, which several graphs share")
    pair = config.exact and source.kind == "genai"
    # What loads the river and does not draft is to compute what the original does.
    config = replace(config, external_data=True, tau=NEVER if config.exact else config.tau)
    name = source.model.with_name(_RIVER) if pair else source.model
    with folders.staged_folder(output) as stage:
        source.copy_side_files(stage)
        river = stage / name

        def beside(original: Path) -> None:
            plain = river.with_name(source.model.name if pair else _ORIGINAL)
            save_sharing(onnx_file.load(original), original.parent, plain, river)
            if pair:
                drafter = only_twin(onnx.load(str(river), load_external_data=False), river=True)
                onnx.save(drafter, str(plain.with_name(_DRAFTER)))

        report = export_file(
            model,
            river,
            config,
            tuning=tuning,
            # What drafts only does not have to agree.
            quality=None if config.exact else quality,
            progress=progress,
            check=check,
            beside=beside if pair or keep_original else None,
        )
        notes = [*report.notes, *_notes(source, config)]
        if source.kind == "genai":
            if genai.without_graph_capture(stage):
                notes.append("genai_config.json: recording of whole passes (CUDA graphs) is off, which exits rule out")
            if pair:
                genai.draft_by(stage, str(name.with_name(_DRAFTER)))
        report = replace(report, source=str(model), output=str(output), notes=tuple(notes))
        (stage / folders.CARD).write_text(
            model_card(report, config, source.kind, output.resolve().name, name.as_posix()), encoding="utf-8"
        )
    return report


def _notes(source: ModelFolder, config: RiverConfig) -> list[str]:
    """What the tool cannot do with a river."""
    tool = _TOOLS[source.kind]
    if config.exact and source.kind == "genai":
        return [
            f"{tool} verifies what {_DRAFTER} drafts, from release 0.18 on; {_RIVER} is for river-compile's runtime"
        ]
    if config.exact:
        return [f"{tool} does not draft: it computes what the original does; river-compile's runtime decodes exactly"]
    return [f"{tool} cannot set the threshold at run time: tau {config.tau:g} is what it decides by"]
