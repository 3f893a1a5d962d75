"""What `river-bench` shows of what it measured."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from river_compile.exporters.torch.timing import Choice
    from river_compile.measure.bench import BenchResult
    from river_compile.measure.bench_rows import ExactTokens, RatedRows
    from river_compile.measure.onnx_bench import BenchPoint, OnnxBench
    from river_compile.measure.onnx_profile import Operators

__all__ = ["show_bench", "show_onnx_bench", "startup_table"]


def show_bench(console: Console, result: BenchResult, *, choices: bool = False) -> None:
    """Of a Hugging Face model.

    Args:
        choices: the products that were timed as well.
    """
    title = f"{Path(result.model).name}, {result.dtype}, batch {result.batch}, decode, {result.device}, "
    console.print(_table(result, title + f"memory {result.bandwidth / 1e9:.1f} GB/s"))
    if result.exact is not None:
        console.print(_exactly(result.exact))
    if choices:
        console.print(_choices_table(result.choices))
    if result.startup:
        console.print(startup_table(result))
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


def _titled(title: str) -> Table:
    return Table(box=box.SIMPLE, title=title, title_justify="left")


def _choices_table(choices: Sequence[Choice]) -> Table:
    """Microseconds of each product by form; the form that was taken has an asterisk."""
    table = _titled("products on this machine: microseconds by form; * was taken")
    table.add_column("rows x inputs -> outputs")
    forms = list(dict.fromkeys(form for choice in choices for form in choice.seconds))
    for form in forms:
        table.add_column(form, justify="right")
    for choice in choices:
        cells = (
            f"{choice.seconds[form] * 1e6:.0f}{'*' if form == choice.taken else ' '}" if form in choice.seconds else ""
            for form in forms
        )
        table.add_row(choice.product, *cells)
    return table


def startup_table(result: BenchResult) -> Table:
    from river_compile.measure.startup import TOKENS

    table = _titled("start-up: seconds from a loaded model to a token, in a new process, and the ratio to Inductor")
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


def show_onnx_bench(console: Console, result: OnnxBench) -> None:
    """Of an ONNX model: a table for each batch size and context, and the sweeps over either."""
    known = not math.isnan(result.bandwidth)
    memory = f", memory {result.bandwidth / 1e9:.1f} GB/s" if known else ""
    console.print(
        f"{result.model}, {result.layers} decoder layers; {result.device}{memory}\n"
        f"plain: {result.plain or 'none'}; in the cache: {result.prompts}; {result.rounds} interleaved rounds of "
        f"{result.new_tokens} decode passes",
        soft_wrap=True,
    )
    for note in result.notes:
        console.print(f"note: {note}", soft_wrap=True)
    for point in result.points:
        console.print(_table(point, f"batch {point.batch}, context {point.context}"))
        if point.exact is not None:
            console.print(_exactly(point.exact))
    if result.operators:
        console.print(_operators_table(result.operators))
    for over in ("batch", "context"):
        if len(points := result.sweep(over)) > 1:
            console.print(_sweep_table(over, points))


def _table(rated: RatedRows, title: str) -> Table:
    table = _titled(title)
    for column in ("", "ms", "tokens/s", "ratio", "mean exit depth", "byte limit tokens/s", "reached"):
        words = map(len, column.split())
        table.add_column(
            column, justify="right" if column else "left", no_wrap=not column, min_width=max(words, default=0)
        )
    for row in rated.rows:
        limit = rated.limit(row)
        table.add_row(
            row.name,
            f"{row.median * 1e3:.1f}",
            f"{rated.batch / row.median:.1f}",
            f"{rated.ratio(row):.2f}x",
            f"{row.mean_depth:.1f}" if row.depths else "",
            "" if math.isnan(limit) else f"{rated.batch * limit:.0f}",
            "" if math.isnan(limit) else f"{1 / row.median / limit:.0%}",
        )
    return table


def _operators_table(profiled: Sequence[Operators]) -> Table:
    """Milliseconds of a pass by operator, its share, and how often it runs."""
    table = _titled("where a decode pass spends its time under the profiler: ms, share (calls)")
    table.add_column("")
    for one in profiled:
        table.add_column(f"{one.name}, {one.seconds * 1e3:.1f} ms", justify="right")
    costs = Counter[str]()
    for one in profiled:
        costs.update({operator: seconds / one.seconds for operator, seconds in one.spent.items()})
    shown = [operator for operator, cost in costs.most_common() if cost / len(profiled) >= 0.005]

    def cell(one: Operators, seconds: float, calls: str = "") -> str:
        return f"{seconds * 1e3:.2f}, {seconds / one.seconds:.0%}{calls}" if seconds else "-"

    for operator in shown:
        cells = [cell(one, one.spent.get(operator, 0.0), f" ({one.calls.get(operator, 0):.0f})") for one in profiled]
        table.add_row(operator, *cells)
    others = [sum(seconds for name, seconds in one.spent.items() if name not in shown) for one in profiled]
    table.add_row("other operators", *(cell(one, seconds) for one, seconds in zip(profiled, others, strict=True)))
    table.add_row("between operators", *(cell(one, one.between) for one in profiled))
    return table


def _exactly(made: ExactTokens) -> str:
    kept = "nothing was drafted" if made.acceptance is None else f"{made.acceptance:.0%} of the drafts accepted"
    return f"exact: {made.differing} of {made.tokens} tokens differ from the backbone's; {kept}"


def _sweep_table(over: str, points: list[BenchPoint]) -> Table:
    """Ratios by batch size or by context; of thresholds the mean exit depth too, since a batch exits where the last of
    its tokens would."""
    first = points[0]
    fixed = f"context {first.context}" if over == "batch" else f"batch {first.batch}"
    table = _titled(f"ratio by {over}, {fixed} (mean exit depth)")
    table.add_column(over, no_wrap=True)
    for point in points:
        table.add_column(str(getattr(point, over)), justify="right")
    for name in dict.fromkeys(row.name for point in points for row in point.rows):
        cells = []
        for point in points:
            row = point.row(name)
            depth = f" ({row.mean_depth:.1f})" if row is not None and row.depths and ", tau " in name else ""
            cells.append("-" if row is None else f"{point.ratio(row):.2f}x{depth}")
        table.add_row(name, *cells)
    return table
