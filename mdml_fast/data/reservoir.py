"""A labelled table larger than memory: all of its anomalies, and a sample of its normals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from mdml_fast.data.batches import STANDARD, open_table, with_types
from mdml_fast.data.csv_blocks import LateTypeError
from mdml_fast.data.encoding import Floats, check_finite
from mdml_fast.data.labelled import LabelledTable, check_columns, check_normals, class_names, label_table
from mdml_fast.data.tables import Wanted
from mdml_fast.errors import rows_of

BATCH_ROWS = 65_536

# Comes before the keys of normals, so that a row with it always stays.
ALWAYS = -1.0


class Reservoir:
    """Rows that come batch by batch: all anomalies stay, and of the normals a uniform sample, in their order.

    Every normal draws a key, and those with the smallest keys stay. The sample is as any other of its size, so that
    what is calibrated on it holds for all normals; normal classes keep their shares, give or take chance.

    Args:
        label: the column of classes.
        normal: the normal classes.
        max_normals: how many normals stay.
        seed: of the keys.
    """

    def __init__(self, label: str, normal: Sequence[str], max_normals: int, seed: int) -> None:
        self.n_normals = 0
        self._label, self._normal, self._max_normals = label, list(normal), max_normals
        self._rng = np.random.default_rng(seed)
        self._tables: list[pa.Table] = []
        self._keys: list[Floats] = []
        self._n_held = 0

    def add(self, table: pa.Table) -> None:
        """Take a batch of rows."""
        is_normal = np.isin(class_names(table[self._label], f"label column {self._label!r}").astype(str), self._normal)
        self._tables.append(table)
        self._keys.append(np.where(is_normal, self._rng.random(len(is_normal)), ALWAYS))
        self.n_normals += int(is_normal.sum())
        self._n_held += int(is_normal.sum())
        # Twice as many may wait, so that sorting out costs little for each row.
        if self._n_held > 2 * self._max_normals:
            self._sort_out()

    def table(self) -> pa.Table:
        """The rows that stay."""
        self._sort_out()
        return self._tables[0]

    def _sort_out(self) -> None:
        table, keys = pa.concat_tables(self._tables), np.concatenate(self._keys)
        normal_keys = keys[keys != ALWAYS]
        if len(normal_keys) > self._max_normals:
            stays = keys <= np.partition(normal_keys, self._max_normals - 1)[self._max_normals - 1]
            table, keys = table.filter(pa.array(stays)), keys[stays]
        self._tables, self._keys = [table], [keys]
        self._n_held = min(len(normal_keys), self._max_normals)


def sample_table(
    path: Path,
    label: str,
    normal: Sequence[str],
    ignore: Sequence[str] = (),
    group: str | None = None,
    *,
    max_normals: int,
    seed: int = 0,
    progress: Callable[[int, int | None], None] | None = None,
) -> tuple[LabelledTable, int]:
    """As `label_table` of a file, with all labelled anomalies and at most so many normals, drawn at random.

    Memory holds twice `max_normals` normals and all anomalies.

    Args:
        path: of the file, see `read_table`.
        label: the column of classes.
        normal: the classes that are normal.
        ignore: columns that are no features.
        group: see `label_table`.
        max_normals: how many normals stay.
        seed: of the draw.
        progress: told the rows read, and how many there are in all, where known; not of a table of one batch.

    Returns:
        The table, its rows in their order in the file, and how many normals the file has.

    Raises:
        InputError: the file or its columns can't be used.
    """

    def drawn(wanted: Wanted) -> Reservoir:
        reservoir = Reservoir(label, normal, max_normals, seed)
        with open_table(path, wanted, BATCH_ROWS, ignore=ignore) as source:
            check_columns(source.names, label, ignore, group)
            n_read = 0
            for batch in source.batches:
                with rows_of(path, n_read, batch.num_rows):
                    _check_rows(batch, label, normal, group)
                    reservoir.add(batch)
                n_read += batch.num_rows
                if progress and n_read > BATCH_ROWS:
                    progress(n_read, source.rows_in_all(n_read))
        return reservoir

    try:
        reservoir = drawn(None)
    except LateTypeError:
        if path == STANDARD:
            raise
        reservoir = drawn(with_types(path, None, ignore))
    return label_table(reservoir.table(), label, normal, group=group), reservoir.n_normals


def _check_rows(batch: pa.Table, label: str, normal: Sequence[str], group: str | None) -> None:
    """Refuse what `label_table` would, also in rows that won't stay: chance shall not tell what is refused."""
    if not normal:
        check_normals(class_names(batch[label], f"label column {label!r}"), normal)
    if group is not None:
        class_names(batch[group], f"group column {group!r}")
    check_finite(batch.drop_columns([name for name in {label, group} if name is not None]))
