"""`river-export`: a decoder in, a decoder with an exit river out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click
from rich.console import Console

from river_compile.cli.console import progress_bars, river_command
from river_compile.cli.engine import build, build_into_repository, engine_options, refuse_engine_options, river_defaults
from river_compile.cli.export_report import show_plan, show_report
from river_compile.cli.options import (
    activations_option,
    bits_option,
    chat_option,
    choice,
    group_size_option,
    head_bits_option,
    json_option,
    quantizer_option,
    quiet_option,
    texts_option,
    tokenizer_option,
)
from river_compile.config import FLOAT, LAYOUTS, RiverConfig
from river_compile.errors import ConfigError, InputError

if TYPE_CHECKING:
    from river_compile.measure.agreement import AgreementTexts
    from river_compile.measure.tuning import Tuning

__all__ = ["main"]

_DEFAULTS = RiverConfig()

_EXAMPLES = """\b
Examples:
  river-export model.onnx                       writes model.river.onnx beside it
  river-export model.onnx --dry-run             what is found and what would be made
  river-export path/to/hf_model -o out.onnx     a Hugging Face folder, exported to ONNX first
  river-export path/to/model -o out_dir         of Hugging Face, optimum or GenAI: a folder that the same tool loads
  river-export model.onnx --tau 0.95 --min-depth 2
  river-export model.onnx --bits-for '*down_proj*=8' --keep-layers 0,-1
  river-export model.onnx --activations float   the paper's W4A16, slower on a CPU
  river-export model.onnx --tune-speed --tokenizer hf_folder   the form that is fastest here
