"""The numbers of a report, before anything is drawn."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy.stats import betabinom
from sklearn.decomposition import PCA

from mdml_fast.alarms import Alarms
from mdml_fast.data.encoding import Floats
from mdml_fast.data.labelled import Names
from mdml_fast.detector import MDMLDetector
from mdml_fast.errors import InputError
from mdml_fast.evaluation import class_metrics
from mdml_fast.meta.history import History

N_ALARMS, N_REASONS = 20, 3
# The rates at which promise and truth are compared, and the share of calibration sets whose truth is in the band.
RATES = np.geomspace(0.001, 0.3, 40)
BAND = 0.95
# Points on the map, of each group.
MAP_ROWS = 600


class ClassResult(NamedTuple):
    """How well one anomaly class is told from the normals: the metrics are those of `evaluate`."""

    name: str
    seen: bool
    rows: int
    auroc: float
    auprc: float
    fpr95: float
    found: float


class RateCurve(NamedTuple):
    """At each promised rate the share of normals that was flagged, and the band it should be in, all [R]."""

    promised: Floats
    realised: Floats
    low: Floats
    high: Floats


class StrongAlarm(NamedTuple):
    """One row of the table of alarms."""

    row: int
    label: str | None
    score: float
    p_value: float
    kind: str
    nearest_family: str
    reasons: list[str]


class Content(NamedTuple):
    """Everything that a report shows.

    `groups` maps normals, seen, unseen and (without labels) rows to scores; `places` maps the same, and alarms, to
    points of the map [n, 2].
    """

    facts: dict[str, str]
    notes: list[str]
    history: History
    calibration: Floats
    groups: dict[str, Floats]
    classes: list[ClassResult]
    rates: RateCurve | None
    places: dict[str, Floats]
    alarms: list[StrongAlarm]


def report_content(detector: MDMLDetector, rows: pa.Table | None, labels: Names | None) -> Content:
    """Score the rows and collect what the report shows; arguments as in `write_report`."""
    calibration, history = detector.calibration_.scores, detector.model_.history
    if rows is None:
        return Content(_facts(detector, None), detector.notes_, history, calibration, {}, [], None, {}, [])
    found = detector.alarms(rows)
    groups = _groups(detector, found, labels)
    scores = {name: found.scores[members] for name, members in groups.items()}
    rates = None
    if "normal" in groups:
        rates = _rates(found.p_values[groups["normal"]], len(calibration))
    return Content(
        facts=_facts(detector, found),
        notes=detector.notes_,
        history=history,
        calibration=calibration,
        groups=scores,
        classes=_classes(detector, found, labels),
        rates=rates,
        places=_places(detector, rows, found, groups),
        alarms=_strongest(detector, rows, found, labels),
    )


def _facts(detector: MDMLDetector, found: Alarms | None) -> dict[str, str]:
    used = detector.encoder_.columns
    facts = {
        "preset": detector.preset if isinstance(detector.preset, str) else "custom",
        "normal classes": ", ".join(detector.normal_classes_),
        "seen anomaly classes": ", ".join(detector.anomaly_classes_) or "none",
        "columns": f"{len(used)} used of {len(detector.feature_names_in_)}",
        "calibration normals": str(len(detector.calibration_.scores)),
        "promise": f"{detector.promise}, at a rate of {detector.false_alarm_rate:g}",
    }
    if found is not None:
        facts["rows scored"] = str(len(found.scores))
        facts["alarms"] = str(int(found.is_alarm.sum()))
    return facts


def _groups(detector: MDMLDetector, found: Alarms, labels: Names | None) -> dict[str, npt.NDArray[np.intp]]:
    """Positions of the rows of each group that has any."""
    if labels is None:
        return {"rows": np.arange(len(found.scores))}
    names = labels.astype(str)
    normal, seen = np.isin(names, detector.normal_classes_), np.isin(names, detector.anomaly_classes_)
    groups = {"normal": normal, "seen": seen, "unseen": ~normal & ~seen}
    return {name: np.flatnonzero(members) for name, members in groups.items() if members.any()}


def _classes(detector: MDMLDetector, found: Alarms, labels: Names | None) -> list[ClassResult]:
    if labels is None:
        return []
    names, anomaly = labels.astype(str), -found.scores
    normals = anomaly[np.isin(names, detector.normal_classes_)]
    if not len(normals):
        raise InputError(f"no row is of a normal class ({', '.join(detector.normal_classes_)}); is it the right label?")
    return [
        ClassResult(
            name=str(name),
            seen=str(name) in detector.anomaly_classes_,
            rows=int((names == name).sum()),
            **class_metrics(normals, anomaly[names == name]),
            found=float(found.is_alarm[names == name].mean()),
        )
        for name in np.unique(names)
        if name not in detector.normal_classes_
    ]


def _rates(p_values: Floats, n_calibration: int) -> RateCurve:
    """Of m new normals a number of about a beta-binomial law is flagged, over calibration sets of n and over the m."""
    m, rates = len(p_values), RATES[RATES * (n_calibration + 1) >= 1]
    ranks = rates * (n_calibration + 1)  # p-values lie between whole ones, too
    flagged = betabinom(m, ranks, n_calibration + 1 - ranks)
    low, high = (flagged.ppf(q) / m for q in ((1 - BAND) / 2, (1 + BAND) / 2))
    return RateCurve(rates, (p_values[None] <= rates[:, None]).mean(axis=1), low, high)


def _places(
    detector: MDMLDetector, rows: pa.Table, found: Alarms, groups: dict[str, npt.NDArray[np.intp]]
) -> dict[str, Floats]:
    """Principal components of the encoded rows, values bounded, of a sample of each group and of the alarms."""
    rng = np.random.default_rng(0)
    chosen = groups | {"alarm": np.flatnonzero(found.is_alarm)}
    sampled = {name: np.sort(rng.permutation(members)[:MAP_ROWS]) for name, members in chosen.items() if len(members)}
    known = np.clip(detector.known_normals_.rows, -10, 10)
    encoded = {
        name: np.clip(detector.encoder_.transform(rows.take(pa.array(members))), -10, 10)
        for name, members in sampled.items()
    }
    every = np.concatenate([known[:MAP_ROWS], *encoded.values()])
    plane = PCA(min(2, *every.shape), random_state=0).fit(every)
    points = {name: plane.transform(part) for name, part in encoded.items()}
    return {name: np.pad(part, ((0, 0), (0, 2 - part.shape[1]))) for name, part in points.items()}


def _strongest(detector: MDMLDetector, rows: pa.Table, found: Alarms, labels: Names | None) -> list[StrongAlarm]:
    alarms = np.flatnonzero(found.is_alarm)
    order = alarms[np.argsort(found.scores[alarms], kind="stable")][:N_ALARMS]
    if not len(order):
        return []
    why = detector.explain(rows.take(pa.array(order)))
    reasons = list(zip(*why.reasons(N_REASONS), strict=True))
    return [
        StrongAlarm(
            row=int(row) + 1,
            label=None if labels is None else str(labels[row]),
            score=float(found.scores[row]),
            p_value=float(found.p_values[row]),
            kind=str(why.kind[place]),
            nearest_family=str(why.nearest_family[place]),
            reasons=[text for text in reasons[place] if text],
        )
        for place, row in enumerate(order)
    ]
