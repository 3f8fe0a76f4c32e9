"""How well anomaly classes are found that were never labelled: protocol, metrics, and the document of results."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score

from mdml_fast.baselines import Method
from mdml_fast.calibration import Positions, split_by_group
from mdml_fast.comparison import paired_difference
from mdml_fast.data.encoding import Floats, row_ids
from mdml_fast.data.labelled import MIN_NORMALS, LabelledTable
from mdml_fast.errors import InputError
from mdml_fast.resources import PeakMemory

METRICS = ("auroc", "auprc", "fpr95")
LOWER_IS_BETTER = ("fpr95",)


@dataclass(frozen=True)
class EvaluationProtocol:
    """How rows and classes are split.

    Attributes:
        shots: labelled rows of each seen class; None takes the training share of its rows.
        splits: how often the anomaly classes are split into seen and unseen; consecutive pairs are complementary.
        seeds: how often rows and models are drawn anew for each of these.
        train_share: of the normals; the others are tested on.
        min_class_rows: smaller anomaly classes are always unseen, and are left out of means where larger ones exist.
        max_rows: bounds the rows used, the classes keeping their shares; None uses all.
    """

    shots: int | None = 10
    splits: int = 5
    seeds: int = 3
    train_share: float = 0.6
    min_class_rows: int = 20
    max_rows: int | None = None

    def __post_init__(self) -> None:
        for name in ("shots", "splits", "seeds", "max_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name.replace('_', '-')} must be 1 or more, got {value}")


class Split(NamedTuple):
    """One way to divide a table: classes, and positions of rows."""

    seed: int
    seen: list[str]
    unseen: list[str]
    train: Positions
    test: Positions
    dropped_duplicates: int


def evaluate(
    data: LabelledTable,
    methods: Mapping[str, Method],
    protocol: EvaluationProtocol | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Fit each method on normals and a few rows of the seen classes, and test it on the other normals and classes.

    Every split is the same for all methods. A test row that equals a training row in all features is dropped. Each
    metric is taken for every class against all test normals, then averaged over the classes with at least
    `min_class_rows` test rows (all of them, where none is that large), then over the splits.

    Args:
        data: the table.
        methods: by the name that the results go under; the first is ours, which the others are compared with.
        protocol: the sizes.
        progress: told (fits done, fits in all, what was fitted).

    Returns:
        A JSON document: `data`, `protocol`, and for each method in `results` the metrics on unseen and on seen
        classes (`mean` and `std` over the splits; null where there is no such class), on each class, for each split,
        time and memory. `differences` has for each other method how much better ours is (`paired_difference`).

    Raises:
        InputError: there are no anomaly classes, or the rows can't be split as asked.
    """
    protocol = protocol or EvaluationProtocol()
    n_rows = len(data)
    data = _bounded(data, protocol.max_rows)
    if not data.anomaly_classes():
        raise InputError("there are no anomaly classes to evaluate on: every row is of a normal class")
    ids = row_ids(data.features)
    splits = [
        _split(data, ids, protocol, split, seed) for split in range(protocol.splits) for seed in range(protocol.seeds)
    ]
    runs: dict[str, list[_Run]] = {name: [] for name in methods}
    for done, split in enumerate(splits):
        for place, (name, method) in enumerate(methods.items()):
            runs[name].append(_run(data, method, split, protocol))
            if progress:
                progress(done * len(methods) + place + 1, len(splits) * len(methods), name)
    (_, ours), *others = runs.items()
    return {
        "data": {
            "rows": n_rows,
            "rows_used": len(data),
            "features": data.features.num_columns,
            "normals": int(data.is_normal.sum()),
            "dropped_duplicates": sum(split.dropped_duplicates for split in splits),
            "families": data.anomaly_classes(),
        },
        "protocol": asdict(protocol),
        "results": {name: _summary(data, splits, done) for name, done in runs.items()},
        "differences": _differences(ours, dict(others)),
    }


def _differences(ours: Sequence[_Run], others: Mapping[str, Sequence[_Run]]) -> dict[str, Any]:
    """How much better ours is than each of the others, on unseen and on seen classes, by metric."""
    return {
        name: {
            side: {
                metric: paired_difference(
                    [getattr(run, side).get(metric) for run in ours],
                    [getattr(run, side).get(metric) for run in theirs],
                    higher_is_better=metric not in LOWER_IS_BETTER,
                )
                for metric in METRICS
            }
            for side in ("unseen", "seen")
        }
        for name, theirs in others.items()
    }


class _Run(NamedTuple):
    """What one fit gave."""

    unseen: dict[str, float]
    seen: dict[str, float]
    auroc: dict[str, float]
    fit_seconds: float
    score_seconds: float
    peak_memory: int | None


