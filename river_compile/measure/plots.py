"""Plots of calibration, comparison and benchmarks, as PNG files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from river_compile.errors import MissingExtra, RiverError

if TYPE_CHECKING:
    from river_compile.measure.bench_rows import RatedRows
    from river_compile.measure.calibration import Calibration
    from river_compile.measure.kv_comparison import Comparison
    from river_compile.measure.onnx_bench import BenchPoint, OnnxBench

__all__ = ["draw_calibration", "draw_policies", "draw_rows", "draw_sweeps"]

_COLOURS = {
    "share": "#0b6e99",
    "propagate": "#c2571a",
    "mask": "#7a7a7a",
    "recompute": "#6a3d9a",
    "monotone": "#b59a00",
}
_OTHER_WAYS = {"plain, int4": "#c2571a", "exact": "#b22222"}
_MARKS = {"share": "o", "propagate": "s", "mask": "x", "recompute": "^", "monotone": "D"}


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtra("matplotlib", "report", "drawing a plot") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise RiverError(f"{path}: cannot be written: {error}") from error
    finally:
        _pyplot().close(figure)


def draw_policies(comparison: Comparison, path: Path) -> None:
    """Agreement with the backbone against milliseconds a token, a line for each KV policy; a point is a threshold.

    Raises:
        RiverError: the comparison was not timed, or the file cannot be written.
        MissingExtra: matplotlib is not installed.
    """
    if any(point.milliseconds is None for point in comparison.points):
        raise RiverError("there is nothing to draw against: the comparison was made with no round of timing")
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 5.2), layout="constrained")
    for policy, colour in _COLOURS.items():
        points = sorted((p for p in comparison.points if p.policy == policy), key=lambda p: p.tau or 0)
        if not points:
            continue
        times = [point.milliseconds for point in points]
        shares = [100 * point.top1.value for point in points]
        spread = [
            [100 * (point.top1.value - point.top1.low) for point in points],
            [100 * (point.top1.high - point.top1.value) for point in points],
        ]
        axes.errorbar(
            times,
            shares,
            spread,
            color=colour,
            marker=_MARKS[policy],
            label=policy,
            capsize=2,
            linewidth=1.6,
            elinewidth=0.8,
            zorder=3 if policy == "share" else 2,
        )
    for point in (point for point in comparison.points if point.policy is None):
        whole = point.label == "backbone"
        place = (point.milliseconds, 100 * point.top1.value)
        axes.scatter(*place, marker="*" if whole else "P", s=130, color="black", zorder=4)
        axes.annotate(
            "full backbone" if whole else "fully 4-bit",
            place,
            xytext=(-4, 8) if whole else (-8, -14),
            textcoords="offset points",
            ha="right",
        )
    axes.set_xlabel("milliseconds a token (batch 1)")
    axes.set_ylabel("top-1 agreement with the full backbone, %")
    axes.set_xlim(left=0)
    axes.set_ylim(0, 109)
    axes.grid(alpha=0.25)
    axes.legend(title="KV policy", loc="upper left", frameon=False)
    axes.set_title(
        f"{comparison.model}, {comparison.layers} layers, {comparison.tokens} decoded tokens\n{comparison.runtime}",
        fontsize=10,
    )
    _save(figure, path)


def draw_calibration(calibration: Calibration, path: Path) -> None:
    """Measured risk and mean exit depth of every threshold tested, the bound, and the choice.

    Raises:
        RiverError: nothing was tested, or the file cannot be written.
        MissingExtra: matplotlib is not installed.
    """
    if not calibration.curve:
        raise RiverError("there is nothing to draw: no threshold was tested")
    pyplot = _pyplot()
    figure, (axes, below) = pyplot.subplots(
        2, 1, sharex=True, figsize=(8, 5.6), height_ratios=(3, 2), layout="constrained"
    )
    names = [f"{tested.tau:g}" for tested in calibration.curve]
    risks = [tested.risk for tested in calibration.curve]
    axes.plot(names, risks, color="#0b6e99", linewidth=1.6, zorder=2)
    for certified, mark, label in ((True, "o", "certified"), (False, "x", "not certified: testing stops")):
        chosen = [(n, t.risk) for n, t in zip(names, calibration.curve, strict=True) if t.certified == certified]
        if chosen:
            axes.scatter(*zip(*chosen, strict=True), marker=mark, color="#0b6e99", s=45, label=label, zorder=3)
    axes.axhline(calibration.max_risk, color="#b22222", linestyle="--", label=f"bound: {calibration.max_risk:g}")
    axes.set_ylim(0, 1.15 * max(*risks, calibration.max_risk))
    axes.set_ylabel(f"risk ({calibration.loss})")
    below.plot(names, [tested.exit_depth for tested in calibration.curve], color="#c2571a", marker="s", linewidth=1.6)
    below.set_ylim(0, calibration.layers * 1.05)
    below.set_ylabel(f"mean exit depth\n(of {calibration.layers} layers)")
    below.set_xlabel("tau, from the safest down")
    for panel in (axes, below):
        panel.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    axes.set_title(
        f"{calibration.verdict()}\n{calibration.documents} documents, {calibration.tokens} tokens", fontsize=9
    )
    _save(figure, path)


def draw_rows(rated: RatedRows, title: str, path: Path) -> None:
    """Speeds of rows beside their byte limits, a bar for each.

    Raises:
        RiverError: the file cannot be written.
        MissingExtra: matplotlib is not installed.
    """
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(8, 0.5 * len(rated.rows) + 1.5), layout="constrained")
    names = [row.name for row in rated.rows]
    speeds = [rated.batch / row.median for row in rated.rows]
    limits = [rated.batch * rated.limit(row) for row in rated.rows]
    if not all(map(math.isnan, limits)):
        axis.barh(names, [0.0 if math.isnan(limit) else limit for limit in limits], color="#dde6ee", label="byte limit")
    bars = axis.barh(names, speeds, height=0.5, color="#2878b5", label="measured")
    axis.bar_label(bars, [f"{rated.ratio(row):.2f}x" for row in rated.rows], padding=3)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set_xlabel("tokens a second")
    axis.set_title(title, fontsize=10)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    _save(figure, path)


def draw_sweeps(result: OnnxBench, path: Path) -> None:
    """Speed beside the plain model's, a line for each row, against batch size and against context, as far as there are
    several; below 1 a river does not pay. With one of each: `draw_rows`.

    Raises: as `draw_rows`.
    """
    name = Path(result.model).name
    sweeps = {over: points for over in ("batch", "context") if len(points := result.sweep(over)) > 1}
    if not sweeps:
        point = result.points[0]
        title = f"{name}, batch {point.batch}, context {point.context}\n{result.device}"
        draw_rows(point, title, path)
        return
    reference = result.points[0].reference
    pyplot = _pyplot()
    figure, panels = pyplot.subplots(
        1, len(sweeps), figsize=(5.6 * len(sweeps) + 0.6, 5.2), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (over, points) in zip(panels[0], sweeps.items(), strict=True):
        _draw_sweep(axis, over, points)
    highest = max(point.ratio(row) for points in sweeps.values() for point in points for row in point.rows)
    panels[0][0].set_ylim(0, 1.08 * max(highest, 1.1))
    panels[0][0].set_ylabel(f"times as fast as {reference}")
    panels[0][0].yaxis.set_major_formatter("{x:g}x")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(
        f"{name}: speed of decoding; below {reference} a river does not pay\n"
        f"{result.device}, {result.prompts} in the cache",
        fontsize=10,
    )
    _save(figure, path)


def _draw_sweep(axis: Any, over: str, points: Sequence[BenchPoint]) -> None:
    from matplotlib import colormaps

    places = [getattr(point, over) for point in points]
    names = [row.name for row in points[0].rows if row.name != points[0].reference]
    rivers = [name for name in names if name not in _OTHER_WAYS]
    for name in names:
        shade = 0.85 * rivers.index(name) / max(len(rivers) - 1, 1) if name in rivers else 0.0
        colour = _OTHER_WAYS.get(name) or colormaps["viridis"](shade)
        rows = [(place, point, point.row(name)) for place, point in zip(places, points, strict=True)]
        found = [(place, point.ratio(row)) for place, point, row in rows if row is not None]
        style = ":" if name in _OTHER_WAYS else "-"
        axis.plot(*zip(*found, strict=True), style, color=colour, marker="o", markersize=4, linewidth=1.6, label=name)
    axis.axhline(1, color="black", linewidth=1.2, linestyle="--", label=points[0].reference)
    axis.axhspan(0, 1, color="#b22222", alpha=0.06, linewidth=0)
    axis.set_xscale("log", base=2)
    axis.set_xticks(places, [f"{place:,}" for place in places])
    axis.minorticks_off()
    fixed = {"batch": f"context {points[0].context:,}", "context": f"batch {points[0].batch}"}[over]
    axis.set_xlabel({"batch": "sequences in a batch", "context": "tokens in the cache"}[over])
    axis.set_title(fixed, fontsize=10)
    axis.grid(alpha=0.25)
