"""An evaluation as one HTML page that needs no network: table, plots as inline SVG, a text coloured by exit depth."""

from __future__ import annotations

import html
import io
import itertools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from river_compile.errors import MissingExtra
from river_compile.measure.evaluation import Evaluation, SettingResult
from river_compile.measure.fidelity import Interval
from river_compile.measure.sensitivity import Sensitivity

__all__ = ["render"]

_INK, _BLUE, _ORANGE, _GREY = "#1f2933", "#1f6fb2", "#d9730d", "#9aa5b1"
_WIDTH = 7.2

_STYLE = """
:root { color-scheme: light }
body { font: 16px/1.55 system-ui, sans-serif; color: #1f2933; max-width: 64rem; margin: 2.5rem auto;
  padding: 0 1.25rem }
h1 { font-size: 1.7rem; margin-bottom: .2rem } h2 { font-size: 1.2rem; margin-top: 2.4rem }
p.lead, figcaption, caption, .note { color: #52606d }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .86rem }
th, td { padding: .35rem .4rem; text-align: right; border-bottom: 1px solid #e4e7eb }
th:first-child, td:first-child { text-align: left; white-space: nowrap } th { font-weight: 600; vertical-align: bottom }
caption { caption-side: bottom; text-align: left; padding-top: .5rem; font-size: .85rem }
.wide { overflow-x: auto } figure { margin: 1rem 0 } figure svg { width: 100%; height: auto }
small { color: #7b8794; white-space: nowrap } td small { display: block }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; font-size: .92rem }
dt { color: #52606d } dd { margin: 0; overflow-wrap: anywhere }
.text { white-space: pre-wrap; font: 15px/1.9 ui-monospace, monospace; padding: 1rem; border: 1px solid #e4e7eb;
  border-radius: 6px; margin: .5rem 0 1.5rem; overflow-wrap: anywhere }
.text span { border-radius: 3px; padding: .12em 0 } .text span.miss { border-bottom: 2px solid #c2410c }
.scale { display: inline-flex; align-items: center; gap: .5rem; font-size: .85rem; color: #52606d }
.scale i { display: inline-block; width: 9rem; height: .8rem; border-radius: 3px }
"""


def render(result: Evaluation, sensitivity: Sensitivity | None = None) -> str:
    """The page.

    Args:
        sensitivity: what each linear layer's quantization alone costs; its plot is left out if None.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    sections = [
        _figure("Agreement and speed", _tradeoff(result), _TRADEOFF) if _thresholds(result) else "",
        _figure("Where tokens leave the backbone", _histograms(result), _HISTOGRAM) if _thresholds(result) else "",
        _figure("KV cache, layer by layer", _cosines(result), _COSINES),
        _figure("What each layer costs", _costs(sensitivity), _sensitivity_note(sensitivity)) if sensitivity else "",
        _figure("Similarity and what follows from it", _similarity(result), _similarity_note(result))
        if result.mean_similarity
        else "",
        _coloured(result),
    ]
    body = "\n".join([_head(result), _table(result), *sections, _method(result)])
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(result.model)}: fidelity</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _thresholds(result: Evaluation) -> list[SettingResult]:
    """Rows with a threshold, by rising threshold."""
    return sorted((row for row in result.settings if row.max_depth is None), key=lambda row: row.tau)


def _head(result: Evaluation) -> str:
    quantizer = html.escape(result.details.get("river.quantizer", "unknown"))
    return (
        f"<h1>How good is {html.escape(result.model)}?</h1>\n<p class='lead'>{result.layers} decoder layers, river "
        f"made by {quantizer}. Read beside its own backbone on {len(result.texts)} documents, {result.tokens} "
        "tokens.</p>"
    )


def _table(result: Evaluation) -> str:
    kinds = sorted({kind for row in result.settings for kind in row.top1_by_kind})
    heads = ["setting", "top-1", *(f"top-1, {kind}" for kind in kinds), "top-5", "KL", "perplexity", "K cosine"]
    heads += ["V cosine", "exit depth", "tokens/s", "ratio"]
    rows = "\n".join(_row(row, kinds) for row in result.settings) + _exact_row(result, len(heads))
    header = "".join(f"<th>{html.escape(head)}</th>" for head in heads)
    return (
        f"<h2>Fidelity</h2>\n<div class='wide'><table><thead><tr>{header}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n"
        f"<caption>Top-1: share of tokens where the river chooses the backbone's token. Small figures: "
        f"{result.confidence:.0%} bootstrap intervals over documents. Perplexity of the backbone: "
        f"{_small(result.perplexity_backbone, '.2f')}. Ratio: decode speed, batch 1, to the backbone in the same run."
        f"</caption></table></div>"
    )


def _row(row: SettingResult, kinds: Sequence[str]) -> str:
    speed = row.speed
    cells = [
        html.escape(row.label),
        _small(row.top1, ".1%"),
        *(f"{row.top1_by_kind[kind].value:.1%}" if kind in row.top1_by_kind else "-" for kind in kinds),
        f"{row.top5.value:.1%}",
        _small(row.kl, ".3f"),
        f"{row.perplexity.value:.2f}",
        f"{row.key_cosine.value:.4f}",
        f"{row.value_cosine.value:.4f}",
        f"{row.mean_exit_depth:.1f}",
        "-" if speed is None else f"{speed.tokens_per_second:.1f}",
        "-" if speed is None else f"{speed.ratio.value:.2f}x",
    ]
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _exact_row(result: Evaluation, columns: int) -> str:
    """Exact decoding writes its own text: what is shown is how much of it is the backbone's."""
    exact = result.exact
    if exact is None:
        return ""
    same = f"{1 - exact.differing / exact.tokens:.1%} <small>of {exact.tokens} tokens written</small>"
    blank = "<td></td>" * (columns - 5)
    speed = f"<td>{exact.tokens_per_second:.1f}</td><td>{exact.ratio.value:.2f}x</td>"
    return f"\n<tr><td>exact</td><td>{same}</td>{blank}<td>{result.layers}.0</td>{speed}</tr>"


