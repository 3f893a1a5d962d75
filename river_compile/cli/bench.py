"""`river-bench`: a model in eager mode, by Inductor, and with a river, side by side."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich import box
from rich.console import Console
from rich.table import Table

from river_compile.cli.console import answer, progress_bars, river_command
from river_compile.cli.options import (
    bits_option,
    depths_option,
    dtype_option,
    group_size_option,
    json_option,
    png_option,
    quiet_option,
    taus_option,
)
from river_compile.config import RiverConfig

if TYPE_CHECKING:
    from river_compile.measure.bench import BenchResult

__all__ = ["main"]

_EXAMPLES = """\b
Examples:
  river-bench path/to/hf_model
  river-bench path/to/hf_model --tau 0.97,0.95 --depths 1,4
  river-bench path/to/hf_model --startup --rounds 1
  river-bench path/to/hf_model --json --png bench.png > bench.json
"""


@river_command("river-bench", _EXAMPLES)
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@taus_option("", "Thresholds to run the river at.", show_default=False)
@depths_option("1,4,15", "Exit depths to force.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Interleaved rounds.")
@click.option("--tokens", type=click.IntRange(4), default=32, show_default=True, help="New tokens in a round.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Sequences.")
@click.option(
    "--startup", is_flag=True, help="Measure start-up too: new processes with an empty, then with a filled disk cache."
)
@click.option("--exact", is_flag=True, help="Decode exactly too: the river drafts, the backbone verifies.")
@dtype_option()
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@bits_option
@group_size_option
@json_option()
@png_option("Draw the table into this file.")
@quiet_option("No progress bars.")
def main(
    model: Path,
    taus: tuple[float, ...],
    depths: tuple[int, ...],
    rounds: int,
    tokens: int,
    batch: int,
    startup: bool,
    exact: bool,
    dtype: str,
    device: str,
    bits: str,
    group_size: str,
    as_json: bool,
    png: Path | None,
    quiet: bool,
) -> None:
    """Time decode passes of the Hugging Face MODEL: eager, plain Inductor, and the river at several exits.

    All ways run interleaved in one process, after a round of warm-up; the ratio is to plain Inductor, within a round.
    """
    for tau in taus:
        RiverConfig(tau=tau)
    config = RiverConfig(bits=int(bits), group_size=int(group_size))
    import torch

    from river_compile.measure.bench import bench, draw

    with progress_bars(quiet) as progress:
        result = bench(
            model,
            taus=taus,
            depths=depths,
            rounds=rounds,
            new_tokens=tokens,
            batch=batch,
            dtype=getattr(torch, dtype),
            device=device,
            config=config,
            startup=startup,
            exact=exact,
            progress=progress,
        )
    if png is not None:
        draw(result, png)
    answer(result, _show, as_json=as_json)


def _show(console: Console, result: BenchResult) -> None:
    table = Table(
        box=box.SIMPLE,
        title=f"{Path(result.model).name}, {result.dtype}, batch {result.batch}, decode, {result.device}, "
        f"memory {result.bandwidth / 1e9:.1f} GB/s",
        title_justify="left",
    )
    for column in ("", "ms", "tokens/s", "ratio", "mean exit depth", "byte limit tokens/s", "reached"):
        table.add_column(column, justify="right" if column else "left")
    for row in result.rows:
        limit = result.limit(row)
        table.add_row(
            row.name,
            f"{row.median * 1e3:.1f}",
            f"{result.batch / row.median:.1f}",
            f"{result.ratio(row):.2f}x",
            f"{row.mean_depth:.1f}" if row.depths else "",
            "" if math.isnan(limit) else f"{result.batch * limit:.0f}",
            "" if math.isnan(limit) else f"{1 / row.median / limit:.0%}",
        )
    console.print(table)
    if result.exact is not None:
        made = result.exact
        kept = "nothing was drafted" if made.acceptance is None else f"{made.acceptance:.0%} of the drafts accepted"
        console.print(f"exact: {made.differing} of {made.tokens} tokens differ from the backbone's; {kept}")
    if result.startup:
        console.print(_startup_table(result))
    seconds = result.compile_seconds
    console.print(
        f"compile time: Inductor {seconds['inductor']:.1f} s, river {seconds['river']:.1f} s "
        f"({seconds['river'] / seconds['inductor']:.2f}x)"
    )
    both = result.backbone_bytes + result.river_bytes
    peaks = result.decode_peak_bytes
    console.print(
        f"weights: backbone {result.backbone_bytes / 1e6:.0f} MB, with the river {both / 1e6:.0f} MB "
        f"({both / result.backbone_bytes:.2f}x); most memory while decoding: {peaks['inductor'] / 1e6:.0f} MB "
        f"before the river was made, {peaks['river'] / 1e6:.0f} MB after"
    )


def _startup_table(result: BenchResult) -> Table:
    from river_compile.measure.startup import TOKENS

    table = Table(
        box=box.SIMPLE,
        title="start-up: seconds from a loaded model to a token, in a new process, and the ratio to Inductor",
        title_justify="left",
    )
    table.add_column("")
    for token in TOKENS:
        for kind in ("CPU s", "wall s"):
            table.add_column(f"{kind}, token {token}", justify="right")
    for row in result.startup:
        cells = []
        for cpu, cpu_ratio, wall, wall_ratio in zip(
            row.cpu_seconds, row.cpu_ratio, row.wall_seconds, row.wall_ratio, strict=True
        ):
            cells += [f"{cpu:.1f} ({cpu_ratio:.2f}x)", f"{wall:.1f} ({wall_ratio:.2f}x)"]
        table.add_row(f"{row.cache}, {row.way}", *cells)
    return table


if __name__ == "__main__":
    main()
