"""`river-plan`: what a river would bring to a model, from its config alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich import box
from rich.console import Console
from rich.table import Table

from river_compile.cli.console import answer, river_command
from river_compile.cli.options import bits_option, depths_option, group_size_option, head_bits_option, json_option
from river_compile.config import FLOAT, RiverConfig

if TYPE_CHECKING:
    from river_compile.measure.plan import RiverPlan

__all__ = ["main"]

_EXAMPLES = """\b
Examples:
  river-plan path/to/hf_model --bandwidth 40
  river-plan path/to/config.json --bandwidth 3350 --memory 80 --context 8192
  river-plan path/to/config.json --bandwidth 3350 --memory 80 --tp 8
"""


@river_command("river-plan", _EXAMPLES)
@click.argument("model")
@click.option("--bandwidth", type=float, required=True, help="Of the memory, GB/s; with --tp, of each rank's.")
@click.option("--memory", type=float, help="GB that weights and cache must fit into; with --tp, of each rank.")
@click.option("--context", type=click.IntRange(0), default=1024, show_default=True, help="Tokens in the cache.")
@click.option("--tp", type=click.IntRange(1), default=1, show_default=True, help="Ranks that share each layer.")
@click.option(
    "--fraction",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="What part of the byte limit is reached; river-eval and river-bench measure it.",
)
@depths_option("1,4,8", "Exit depths to tell of.")
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Default: as the config says.")
@bits_option
@group_size_option
@head_bits_option
@json_option()
def main(
    model: str,
    bandwidth: float,
    memory: float | None,
    context: int,
    tp: int,
    fraction: float,
    depths: tuple[int, ...],
    dtype: str | None,
    bits: str,
    group_size: str,
    head_bits: str,
    as_json: bool,
) -> None:
    """Predict sizes and speed of a river for MODEL: a folder, a hub name or a config.json. No weights are read.

    Speeds are those at which the memory hands over the bytes that a token reads, times --fraction: a limit, not a
    measurement.
    """
    import torch

    from river_compile.measure.plan import plan_river

    config = RiverConfig(
        bits=int(bits), group_size=int(group_size), head_bits=FLOAT if head_bits == FLOAT else int(head_bits)
    )
    found = plan_river(
        Path(model) if Path(model).exists() or model[:1] in "./~" else model,
        bandwidth * 1e9,
        memory=None if memory is None else memory * 1e9,
        context=context,
        dtype=None if dtype is None else getattr(torch, dtype),
        ranks=tp,
        fraction=fraction,
        depths=depths,
        config=config,
    )
    answer(found, _show, as_json=as_json)


def _show(console: Console, plan: RiverPlan) -> None:
    sizes = plan.sizes
    each = " on each rank" if plan.ranks > 1 else ""
    cache = sizes.cache_per_token * plan.context
    console.print(
        f"{plan.model}, {plan.dtype}: {sizes.layers} layers; weights {sizes.backbone / 1e9:.2f} GB, river "
        f"{sizes.added / 1e9:.2f} GB, cache of {plan.context} tokens {cache / 1e9:.3f} GB{each}"
    )
    if plan.memory is not None:
        verdict = "fits into" if plan.fits else "DOES NOT FIT into"
        console.print(f"{plan.needed / 1e9:.2f} GB {verdict} {plan.memory / 1e9:.0f} GB{each}")
    table = Table(box=box.SIMPLE, caption="a limit by memory bandwidth, not a measurement", caption_justify="left")
    for column in ("exit depth", "GB a token", "tokens/s", "speed-up"):
        table.add_column(column, justify="right")
    base = plan.speeds[sizes.layers]
    for depth, speed in plan.speeds.items():
        name = {0: "0, all river", sizes.layers: f"{sizes.layers}, exits off"}.get(depth, str(depth))
        size = sizes.token(depth, plan.context) / 1e9
        table.add_row(name, f"{size:.3f}", f"{speed:.1f}", f"{speed / base:.2f}x")
    console.print(table)
    words = ", ".join(f"{gain:.2f}x at {accepted:.0%} ({length})" for accepted, (gain, length) in plan.exact.items())
    console.print(f"exact mode, by acceptance (and draft length): {words}")
    made = plan.export
    if made is None:
        return
    console.print(
        f"to make it from an ONNX file, here: about {made.seconds:.0f} s (rounding {made.rounding:.0f}, writing "
        f"{made.writing:.0f}), {made.peak / 1e9:.1f} GB of memory; the check maps files of {made.mapped / 1e9:.1f} GB"
    )


if __name__ == "__main__":
    main()
