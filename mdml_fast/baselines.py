"""What people would use instead, on the same encoded rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import pyarrow as pa
from sklearn.ensemble import IsolationForest
from sklearn.neighbors import NearestNeighbors

from mdml_fast.data import FeatureEncoder, LabelledTable
from mdml_fast.data.encoding import Floats, Rows
from mdml_fast.detector import MDMLDetector
from mdml_fast.errors import InputError
from mdml_fast.presets import Config


class Scorer(Protocol):
    """A fitted method."""

    def __call__(self, features: pa.Table, /) -> Floats:
        """A score of each row [N], higher for more normal rows."""


Method = Callable[[LabelledTable, int], Scorer]
"""Fit on a training table with a seed."""


def mdml(preset: str | Config, device: str, dtype: str) -> Method:
    """Our detector with these settings, as a method."""

    def fit(train: LabelledTable, seed: int) -> Scorer:
        detector = MDMLDetector(preset, normal=train.normal, random_state=seed, device=device, dtype=dtype)
        return detector.fit(train.features, train.labels, groups=train.groups).score_samples

    return fit


def _on_normals(fit_rows: Callable[[Rows, int], Callable[[Rows], Floats]]) -> Method:
    """An unsupervised method: encode as our detector does, fit on the normal rows."""

    def fit(train: LabelledTable, seed: int) -> Scorer:
        encoder = FeatureEncoder.fit(train.features, train.is_normal)
        score = fit_rows(encoder.transform(train.features)[train.is_normal], seed)
        return lambda features: score(encoder.transform(features))

    return fit


def _knn(normals: Rows, seed: int) -> Callable[[Rows], Floats]:  # noqa: ARG001 - it has nothing random
    neighbours = NearestNeighbors(n_neighbors=min(5, len(normals))).fit(normals)
    return lambda rows: -neighbours.kneighbors(rows)[0].mean(axis=1)


def _isolation_forest(normals: Rows, seed: int) -> Callable[[Rows], Floats]:
    return IsolationForest(random_state=seed).fit(normals).score_samples  # type: ignore[no-any-return]


BASELINES: dict[str, Method] = {
    # The mean distance to the 5 nearest normals: what our detector has to beat.
    "knn": _on_normals(_knn),
    "isolation-forest": _on_normals(_isolation_forest),
}


def baseline(name: str) -> Method:
    """The baseline of that name.

    Raises:
        InputError: there is none.
    """
    if name not in BASELINES:
        raise InputError(f"there is no baseline {name!r}; the baselines are {', '.join(BASELINES)}")
    return BASELINES[name]
