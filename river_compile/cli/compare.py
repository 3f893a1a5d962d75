"""`river-compare`: every KV policy in one runtime, fidelity against time."""

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
    documents_option,
    dtype_option,
    group_size_option,
    json_option,
    max_tokens_option,
    output_option,
    png_option,
    prompt_tokens_option,
    quantizer_option,
    quiet_option,
    taus_option,
    texts_option,
    tokenizer_option,
)
from river_compile.config import KV_POLICIES, RiverConfig

if TYPE_CHECKING:
    from river_compile.measure.kv_comparison import Comparison, PolicyPoint

__all__ = ["main"]

_EXAMPLES = """\b
Examples:
  river-compare hf_folder                                     the table
  river-compare hf_folder --png policies.png -o policies.json
  river-compare hf_folder --policies share,propagate --tau 0.98,0.95 --texts book.txt
"""


def _policies(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split(",") if part.strip())


@river_command("river-compare", _EXAMPLES)
@click.argument("model")
@tokenizer_option("MODEL")
@texts_option(HELD_OUT)
@click.option(
    "--policies",
    callback=_policies,
    metavar="LIST",
    default=",".join(KV_POLICIES),
    show_default=True,
    help="To compare.",
)
@taus_option("0.99,0.98,0.97,0.9", "Thresholds.")
@dtype_option(float16=False)
@group_size_option
@quantizer_option("Algorithm that makes the river.")
@prompt_tokens_option("Read by the backbone, not counted.")
@max_tokens_option(64, "Of each document.")
@documents_option(8)
@click.option("--rounds", type=int, default=5, show_default=True, help="Interleaved rounds of timing; 0: none.")
@png_option("Write the plot there.")
@output_option("--output", "-o", help="Write the JSON there.")
@chat_option
@json_option()
@quiet_option()
@cache_option
def main(
    model: str,
    tokenizer: str | None,
    texts: tuple[Path, ...],
    policies: tuple[str, ...],
    taus: tuple[float, ...],
    dtype: str,
    group_size: str,
    quantizer: str,
    prompt_tokens: int,
    max_tokens: int,
    documents: int,
    rounds: int,
    png: Path | None,
    output: Path | None,
    chat: bool,
    as_json: bool,
    quiet: bool,
    cache: Path | None,
) -> None:
    """Measure what each KV policy costs and keeps, in one reference runtime.

    MODEL is a folder or hub name of a Hugging Face decoder. Each policy runs the same layers with the same exit rule,
    at batch 1; the table and the plot show agreement with the full backbone against milliseconds a token, with the full
    backbone and the fully 4-bit model as end points.
    """
    import torch

    from river_compile.exporters.onnx.hf import load_decoder
    from river_compile.measure.fidelity import load_tokenizer
    from river_compile.measure.kv_comparison import compare_policies
    from river_compile.reference import ReferenceDecoder

    with progress_bars(quiet or as_json) as progress:
        decoder = ReferenceDecoder(
            load_decoder(model, getattr(torch, dtype)),
            RiverConfig(group_size=int(group_size), quantizer=quantizer),
            progress=lambda done, total: progress("make the river", done, total),
        )
        result = compare_policies(
            decoder,
            texts or None,
            load_tokenizer(tokenizer or model, chat=chat),
            policies=policies,
            taus=taus,
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
            max_documents=documents,
            rounds=rounds,
            cache=cache,
            progress=progress,
        )
    if png is not None:
        from river_compile.measure.plots import draw_policies

        draw_policies(result, png)
    answer(result, _show, output=output, as_json=as_json, quiet=quiet)


def _show(console: Console, result: Comparison) -> None:
    console.print(
        f"{result.model}, {result.layers} decoder layers; {result.runtime}\n"
        f"{result.documents} documents, {result.tokens} decoded tokens a row; "
        f"times: {result.timed_tokens} tokens, {result.rounds} interleaved rounds",
        soft_wrap=True,
    )
    for note in result.notes:
        console.print(f"note: {note}", soft_wrap=True)
    table = Table(box=box.SIMPLE, caption=f"brackets: {result.confidence:.0%} bootstrap intervals over documents")
    for column in ("policy", "tau", "exit depth", "top-1", "KL", "ms/token", "speed-up (rounds)"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    previous: str | None = None
    for point in result.points:
        if point.policy != previous:
            table.add_section()
        previous = point.policy
        table.add_row(*_cells(point))
    console.print(table)


def _cells(point: PolicyPoint) -> list[str]:
    top1, speedup = point.top1, point.speedup
    return [
        point.policy or point.label,
        "" if point.tau is None else f"{point.tau:g}",
        f"{point.exit_depth:.1f}",
        f"{top1.value:.1%} \\[{100 * top1.low:.1f}-{100 * top1.high:.1f}]",
        f"{point.kl.value:.3f}",
        "-" if point.milliseconds is None else f"{point.milliseconds:.1f}",
        "-" if speedup is None else f"{speedup.value:.2f}x ({speedup.low:.2f}-{speedup.high:.2f})",
    ]
