"""What `river-export` shows: the report, the plan, and the rivers tried as drafters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from river_compile.passes.anatomy import Layer
    from river_compile.reports import Agreement, ExportReport, Plan

__all__ = ["show_plan", "show_report"]


def show_report(console: Console, report: ExportReport) -> None:
    table = Table(box=box.SIMPLE, show_header=False)
    for label, value in _rows(report):
        table.add_row(label, value)
    console.print(table)
    for note in report.notes:
        console.print(f"note: {note}", soft_wrap=True)
    if report.agreement is not None and report.agreement.advice is not None:
        console.print(f"agreement {report.agreement.advice}", soft_wrap=True)
    if report.output is not None:
        console.print(f"wrote {report.output}", soft_wrap=True)
    if report.drafts is not None:
        _show_drafts(console, report.drafts)
    if report.speeds is not None:
        _show_speeds(console, report.speeds)


def _rows(report: ExportReport) -> list[tuple[str, str]]:
    kinds = f" of {report.kinds} kinds" if report.kinds > 1 else ""
    points = report.exit_points
    where = f" (after layers {points[0]} to {points[-1]})" if len(points) > 1 else ""
    bits = "" if math.isnan(report.average_bits) else f", {report.average_bits:.2f} bits on average"
    return [
        ("decoder layers", f"{report.layers}{kinds}, found by {report.found_by}"),
        ("river layers", f"{report.river_layers}"),
        ("river", f"{_megabytes(report.river_bytes)} beside a model of {_megabytes(report.backbone_bytes)}"),
        ("quantizer", f"{report.quantizer}{bits}"),
        ("exit points", f"{len(points)}{where}"),
        *([("added nodes", str(report.added_nodes))] if report.output is not None else []),
        *([("agreement", _agreement(report.agreement))] if report.agreement is not None else []),
        ("time", ", ".join(f"{name} {seconds:.1f} s" for name, seconds in report.seconds.items())),
    ]


def _agreement(found: Agreement) -> str:
    depth = "" if found.exit_depth is None else f", mean exit depth {found.exit_depth:.1f}"
    of = f"{found.tokens} tokens of {found.documents} texts"
    return f"{found.top1:.1%} with the backbone at tau {found.tau:g}, on {of}{depth}"


def show_plan(console: Console, plan: Plan) -> None:
    show_report(console, plan.report)
    table = Table(box=box.SIMPLE, title="Decoder layers", title_justify="left")
    for column in ("layers", "kind", "nodes", "cache slots", "river linears (bits/group size)"):
        table.add_column(column, overflow="fold")
    for row, alike in groupby(plan.layers, key=lambda layer: _plan_row(plan, layer)):
        indices = [layer.index for layer in alike]
        table.add_row(f"{indices[0]}-{indices[-1]}" if len(indices) > 1 else str(indices[0]), *row)
    console.print(table)
    head = [linear for linear in plan.linears if linear.layer == len(plan.layers)]
    if head:
        console.print(f"LM head after an exit: {head[0].name} {head[0].grid}")
    console.print("dry run: nothing written")


def _plan_row(plan: Plan, layer: Layer) -> tuple[str, ...]:
    linears = [linear for linear in plan.linears if linear.layer == layer.index]
    shown = ", ".join(f"{linear.name.rsplit('.', 1)[-1]} {linear.grid}" for linear in linears)
    return str(layer.kind), str(len(layer.nodes)), str(len(layer.caches)), shown or "none: backbone only"


def _megabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _show_drafts(console: Console, drafts: Mapping[str, Any]) -> None:
    """The rivers tried as drafters, and the sentence that matters."""
    table = Table(box=box.SIMPLE, caption=f"exact decoding on {drafts['cpu']}; * is the one written")
    for column in ("river", "bits", "head", "accepted", "draft", "5 rows", "expected", "measured"):
        table.add_column(column, justify="left" if column == "river" else "right")
    for index, point in enumerate(drafts["points"]):
        accepted = point["acceptance"]
        table.add_row(
            ("* " if index == drafts["chosen"] else "  ") + point["quantizer"],
            f"{point['bits']:g}",
            str(point["head_bits"]),
            f"{sum(accepted) / len(accepted):.0%}" if accepted else "-",
            f"{point['draft_ms']:.1f} ms",
            f"{point['verify_ms'][5]:.1f} ms",
            f"{point['expected']:.2f}x",
            "-" if point["measured"] is None else f"{point['measured']:.2f}x",
        )
    console.print(table)
    best = drafts["points"][drafts["chosen"]]
    output = f"{best['differing']} TOKENS DIFFER" if best["differing"] else "same output"
    console.print(f"[bold]{best['measured']:.2f} times faster, {output}[/bold] (exact decoding, greedy, batch 1)")


def _show_speeds(console: Console, speeds: Mapping[str, Any]) -> None:
    """The forms of the river that were tried."""
    caption = f"all river beside the backbone on {speeds['cpu']}, {speeds['tokens']} tokens; * is the one written"
    table = Table(box=box.SIMPLE, caption=caption)
    for column in ("bits", "group", "activations", "head", "all river", "speed-up", "agrees"):
        table.add_column(column, justify="right")
    for index, point in enumerate(speeds["points"]):
        table.add_row(
            ("* " if index == speeds["chosen"] else "") + str(point["bits"]),
            str(point["group_size"]),
            point["activations"],
            str(point["head_bits"]),
            f"{point['river_ms']:.1f} ms",
            f"{point['speedup']:.2f}x",
            f"{point['agreement']:.1%}",
        )
    console.print(table)
    if speeds["spoilt"] is not None:
        console.print(
            f"int8 activations cost {speeds['spoilt']:.0%} of the tokens beside float ones: this model has huge "
            "activations, which eight bits do not hold"
        )