def _split(data: LabelledTable, ids: Positions, protocol: EvaluationProtocol, split: int, seed: int) -> Split:
    classes = data.anomaly_classes()
    eligible = [name for name, rows in classes.items() if rows >= protocol.min_class_rows]
    order = np.random.default_rng(split // 2).permutation(eligible).tolist()
    half = len(order) // 2
    seen = sorted(order[:half] if split % 2 == 0 else order[len(order) - half :])

    rng = np.random.default_rng([split, seed])
    normals = np.flatnonzero(data.is_normal)
    if data.groups is None:
        order_of_rows = rng.permutation(len(normals))
        n_train = round(protocol.train_share * len(normals))
        train, held_out = order_of_rows[:n_train], order_of_rows[n_train:]
    else:
        group_seed = int(rng.integers(2**31))
        train, held_out = split_by_group(data.groups[normals], 1 - protocol.train_share, group_seed)
    if len(train) < MIN_NORMALS:
        raise InputError(f"only {len(train)} normal rows are left to train on; at least {MIN_NORMALS} are needed")

    train_rows, test_rows = [normals[train]], [normals[held_out]]
    for name, n_rows in classes.items():
        rows = rng.permutation(np.flatnonzero(data.labels == name))
        n_shots = 0
        if name in seen:
            n_shots = round(protocol.train_share * n_rows) if protocol.shots is None else min(protocol.shots, n_rows)
        train_rows.append(rows[:n_shots])
        test_rows.append(rows[n_shots:])
    train, test = np.concatenate(train_rows), np.concatenate(test_rows)
    is_new = ~np.isin(ids[test], ids[train])
    if not data.is_normal[test[is_new]].any():
        raise InputError("no normal row is left to test on: all of them equal a training row")
    unseen = [name for name in classes if name not in seen]
    return Split(seed, seen, unseen, np.sort(train), np.sort(test[is_new]), int((~is_new).sum()))


def _run(data: LabelledTable, method: Method, split: Split, protocol: EvaluationProtocol) -> _Run:
    memory, start = PeakMemory(), time.perf_counter()
    score = method(data.take(split.train), split.seed)
    fitted = time.perf_counter()
    test = data.take(split.test)
    scores = score(test.features)
    scored, peak_memory = time.perf_counter(), memory.bytes()
    if not np.isfinite(scores).all():
        raise InputError("a method gave scores that are not finite; the training rows may be degenerate")

    anomaly = -scores
    normals = anomaly[test.is_normal]
    rows = test.anomaly_classes()
    by_class = {name: class_metrics(normals, anomaly[test.labels == name]) for name in rows}
    return _Run(
        unseen=_class_mean({name: by_class[name] for name in split.unseen if name in by_class}, rows, protocol),
        seen=_class_mean({name: by_class[name] for name in split.seen if name in by_class}, rows, protocol),
        auroc={name: metrics["auroc"] for name, metrics in by_class.items()},
        fit_seconds=fitted - start,
        score_seconds=scored - fitted,
        peak_memory=peak_memory,
    )


def class_metrics(normals: Floats, anomalies: Floats) -> dict[str, float]:
    """AUROC, AUPRC (anomalies are the positives) and FPR at 95 % TPR, of anomaly scores (higher is more anomalous)."""
    scores = np.concatenate([normals, anomalies])
    is_anomaly = np.arange(len(scores)) >= len(normals)
    threshold = np.quantile(anomalies, 0.05, method="lower")
    return {
        "auroc": float(roc_auc_score(is_anomaly, scores)),
        "auprc": float(average_precision_score(is_anomaly, scores)),
        "fpr95": float((normals >= threshold).mean()),
    }


def _class_mean(
    by_class: dict[str, dict[str, float]], rows: dict[str, int], protocol: EvaluationProtocol
) -> dict[str, float]:
    large = {name: metrics for name, metrics in by_class.items() if rows[name] >= protocol.min_class_rows}
    counted = list((large or by_class).values())
    return {metric: float(np.mean([metrics[metric] for metrics in counted])) for metric in METRICS} if counted else {}


def _summary(data: LabelledTable, splits: Sequence[Split], runs: Sequence[_Run]) -> dict[str, Any]:
    per_class = {}
    for name, rows in data.anomaly_classes().items():
        pairs = [
            (run.auroc[name], name in split.seen) for run, split in zip(runs, splits, strict=True) if name in run.auroc
        ]
        per_class[name] = {
            "auroc": _mean([auroc for auroc, seen in pairs if not seen]),
            "auroc_seen": _mean([auroc for auroc, seen in pairs if seen]),
            "rows": rows,
        }
    test_rows = sum(len(split.test) for split in splits)
    return {
        "unseen": {metric: _spread([run.unseen.get(metric) for run in runs]) for metric in METRICS},
        "seen": {metric: _spread([run.seen.get(metric) for run in runs]) for metric in METRICS},
        "per_class": per_class,
        "splits": [
            {
                "seed": split.seed,
                "seen": split.seen,
                "auroc_unseen": run.unseen.get("auroc"),
                "auroc_seen": run.seen.get("auroc"),
                "dropped_duplicates": split.dropped_duplicates,
            }
            for split, run in zip(splits, runs, strict=True)
        ],
        "fit_seconds": float(np.mean([run.fit_seconds for run in runs])),
        "score_rows_per_second": test_rows / sum(run.score_seconds for run in runs),
        # Of fitting and scoring; the first runs count most, before the allocator has memory to use again.
        "peak_memory_bytes": max((run.peak_memory for run in runs if run.peak_memory is not None), default=None),
    }


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _spread(values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean and standard deviation over the splits that have a value."""
    found = [value for value in values if value is not None]
    return {"mean": _mean(found), "std": float(np.std(found)) if found else None}


def _bounded(data: LabelledTable, max_rows: int | None) -> LabelledTable:
    """At most about `max_rows` rows, each class in its share (at least one row)."""
    if max_rows is None or len(data) <= max_rows:
        return data
    rng = np.random.default_rng(0)
    kept = []
    for name in np.unique(data.labels.astype(str)):
        rows = np.flatnonzero(data.labels == name)
        kept.append(rng.permutation(rows)[: max(1, round(max_rows * len(rows) / len(data)))])
    return data.take(np.sort(np.concatenate(kept)))
