"""`river-bench`: a model beside itself with a river, in PyTorch or in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from river_compile.cli.bench_report import show_bench, show_onnx_bench
from river_compile.cli.console import answer, progress_bars, river_command
from river_compile.cli.options import (
    activations_option,
    bits_option,
    counts_option,
    depths_option,
    dtype_option,
    group_size_option,
    head_bits_option,
    json_option,
    png_option,
    quantizer_option,
    quiet_option,
    taus_option,
    threads_option,
    tokenizer_option,
)
from river_compile.config import FLOAT, RiverConfig
from river_compile.errors import ConfigError

__all__ = ["main"]

_EXAMPLES = """\b
Examples, PyTorch:
  river-bench path/to/hf_model
  river-bench path/to/hf_model --tau 0.97,0.95 --depths 1,4
  river-bench path/to/hf_model --choices --dtype float32
  river-bench path/to/hf_model --startup --rounds 1
  river-bench path/to/hf_model --json --png bench.png > bench.json

\b
Examples, ONNX Runtime:
  river-bench model.onnx                        its river is made in a temporary folder
  river-bench model.onnx --head-bits 8 --int4 --exact
  river-bench model.river.onnx --plain model.onnx --operators
  river-bench model.river.onnx --tau 0.95,0.9 --tokenizer path/to/hf_model \\
      --batch 1,4,16 --context 128,1024,8192 --png sweep.png
