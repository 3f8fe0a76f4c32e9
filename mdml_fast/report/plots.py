"""The figures of a report, as SVG that takes the page's text colour."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from sklearn.metrics import precision_recall_curve, roc_curve

from mdml_fast.data.encoding import Floats
from mdml_fast.meta.history import History
from mdml_fast.report.content import Content

# What text and axes are drawn in, replaced by the page's own colour: light on dark, dark on light.
INK = "#010203"
# Told apart by lightness too, and readable on black and on white.
COLOURS = {"normal": "#3f8fd2", "rows": "#3f8fd2", "seen": "#e08a1e", "unseen": "#c9407f", "alarm": "#d03030"}
MARKERS = {"normal": "o", "rows": "o", "seen": "^", "unseen": "s", "alarm": "x"}
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mdml-fast",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    **{f"{part}.color": INK for part in ("text", "xtick", "ytick")},
    **{f"axes.{part}color": INK for part in ("edge", "label", "title")},
}
# Points of a curve: more can't be seen.
CURVE_POINTS = 400
# The last so many directions are named, each in so many letters.
NAMED_DIRECTIONS, DIRECTION_LETTERS = 16, 44
LINES = ("-", "--", ":", "-.")


def figures(content: Content) -> dict[str, str]:
    """The SVG of each figure that the content has the numbers for, by name."""
    drawn: dict[str, str] = {}
    if content.history.losses:
        n_named = min(len(content.history.directions), NAMED_DIRECTIONS) + 1
        drawn["training"] = _svg(lambda axes: _training(axes, content.history), height=3.6 + 0.1 * n_named)
    drawn["scores"] = _svg(lambda axes: _histograms(axes, {"calibration": content.calibration} | content.groups))
    if content.classes:
        drawn["roc"] = _svg(lambda axes: _curves(axes, content.groups, roc=True))
        drawn["precision_recall"] = _svg(lambda axes: _curves(axes, content.groups, roc=False))
    if content.rates is not None:
        drawn["rates"] = _svg(lambda axes: _rates(axes, content))
    if content.places:
        drawn["map"] = _svg(lambda axes: _map(axes, content.places))
    return drawn


def _svg(draw: Callable[[Axes], None], height: float = 3.6) -> str:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6, height), layout="constrained")
        draw(figure.add_subplot())
        written = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(written, format="svg", transparent=True, metadata=nothing)
    text = written.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")


def _training(axes: Axes, history: History) -> None:
    steps, unnamed = np.arange(1, len(history.losses) + 1), max(0, len(history.directions) - NAMED_DIRECTIONS)
    by_direction = np.array(history.by_direction, dtype=np.float64)
    for number, (name, losses) in enumerate(zip(history.directions, by_direction.T, strict=True)):
        short = name if len(name) <= DIRECTION_LETTERS else f"{name[: DIRECTION_LETTERS - 1]}…"
        line = LINES[number // 10 % len(LINES)]
        axes.plot(
            steps,
            losses,
            color=f"C{number % 10}",
            linestyle=line,
            linewidth=0.8,
            label=short if number >= unnamed else None,
        )
    axes.plot(steps, history.losses, color=INK, linewidth=2, label="mean of the episodes")
    axes.set(xlabel="outer step", ylabel="outer loss")
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    figure.legend(loc="outside lower center", ncols=2, fontsize=7)


def _histograms(axes: Axes, groups: dict[str, Floats]) -> None:
    every = np.concatenate(list(groups.values()))
    low, high = np.quantile(every, [0.002, 1.0])
    edges = np.linspace(low, max(high, low + 1e-9), 60)
    for name, scores in groups.items():
        shown = np.clip(scores, edges[0], edges[-1])
        weights = np.full(len(shown), 1 / len(shown))
        colour = COLOURS.get(name, "#888888")
        axes.hist(shown, edges.tolist(), weights=weights, histtype="step", color=colour, linewidth=1.6, label=name)
    axes.set(xlabel="score (higher is more normal)", ylabel="share of rows")
    axes.legend()


def _curves(axes: Axes, groups: dict[str, Floats], *, roc: bool) -> None:
    normals = groups["normal"]
    for name in ("seen", "unseen"):
        if name not in groups:
            continue
        scores = -np.concatenate([normals, groups[name]])
        is_anomaly = np.arange(len(scores)) >= len(normals)
        if roc:
            x, y, _ = roc_curve(is_anomaly, scores)
        else:
            y, x, _ = precision_recall_curve(is_anomaly, scores)
        kept = np.unique(np.linspace(0, len(x) - 1, CURVE_POINTS).round().astype(int))
        axes.plot(x[kept], y[kept], color=COLOURS[name], label=name, linestyle="-" if name == "seen" else "--")
    labels = ("false alarms", "anomalies found") if roc else ("anomalies found", "share of alarms that are true")
    axes.set(xlabel=labels[0], ylabel=labels[1], xlim=(-0.01, 1.01), ylim=(-0.01, 1.03))
    axes.legend()


def _rates(axes: Axes, content: Content) -> None:
    assert content.rates is not None
    promised, realised, low, high = content.rates
    axes.fill_between(
        promised, np.maximum(low, 1e-4), np.maximum(high, 1e-4), color="#888888", alpha=0.3, label="95 % band"
    )
    axes.plot(promised, promised, color=INK, linewidth=0.8, linestyle=":", label="promised")
    axes.plot(promised, np.maximum(realised, 1e-4), color=COLOURS["normal"], label="realised")
    axes.set(xscale="log", yscale="log", xlabel="promised false-alarm rate", ylabel="share of normals flagged")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    axes.legend()


def _map(axes: Axes, places: dict[str, Floats]) -> None:
    for name, points in places.items():
        size = 36 if name == "alarm" else 9
        axes.scatter(
            points[:, 0],
            points[:, 1],
            s=size,
            c=COLOURS[name],
            marker=MARKERS[name],
            alpha=0.6,
            linewidths=0.8,
            label=name,
        )
    axes.set(xlabel="first principal component", ylabel="second")
    axes.legend()
