"""What does `adapt` give, and what does it cost? python benchmarks/adaptation.py [--splits 2] [--table NAME ...]

On each open table with several normal classes, one of them is left out of `fit` in turn and adapted to on 50 of its
rows. Half of the anomaly classes are seen, ten rows of each. Measured on held-out rows, before and after: the false
alarms on the class that was left out, and the AUROC of the other normals against the unseen classes. Beside it that
AUROC of a model which was trained with all of the class's training rows: anomalies that look like the class are harder
to tell from normals as soon as it is one of them, however it is learned.
"""

from __future__ import annotations

from typing import Any

import by_table
import numpy as np

from mdml_fast import MDMLDetector
from mdml_fast.data import LabelledTable
from mdml_fast.evaluation import class_metrics

RATES = (0.01, 0.05)
TRAIN_SHARE, SHOTS, ADAPTED_ROWS = 0.6, 10, 50


def left_out(table: LabelledTable, new: str, seed: int) -> dict[str, float]:
    """One normal class left out, on one split of the rows and of the anomaly classes."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(list(table.anomaly_classes())).tolist()
    seen, unseen = order[: len(order) // 2], order[len(order) // 2 :]
    normals = rng.permutation(np.flatnonzero(table.is_normal))
    train, test = np.split(normals, [round(TRAIN_SHARE * len(normals))])
    shots = [rng.permutation(np.flatnonzero(table.labels == name))[:SHOTS] for name in seen]
    own, own_test = (rows[table.labels[rows] == new] for rows in (train, test))
    others, others_test = (rows[table.labels[rows] != new] for rows in (train, test))
    unseen_rows = [table.take(np.flatnonzero(table.labels == name)) for name in unseen]

    def fit(rows: np.ndarray) -> MDMLDetector:
        known = table.take(np.sort(np.concatenate([rows, *shots])))
        return MDMLDetector(normal=[name for name in known.normal if name in known.labels], random_state=seed).fit(
            known.features, known.labels
        )

    def auroc(detector: MDMLDetector) -> float:
        normal = -detector.score_samples(table.take(others_test).features)
        found = [class_metrics(normal, -detector.score_samples(rows.features))["auroc"] for rows in unseen_rows]
        return float(np.mean(found))

    def alarms(detector: MDMLDetector, when: str) -> dict[str, float]:
        p_values = detector.p_value(table.take(own_test).features)
        return {f"alarms {when} {rate}": float((p_values <= rate).mean()) for rate in RATES}

    detector = fit(others)
    found = {"auroc before": auroc(detector)} | alarms(detector, "before")
    detector.adapt(table.take(own[:ADAPTED_ROWS]).features)
    found |= {"auroc after": auroc(detector)} | alarms(detector, "after")
    return found | {"auroc trained": auroc(fit(train))}


def measure(name: str, table: LabelledTable, splits: int) -> dict[str, Any] | None:
    """Print a line for each class, and the means; None where there is one class only."""
    if len(table.normal) < 2:
        return None
    by_class = {
        new: _means([left_out(table, new, seed) for seed in range(splits)]) for new in map(str, sorted(table.normal))
    }
    mean = _means(list(by_class.values()))
    for new, means in [*by_class.items(), ("mean", mean)]:
        costs = [means[f"auroc {how}"] - means["auroc before"] for how in ("after", "trained")]
        alarms = [
            f"at {rate}: {means[f'alarms before {rate}']:.3f} to {means[f'alarms after {rate}']:.3f}" for rate in RATES
        ]
        print(
            f"{name:8} {new:>5}  unseen AUROC {means['auroc before']:.4f}, adapted {costs[0]:+.4f}, trained "
            f"{costs[1]:+.4f}  alarms {', '.join(alarms)}",
            flush=True,
        )
    return {"classes": by_class, "mean": mean}


def _means(found: list[dict[str, float]]) -> dict[str, float]:
    return {key: float(np.mean([run[key] for run in found])) for key in found[0]}


if __name__ == "__main__":
    by_table.run(__doc__, 2, measure)
