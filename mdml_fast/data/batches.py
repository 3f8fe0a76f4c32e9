"""Tables read and written batch by batch: memory does not grow with the number of rows."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.dataset as pa_dataset
import pyarrow.parquet as pa_parquet

from mdml_fast.data.csv_blocks import csv_batches, csv_types, open_csv
from mdml_fast.data.pipes import PATIENCE, Pipe
from mdml_fast.data.tables import Wanted, check_names, check_readable, chosen, read_table, suffix_of, without_views
from mdml_fast.errors import InputError, first_line
from mdml_fast.files import check_file, replace_file

# Standard input or output, where a path is expected.
STANDARD = Path("-")

WRITABLE = (".parquet", ".csv", ".arrow", ".feather")

# Rows of a batch, where the whole is wanted.
WHOLE_ROWS = 65_536
# Bytes that a Parquet column is read ahead; without a bound a whole row group is.
PARQUET_BUFFER_BYTES = 2**18
# An Arrow file begins with these (and two more bytes), an Arrow stream with those.
ARROW_FILE, ARROW_STREAM = b"ARROW1", b"\xff\xff\xff\xff"
PARQUET, GZIP = b"PAR1", b"\x1f\x8b"


@dataclass(frozen=True)
class TableStream:
    """A table that is read batch by batch, once.

    Attributes:
        names: its columns, those that are not read too.
        batches: its rows in order, at least one, in tables of as many rows as asked for; the last may have fewer. Of a
            live one every table may, or have none: then no more have come yet.
        rows_in_all: how many rows it has, given how many were read so far: as the file says, or else estimated from
            how far into the file they reach; None where nothing tells.
        is_text: whether it is CSV, and not a binary format.
    """

    names: list[str]
    batches: Iterator[pa.Table]
    rows_in_all: Callable[[int], int | None]
    is_text: bool


@contextlib.contextmanager
def open_table(
    path: Path, wanted: Wanted, n_rows: int, live: bool = False, ignore: Collection[str] = ()
) -> Iterator[TableStream]:
    """A table to read in batches of `n_rows` rows: a file as `read_table` takes, or ``-`` for standard input.

    Standard input is Arrow IPC (stream or file) or CSV, by its first bytes. An .npz is read whole.

    Args:
        path: of the table.
        wanted: the columns to read.
        n_rows: of a batch.
        live: of standard input, give rows that have come without waiting for `n_rows` of them. (Compressed CSV is not
            read so.)
        ignore: columns that are not read.

    Raises:
        LateTypeError: while batches are read, a column of CSV without a type in `wanted` is not as its first rows
            suggest; `with_types` gives it the type of them all.
        InputError: there is no such file, it is no table or has no rows; also while its batches are read.
    """
    is_pipe = path == STANDARD
    source = "standard input" if is_pipe else str(path)
    with contextlib.ExitStack() as stack:
        with _explained(source):
            found = _standard_input(wanted, ignore, live) if is_pipe else _file(path, wanted, ignore, stack)
        check_names(found.names, source)
        if not chosen(found.names, wanted, ignore):
            raise InputError(
                f"{source} has no column to read of {', '.join(wanted or ())}; it has {', '.join(found.names)}"
            )
        batches = _resized(found, n_rows, source)
        yield TableStream(found.names, batches, found.rows_in_all, found.is_text)


def read_wanted(path: Path, wanted: Wanted) -> pa.Table:
    """Those columns of a table that are wanted, whole, of CSV with the types wanted; see `open_table`.

    Raises:
        InputError: there is no such file, it is no table or has no rows.
    """
    with open_table(path, with_types(path, wanted), WHOLE_ROWS) as source:
        return pa.concat_tables(source.batches)


def with_types(path: Path, wanted: Wanted, ignore: Collection[str] = ()) -> Wanted:
    """The columns to read, those of a CSV file with the types that all of its rows suggest where `wanted` gives none.

    That takes reading the file, and can't be told of a pipe. Binary formats say themselves what they hold.

    Args:
        path: of the table.
        wanted: the columns to read.
        ignore: columns that are not read.

    Raises:
        InputError: there is no such file, or it is no table.
    """
    if path == STANDARD or not check_readable(path).startswith(".csv"):
        return wanted
    untyped = None if wanted is None else {name: None for name, kind in wanted.items() if kind is None}
    with _explained(str(path)):
        types = {} if untyped == {} else csv_types(path, untyped, ignore)
    return {**(wanted or {}), **types}


def check_writable(path: Path) -> None:
    """Raise InputError now where `write_tables` would later: an unknown ending, or nothing there to write to."""
    if path == STANDARD:
        if sys.stdout is None:
            raise InputError("standard output is closed; name a file to write to")
        return
    suffix_of(path, WRITABLE)
    check_file(path, WRITABLE)


def write_tables(tables: Iterable[pa.Table], path: Path, text: bool = False) -> None:
    """Write tables of one schema, at least one, one after the other.

    Args:
        tables: what to write; they are taken one at a time.
        path: .parquet, .csv, .arrow or .feather, which appears whole or not at all; or ``-`` for standard output.
        text: on standard output, CSV in place of an Arrow IPC stream.

    Raises:
        InputError: the ending is none that can be written.
        OSError: it cannot be written.
    """
    if path == STANDARD:
        _write(tables, pa.PythonFile(sys.stdout.buffer, mode="w"), format_of(path, text))
        sys.stdout.buffer.flush()
        return
    with replace_file(path) as temporary, pa.OSFile(str(temporary), "wb") as sink:
        _write(tables, sink, format_of(path, text))


def as_writable(table: pa.Table, path: Path, text: bool = False) -> pa.Table:
    """A table that `write_tables` can write there: for CSV with text in place of bytes.

    Raises:
        InputError: the format has no place for a column's type, or bytes are no text.
    """
    suffix = format_of(path, text)
    for place, field in enumerate(table.schema):
        try:
            if suffix == ".csv" and _is_binary(field.type):
                table = table.set_column(place, field.name, table[place].cast(pa.string()))
            _write([pa.schema([field]).empty_table()], pa.BufferOutputStream(), suffix)
        except pa.ArrowException as error:
            says = f"column {field.name!r} holds {field.type}, which {suffix} has no place for ({first_line(error)})"
            others = ", ".join(other for other in WRITABLE if other != suffix)
            raise InputError(f"{says}; leave it out, or write {others}") from error
    return table


def _is_binary(kind: pa.DataType) -> bool:
    return any(check(kind) for check in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary))


def format_of(path: Path, text: bool) -> str:
    """The ending of the format that `write_tables` writes."""
    return suffix_of(path, WRITABLE) if path != STANDARD else ".csv" if text else ".stream"


def write_table(table: pa.Table, path: Path | str) -> None:
    """Write one table to a file; see `write_tables`."""
    write_tables([table], Path(path))


def _write(tables: Iterable[pa.Table], sink: pa.NativeFile, suffix: str) -> None:
    tables = iter(tables)
    first = next(tables)
    open_writer: Callable[[pa.NativeFile, pa.Schema], Any] = {
        ".parquet": pa_parquet.ParquetWriter,
        ".csv": pa_csv.CSVWriter,
        ".stream": pa.ipc.new_stream,
    }.get(suffix, pa.ipc.new_file)
    with open_writer(sink, first.schema) as writer:
        for table in itertools.chain([first], tables):
            writer.write_table(table)
            sink.flush()  # whoever reads it need not wait for more


@dataclass(frozen=True)
class _Found:
    """A `TableStream` whose batches are of any size.

    Attributes:
        paused: tells, after a batch of a live one, whether the next has not come yet; None where it is not live.
    """

    names: list[str]
    batches: Iterable[pa.RecordBatch]
    rows_in_all: Callable[[int], int | None]
    is_text: bool = False
    paused: Callable[[], bool] | None = None


def _file(path: Path, wanted: Wanted, ignore: Collection[str], stack: contextlib.ExitStack) -> _Found:
    suffix = check_readable(path)
    if suffix == ".parquet":
        file = pa_parquet.ParquetFile(path, buffer_size=PARQUET_BUFFER_BYTES, pre_buffer=False)
        return _parquet(stack.enter_context(file), wanted, ignore)
    if suffix in (".arrow", ".feather"):
        return _arrow_file(path, wanted, ignore, stack)
    if suffix == ".npz":
        table = read_table(path)
        return _Found(table.column_names, table.to_batches(), lambda _: table.num_rows)
    read, tell = stack.enter_context(open_csv(path))
    size = path.stat().st_size
    names, batches = csv_batches(read, wanted, str(path), ignore)
    return _Found(names, batches, lambda n_rows: round(n_rows * size / max(tell(), 1)), is_text=True)


def _parquet(file: pa_parquet.ParquetFile, wanted: Wanted, ignore: Collection[str]) -> _Found:
    schema = file.schema_arrow
    # pandas may have stored its row labels as a column; they are no feature.
    pandas = json.loads((schema.metadata or {}).get(b"pandas", b"{}"))
    stored = [name for name in pandas.get("index_columns", []) if isinstance(name, str)]
    names = [name for name in schema.names if name not in stored]
    n_rows = file.metadata.num_rows
    columns = chosen(names, wanted, ignore)
    return _Found(names, file.iter_batches(columns=columns, use_threads=False), lambda _: n_rows)


def _arrow_file(path: Path, wanted: Wanted, ignore: Collection[str], stack: contextlib.ExitStack) -> _Found:
    # Mapped, so that one batch as large as the file need not fit in memory.
    mapped = stack.enter_context(pa.memory_map(str(path)))
    names = pa.ipc.open_file(mapped).schema.names
    fields = [names.index(name) for name in chosen(names, wanted, ignore)]
    reader = pa.ipc.open_file(mapped, options=pa.ipc.IpcReadOptions(included_fields=fields, use_threads=False))
    n_rows = pa_dataset.dataset(str(path), format="ipc").count_rows()
    return _Found(names, map(reader.get_batch, range(reader.num_record_batches)), lambda _: n_rows)


def _standard_input(wanted: Wanted, ignore: Collection[str], live: bool) -> _Found:
    if sys.stdin is None:
        raise InputError("standard input is closed; pipe a table into it, or name a file")
    pipe = Pipe(sys.stdin.buffer)
    start = pipe.peek(8)
    if start.startswith((ARROW_FILE, ARROW_STREAM)):
        if start.startswith(ARROW_FILE):
            pipe.read(8)  # what follows is a stream
        reader = pa.ipc.open_stream(pipe)
        names = reader.schema.names
        batches = (batch.select(chosen(names, wanted, ignore)) for batch in reader)
        return _Found(names, batches, _nobody_knows, paused=pipe.paused if live else None)
    if start.startswith(PARQUET):
        raise InputError("standard input is Parquet, which is read from its end: name the file instead")
    read: Callable[[int], bytes] = pipe.read_ready if live else pipe.read
    if start.startswith(GZIP):
        read, live = gzip.GzipFile(fileobj=pipe).read, False
    names, rows = csv_batches(read, wanted, "standard input", ignore)
    return _Found(names, rows, _nobody_knows, is_text=True, paused=pipe.paused if live else None)


def _nobody_knows(_: int) -> None:
    """How many rows there will be."""


def _resized(found: _Found, n_rows: int, source: str) -> Iterator[pa.Table]:
    waiting, n_waiting, since, is_empty = list[pa.Table](), 0, 0.0, True
    with _explained(source):
        for batch in found.batches:
            if not n_waiting:
                since = time.monotonic()
            waiting.append(without_views(pa.Table.from_batches([batch])))
            n_waiting += batch.num_rows
            is_empty = is_empty and not n_waiting
            if n_waiting >= n_rows:
                table = pa.concat_tables(waiting)
                while table.num_rows >= n_rows:
                    yield table.slice(0, n_rows)
                    table = table.slice(n_rows)
                waiting, n_waiting, since = [table], table.num_rows, time.monotonic()
            if found.paused and (found.paused() or time.monotonic() - since > PATIENCE):
                yield pa.concat_tables(waiting)
                waiting, n_waiting = [], 0
    if n_waiting:
        yield pa.concat_tables(waiting)
    elif is_empty:
        raise InputError(f"{source} has no rows")


@contextlib.contextmanager
def _explained(source: str) -> Iterator[None]:
    """One line for what pyarrow and gzip raise on files that are no tables."""
    try:
        yield
    except InputError:
        raise
    except (pa.ArrowException, OSError, ValueError, EOFError) as error:
        raise InputError(f"{source} is not a table that can be read: {first_line(error)}") from error
