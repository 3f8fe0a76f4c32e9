"""Families: groups of rows that an episode takes as a whole, as ID or as OOD."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from sklearn.cluster import KMeans

from mdml_fast.data.encoding import Rows
from mdml_fast.data.labelled import Names

# One normal class is split into at most this many clusters, none smaller on average than so many rows.
MAX_CLUSTERS = 8
ROWS_PER_CLUSTER = 50
# k-means sees at most so many rows: the centres of eight clusters need no more.
CLUSTERING_ROWS = 10_000

# Synthetic OOD: the share of a row's features swapped in from another normal row is uniform between these.
SWAPPED_SHARE = (0.05, 0.5)


class Families(NamedTuple):
    """Names, and for each the positions of its rows."""

    names: tuple[str, ...]
    rows: tuple[npt.NDArray[np.intp], ...]


def normal_families(rows: Rows, labels: Names, rng: np.random.Generator) -> Families:
    """The ID families of normal rows [N, d]: their classes, or clusters where all are of one class."""
    names = np.unique(labels.astype(str))
    if len(names) > 1:
        return _by_name(labels, names)
    n_clusters = min(MAX_CLUSTERS, len(rows) // ROWS_PER_CLUSTER)
    if n_clusters < 2:
        return _by_name(labels, names)
    sample = rng.permutation(len(rows))[:CLUSTERING_ROWS]
    kmeans = KMeans(n_clusters, n_init=1, random_state=int(rng.integers(2**31))).fit(rows[sample])
    clusters = kmeans.predict(rows)
    found = np.unique(clusters)
    return Families(
        tuple(f"{names[0]} #{cluster + 1}" for cluster in found),
        tuple(np.flatnonzero(clusters == cluster) for cluster in found),
    )


def anomaly_families(labels: Names) -> Families:
    """The OOD families of anomalous rows with these class names [N]: one for each class."""
    return _by_name(labels, np.unique(labels.astype(str)))


def synthetic_rows(normals: Rows, n_rows: int, rng: np.random.Generator) -> Rows:
    """OOD rows [n_rows, d] made of normals [N, d]: a random share of the features comes from another normal row."""
    base, donor = rng.integers(len(normals), size=(2, n_rows))
    share = rng.uniform(*SWAPPED_SHARE, size=(n_rows, 1))
    swapped = rng.random((n_rows, normals.shape[1])) < share
    mixed: Rows = np.where(swapped, normals[donor], normals[base])
    return mixed


def _by_name(labels: Names, names: Sequence[str] | npt.NDArray[np.str_]) -> Families:
    return Families(tuple(map(str, names)), tuple(np.flatnonzero(labels == name) for name in names))
