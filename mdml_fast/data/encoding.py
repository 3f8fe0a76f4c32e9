"""Columns of numbers and text to float32 features, scaled by the normal rows."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from sklearn.preprocessing import RobustScaler, StandardScaler

from mdml_fast.data.tables import plain
from mdml_fast.errors import InputError, MissingValuesWarning, RowError

Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.float32]

# A column whose normals reach this many robust deviations from their median spans decades: it goes on a log scale.
HEAVY_TAIL = 20.0
# Beyond this many deviations a value is strange, and how strange matters only on a log scale.
SOFT_CLIP = 10.0
# Beyond this a number is as good as infinite: what is computed from it would be.
LARGEST = 1e300
# Categories rarer than the 64 most frequent share one indicator, so that an identifier can't swamp the features.
MAX_CATEGORIES = 64


@dataclass(frozen=True)
class NumericColumn:
    """One numeric column: `soft_clip((g((x - center) / scale) - mean) / deviation)`, g = asinh where heavy-tailed."""

    name: str
    center: float
    scale: float
    heavy_tailed: bool
    mean: float
    deviation: float
    has_missing: bool
    kind: str = "numeric"

    @property
    def feature_names(self) -> list[str]:
        """The features that this column becomes."""
        return [self.name, f"{self.name} is missing"] if self.has_missing else [self.name]

    def encode(self, values: Floats) -> list[Floats]:
        """Values [N] to features, each [N]; a missing value becomes the normals' mean."""
        scaled = (values - self.center) / self.scale
        if self.heavy_tailed:
            scaled = np.arcsinh(scaled)
        encoded = np.nan_to_num(soft_clip((scaled - self.mean) / self.deviation), nan=0.0)
        return [encoded, np.isnan(values).astype(np.float64)] if self.has_missing else [encoded]

    def decode(self, features: Rows) -> pa.Array:
        """The values [N] of features [N, 1 or 2], to the precision of these; null where they say missing."""
        scaled = soft_clip_inverse(features[:, 0].astype(np.float64)) * self.deviation + self.mean
        values = (np.sinh(scaled) if self.heavy_tailed else scaled) * self.scale + self.center
        # What float32 can't tell from 0 is 0.
        values[np.abs(values) < 1e-6 * max(self.scale, abs(self.center))] = 0.0
        return pa.array(values, mask=features[:, 1] > 0.5 if self.has_missing else None)


@dataclass(frozen=True)
class CategoricalColumn:
    """One text column: an indicator for each category, and one for every other value, missing ones included."""

    name: str
    categories: tuple[str, ...]
    kind: str = "categorical"

    @property
    def feature_names(self) -> list[str]:
        """The features that this column becomes."""
        return [*(f"{self.name} = {category}" for category in self.categories), f"{self.name} is another"]

    def encode(self, values: pa.ChunkedArray) -> list[Floats]:
        """Values [N] to features, each [N]."""
        codes = pc.index_in(values, value_set=pa.array(self.categories, pa.string())).fill_null(len(self.categories))
        return list(np.eye(len(self.categories) + 1)[codes.to_numpy()].T)

    def decode(self, features: Rows) -> pa.Array:
        """The values [N] of features [N, categories + 1]; null for any other value."""
        names = pa.array([*self.categories, None], pa.string())
        return names.take(pa.array(features.argmax(axis=1)))


Column = NumericColumn | CategoricalColumn


