"""`river-calibrate`: the fastest threshold whose risk is bounded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich import box
from rich.console import Console
from rich.table import Table

from river_compile.cli.console import answer, progress_bars, river_command
from river_compile.cli.options import (
    cache_option,
    chat_option,
    documents_option,
    json_option,
    max_tokens_option,
    output_option,
    own_tokenizer,
    png_option,
    prompt_tokens_option,
    quiet_option,
    taus_option,
    texts_option,
    threads_option,
    tokenizer_option,
)

if TYPE_CHECKING:
    from river_compile.measure.calibration import Calibration

__all__ = ["main"]

_EXAMPLES = """\b
Examples:
  river-calibrate model.river.onnx --tokenizer hf_folder --max-risk 0.1 -o calibration.json
  river-export model.onnx --calibration calibration.json
  river-calibrate model.river.onnx --tokenizer hf_folder --texts mine.jsonl --loss kl
  river-calibrate model.river.onnx --tokenizer hf_folder --by-layer
"""


@river_command("river-calibrate", _EXAMPLES)
@click.argument("model", type=click.Path(path_type=Path))
@tokenizer_option("MODEL if a folder")
@texts_option("calibration texts of the package")
@click.option("--max-risk", type=float, default=0.02, show_default=True, help="Bound on the expected loss.")
@click.option("--confidence", type=float, default=0.95, show_default=True, help="Probability that the bound holds.")
@click.option(
    "--loss",
    type=click.Choice(["disagreement", "kl"]),
    default="disagreement",
    show_default=True,
    help="A document's loss: the share of tokens whose top-1 is not the backbone's, or clipped KL over the clip.",
)
@click.option("--kl-clip", type=float, default=1.0, show_default=True, help="In nats, for --loss kl.")
@taus_option(
    "0.998,0.995,0.99,0.985,0.98,0.975,0.97,0.96,0.95,0.93,0.9,0.85,0.8,0.7,0.6,0.5",
    "Thresholds to test, from the safest down.  [default: 16 from 0.998 to 0.5]",
    show_default=False,
)
@click.option(
    "--by-layer",
    is_flag=True,
    help="Choose the least depth and each layer's threshold as well, on a quarter of the documents. An exported model "
    "needs room for it: river-export --layer-tau.",
)
@prompt_tokens_option("Read in one pass; the rest is decoded.")
@max_tokens_option(64, "Read of each document.")
@documents_option()
@threads_option
@output_option("--output", "-o", help="Write the threshold and its evidence there.")
@png_option("Write a plot of risk and exit depth against tau there.")
@chat_option
@json_option()
@quiet_option()
@cache_option
def main(
    model: Path,
    tokenizer: str | None,
    texts: tuple[Path, ...],
    max_risk: float,
    confidence: float,
    loss: str,
    kl_clip: float,
    taus: tuple[float, ...],
    by_layer: bool,
    prompt_tokens: int,
    max_tokens: int,
    documents: int | None,
    threads: int | None,
    output: Path | None,
    png: Path | None,
    chat: bool,
    as_json: bool,
    quiet: bool,
    cache: Path | None,
) -> None:
    """Find the fastest exit threshold that disagrees with the backbone on at most a given share of tokens.

    MODEL is an exported river model, or a folder of a Hugging Face decoder. The result holds for new texts of the same
    kind, with the stated confidence; where no threshold can be certified, it is never to exit.
    """
    from river_compile.measure.calibration import calibrate
    from river_compile.measure.fidelity import load_tokenizer
    from river_compile.measure.risk import check_risk

    check_risk(max_risk, confidence)
    words = load_tokenizer(tokenizer or own_tokenizer(model), chat=chat)
    with progress_bars(quiet or as_json) as progress:
        result = calibrate(
            model,
            texts or None,
            words,
            max_risk=max_risk,
            confidence=confidence,
            loss=loss,
            kl_clip=kl_clip,
            taus=taus,
            by_layer=by_layer,
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
            max_documents=documents,
            threads=threads,
            cache=cache,
            progress=progress,
        )
    if png is not None:
        from river_compile.measure.plots import draw_calibration

        draw_calibration(result, png)
    answer(result, _show, output=output, as_json=as_json, quiet=quiet)


def _show(console: Console, result: Calibration) -> None:
    console.print(
        f"{result.model}: {result.layers} decoder layers; {result.documents} documents, {result.tokens} tokens"
        + (f"; {result.explored_documents} more to explore" if result.explored_documents else "")
        + f"; at least {result.least_documents} documents are needed even with no loss at all",
        soft_wrap=True,
    )
    if result.curve:
        table = Table(
            box=box.SIMPLE, caption=f"p: of 'the risk is above {result.max_risk:g}'; testing stops where it fails"
        )
        for column in ("tau", "risk", "p", "exit depth", ""):
            table.add_column(column, justify="right" if column else "left")
        for row in result.curve:
            shown = "certified" if row.certified else "not certified"
            table.add_row(f"{row.tau:g}", f"{row.risk:.4f}", f"{row.p_value:.2g}", f"{row.exit_depth:.1f}", shown)
        console.print(table)
    if result.tau_offsets is not None:
        offsets = ", ".join("no exit" if value > 2 else f"{value:+.3f}" for value in result.tau_offsets)
        console.print(f"added to tau, layer by layer: {offsets}", soft_wrap=True)
    console.print(result.verdict(), soft_wrap=True)
