"""What was measured, as a table, as JSON and as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from side_by_side.rounds import Measured

__all__ = ["document", "draw", "table"]

_COLUMNS = ("", "tokens/s", "ratio (slowest round)", "top-1 agreement (95%)", "tokens that differ", "resident MB", "")


def table(results: Mapping[str, Measured], tokens: int) -> str:
    """In Markdown; a row for each peer, of rounds of so many new tokens."""
    rows = [_COLUMNS, ("---",) * len(_COLUMNS), *(_row(result, tokens) for result in results.values())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(result: Measured, tokens: int) -> tuple[str, ...]:
    speed = ratio = differing = "-"
    if result.seconds:
        speed = f"{result.rate(tokens):.1f}"
        ratio = f"{statistics.median(result.ratios):.2f}x ({min(result.ratios):.2f}x)"
        differing = f"{result.differing} of {result.tokens}"
    agreement = result.agreement()
    share = "-" if agreement is None else f"{agreement.value:.1%} ({agreement.low:.0%} to {agreement.high:.0%})"
    resident = "-" if result.resident is None else f"{result.resident / 1e6:.0f}"
    return result.title, speed, ratio, share, differing, resident, result.failure or result.note


def document(results: Mapping[str, Measured], tokens: int, **run: Any) -> dict[str, Any]:
    """Everything, rounds included, for JSON; ``run`` says how it was run."""
    return run | {"new_tokens": tokens, "peers": {name: _figures(result, tokens) for name, result in results.items()}}


def _figures(result: Measured, tokens: int) -> dict[str, Any]:
    agreement = result.agreement()
    measured = (
        {}
        if not result.seconds
        else {
            "tokens_per_second": result.rate(tokens),
            "ratio": statistics.median(result.ratios),
            "ratios": result.ratios,
            "seconds": result.seconds,
            "tokens": result.tokens,
            "differing": result.differing,
            "resident_bytes": result.resident,
        }
    )
    if agreement is not None:
        measured["agreement"] = {"value": agreement.value, "low": agreement.low, "high": agreement.high}
        measured["positions"] = sum(len(found) for found in result.agrees)
    return {"title": result.title.replace("*", ""), "note": result.note, "failure": result.failure} | measured


def _label(axis: Any, names: Sequence[str], points: Sequence[tuple[float, float]]) -> None:
    """Beside each point its name, the higher the more others are in its way."""
    taken: list[Any] = []
    for name, point in sorted(zip(names, points, strict=True), key=lambda one: one[1]):
        label = axis.annotate(name, point, xytext=(5, 4), textcoords="offset points", fontsize=8)
        while any(label.get_window_extent().overlaps(other) for other in taken):
            label.xyann = (5, label.xyann[1] + 4)
        taken.append(label.get_window_extent())


def draw(results: Mapping[str, Measured], title: str, path: Path) -> None:
    """Speed against agreement, a point for each peer that has both; speed alone, as bars, where none was read."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    shown = [result for result in results.values() if result.seconds]
    ratios = [statistics.median(result.ratios) for result in shown]
    names = [result.title.replace("*", "") for result in shown]
    colours = ["#c2571a" if result.title.startswith("**") else "#0b6e99" for result in shown]
    figure, axis = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    if all(result.agrees for result in shown):
        shares = [100 * found.value for result in shown if (found := result.agreement())]
        axis.scatter(ratios, shares, c=colours)
        axis.set_ylabel("top-1 agreement with the float model, %")
        axis.margins(x=0.3, y=0.15)
        figure.canvas.draw()
        _label(axis, names, list(zip(ratios, shares, strict=True)))
    else:
        axis.barh(names, ratios, color=colours)
        axis.invert_yaxis()
    axis.set_xlabel("speed, times the reference's")
    axis.set_title(title.replace("; ", "\n", 1), fontsize=10)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