"""


def _layers(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
    """``0,3,-1`` or ``26-29`` or both."""
    indices: list[int] = []
    for part in filter(None, value.split(",")):
        first, dash, last = part.strip().rpartition("-")
        try:
            indices += range(int(first), int(last) + 1) if dash and first else [int(part)]
        except ValueError:
            raise ConfigError("keep_layers", f"{part.strip()!r} is no layer number and no range") from None
    return tuple(indices)


def _bits_for(
    ctx: click.Context, param: click.Parameter, value: tuple[str, ...]
) -> tuple[tuple[str, int | Literal["float"]], ...]:
    """``PATTERN=BITS``, any number of times."""
    pairs: list[tuple[str, int | Literal["float"]]] = []
    for text in value:
        pattern, equals, bits = text.rpartition("=")
        if not equals or not pattern or not (bits.isdigit() or bits == FLOAT):
            raise ConfigError("bits_for", f"{text!r} is not of the form 'PATTERN=BITS', such as '*down_proj*=8'")
        pairs.append((pattern, FLOAT if bits == FLOAT else int(bits)))
    return tuple(pairs)


@river_command("river-export", _EXAMPLES)
@click.argument("model")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="File to write, or, if MODEL is a folder or a hub name and this does not end in .onnx, the folder.  [default: "
    "MODEL.river.onnx]  With --target tensorrt: keep the engine's ONNX.",
)
@click.option(
    "--tau",
    type=float,
    default=_DEFAULTS.tau,
    show_default=True,
    help="Exit where the similarity of a layer's input and output lies above this; in [-1, 1], above 1: never exit. "
    "Stored as the default of the model's input river.tau, which can be set anew in every run.",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A threshold of river-calibrate, instead of --tau and --min-depth; its evidence goes into the metadata.",
)
@click.option(
    "--layer-tau", is_flag=True, help="Make room for a threshold for each layer, the input river.tau_offsets."
)
@click.option(
    "--min-depth", type=int, default=_DEFAULTS.min_depth, show_default=True, help="Layers run before any exit."
)
@click.option(
    "--exact",
    is_flag=True,
    help="A river for exact decoding: it only drafts, and generation gives the original's own tokens. Where there is a "
    "tokenizer, quantizer and bits are chosen for the highest measured speed.",
)
@click.option(
    "--tune-speed",
    is_flag=True,
    help="Choose group size, activations, bits and those of the LM head by measuring on this machine: the fastest that "
    "agrees with the backbone as often as what was asked for. Needs a tokenizer; takes minutes.",
)
@click.option("--max-depth", type=int, help="Leave after this many layers at the latest; 0: all river.")
@click.option(
    "--exit-every", type=int, metavar="K", default=1, show_default=True, help="An exit after every K-th layer."
)
@click.option(
    "--keep-layers",
    callback=_layers,
    metavar="LIST",
    default="",
    help="Layers without a river twin, such as 0,3,-1 or 26-29.",
)
@bits_option
@click.option(
    "--bits-for",
    callback=_bits_for,
    metavar="PATTERN=BITS",
    multiple=True,
    help="Bits, or 'float', for linear layers, or decoder layers (layers.3), whose name matches; repeatable, the first "
    "match wins.",
)
@head_bits_option
@group_size_option
@activations_option
@quantizer_option(
    "Algorithm that makes the river: rtn, lsq, kquant, hqq; or gptq or gptq-symmetric, which read tuning texts."
)
@tokenizer_option("MODEL if a folder", ", for tuning texts")
@click.option(
    "--no-quality",
    is_flag=True,
    help="Do not compare the river with its backbone in the end, on some 300 tokens; done where there is a tokenizer.",
)
@texts_option("tuning texts of the package", "--tuning-texts", ", for gptq, bit budgets, --exact and --tune-speed")
@chat_option
@click.option("--avg-bits", type=float, help="Choose 4 bits, 8 bits or float for each linear layer; so many on average")
@click.option("--max-kl", type=float, help="Likewise, as few bits as keep the expected KL divergence below this.")
@click.option(
    "--sensitivity", type=click.Path(path_type=Path), help="File that keeps what bit budgets measure; read if present."
)
@click.option("--no-extra-output", is_flag=True, help="Leave out the output river.exit_depth.")
@click.option(
    "--external-data/--no-external-data",
    default=None,
    help="Weights in one file beside the model, or within it.  [default: as the model's are; beside it when over 1 GB]",
)
@click.option(
    "--layout",
    type=choice(LAYOUTS),
    default=LAYOUTS[0],
    show_default=True,
    help="What a folder that is written into is: the tool's that MODEL is of, or a model repository of Triton "
    "Inference Server.",
)
@click.option(
    "--keep-original",
    is_flag=True,
    help="Into a folder: the original graph too, original.onnx, on the same file of weights.",
)
@click.option(
    "--check/--no-check",
    default=True,
    show_default=True,
    help="Before anything is kept: ONNX's checker, and a tiny pass in ONNX Runtime beside the original.",
)
@engine_options
@click.option("--dry-run", is_flag=True, help="Show the decoder's anatomy and the plan; write nothing.")
@json_option("Print the report as JSON.")
@quiet_option()
@click.option("--dump-dir", type=click.Path(path_type=Path), help="Write the graph after each pass into this folder.")
def main(
    model: str,
    output: Path | None,
    tau: float,
    calibration: Path | None,
    layer_tau: bool,
    min_depth: int,
    exact: bool,
    tune_speed: bool,
    max_depth: int | None,
    exit_every: int,
    keep_layers: tuple[int, ...],
    bits: str,
    bits_for: tuple[tuple[str, int | Literal["float"]], ...],
    head_bits: str,
    group_size: str,
    activations: str,
    quantizer: str,
    tokenizer: str | None,
    no_quality: bool,
    tuning_texts: tuple[Path, ...],
    chat: bool,
    avg_bits: float | None,
    max_kl: float | None,
    sensitivity: Path | None,
    no_extra_output: bool,
    external_data: bool | None,
    layout: str,
    keep_original: bool,
    check: bool,
    target: str,
    engine: Path | None,
    max_batch: int,
    max_length: int,
    dtype: str | None,
    kv_cache: str,
    runtime: str,
    compute_capabilities: tuple[str, ...],
    weightless: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    dump_dir: Path | None,
) -> None:
    """Give a decoder-only language model an exit river.

    MODEL is an ONNX file with a KV cache in its signature, a folder or hub name of a Hugging Face model, or a folder of
    optimum or of ONNX Runtime GenAI. The result has the same inputs and outputs, and runs in ONNX Runtime wherever the
    original does.
    """
    config = RiverConfig(
        tau=tau,
        calibration=calibration,
        tau_offsets=() if layer_tau and calibration is None else None,
        max_depth=max_depth,
        exact=exact,
        min_depth=min_depth,
        exit_every=exit_every,
        keep_layers=keep_layers,
        bits=int(bits),
        bits_for=bits_for,
        head_bits=FLOAT if head_bits == FLOAT else int(head_bits),
        group_size=int(group_size),
        activations=activations,
        quantizer=quantizer,
        extra_output=not no_extra_output,
        external_data=external_data,
        dump_dir=dump_dir,
    )
    if dry_run:
        _refuse_measuring(avg_bits=avg_bits, max_kl=max_kl, tune_speed=tune_speed or None)
    from river_compile.api import export, plan

    if target == "tensorrt":
        if avg_bits is not None or max_kl is not None or sensitivity or tune_speed:
            raise ConfigError("target", "an engine's bits are planned by --bits and --bits-for only")
        config = river_defaults(click.get_current_context(), config)
        if not dry_run:
            from river_compile.exporters.tensorrt.build import EngineOptions

            options = EngineOptions(
                max_batch=max_batch,
                max_length=max_length,
                dtype=dtype,
                kv_cache=kv_cache,
                runtime=runtime,
                compute_capabilities=compute_capabilities,
                weightless=weightless,
            )
            tuning = _tuning(model, config, tokenizer, tuning_texts, chat)
            if layout == "triton":
                build_into_repository(model, output, config, options, tuning, quiet=quiet, as_json=as_json)
            else:
                build(model, engine, output, config, options, tuning, quiet=quiet, as_json=as_json)
            return
    else:
        refuse_engine_options(click.get_current_context())
    console = Console(quiet=quiet, highlight=False)
    with progress_bars(quiet or as_json) as progress:
        if dry_run:
            planned = plan(model, config, progress=progress)
            report, text = planned.report, planned.to_json()
        else:
            planned = None
            tuning = _tuning(
                model, config, tokenizer, tuning_texts, chat, avg_bits, max_kl, sensitivity, fast=tune_speed
            )
            quality = None if no_quality else _quality(model, tokenizer, chat)
            report = export(
                model,
                output,
                config,
                tuning=tuning,
                quality=quality,
                progress=progress,
                check=check,
                keep_original=keep_original,
                layout=layout,
            )
            text = report.to_json()
    if as_json:
        click.echo(text)
    elif planned is not None:
        show_plan(console, planned)
    else:
        show_report(console, report)


def _refuse_measuring(**options: float | None) -> None:
    for name, value in options.items():
        if value is not None:
            raise ConfigError(name, "a dry run measures nothing")


def _quality(model: str, tokenizer: str | None, chat: bool) -> AgreementTexts | None:
    """What to put the river to the test on, where there is a tokenizer."""
    from river_compile.measure.agreement import AgreementTexts
    from river_compile.measure.fidelity import load_tokenizer

    if tokenizer is None and not Path(model).is_dir():
        return None
    try:
        return AgreementTexts(load_tokenizer(tokenizer or model, chat=chat))
    except InputError:
        # A folder need not have a tokenizer; one that was asked for must be there.
        if tokenizer is not None or chat:
            raise
        return None


def _tuning(
    model: str,
    config: RiverConfig,
    tokenizer: str | None,
    texts: tuple[Path, ...],
    chat: bool,
    avg_bits: float | None = None,
    max_kl: float | None = None,
    sensitivity: Path | None = None,
    *,
    fast: bool = False,
) -> Tuning | None:
    """Tuning, if any option asks for it or the quantizer does."""
    from river_compile.exporters.quantizers import quantizer
    from river_compile.measure.fidelity import load_texts, load_tokenizer
    from river_compile.measure.tuning import Tuning
    from river_compile.passes.quantizer import ActivationAware

    if fast and config.exact:
        raise ConfigError("tune_speed", "measures a river with exits; --exact chooses by speed itself")
    if config.exact and (tokenizer is not None or Path(model).is_dir()):
        if avg_bits is not None or max_kl is not None or sensitivity:
            raise ConfigError("exact", "chooses bits by measured speed; a budget of bits is for a river that decides")
        from river_compile.measure.drafting import DraftTuning

        return DraftTuning(load_tokenizer(tokenizer or model, chat=chat), load_texts(texts) if texts else None)
    aware = isinstance(quantizer(config.quantizer), ActivationAware)
    if not (fast or aware or texts or avg_bits is not None or max_kl is not None or sensitivity):
        return None
    if tokenizer is None and Path(model).is_file():
        raise ConfigError("tokenizer", "tuning texts need the model's tokenizer: name its folder with --tokenizer")
    kind = Tuning
    if fast:
        from river_compile.measure.speed import SpeedTuning

        kind = SpeedTuning
    return kind(
        load_tokenizer(tokenizer or model, chat=chat),
        load_texts(texts) if texts else None,
        avg_bits,
        max_kl,
        sensitivity,
    )