@dataclass(frozen=True)
class FeatureEncoder:
    """The fitted transformation of a table's columns to float32 rows [N, d]; part of the model.

    Attributes:
        columns: the columns used, in order.
        constant: columns dropped because all training rows agree in them.
    """

    columns: tuple[Column, ...]
    constant: tuple[str, ...] = ()

    @classmethod
    def fit(
        cls, table: pa.Table, is_normal: npt.NDArray[np.bool_], rows: npt.NDArray[np.intp] | None = None
    ) -> FeatureEncoder:
        """Learn the encoding from training rows: scales from the normals, categories from all.

        Args:
            table: the feature columns, N rows.
            is_normal: bool [N].
            rows: positions of the rows to learn from; None is all. The others are checked, and nothing else.

        Raises:
            InputError: a column is of no usable type or holds infinities, or all columns are constant.
        """
        values = {name: _column(table, name) for name in table.column_names}
        if rows is not None:
            values = {name: column.take(pa.array(rows)) for name, column in values.items()}
            is_normal = is_normal[rows]
        constant = [name for name, column in values.items() if _is_constant(column)]
        varying = {name: column for name, column in values.items() if name not in constant}
        if not varying:
            raise InputError("all feature columns are constant; there is nothing to learn from")
        numbers = {name: column.to_numpy() for name, column in varying.items() if not pa.types.is_string(column.type)}
        numeric = _fit_numeric(numbers, is_normal)
        columns = [numeric[name] if name in numeric else _fit_categorical(name, varying[name]) for name in varying]
        return cls(tuple(columns), tuple(constant))

    def transform(self, table: pa.Table) -> Rows:
        """Encode rows: a table with the trained columns (others are ignored) to float32 [N, d].

        Warns of each column in which values are missing where none were in training (`MissingValuesWarning`).

        Raises:
            InputError: a column is missing, of another type than in training, or holds infinities.
        """
        encoded = []
        for column in self.columns:
            values = _values(table, column)
            if isinstance(column, NumericColumn) and not column.has_missing and np.isnan(values).any():
                what = f"values are missing in column {column.name!r}, and none were where its scale was learned"
                advice = (
                    "they count as average, so such rows may look normal: fill them, or train with more rows like them"
                )
                warnings.warn(f"{what}: {advice}", MissingValuesWarning, stacklevel=2)
            encoded += column.encode(values)
        return np.stack(encoded, axis=1).astype(np.float32)

    def decode(self, rows: Rows) -> pa.Table:
        """The inverse of `transform`, to the precision of float32; rare categories and gaps become null."""
        ends = np.cumsum([len(column.feature_names) for column in self.columns])[:-1]
        parts = np.split(rows, ends, axis=1)
        return pa.table({column.name: column.decode(part) for column, part in zip(self.columns, parts, strict=True)})

    def by_column(self, contributions: Floats, names: Sequence[str]) -> Floats:
        """What features add to something [N, d], summed over each table column's features [N, names]; 0 if unused."""
        sizes = np.array([len(column.feature_names) for column in self.columns])
        places = [names.index(column.name) for column in self.columns]
        summed = np.zeros((len(contributions), len(names)))
        summed[:, places] = np.add.reduceat(contributions, np.cumsum(sizes) - sizes, axis=1)
        return summed

    @property
    def feature_names(self) -> list[str]:
        """The names of the d features."""
        return [feature for column in self.columns for feature in column.feature_names]

    def types(self) -> dict[str, pa.DataType]:
        """The columns used, and as what a text format shall be read for them."""
        return {
            column.name: pa.float64() if isinstance(column, NumericColumn) else pa.string() for column in self.columns
        }

    def notes(self) -> list[str]:
        """What was done to the columns that a user should know, a line each."""
        missing = [column.name for column in self.columns if isinstance(column, NumericColumn) and column.has_missing]
        notes = []
        if self.constant:
            notes.append(f"dropped {len(self.constant)} constant column(s): {', '.join(self.constant)}")
        if missing:
            notes.append(f"missing values filled with the normals' mean, and marked, in: {', '.join(missing)}")
        return notes

    def to_json(self) -> dict[str, Any]:
        """The encoding as plain JSON values."""
        return {"columns": [asdict(column) for column in self.columns], "constant": list(self.constant)}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> FeatureEncoder:
        """The inverse of `to_json`."""
        return cls(tuple(map(_column_from_json, document["columns"])), tuple(document["constant"]))


def check_finite(table: pa.Table) -> None:
    """Raise RowError where a column of numbers holds infinities."""
    for field in table.schema:
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
            _column(table, field.name)


def soft_clip(values: Floats) -> Floats:
    """Values within ±10 as they are, and what lies beyond on a log scale: monotone, so nothing is made equal."""
    size = np.abs(values)
    clipped: Floats = np.sign(values) * (np.minimum(size, SOFT_CLIP) + np.log1p(np.maximum(size - SOFT_CLIP, 0.0)))
    return clipped


def soft_clip_inverse(values: Floats) -> Floats:
    """The values that `soft_clip` takes to these."""
    size = np.abs(values)
    found: Floats = np.sign(values) * (np.minimum(size, SOFT_CLIP) + np.expm1(np.maximum(size - SOFT_CLIP, 0.0)))
    return found


