"""`river-eval`: fidelity and speed of a river model, beside its own backbone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich import box
from rich.console import Console
from rich.table import Table

from river_compile.cli.console import answer, progress_bars, river_command
from river_compile.cli.options import (
    HELD_OUT,
    cache_option,
    chat_option,
    depths_option,
    documents_option,
    dtype_option,
    json_option,
    max_tokens_option,
    output_option,
    own_tokenizer,
    quantizer_option,
    quiet_option,
    taus_option,
    texts_option,
    threads_option,
    tokenizer_option,
)
from river_compile.config import RiverConfig
from river_compile.errors import ConfigError
from river_compile.reports import write_report

if TYPE_CHECKING:
    from river_compile.measure.evaluation import Evaluation, SettingResult
    from river_compile.measure.fidelity import Interval

__all__ = ["main"]

_EXAMPLES = """\b
Examples:
  river-eval model.river.onnx --tokenizer hf_folder
  river-eval model.river.onnx --tokenizer hf_folder --tau 0.95,0.9 --html report.html
  river-eval model.river.onnx --tokenizer hf_folder --texts book.txt --texts prompts.jsonl --json
  river-eval hf_folder --quantizer lsq --tau 0.97
"""


@river_command("river-eval", _EXAMPLES)
@click.argument("model", type=click.Path(path_type=Path))
@tokenizer_option("MODEL if a folder")
@quantizer_option("Of the river, if MODEL is a folder.  [default: rtn]", default=None)
@dtype_option("Type to read the model in, if it is a folder.  [default: bfloat16]", default=None)
@texts_option(HELD_OUT)
@taus_option("0.98,0.95,0.9", "Thresholds to measure.")
@depths_option("0", "Forced exit depths to measure; 0 is all river.")
@max_tokens_option(512, "Cut longer texts into pieces.")
@documents_option()
@click.option("--confidence", type=float, default=0.95, show_default=True, help="Of the intervals.")
@click.option("--speed-rounds", type=int, default=3, show_default=True, help="Rounds of timed decoding; 0: none.")
@threads_option
@click.option(
    "--sensitivity", type=click.Path(path_type=Path), help="A file of river-export --sensitivity, to be plotted."
)
@output_option("--html", help="Write a self-contained page with plots.")
@output_option("--output", "-o", help="Write the JSON there.")
@chat_option
@json_option()
@quiet_option()
@cache_option
def main(
    model: Path,
    tokenizer: str | None,
    quantizer: str | None,
    dtype: str | None,
    texts: tuple[Path, ...],
    taus: tuple[float, ...],
    depths: tuple[int, ...],
    max_tokens: int,
    documents: int | None,
    confidence: float,
    speed_rounds: int,
    threads: int | None,
    sensitivity: Path | None,
    html: Path | None,
    output: Path | None,
    chat: bool,
    as_json: bool,
    quiet: bool,
    cache: Path | None,
) -> None:
    """Measure a river model against its own backbone, teacher-forced.

    MODEL is an exported river model, or a folder of a Hugging Face decoder, which is compiled with a river by PyTorch.
    The table shows, for each threshold and forced depth: top-1 agreement, top-5 overlap, KL divergence, perplexity,
    cosine of K and V, exit depth and speed.
    """
    from river_compile.measure.evaluation import evaluate
    from river_compile.measure.fidelity import load_tokenizer
    from river_compile.measure.sensitivity import Sensitivity

    measured = Sensitivity.load(sensitivity) if sensitivity is not None else None
    if not model.is_dir():
        for name, value in (("quantizer", quantizer), ("dtype", dtype)):
            if value is not None:
                raise ConfigError(name, f"only for a folder of a Hugging Face decoder; {model} is none")
    words = load_tokenizer(tokenizer or own_tokenizer(model), chat=chat)
    with progress_bars(quiet or as_json) as progress:
        result = evaluate(
            model,
            texts or None,
            words,
            taus=taus,
            depths=depths,
            max_tokens=max_tokens,
            max_documents=documents,
            confidence=confidence,
            speed_rounds=speed_rounds,
            threads=threads,
            config=None if quantizer is None else RiverConfig(quantizer=quantizer),
            dtype=dtype,
            cache=cache,
            progress=progress,
        )
    if html is not None:
        from river_compile.measure.report_html import render

        write_report(html, render(result, measured))
    answer(result, _show, output=output, as_json=as_json, quiet=quiet)


def _show(console: Console, result: Evaluation) -> None:
    quantizer = result.details.get("river.quantizer", "unknown")
    console.print(
        f"{result.model}: {result.layers} decoder layers, river by {quantizer}; {len(result.texts)} documents, "
        f"{result.tokens} tokens; backbone perplexity {result.perplexity_backbone.value:.2f}",
        soft_wrap=True,
    )
    table = Table(
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
        caption=f"under top-1 and KL: {result.confidence:.0%} bootstrap intervals over documents",
    )
    for column in ("setting", "top-1", "top-5", "KL", "perplexity", "K cos\nV cos", "exit\ndepth", "tokens/s\nratio"):
        table.add_column(column, justify="left" if column == "setting" else "right", no_wrap=column == "setting")
    for row in result.settings:
        table.add_row(*_cells(row))
    if (exact := result.exact) is not None:
        same = f"{1 - exact.differing / exact.tokens:.1%}\nof {exact.tokens} written"
        speed = f"{exact.tokens_per_second:.1f}\n{exact.ratio.value:.2f}x"
        table.add_row("exact", same, "", "", "", "", f"{result.layers}.0", speed)
    console.print(table)
    console.print(
        "early-layer similarity against last-layer V cosine, all river: r = "
        f"{result.early_correlation:.2f} (paper: 0.55)"
    )


def _cells(row: SettingResult) -> list[str]:
    speed = row.speed
    return [
        row.label,
        _two_lines(row.top1, ".1%"),
        f"{row.top5.value:.1%}",
        _two_lines(row.kl, ".3f"),
        f"{row.perplexity.value:.2f}",
        f"{row.key_cosine.value:.4f}\n{row.value_cosine.value:.4f}",
        f"{row.mean_exit_depth:.1f}",
        "-" if speed is None else f"{speed.tokens_per_second:.1f}\n{speed.ratio.value:.2f}x",
    ]


def _two_lines(interval: Interval, form: str) -> str:
    bounds = [format(value, form).rstrip("%") for value in (interval.low, interval.high)]
    return f"{interval.value:{form}}\n{bounds[0]}-{bounds[1]}"
