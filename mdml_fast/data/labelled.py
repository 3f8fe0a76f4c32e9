"""A table whose rows have a class, some classes being the normal ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mdml_fast.data.encoding import check_finite
from mdml_fast.data.tables import plain
from mdml_fast.errors import InputError, RowError

MIN_NORMALS = 20
# The class of further normals that nobody named, where there are several: they may be of any of them.
UNNAMED = "(unnamed)"

Names = npt.NDArray[np.object_]


@dataclass(frozen=True)
class LabelledTable:
    """Features, and for each row its class and, where given, its group.

    Attributes:
        features: N rows, only the columns that are features.
        labels: class name of each row [N].
        normal: the names of the normal classes; every other class is an anomaly class.
        groups: what must not be on both sides of a split [N], or None.
    """

    features: pa.Table
    labels: Names
    normal: tuple[str, ...]
    groups: Names | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def is_normal(self) -> npt.NDArray[np.bool_]:
        """Whether each row [N] belongs to a normal class."""
        return np.isin(self.labels.astype(str), self.normal)

    def take(self, rows: npt.NDArray[np.intp]) -> LabelledTable:
        """The table of these rows, in this order."""
        groups = None if self.groups is None else self.groups[rows]
        return LabelledTable(self.features.take(pa.array(rows)), self.labels[rows], self.normal, groups)

    def anomaly_classes(self) -> dict[str, int]:
        """Each anomaly class and its number of rows, by name."""
        names, counts = np.unique(self.labels[~self.is_normal].astype(str), return_counts=True)
        return dict(zip(names.tolist(), counts.tolist(), strict=True))


def label_table(
    table: pa.Table, label: str, normal: Sequence[str], ignore: Sequence[str] = (), group: str | None = None
) -> LabelledTable:
    """Split a table into features, classes and groups.

    Args:
        table: the data.
        label: the column of classes.
        normal: the classes that are normal.
        ignore: columns that are no features.
        group: a column whose values must not be on both sides of a split; no feature either.

    Raises:
        InputError: a column or a class does not occur, a label or group is missing, a feature is infinite, or fewer
            than 20 rows are normal.
    """
    check_columns(table.column_names, label, ignore, group)
    features = table.drop_columns([name for name in {label, group, *ignore} if name is not None])
    check_finite(features)
    groups = None if group is None else class_names(table[group], f"group column {group!r}")
    labels = class_names(table[label], f"label column {label!r}")
    check_normals(labels, normal)
    return LabelledTable(features, labels, tuple(normal), groups)


def check_columns(names: Sequence[str], label: str, ignore: Sequence[str], group: str | None) -> None:
    """Raise InputError unless these columns have what `label_table` takes them for, and others are left as features."""
    for role, column in (("label", label), ("group", group)):
        if column in ignore:
            raise InputError(f"the {role} column {column!r} is ignored, too; it is no feature anyway: don't ignore it")
    for role, column in [("label", label), ("group", group), *(("ignored", name) for name in ignore)]:
        if column is not None and column not in names:
            raise InputError(f"there is no {role} column {column!r}; the columns are {_listed(names)}")
    if not set(names) - {label, group, *ignore}:
        raise InputError("no feature column is left; give a table with more columns or ignore fewer")


def class_names(values: Any, what: str) -> Names:
    """Class labels of any kind as strings [N].

    Raises:
        InputError: a value is missing, or the values are no labels.
    """
    if isinstance(values, (pa.Array, pa.ChunkedArray)):
        column = plain(values if isinstance(values, pa.ChunkedArray) else pa.chunked_array([values]))
    else:
        array = values if isinstance(values, np.ma.MaskedArray) else np.asarray(values)
        if array.ndim != 1:
            raise InputError(f"{what} must hold one label per row, got an array of shape {list(array.shape)}")
        try:
            column = pa.array(array, from_pandas=True)
        except (pa.ArrowException, TypeError) as error:
            raise InputError(f"{what} must hold labels of one kind: numbers or text") from error
    missing = np.flatnonzero(pc.is_null(column, nan_is_null=True))
    if len(missing):
        raise RowError(f"{what} has {len(missing)} missing values", int(missing[0]) + 1, "; drop those rows")
    if pa.types.is_nested(column.type):
        raise InputError(f"{what} holds {column.type}; labels must be numbers or text")
    return np.asarray(column.cast(pa.string()).to_pylist(), dtype=object)


def check_normals(labels: Names, normal: Sequence[str]) -> None:
    """Raise InputError unless every class in `normal` occurs and together they have at least 20 rows."""
    present, counts = np.unique(labels.astype(str), return_counts=True)
    if not normal:
        raise InputError(f"name the normal classes; the classes are {_listed(present)}")
    for name in normal:
        if name not in present:
            raise InputError(f"there is no row of the normal class {name!r}; the classes are {_listed(present)}")
    total = int(counts[np.isin(present, list(normal))].sum())
    if total < MIN_NORMALS:
        raise InputError(f"only {total} normal rows; at least {MIN_NORMALS} are needed")


def at_most_of_each(labels: Names, most: int, seed: int) -> npt.NDArray[np.intp]:
    """Positions, increasing, of up to so many random rows of each class [N]."""
    rng = np.random.default_rng(seed)
    chosen = [rng.permutation(np.flatnonzero(labels == name))[:most] for name in np.unique(labels.astype(str))]
    return np.sort(np.concatenate([np.empty(0, dtype=np.intp), *chosen]))


def family_codes(groups: Names | None, n_rows: int) -> npt.NDArray[np.int64]:
    """A number [N] for each row: the same for rows of one group; without groups, or with one only, all differ."""
    if groups is not None:
        names, codes = np.unique(groups.astype(str), return_inverse=True)
        if len(names) > 1:
            return codes
    return np.arange(n_rows)


def _listed(names: Sequence[str] | npt.NDArray[np.str_], most: int = 30) -> str:
    shown = ", ".join(map(str, names[:most]))
    return shown if len(names) <= most else f"{shown}, … ({len(names)} in all)"
