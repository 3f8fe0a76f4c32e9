"""What people would use instead, on the same encoded rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from sklearn.ensemble import ExtraTreesClassifier, HistGradientBoostingClassifier, IsolationForest
from sklearn.neighbors import LocalOutlierFactor, NearestNeighbors
from sklearn.preprocessing import StandardScaler

from mdml_fast.data import FeatureEncoder, LabelledTable
from mdml_fast.data.encoding import Floats, Rows
from mdml_fast.detector import MDMLDetector
from mdml_fast.errors import InputError
from mdml_fast.peers import PEERS
from mdml_fast.presets import Config


class Scorer(Protocol):
    """A fitted method."""

    def __call__(self, features: pa.Table, /) -> Floats:
        """A score of each row [N], higher for more normal rows."""


Method = Callable[[LabelledTable, int], Scorer]
"""Fit on a training table with a seed."""

RowScorer = Callable[[Rows], Floats]
"""A score of each encoded row [N, d] -> [N], higher for more normal rows."""


def mdml(preset: str | Config, device: str, dtype: str) -> Method:
    """Our detector with these settings, as a method."""

    def fit(train: LabelledTable, seed: int) -> Scorer:
        detector = MDMLDetector(preset, normal=train.normal, random_state=seed, device=device, dtype=dtype)
        return detector.fit(train.features, train.labels, groups=train.groups).score_samples

    return fit


def _on_normals(fit_rows: Callable[[Rows, int], RowScorer]) -> Method:
    """An unsupervised method: encode as our detector does, fit on the normal rows."""

    def fit(train: LabelledTable, seed: int) -> Scorer:
        encoder = FeatureEncoder.fit(train.features, train.is_normal)
        score = fit_rows(encoder.transform(train.features)[train.is_normal], seed)
        return lambda features: score(encoder.transform(features))

    return fit


def _on_labels(fit_rows: Callable[[Rows, Any, int], RowScorer]) -> Method:
    """A supervised method: encode as our detector does, fit on all rows and which of them are anomalies, bool [N]."""

    def fit(train: LabelledTable, seed: int) -> Scorer:
        if train.is_normal.all():  # nothing to tell apart: all rows are alike to it
            return lambda features: np.zeros(features.num_rows)
        encoder = FeatureEncoder.fit(train.features, train.is_normal)
        score = fit_rows(encoder.transform(train.features), ~train.is_normal, seed)
        return lambda features: score(encoder.transform(features))

    return fit


def _neighbours(normals: Rows, k: int) -> NearestNeighbors:
    return NearestNeighbors(n_neighbors=min(k, len(normals) - 1)).fit(normals)


def knn(normals: Rows, seed: int = 0) -> RowScorer:  # noqa: ARG001 - it has nothing random
    """Minus the mean distance to the 5 nearest of these normals [n, d]."""
    neighbours = _neighbours(normals, 5)
    return lambda rows: -neighbours.kneighbors(rows)[0].mean(axis=1)


def _knn_clipped(normals: Rows, seed: int) -> RowScorer:  # noqa: ARG001 - it has nothing random
    scaler = StandardScaler().fit(normals)

    def clipped(rows: Rows) -> Rows:
        scaled = scaler.transform(rows)
        beyond = np.maximum(np.abs(scaled) - 3, 0)
        return np.clip(scaled, -3, 3) + np.sign(scaled) * np.log1p(beyond)  # type: ignore[no-any-return]

    neighbours = _neighbours(clipped(normals), 2)
    return lambda rows: -neighbours.kneighbors(clipped(rows))[0].mean(axis=1)


def _isolation_forest(normals: Rows, seed: int) -> RowScorer:
    return IsolationForest(random_state=seed).fit(normals).score_samples  # type: ignore[no-any-return]


def _lof(normals: Rows, seed: int) -> RowScorer:  # noqa: ARG001 - it has nothing random
    n_neighbors = min(20, len(normals) - 1)
    return LocalOutlierFactor(n_neighbors=n_neighbors, novelty=True).fit(normals).score_samples  # type: ignore[no-any-return]


def _extra_trees(rows: Rows, is_anomaly: Any, seed: int) -> RowScorer:
    trees = ExtraTreesClassifier(200, class_weight="balanced", random_state=seed).fit(rows, is_anomaly)
    return lambda rows: -trees.predict_proba(rows)[:, 1]


def _boosted_trees(rows: Rows, is_anomaly: Any, seed: int) -> RowScorer:
    trees = HistGradientBoostingClassifier(class_weight="balanced", random_state=seed).fit(rows, is_anomaly)
    return lambda rows: -trees.predict_proba(rows)[:, 1]


def _extra_trees_on_scores(rows: Rows, is_anomaly: Any, seed: int) -> RowScorer:
    """The idea of XGBOD (Zhao, Hryniewicki, IJCNN 2018): unsupervised scores as further features of a classifier."""
    normals = rows[~is_anomaly]
    neighbours, forest = _neighbours(normals, 5), IsolationForest(random_state=seed).fit(normals)
    lof = LocalOutlierFactor(n_neighbors=min(20, len(normals) - 1), novelty=True).fit(normals)

    def widened(rows: Rows) -> Rows:
        distance = neighbours.kneighbors(rows)[0].mean(axis=1)
        return np.column_stack([rows, distance, lof.score_samples(rows), forest.score_samples(rows)])

    train = widened(rows)
    # What a normal of the training rows scores must not count the row itself among its neighbours.
    train[~is_anomaly, -3] = neighbours.kneighbors()[0].mean(axis=1)
    train[~is_anomaly, -2] = lof.negative_outlier_factor_
    trees = ExtraTreesClassifier(200, class_weight="balanced", random_state=seed).fit(train, is_anomaly)
    return lambda rows: -trees.predict_proba(widened(rows))[:, 1]


BASELINES: dict[str, Method] = {
    # The mean distance to the 5 nearest normals: what our detector has to beat.
    "knn": _on_normals(knn),
    # To 2 nearest, of features clipped at 3 deviations: cheap, and strong.
    "knn-clipped": _on_normals(_knn_clipped),
    "isolation-forest": _on_normals(_isolation_forest),
    "lof": _on_normals(_lof),
    "extra-trees": _on_labels(_extra_trees),
    "boosted-trees": _on_labels(_boosted_trees),
    "extra-trees-on-scores": _on_labels(_extra_trees_on_scores),
    **{name: (_on_labels if peer.supervised else _on_normals)(peer.fit) for name, peer in PEERS.items()},
}


def baseline(name: str) -> Method:
    """The baseline of that name.

    Raises:
        InputError: there is none, or it needs a package that is not installed.
    """
    if name not in BASELINES:
        raise InputError(f"there is no baseline {name!r}; the baselines are {', '.join(BASELINES)}")
    if name in PEERS and not PEERS[name].installed:
        raise InputError(f"baseline {name} needs {PEERS[name].package}: {PEERS[name].remedy}")
    return BASELINES[name]


def installed_baselines() -> list[str]:
    """The names of all baselines that can run here."""
    return [name for name in BASELINES if name not in PEERS or PEERS[name].installed]
