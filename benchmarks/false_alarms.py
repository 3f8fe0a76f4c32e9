"""Do alarms hold the rate they promise? python benchmarks/false_alarms.py [--splits 200] [--table NAME ...]

Over random splits of each open table's normals (groups whole): the share of held-out normals that is flagged at a
promised rate, beside the exact 99 % binomial band of that promise over all held-out rows; and how often a certificate
(95 % confidence) is broken. Held-out rows of one split share a calibration set, and rows of a group share even more, so
the band is narrower than honest chance allows: a mean inside it is a strong result, one just outside no alarm. What
chance does to these very splits, the control shows: p-values that are exact, of the plain distance to the 5 nearest of
the normals that were trained on, by the same calibration normals (not by groups, of which no rule is exact).
"""

from __future__ import annotations

import by_table
import numpy as np
from scipy.stats import binom, sem

from mdml_fast import MDMLDetector
from mdml_fast.baselines import knn
from mdml_fast.calibration import ConformalCalibration, Promise, split_by_group
from mdml_fast.data import LabelledTable
from mdml_fast.data.encoding import Floats, Rows

RATES = (0.01, 0.05)
TRAIN_SHARE, SHOTS, MOST_NORMALS = 0.6, 10, 4_000


def split(table: LabelledTable, seed: int) -> tuple[LabelledTable, LabelledTable]:
    """Training rows (a share of the normals, some rows of every anomaly class), and the other normals."""
    rng = np.random.default_rng(seed)
    normals = rng.permutation(np.flatnonzero(table.is_normal))[:MOST_NORMALS]
    if table.groups is None:
        cut = round(TRAIN_SHARE * len(normals))
        train, test = normals[:cut], normals[cut:]
    else:
        kept, held_out = split_by_group(table.groups[normals], 1 - TRAIN_SHARE, seed)
        train, test = normals[kept], normals[held_out]
    shots = [rng.permutation(np.flatnonzero(table.labels == name))[:SHOTS] for name in table.anomaly_classes()]
    return table.take(np.sort(np.concatenate([train, *shots]))), table.take(np.sort(test))


def realised(table: LabelledTable, seed: int) -> dict[str, float]:
    """The shares of held-out normals flagged under each promise and by the control, and how many rows that is of."""
    train, test = split(table, seed)
    detector = MDMLDetector(normal=train.normal, random_state=seed)
    detector.fit(train.features, train.labels, groups=train.groups)
    p_values = detector.p_value(test.features)
    found: dict[str, float] = {"rows": len(p_values)} | {
        f"{promise} {rate}": float((p_values <= detector.calibration_.alarm_level(p_values, rate, promise)).mean())
        for rate in RATES
        for promise in (Promise.MARGINAL, Promise.CERTIFICATE)
    }
    if train.groups is None:
        exact = exact_p_values(detector, detector.encoder_.transform(test.features))
        found |= {f"control {rate}": float((exact <= rate).mean()) for rate in RATES}
    return found


def exact_p_values(detector: MDMLDetector, rows: Rows) -> Floats:
    """The control's p-values of encoded rows [N, d]: nothing was chosen by the normals that it calibrates on."""
    given = detector.kept_.training()
    score = knn(given.normals[~given.held_out])
    return ConformalCalibration(score(given.normals[given.held_out])).p_value(score(rows))


def summary(runs: list[dict[str, float]]) -> dict[str, dict[str, float | bool]]:
    """By rate: the realised mean, its binomial band, the share of splits with a broken certificate, and the control.

    The control's realised mean comes with two standard errors over splits: its own, and that of ours less it.
    """
    weights = np.array([run["rows"] for run in runs], dtype=float)
    rows = int(weights.sum())
    found: dict[str, dict[str, float | bool]] = {}
    for rate in RATES:
        flagged = np.array([run[f"marginal {rate}"] for run in runs])
        mean = float(np.average(flagged, weights=weights))
        low, high = (float(binom.ppf(q, rows, rate)) / rows for q in (0.005, 0.995))
        # A held-out share exceeds the rate by chance alone, too: broken is what chance explains in 1 of 20 at most.
        limits = [float(binom.ppf(0.95, run["rows"], rate)) / run["rows"] for run in runs]
        broken = [run[f"certificate {rate}"] > limit for run, limit in zip(runs, limits, strict=True)]
        found[str(rate)] = {
            "realised": mean,
            "band_low": low,
            "band_high": high,
            "inside": low <= mean <= high,
            "certificates_broken": float(np.mean(broken)),
            "certified_above_rate": float(np.mean([run[f"certificate {rate}"] > rate for run in runs])),
        }
        if f"control {rate}" in runs[0] and len(runs) > 1:
            control = np.array([run[f"control {rate}"] for run in runs])
            found[str(rate)] |= {
                "control": float(np.average(control, weights=weights)),
                "control_error": float(sem(control)),
                "difference_error": float(sem(flagged - control)),
            }
    return found


def measure(name: str, table: LabelledTable, splits: int) -> dict[str, dict[str, float | bool]]:
    """Print a line for each rate."""
    by_rate = summary([realised(table, seed) for seed in range(splits)])
    for rate, found in by_rate.items():
        band = f"[{found['band_low']:.4f}, {found['band_high']:.4f}]"
        control = f"  control {found['control']:.4f} ± {found['control_error']:.4f}" if "control" in found else ""
        print(
            f"{name:18} promised {rate:>5}  realised {found['realised']:.4f}  99 % band {band}{control}  "
            f"certificates broken {found['certificates_broken']:.3f}",
            flush=True,
        )
    return by_rate


if __name__ == "__main__":
    by_table.run(__doc__, 200, measure)