"""

_OF_FOLDERS = ("startup", "choices", "dtype")
_OF_FILES = ("plain", "int4", "operators", "contexts", "tokenizer", "threads", "activations")
_OF_RIVERS = ("bits", "group_size", "head_bits", "activations", "quantizer")


@river_command("river-bench", _EXAMPLES)
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@taus_option("", "Thresholds to run the river at.  [default: none; of an ONNX model, its own]", show_default=False)
@depths_option("1,4,15", "Exit depths to force.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Interleaved rounds.")
@click.option("--tokens", type=click.IntRange(4), default=32, show_default=True, help="New tokens in a round.")
@counts_option("--batch", "batches", "1", "Sequences; of an ONNX model, a list of batch sizes.")
@counts_option("--context", "contexts", "128", "ONNX: tokens in the cache before decode passes are timed, a list.")
@click.option("--exact", is_flag=True, help="Decode exactly too: the river drafts, the backbone verifies.")
@click.option(
    "--plain",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="ONNX: the model that a river model was made of.  [default: the river is taken out of it]",
)
@click.option("--int4", is_flag=True, help="ONNX: the plain model too with 4-bit weights, by onnxruntime's quantizer.")
@click.option(
    "--operators",
    is_flag=True,
    help="ONNX: where a pass spends its time, by operator, as ONNX Runtime profiles it.",
)
@tokenizer_option(use=", for prompts of text; ONNX: random tokens without")
@threads_option
@click.option(
    "--startup",
    is_flag=True,
    help="PyTorch: start-up too: new processes with an empty, then with a filled disk cache.",
)
@click.option(
    "--choices",
    is_flag=True,
    help="PyTorch: how long each product takes on this CPU, by form, and which form was taken.",
)
@dtype_option("PyTorch: of the model.")
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@bits_option
@group_size_option
@head_bits_option
@activations_option
@quantizer_option("Algorithm that makes the river.")
@json_option()
@png_option("Draw the table into this file; of several batch sizes or contexts, the ratios.")
@quiet_option("No progress bars.")
@click.pass_context
def main(
    ctx: click.Context,
    /,
    model: Path,
    taus: tuple[float, ...],
    depths: tuple[int, ...],
    rounds: int,
    tokens: int,
    batches: tuple[int, ...],
    contexts: tuple[int, ...],
    exact: bool,
    plain: Path | None,
    int4: bool,
    operators: bool,
    tokenizer: Path | None,
    threads: int | None,
    startup: bool,
    choices: bool,
    dtype: str,
    device: str,
    bits: str,
    group_size: str,
    head_bits: str,
    activations: str,
    quantizer: str,
    as_json: bool,
    png: Path | None,
    quiet: bool,
) -> None:
    """Time decode passes of MODEL, plain and with a river, at several exits.

    MODEL is a folder of a Hugging Face model, for PyTorch: in eager mode, by plain Inductor, and with a river. Or it is
    an ONNX model with a river or without, or a folder of optimum or GenAI, for ONNX Runtime: at every batch size with
    the first context, and at every context with the first batch size.

    All ways run interleaved in one process, after a round of warm-up; the ratio is to plain Inductor, or to the plain
    ONNX model, within a round.
    """
    for tau in taus:
        RiverConfig(tau=tau)
    config = RiverConfig(
        bits=int(bits),
        group_size=int(group_size),
        head_bits=FLOAT if head_bits == FLOAT else int(head_bits),
        activations=activations,
        quantizer=quantizer,
    )
    file = _onnx_in(model)
    given = {name for name in ctx.params if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    shown: dict[str, Any] = {"as_json": as_json, "png": png, "quiet": quiet}
    timed: dict[str, Any] = {
        "taus": taus,
        "depths": depths,
        "rounds": rounds,
        "new_tokens": tokens,
        "exact": exact,
        "device": device,
    }
    if file is None:
        _refuse(given, _OF_FILES, "is for ONNX models, and this is a Hugging Face folder")
        if len(batches) > 1:
            raise ConfigError("batch", "several batch sizes are for ONNX models; a Hugging Face model is timed at one")
        timed |= {"batch": batches[0], "startup": startup}
        _bench_folder(model, timed, config, dtype, choices=choices, **shown)
    else:
        _refuse(given, _OF_FOLDERS, "is for Hugging Face folders, and this is an ONNX model")
        timed |= {"batches": batches, "contexts": contexts, "threads": threads}
        timed |= {"plain": plain, "int4": int4, "operators": operators}
        _bench_file(file, timed, config if given.intersection(_OF_RIVERS) else None, tokenizer, **shown)


def _onnx_in(model: Path) -> Path | None:
    """The ONNX file that a path means; None of a Hugging Face folder."""
    if model.is_file():
        return model
    from river_compile.exporters.onnx.folder import ModelFolder

    found = ModelFolder.of(model)
    return None if found is None or found.kind == "hf" else model / found.model


def _refuse(given: set[str], names: tuple[str, ...], why: str) -> None:
    for name in names:
        if name in given:
            raise ConfigError({"contexts": "context"}.get(name, name), why)


def _bench_folder(
    model: Path,
    timed: Mapping[str, Any],
    config: RiverConfig,
    dtype: str,
    *,
    choices: bool,
    as_json: bool,
    png: Path | None,
    quiet: bool,
) -> None:
    import torch

    from river_compile.measure.bench import bench

    with progress_bars(quiet) as progress:
        result = bench(model, config=config, dtype=getattr(torch, dtype), progress=progress, **timed)
    if png is not None:
        from river_compile.measure.plots import draw_rows

        title = f"{Path(result.model).name}, {result.dtype}, batch {result.batch}, {result.device}"
        draw_rows(result, title, png)
    answer(result, partial(show_bench, choices=choices), as_json=as_json)


def _bench_file(
    model: Path,
    timed: Mapping[str, Any],
    config: RiverConfig | None,
    tokenizer: Path | None,
    *,
    as_json: bool,
    png: Path | None,
    quiet: bool,
) -> None:
    from river_compile.measure.fidelity import load_tokenizer
    from river_compile.measure.onnx_bench import bench_onnx

    words = None if tokenizer is None else load_tokenizer(tokenizer)
    with progress_bars(quiet) as progress:
        result = bench_onnx(model, config=config, tokenizer=words, progress=progress, **timed)
    if png is not None:
        from river_compile.measure.plots import draw_sweeps

        draw_sweeps(result, png)
    answer(result, show_onnx_bench, as_json=as_json)


if __name__ == "__main__":
    main()