def _is_constant(values: pa.ChunkedArray) -> bool:
    """Whether all agree. There are several NaNs, and all of them are one missing value."""
    found = values.unique()
    return len(found) <= 1 or (not pa.types.is_string(found.type) and bool(np.isnan(found.to_numpy()).all()))


def _fit_numeric(columns: dict[str, Floats], is_normal: npt.NDArray[np.bool_]) -> dict[str, NumericColumn]:
    """Columns of N values each, all at once: a scaler takes as long for one as for many."""
    if not columns:
        return {}
    values = np.stack(list(columns.values()), axis=1)
    missing = np.isnan(values)
    # Where the normals have no value at all, all rows have to do.
    known = is_normal[:, None] | missing[is_normal].all(axis=0)
    robust = RobustScaler(unit_variance=True)
    scaled = robust.fit_transform(np.where(known, values, np.nan))
    heavy_tailed = np.nanmax(np.abs(scaled), axis=0) > HEAVY_TAIL
    scaled[:, heavy_tailed] = np.arcsinh(scaled[:, heavy_tailed])
    standard = StandardScaler().fit(scaled)
    fitted = (robust.center_, robust.scale_, heavy_tailed, standard.mean_, standard.scale_, missing.any(axis=0))
    by_column = zip(*(constants.tolist() for constants in fitted), strict=True)
    return {name: NumericColumn(name, *constants) for name, constants in zip(columns, by_column, strict=True)}


def _fit_categorical(name: str, values: pa.ChunkedArray) -> CategoricalColumn:
    counts = pc.value_counts(values.drop_null())
    # Most frequent first, ties by name, so that the order of the rows does not matter.
    ranked = sorted(counts.to_pylist(), key=lambda entry: (-entry["counts"], entry["values"]))
    return CategoricalColumn(name, tuple(sorted(entry["values"] for entry in ranked[:MAX_CATEGORIES])))


def _values(table: pa.Table, column: Column) -> Any:
    if table.schema.get_field_index(column.name) < 0:
        raise InputError(f"the data has no column {column.name!r}, which the model was trained with")
    values = _column(table, column.name)
    # Values that are all missing are of either kind.
    if isinstance(column, NumericColumn):
        if not pa.types.is_string(values.type):
            return values.to_numpy()
        if values.null_count == len(values):
            return np.full(len(values), np.nan)
        raise InputError(f"column {column.name!r} holds text; the model was trained with numbers there: convert it")
    if pa.types.is_string(values.type):
        return values
    if np.isnan(values.to_numpy()).all():
        return pa.chunked_array([pa.nulls(len(values), pa.string())])
    raise InputError(f"column {column.name!r} holds numbers; the model was trained with text there: convert it")


def _column(table: pa.Table, name: str) -> pa.ChunkedArray:
    """A column as text, or as float64 whose missing values are NaN."""
    values = plain(table[name])
    kind = values.type
    if pa.types.is_string(kind):
        return values
    if pa.types.is_boolean(kind):
        values = values.cast(pa.uint8())
    elif not _is_number(kind):
        raise InputError(f"column {name!r} holds {kind}; features are numbers or text: convert it or ignore it")
    values = values.cast(pa.float64(), safe=False).fill_null(np.nan)
    infinite = np.flatnonzero(np.abs(values.to_numpy()) > LARGEST)
    if len(infinite):
        what = f"column {name!r} has {len(infinite)} infinite values"
        raise RowError(what, int(infinite[0]) + 1, f", or some beyond {LARGEST:g}; replace them")
    return values


def _is_number(kind: pa.DataType) -> bool:
    types = pa.types
    checks = (types.is_integer, types.is_floating, types.is_decimal, types.is_null)
    return any(check(kind) for check in checks)


def _column_from_json(document: dict[str, Any]) -> Column:
    if document["kind"] == "numeric":
        return NumericColumn(**document)
    return CategoricalColumn(document["name"], tuple(document["categories"]))


def row_ids(table: pa.Table) -> npt.NDArray[np.intp]:
    """A number [N] for each row: two rows have the same number when they agree in every column."""
    codes = [_codes(_column(table, name)) for name in table.column_names]
    _, ids = np.unique(np.stack(codes, axis=1), axis=0, return_inverse=True)
    return ids.reshape(-1)


def _codes(values: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    indices = pa.concat_arrays(values.chunks).dictionary_encode(null_encoding="encode").indices
    return np.asarray(indices.to_numpy(zero_copy_only=False), dtype=np.int64)