def _small(interval: Interval, form: str) -> str:
    bounds = "&ndash;".join(format(value, form).rstrip("%") for value in (interval.low, interval.high))
    return f"{interval.value:{form}} <small>{bounds}</small>"


def _figure(title: str, svg: str, caption: str) -> str:
    return f"<h2>{title}</h2>\n<figure>{svg}<figcaption>{caption}</figcaption></figure>"


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtra("matplotlib", "report", "drawing a report") from error
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def _canvas(height: float, columns: int = 1, rows: int = 1, **options: Any) -> tuple[Any, Any]:
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(rows, columns, figsize=(_WIDTH, height), layout="constrained", **options)
    for axis in np.atleast_1d(axes).flat:
        axis.locator_params(nbins=6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9)
    return figure, axes


def _svg(figure: Any) -> str:
    """The figure as SVG without a prologue; text stays text."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "river"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    _pyplot().close(figure)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # Ids are per figure in matplotlib, and this page has several.
    mark = f"f{abs(hash(svg)) % 10**8}-"
    return re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{mark}", svg)


def _speeds(axis: Any, rows: Sequence[SettingResult]) -> None:
    """A marker of its own for each row, named in a legend: labels beside points that are close would overlap."""
    for row, marker in zip(rows, itertools.cycle("ovDP^X<*>p"), strict=False):
        assert row.speed is not None
        colour = _BLUE if row.max_depth is None else _ORANGE
        ratio = row.speed.ratio
        spread = [[ratio.value - ratio.low], [ratio.high - ratio.value]]
        axis.errorbar(
            [ratio.value],
            [row.top1.value],
            xerr=spread,
            fmt=marker,
            color=colour,
            capsize=3,
            alpha=0.8,
            label=row.label,
        )
    axis.plot([1.0], [1.0], "s", color=_GREY, label="backbone")
    axis.margins(0.1)
    axis.set(xlabel="decode speed, times the backbone's", ylabel="top-1 agreement")
    axis.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))


_TRADEOFF = "Top-1 agreement with the backbone, with its interval, and decode speed over the backbone's, by threshold."


def _tradeoff(result: Evaluation) -> str:
    rows = _thresholds(result)
    timed = [row for row in rows if row.speed is not None]
    figure, axes = _canvas(3.0, columns=2 if timed else 1)
    first = np.atleast_1d(axes)[0]
    taus = [row.tau for row in rows]
    values = np.array([row.top1.value for row in rows])
    bounds = np.array([[row.top1.value - row.top1.low, row.top1.high - row.top1.value] for row in rows]).T
    first.errorbar(taus, values, bounds, fmt="o-", color=_BLUE, capsize=3, label="exits at the threshold")
    for row in result.settings:
        if row.max_depth == 0:
            first.axhline(row.top1.value, color=_ORANGE, linestyle="--", label="all river")
    first.axhline(1.0, color=_GREY, linewidth=1, label="backbone")
    first.set(xlabel="threshold tau", ylabel="top-1 agreement")
    first.legend(fontsize=8, frameon=False)
    if timed:
        _speeds(axes[1], [row for row in result.settings if row.speed is not None])
    return _svg(figure)


_HISTOGRAM = (
    "Share of tokens by exit depth, the number of backbone layers that a token ran; the rest of its way is river."
)


def _histograms(result: Evaluation) -> str:
    rows = _thresholds(result)[::-1]
    figure, axes = _canvas(0.5 + 1.25 * len(rows), rows=len(rows), sharex=True, squeeze=False)
    for axis, row in zip(axes[:, 0], rows, strict=True):
        counts = np.array(row.exit_histogram, float)
        axis.bar(range(len(counts)), counts / counts.sum(), color=_BLUE)
        axis.set_title(f"{row.label}: mean exit depth {row.mean_exit_depth:.1f}", fontsize=9, loc="left")
        axis.set_ylabel("share", fontsize=9)
    axes[-1, 0].xaxis.get_major_locator().set_params(integer=True)
    axes[-1, 0].set_xlabel(f"exit depth, of {result.layers} layers")
    return _svg(figure)


def _by_layer(axis: Any, label: str = "") -> None:
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set(xlabel="decoder layer", ylabel=label)


_COSINES = "Cosine of cached keys and values with the backbone's, mean over heads and tokens; the paper has over 0.97."


def _cosines(result: Evaluation) -> str:
    figure, axes = _canvas(3.0, columns=2, sharey=True)
    for axis, title, kind in zip(
        axes, ("keys", "values"), ("key_cosine_by_layer", "value_cosine_by_layer"), strict=True
    ):
        for row in result.settings:
            axis.plot(range(1, result.layers + 1), getattr(row, kind), ".-", linewidth=1.2, label=row.label)
        axis.axhline(0.97, color=_GREY, linewidth=1, linestyle="--")
        axis.set_title(title, fontsize=10, loc="left")
        _by_layer(axis)
    axes[0].set_ylabel("cosine with the backbone's")
    axes[1].legend(fontsize=8, frameon=False)
    return _svg(figure)


def _sensitivity_note(sensitivity: Sensitivity | None) -> str:
    assert sensitivity is not None
    return (
        f"KL divergence from the backbone, in nats a token, when one linear layer alone is quantized to "
        f"{sensitivity.bits} bits by {html.escape(sensitivity.quantizer)}, on {sensitivity.tokens} tokens of tuning "
        "text; summed over the linear layers of a decoder layer, and over all decoder layers by kind. "
        f"All together cost {sensitivity.together:.3f}."
        + (f" The LM head would cost {sensitivity.head.kl:.4f}." if sensitivity.head is not None else "")
    )


def _costs(sensitivity: Sensitivity | None) -> str:
    assert sensitivity is not None
    figure, axes = _canvas(3.0, columns=2, width_ratios=(2, 1))
    layers = sensitivity.by_layer
    axes[0].bar([layer + 1 for layer in layers], list(layers.values()), color=_BLUE)
    _by_layer(axes[0], "KL alone")
    roles = sorted(sensitivity.by_role.items(), key=lambda item: item[1])
    axes[1].barh([role for role, _ in roles], [cost for _, cost in roles], color=_ORANGE)
    axes[1].locator_params(axis="x", nbins=3)
    axes[1].set_xlabel("KL, summed over layers")
    return _svg(figure)


def _similarity_note(result: Evaluation) -> str:
    return (
        "Left: the backbone's state transition similarity by layer, on which exits are decided. Right: its correlation "
        "over tokens with the cosine of V in the last layer, all river. Over the first quarter of the layers together "
        f"r = {result.early_correlation:.2f}; the paper reports 0.55."
    )


def _similarity(result: Evaluation) -> str:
    figure, axes = _canvas(2.8, columns=2)
    layers = range(1, result.layers + 1)
    axes[0].plot(layers, result.mean_similarity, ".-", color=_BLUE)
    _by_layer(axes[0], "mean similarity")
    if result.similarity_correlation:
        axes[1].bar(layers, np.nan_to_num(result.similarity_correlation), color=_BLUE)
    axes[1].axhline(0, color=_INK, linewidth=0.8)
    _by_layer(axes[1], "correlation r")
    return _svg(figure)


def _coloured(result: Evaluation) -> str:
    """One document for each threshold, the choice after each token coloured by the depth it left at."""
    example: Any = result.example
    shown = [row.label for row in _thresholds(result)[::-1]]
    if not shown:
        return ""
    parts = [
        f"<h2>A text by exit depth</h2>\n<p class='note'>{html.escape(example['id'])}. Colour: backbone layers run for "
        "the token; underlined: the river would have chosen another next token than the backbone. "
        f"<span class='scale'>0 <i style='background:linear-gradient(90deg,{_shade(0)},{_shade(1)})'></i> "
        f"{result.layers} layers</span></p>"
    ]
    for label in shown:
        setting = example["settings"][label]
        spans = [
            f"<span style='background:{_shade(depth / result.layers)}' title='exit depth {depth}'"
            f"{'' if agrees else ' class=miss'}>{html.escape(token)}</span>"
            for token, depth, agrees in zip(example["tokens"], setting["depths"], setting["agrees"], strict=True)
        ]
        parts.append(f"<p><b>{html.escape(label)}</b></p>\n<div class='text'>{''.join(spans)}</div>")
    return "\n".join(parts)


def _shade(share: float) -> str:
    """From pale yellow (all river) to blue (all backbone), always light enough for dark text."""
    start, end = np.array([255, 246, 214]), np.array([122, 178, 228])
    red, green, blue = (start + (end - start) * share).round().astype(int)
    return f"rgb({red},{green},{blue})"


def _method(result: Evaluation) -> str:
    details = "".join(
        f"<dt>{html.escape(key)}</dt><dd>{html.escape(value)}</dd>" for key, value in sorted(result.details.items())
    )
    return (
        "<h2>How this was measured</h2>\n<p class='note'>Teacher-forced: river and backbone read the same tokens, and "
        "only their predictions are compared. Thresholds are read token by token, forced depths in one pass. Intervals "
        "resample documents, since tokens of one document are not independent.</p>\n"
        f"<dl>{details}<dt>documents</dt><dd>{html.escape(', '.join(result.texts))}</dd></dl>"
    )
