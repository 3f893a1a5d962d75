"""`river-compare`: every KV policy in one runtime, fidelity against time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich import box
from rich.console import Console
from rich.table import Table

from river_compile.cli.console import RiverCommand, progress_bars
from river_compile.cli.options import cache_option, chat_option, numbers
from river_compile.config import GROUP_SIZES, KV_POLICIES, RiverConfig
from river_compile.errors import InputError
from river_compile.version import __version__

if TYPE_CHECKING:
    from river_compile.measure.kv_comparison import Comparison, PolicyPoint

__all__ = ["main"]

_DEFAULTS = RiverConfig()

_EXAMPLES = """\b
Examples:
  river-compare hf_folder                                     the table
  river-compare hf_folder --png policies.png -o policies.json
  river-compare hf_folder --policies share,propagate --tau 0.98,0.95 --texts book.txt
"""


def _policies(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split(",") if part.strip())


@click.command(cls=RiverCommand, epilog=_EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model")
@click.option("--tokenizer", metavar="FOLDER", help="Folder or hub name of the tokenizer.  [default: MODEL]")
@click.option(
    "--texts",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Text file, or JSONL of texts or prompts; repeatable.  [default: held-out texts that come with the package]",
)
@click.option(
    "--policies",
    callback=_policies,
    metavar="LIST",
    default=",".join(KV_POLICIES),
    show_default=True,
    help="To compare.",
)
@click.option(
    "--tau",
    "taus",
    callback=numbers("tau"),
    metavar="LIST",
    default="0.99,0.98,0.97,0.9",
    show_default=True,
    help="Thresholds.",
)
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", show_default=True)
@click.option("--group-size", type=click.Choice([str(size) for size in GROUP_SIZES]), default="32", show_default=True)
@click.option("--quantizer", default=_DEFAULTS.quantizer, show_default=True, help="Algorithm that makes the river.")
@click.option("--prompt-tokens", type=int, default=8, show_default=True, help="Read by the backbone, not counted.")
@click.option("--max-tokens", type=int, default=64, show_default=True, help="Of each document.")
@click.option("--documents", type=int, default=8, show_default=True, help="Documents, evenly spread over the texts.")
@click.option("--rounds", type=int, default=5, show_default=True, help="Interleaved rounds of timing; 0: none.")
@click.option("--png", type=click.Path(path_type=Path), help="Write the plot there.")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Write the JSON there.")
@chat_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the table.")
@click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors (and JSON, with --json).")
@cache_option
@click.version_option(__version__, prog_name="river-compare")
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

    for path in (png, output):
        if path is not None and not path.parent.is_dir():
            raise InputError(f"{path}: there is no such folder")
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
    if output is not None:
        output.write_text(result.to_json() + "\n", encoding="utf-8")
    if png is not None:
        from river_compile.measure.plots import draw_policies

        draw_policies(result, png)
    if as_json:
        click.echo(result.to_json())
    else:
        _show(Console(quiet=quiet, highlight=False), result)


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
