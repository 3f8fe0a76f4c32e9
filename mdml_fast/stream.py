"""Scoring a table batch by batch: reading, scoring and writing overlap, and memory stays as it is."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from mdml_fast.artifact import DOCUMENT
from mdml_fast.calibration import Promise
from mdml_fast.data.batches import (
    STANDARD,
    TableStream,
    as_writable,
    check_writable,
    format_of,
    open_table,
    with_types,
    write_tables,
)
from mdml_fast.data.csv_blocks import type_of_names
from mdml_fast.data.labelled import class_names
from mdml_fast.data.parts import Parts
from mdml_fast.data.tables import Wanted, plain
from mdml_fast.detector import MDMLDetector
from mdml_fast.drift import DriftMonitor
from mdml_fast.errors import InputError, rows_of
from mdml_fast.explanation import KIND, why_names
from mdml_fast.inputs import resolve_device
from mdml_fast.meta.default import ORDERED_ROWS
from mdml_fast.resources import release_memory
from mdml_fast.threads import Item, in_order, workers

# Rows that one thread scores at once, and rows that a run that is cut off may lose.
BATCH_ROWS, PART_ROWS = ORDERED_ROWS, 65_536

# The columns that scoring adds.
WRITTEN = ("score", "p_value", "is_anomaly", "drift_evidence")

Progress = Callable[[int, int | None], None]
"""Told the rows done, and how many there are in all, where known."""

OnDrift = Callable[[int], None]
"""Told once, when that row is written, the row from which on there is drift."""


@dataclass(frozen=True)
class ScoreTask:
    """What to score, and where to write it.

    Attributes:
        model: the folder that the detector was loaded from.
        data: a file as `read_table` takes, or ``-`` for standard input: Arrow IPC or CSV.
        out: a file by its ending, or ``-`` for standard output: CSV where the data is, else an Arrow IPC stream.
        keep: columns of the data to carry over.
        group: the column of groups, for alarms by group.
        monitor: whether to watch for drift, the rows being in order of time.
        explain: how many reasons to give for each row; with them come its nearest normal family and, for alarms, the
            kind of anomaly.
    """

    model: Path
    data: Path
    out: Path
    keep: tuple[str, ...] = ()
    group: str | None = None
    monitor: bool = False
    explain: int = 0

    @property
    def partial(self) -> Path:
        """The folder of what is scored so far, while `out` is not written."""
        return self.out.with_name(f"{self.out.name}.partial")

    @property
    def writes_csv(self) -> bool:
        """Whether what comes as CSV becomes CSV."""
        return format_of(self.out, text=True) == ".csv"

    def check(self) -> None:
        """Raise InputError for what can't be done, before anything is read."""
        check_writable(self.out)
        if self.data != STANDARD and self.out.exists() and self.out.samefile(self.data):
            raise InputError(f"{self.out} is the data to score: write to another file")
        for name in self.keep:
            if name in (*WRITTEN, *why_names(self.explain)):
                raise InputError(f"--keep: the output has a column {name!r} of its own; rename that of {self.data}")


@dataclass
class ScoreSummary:
    """Rows and alarms so far; the rows that an earlier run had scored; the row from which on there is drift."""

    rows: int = 0
    alarms: int = 0
    resumed_rows: int = 0
    drift_row: int | None = None


def score_file(
    detector: MDMLDetector,
    task: ScoreTask,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    on_drift: OnDrift | None = None,
) -> ScoreSummary:
    """Score a table of any size, in the order of its rows; the alarms keep the detector's promise.

    What is scored gathers in the folder ``<out>.partial``, and becomes `out` at the end; a run that is cut off leaves
    the folder, to be resumed. To standard output rows are written as they are scored, those of a pipe within about a
    second of their coming; under the promise ``fdr``, which depends on all of them, after the last one.

    Args:
        detector: fitted.
        task: what to score.
        resume: go on from the folder, where there is one.
        progress: told after every batch.
        on_drift: told of drift, where the task is to watch for it.

    Raises:
        InputError: the data or the task can't be used, or the folder is that of another task.
        OSError: the output cannot be written.
    """
    task.check()
    if resume and STANDARD in (task.data, task.out):
        raise InputError("a run between standard input and output can't be resumed; leave out --resume, or name files")
    by_batch = Promise(detector.promise) is Promise.FDR
    live = task.out == STANDARD and not by_batch
    # The first rows of a CSV don't tell the types of what is kept in another format.
    with open_table(task.data, with_types(task.data, _wanted(detector, task)), BATCH_ROWS, live) as table:
        _check_columns(table, task)
        if live:
            scored = _scored(detector, task, table, 0, progress)
            return _write(detector, task, table, scored, detector.alarm_level(), on_drift)
        with _parts(task, by_batch, resume) as parts:
            resumed_rows = parts.n_rows
            parts.fill(_scored(detector, task, table, resumed_rows, progress), PART_ROWS)
            level = detector.alarm_level(*_p_value_counts(parts)) if by_batch else detector.alarm_level()
            summary = _write(detector, task, table, parts, level, on_drift)
            summary.resumed_rows = resumed_rows
            return summary


def _wanted(detector: MDMLDetector, task: ScoreTask) -> Wanted:
    # From CSV to CSV as text: 007 stays 007, and 0 is no whole number where the first fraction is still to come.
    kept = dict.fromkeys(task.keep, pa.string() if task.writes_csv else None)
    group = {task.group: _type_of_groups(detector)} if task.group else {}
    return kept | group | detector.encoder_.types()  # a column that is several of these is read as the last


def _type_of_groups(detector: MDMLDetector) -> pa.DataType:
    """How CSV is read so that groups have names as in training, whatever its first rows look like."""
    groups = detector.calibration_.groups
    return pa.string() if groups is None else type_of_names(np.unique(groups).tolist())


