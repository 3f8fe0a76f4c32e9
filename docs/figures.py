"""The figures of the documentation, from real runs: `python docs/figures.py [NAME …]` draws docs/figures/*.svg anew.

Each fits a detector or two, which takes seconds. The drawings are vectors on no ground. Text and axes take the reader's
colour: dark on a light browser, light on a dark one.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.stats import beta

from mdml_fast import MDMLDetector
from mdml_fast.calibration import ConformalCalibration
from mdml_fast.data import digits_table, label_table
from mdml_fast.data.digits import DIGITS_LABEL, DIGITS_NORMAL
from mdml_fast.evaluation import class_metrics

FOLDER = Path(__file__).parent / "figures"

# Stands for the reader's colour, until the drawing is written.
INK = "#123456"
NORMAL, SEEN, UNSEEN, OTHER = "#3f86d8", "#d9952b", "#d24a43", "#8d8f96"
STYLE = "<style>svg{color:#1f2328;background:none}@media (prefers-color-scheme: dark){svg{color:#e3e6ea}}</style>"

mpl.rcParams |= {
    "svg.fonttype": "none",
    "svg.hashsalt": "mdml-fast",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "legend.frameon": False,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "axes.titlecolor"), INK
    ),
}


def field() -> Figure:
    """What the two presets take for normal in the plane, after the same rows."""
    rng = np.random.default_rng(3)
    angle = rng.uniform(0, np.pi, 600)
    normals = np.column_stack([np.cos(angle), np.sin(angle)]) * 2 + 0.18 * rng.normal(size=(600, 2))
    seen = {"seen A": (0.0, 0.2), "seen B": (2.6, 2.4)}
    rows = {name: np.array(centre) + 0.15 * rng.normal(size=(12, 2)) for name, centre in seen.items()}
    X = np.concatenate([normals, *rows.values()])
    y = np.repeat(["ok", *rows], [len(normals), *map(len, rows.values())])
    unseen = np.concatenate(
        [np.array(centre) + 0.15 * rng.normal(size=(20, 2)) for centre in ((-3.3, 3.0), (0.2, 4.2), (-2.6, -1.6))]
    )

    ticks_x, ticks_y = np.linspace(-4.5, 4.5, 140), np.linspace(-2.8, 5.2, 120)
    plane = np.stack(np.meshgrid(ticks_x, ticks_y), axis=-1).reshape(-1, 2)
    figure = Figure((7.2, 3.6))
    for axes, preset in zip(figure.subplots(1, 2, sharey=True), ("default", "paper"), strict=True):
        detector = MDMLDetector(preset, normal=["ok"], false_alarm_rate=0.05, random_state=0).fit(X, y)
        passes = (detector.p_value(plane) > 0.05).reshape(len(ticks_y), len(ticks_x)).astype(float)
        axes.contourf(ticks_x, ticks_y, passes, levels=[0.5, 1.5], colors=[NORMAL], alpha=0.28)
        axes.plot(*normals[::2].T, ".", ms=2, color=NORMAL)
        axes.plot(*X[len(normals) :].T, "o", ms=4, mfc="none", mec=SEEN, mew=1.2)
        axes.plot(*unseen.T, "x", ms=4, color=UNSEEN)
        found = np.mean(detector.predict(unseen) == -1)
        axes.set_title(f'preset="{preset}": {found:.0%} of the unseen found')
        axes.set_axis_off()
        axes.set_aspect("equal")
    figure.legend(
        handles=[
            Line2D([], [], marker="o", ls="", ms=4, color=NORMAL, label="normals"),
            Line2D([], [], marker="s", ls="", ms=8, color=NORMAL, alpha=0.28, label="passes at 5 %"),
            Line2D([], [], marker="o", ls="", ms=4, mfc="none", mec=SEEN, label="seen anomalies"),
            Line2D([], [], marker="x", ls="", ms=4, color=UNSEEN, label="unseen anomalies"),
        ],
        loc="lower center",
        ncols=4,
    )
    figure.subplots_adjust(left=0.02, right=0.98, bottom=0.12, top=0.92, wspace=0.04)
    return figure


def separation() -> Figure:
    """Scores of held-out digits: normals, a class that was labelled, and one that was not."""
    table = label_table(digits_table(), DIGITS_LABEL, DIGITS_NORMAL)
    rng = np.random.default_rng(0)
    normals = rng.permutation(np.flatnonzero(table.is_normal))
    sides = {"seen": ["5", "6"], "unseen": ["7", "8", "9"]}
    rows = {side: rng.permutation(np.flatnonzero(np.isin(table.labels, names))) for side, names in sides.items()}
    shots = np.concatenate([[row for row in rows["seen"] if table.labels[row] == name][:10] for name in sides["seen"]])
    train = table.take(np.sort(np.concatenate([normals[:540], shots])))
    detector = MDMLDetector(normal=train.normal, random_state=0).fit(train.features, train.labels)
    held_out = {
        "normals": normals[540:],
        "seen": np.setdiff1d(rows["seen"], shots),
        "unseen": rows["unseen"],
    }
    anomaly = {name: -detector.score_samples(table.features.take(positions)) for name, positions in held_out.items()}
    names = {
        "normals": "normals (0-4)",
        "seen": "seen (5 and 6)",
        "unseen": "unseen (7-9)",
    }
    figure = Figure((7.2, 2.9))
    axes = figure.subplots()
    bins = np.linspace(0, np.quantile(np.concatenate(list(anomaly.values())), 0.995), 60)
    for (name, scores), colour in zip(anomaly.items(), (NORMAL, SEEN, UNSEEN), strict=True):
        auroc = "" if name == "normals" else f", AUROC {class_metrics(anomaly['normals'], scores)['auroc']:.3f}"
        axes.hist(
            scores, bins, density=True, histtype="stepfilled", color=colour, alpha=0.45, label=names[name] + auroc
        )
    level = -detector.calibration_.score_threshold(0.01)
    axes.axvline(level, color=INK, lw=1, ls="--", label="alarms at 1 % from here")
    axes.set_xlabel("anomaly score (minus score_samples)")
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.legend(loc="upper right")
    return figure


def rates() -> Figure:
    """Promised and realised false-alarm rates over random calibration sets of held-out digits."""
    table = label_table(digits_table(), DIGITS_LABEL, DIGITS_NORMAL)
    rng = np.random.default_rng(1)
    normals = rng.permutation(np.flatnonzero(table.is_normal))
    anomalies = np.flatnonzero(~table.is_normal)[:50]
    train = table.take(np.sort(np.concatenate([normals[:300], anomalies])))
    detector = MDMLDetector(normal=train.normal, random_state=0).fit(train.features, train.labels)
    scores = detector.score_samples(table.features.take(normals[300:]))
    n, promised = 200, np.linspace(0.01, 0.2, 20)
    realised = []
    for _ in range(400):
        order = rng.permutation(len(scores))
        p_values = ConformalCalibration(scores[order[:n]]).p_value(scores[order[n:]])
        realised.append([(p_values <= rate).mean() for rate in promised])
    ranks = promised * (n + 1)
    figure = Figure((4.6, 3.6))
    axes = figure.subplots()
    axes.plot([0, 0.2], [0, 0.2], color=OTHER, lw=1, ls="--", label="as promised")
    low, high = (beta.ppf(q, ranks, n + 1 - ranks) for q in (0.05, 0.95))
    axes.fill_between(promised, low, high, color=NORMAL, alpha=0.22, lw=0, label="90 % of calibration sets, in theory")
    axes.plot(promised, np.mean(realised, axis=0), "o", ms=4, color=NORMAL, label="mean of 400 calibration sets")
    axes.set_xlabel("promised rate")
    axes.set_ylabel("normals flagged")
    axes.legend(loc="upper left")
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {function.__name__: function for function in (field, separation, rates)}


def svg(figure: Figure) -> str:
    """The drawing as text, in the reader's colours."""
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None, "Creator": None})
    text = drawn.getvalue().replace(INK, "currentColor")
    start = text.index("<svg")
    end = text.index(">", start) + 1
    return f"{text[start:end]}\n{STYLE}{text[end:]}"


def main(names: list[str]) -> None:
    """Draw these, or all."""
    FOLDER.mkdir(exist_ok=True)
    for name in names or FIGURES:
        (FOLDER / f"{name}.svg").write_text(svg(FIGURES[name]()))
        print(f"docs/figures/{name}.svg")


if __name__ == "__main__":
    main(sys.argv[1:])
