"""Why rows have their scores: what each column adds, in words and numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mdml_fast.calibration import Positions
from mdml_fast.data.encoding import CategoricalColumn, FeatureEncoder, Floats, Rows
from mdml_fast.data.labelled import Names
from mdml_fast.known import KnownRows

# What is usual for a number: the median, and between these quantiles.
USUAL = (0.05, 0.5, 0.95)
# The column that names the seen class of an alarm.
KIND = "kind"


def why_names(k: int) -> list[str]:
    """The names of the columns that say why, for k reasons; none for 0."""
    return [*(f"why_{place + 1}" for place in range(k)), "nearest_family", KIND] if k else []


@dataclass(frozen=True)
class Explanation:
    """What makes up the scores of N rows of a table with d columns.

    Attributes:
        table: the rows.
        columns: the names of the d columns.
        scores: [N], higher is more normal.
        contributions: what each column adds to the score [N, d], compared with the row's nearest normal: a negative
            number makes the row an anomaly. 0 for columns in which both agree and for those that are not used.
        remainder: the score less its contributions [N]: what the row shares with its nearest normal, and what the trees
            add where that is less than a hundredth.
        nearest: position of the nearest normal in `normals` [N].
        nearest_family: the class of that normal [N].
        kind: the seen anomaly class that the row resembles, or ``new`` [N]. Of a row that is no alarm it says nothing.
        normals: the normals that are compared with.
        encoder: how columns become features.
    """

    table: pa.Table
    columns: list[str]
    scores: Floats
    contributions: Floats
    remainder: Floats
    nearest: npt.NDArray[np.intp]
    nearest_family: Names
    kind: Names
    normals: KnownRows
    encoder: FeatureEncoder

    def nearest_normals(self) -> pa.Table:
        """The nearest normal of each row, N rows of the columns that are used."""
        return self._in_words.values.take(pa.array(self.nearest))

    def reasons(self, k: int) -> list[list[str | None]]:
        """The k columns that make each row most anomalous, strongest first, in words: k lists of N.

        For example ``bytes = 54540, nearest 310, usual 232 (0 to 1204)`` or ``service = 'smtp', nearest 'http', usual
        'http' (62 %)``: the row's value, that of the nearest normal, and of its family the median with 5 % and 95 %
        quantiles, or the most frequent value. None where fewer columns make the row anomalous.
        """
        return [words.to_pylist() for words in self._reasons(k)]

    def why(self, k: int) -> dict[str, pa.Array]:
        """The columns of `why_names`, each [N]: the k strongest reasons, the nearest normal family, the kind."""
        classes = [pa.array(names, pa.string()) for names in (self.nearest_family, self.kind)]
        return dict(zip(why_names(k), [*self._reasons(k), *classes], strict=True)) if k else {}

    def _reasons(self, k: int) -> list[pa.Array]:
        """`reasons` as arrays: put together column by column, as what Python does for each row keeps others waiting."""
        order = np.argsort(self.contributions, axis=1, kind="stable")
        order = np.pad(order, ((0, 0), (0, max(0, k - order.shape[1]))), mode="edge")[:, :k]
        blames = np.take_along_axis(self.contributions, order, axis=1) < 0
        blames[:, len(self.columns) :] = False
        places = np.flatnonzero(blames)
        places = places[np.argsort(order.flat[places], kind="stable")]
        columns, starts = np.unique(order.flat[places], return_index=True)
        of_columns = zip(columns, np.split(places, starts)[1:], strict=True)
        words = [self._words(self.columns[column], own // k) for column, own in of_columns]
        found = np.full(order.shape, -1)
        found.flat[places] = np.arange(len(places))
        everything = pa.concat_arrays([pa.nulls(0, pa.string()), *words])
        return [everything.take(pa.array(own, mask=own < 0)) for own in found.T]

    def _words(self, name: str, rows: Positions) -> pa.Array:
        """How these rows differ in a column from what is usual, in words [rows]."""
        own = _described(self.table[name].take(pa.array(rows)))
        # Decoded from float32, whose last digits are not the data's.
        normals, of_rows = np.unique(self.nearest[rows], return_inverse=True)
        nearest = _described(self._in_words.values[name].take(pa.array(normals)), digits=4).take(pa.array(of_rows))
        families, which = np.unique(self.normals.names[normals], return_inverse=True)
        of_families = pa.array([self._in_words.usual[family, name] for family in families.tolist()])
        usual = of_families.take(pa.array(which[of_rows]))
        return pc.binary_join_element_wise(f"{name} = ", own, ", nearest ", nearest, ", usual ", usual, "")

    @cached_property
    def _in_words(self) -> NormalsInWords:
        return normals_in_words(self.encoder, self.normals)


class NormalsInWords(NamedTuple):
    """Attributes:
    values: the normals as a table.
    usual: what is usual, by normal family and column.
    """

    values: pa.Table
    usual: dict[tuple[str, str], str]


@lru_cache(maxsize=2)  # of a stream, batch after batch is explained by the same normals
def normals_in_words(encoder: FeatureEncoder, normals: KnownRows) -> NormalsInWords:
    """What explanations say of the normals that rows are compared with."""
    values = encoder.decode(normals.rows)
    usual = {
        (str(family), column.name): _usual_value(
            values[column.name].filter(pa.array(normals.names == family)), isinstance(column, CategoricalColumn)
        )
        for family in np.unique(normals.names)
        for column in encoder.columns
    }
    return NormalsInWords(values, usual)


def _described(values: pa.ChunkedArray, digits: int = 6) -> pa.Array:
    """Values in words, equal ones once [N]."""
    distinct = values.combine_chunks().dictionary_encode()
    pattern = f"%.{digits}g"
    words = [
        "missing" if value is None or value != value else repr(value) if isinstance(value, str) else pattern % value
        for value in distinct.dictionary.to_pylist()
    ]
    return pa.array(words, pa.string()).take(distinct.indices).fill_null("missing")


def _usual_value(values: pa.ChunkedArray, is_text: bool) -> str:
    known = values.drop_null()
    if not len(known):
        return "another value" if is_text else "missing"
    if is_text:
        top = max(pc.value_counts(known).to_pylist(), key=lambda entry: entry["counts"])
        return f"{top['values']!r} ({100 * top['counts'] / len(values):.0f} %)"
    low, median, high = np.quantile(known.to_numpy(), USUAL)
    return f"{median:.4g} ({low:.4g} to {high:.4g})"


def explain(
    table: pa.Table,
    columns: Sequence[str],
    encoder: FeatureEncoder,
    model: Any,
    normals: KnownRows,
    anomalies: KnownRows,
) -> Explanation:
    """Score rows and say why; see `MDMLDetector.explain`."""
    rows: Rows = encoder.transform(table)
    nearest, distances = normals.nearest(rows)
    scores, by_feature = model.explain(rows, normals.rows, nearest)
    contributions = encoder.by_column(by_feature, columns)
    return Explanation(
        table=table,
        columns=list(columns),
        scores=scores,
        contributions=contributions,
        remainder=scores - contributions.sum(axis=1),
        nearest=nearest,
        nearest_family=normals.names[nearest].astype(object),
        kind=anomalies.resembled(rows, distances),
        normals=normals,
        encoder=encoder,
    )