def _check_columns(table: TableStream, task: ScoreTask) -> None:
    for name in [*task.keep, *([task.group] if task.group else [])]:
        if name not in table.names:
            raise InputError(f"{task.data} has no column {name!r}; it has {', '.join(table.names)}")


def _parts(task: ScoreTask, by_batch: bool, resume: bool) -> contextlib.AbstractContextManager[Parts]:
    if task.out == STANDARD:
        return _temporary_parts()
    if task.data == STANDARD:
        return Parts.begin(task.partial)
    begin = Parts.resume if resume else Parts.begin
    return begin(task.partial, _identity(task, by_batch))


@contextlib.contextmanager
def _temporary_parts() -> Iterator[Parts]:
    with tempfile.TemporaryDirectory(prefix="mdml-fast-") as folder, Parts.begin(Path(folder) / "parts") as parts:
        yield parts


def _identity(task: ScoreTask, by_batch: bool) -> dict[str, Any]:
    """What must agree for two runs to score the same rows in the same way; p-values by batch are of whole ranks."""
    status = task.data.stat()
    return {
        "model": hashlib.sha256((task.model / DOCUMENT).read_bytes()).hexdigest(),
        "keep": list(task.keep),
        "group": task.group,
        "explain": task.explain,
        "by_batch": by_batch,
        "data": str(task.data.resolve()),
        "bytes": status.st_size,
        "changed": status.st_mtime_ns,
    }


def _scored(
    detector: MDMLDetector, task: ScoreTask, table: TableStream, skipped_rows: int, progress: Progress | None
) -> Iterator[pa.Table]:
    """For every batch after so many rows, in order: the kept columns, the scores, the p-values, and why.

    Which rows are alarms is not known yet: the kind of anomaly is there for all.
    """

    def kept_columns(batch: pa.Table) -> pa.Table:
        return as_writable(pa.table({name: plain(batch[name]) for name in task.keep}), task.out, table.is_text)

    def score(start: int, batch: pa.Table) -> pa.Table:
        with rows_of(task.data, start, batch.num_rows):
            kept = kept_columns(batch)
            explanation = detector.explain(batch) if task.explain else None
            scores = explanation.scores if explanation else detector.score_samples(batch)
            groups = None if task.group is None else class_names(batch[task.group], f"group column {task.group!r}")
        p_values = detector.p_value_at(scores, groups)
        columns = dict(zip(kept.column_names, kept.columns, strict=True)) | {"score": scores, "p_value": p_values}
        return pa.table(columns | (explanation.why(task.explain) if explanation else {}))

    def jobs() -> Iterator[Callable[[], pa.Table] | None]:
        start = 0
        for batch in table.batches:
            if not start:
                kept_columns(batch.slice(0, 0))  # refuse what can't be written before anything is scored
            if start >= skipped_rows and batch.num_rows:
                yield partial(score, start, batch)
            if batch.num_rows < BATCH_ROWS:
                yield None  # no more have come yet: nobody shall wait for these
            start += batch.num_rows

    done = released = skipped_rows
    for result in _in_order(jobs(), _n_workers(detector)):
        done += result.num_rows
        if done - released >= PART_ROWS:
            release_memory()
            released = done
        if progress:
            progress(done, table.rows_in_all(done))
        yield result


def _n_workers(detector: MDMLDetector) -> int:
    """Threads that score, each on one core: a GPU needs only one."""
    return torch.get_num_threads() if resolve_device(detector.device).type == "cpu" else 1


def _in_order(jobs: Iterable[Callable[[], Item] | None], n_workers: int) -> Iterator[Item]:
    """The results of jobs, in order; the next ones run in other threads meanwhile."""
    n_threads, pool = torch.get_num_threads(), workers(n_workers)
    try:
        # As many wait as run, so that no thread is idle while this one reads or writes.
        yield from in_order(pool, jobs, 2 * n_workers)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(n_threads)


def _p_value_counts(tables: Iterable[pa.Table]) -> tuple[np.ndarray, np.ndarray]:
    """The distinct p-values, of which there are no more than calibration normals, and how many rows have each."""
    rows: Counter[float] = Counter()
    for table in tables:
        values, counts = np.unique(table["p_value"].to_numpy(), return_counts=True)
        rows.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
    return np.array(list(rows.keys())), np.array(list(rows.values()), dtype=np.int64)


def _write(
    detector: MDMLDetector,
    task: ScoreTask,
    source: TableStream,
    tables: Iterable[pa.Table],
    level: float,
    on_drift: OnDrift | None,
) -> ScoreSummary:
    """Write the tables, each with its alarms and where asked for its evidence of drift."""
    summary = ScoreSummary()
    monitor = DriftMonitor(detector.calibration_.scores) if task.monitor else None

    def finished() -> Iterator[pa.Table]:
        for table in tables:
            is_alarm = table["p_value"].to_numpy() <= level
            summary.rows += len(is_alarm)
            summary.alarms += int(is_alarm.sum())
            table = table.add_column(table.column_names.index("p_value") + 1, "is_anomaly", pa.array(is_alarm))
            if task.explain:
                place = table.column_names.index(KIND)
                kinds = pc.if_else(table["is_anomaly"], table[KIND], None)
                table = table.set_column(place, KIND, kinds)
            if monitor:
                evidence = monitor.evidence(table["score"].to_numpy())
                table = table.append_column("drift_evidence", pa.array(evidence))
                if summary.drift_row is None and monitor.first_row is not None:
                    summary.drift_row = monitor.first_row
                    if on_drift:
                        on_drift(summary.drift_row)
            yield table

    write_tables(finished(), task.out, text=source.is_text)
    return summary
