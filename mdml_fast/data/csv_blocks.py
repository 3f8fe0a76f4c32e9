"""CSV that is parsed block by block, as it is read."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv

from mdml_fast.data.tables import CSV_ROW_BYTES, Wanted, check_names, chosen, csv_values
from mdml_fast.errors import InputError, first_line

# So many bytes at once; the first tell the types of the columns.
CSV_BLOCK_BYTES = 2**22
# What pyarrow takes a column for, narrowest first: the first of these to which all of its values convert.
TYPES = (
    *(pa.null(), pa.int64(), pa.bool_(), pa.date32(), pa.time32("s")),
    *(pa.timestamp(unit, zone) for unit in ("s", "ns") for zone in (None, "UTC")),
    *(pa.float64(), pa.string(), pa.binary()),
)
# What pyarrow says of a value, the row being that of the table.
BAD_VALUE = re.compile(r"In CSV column #(\d+): (row \d+): CSV conversion error to (.*?): (.*)", re.DOTALL)
# A value in quotes, which begin where a value does; to the end, where they are not closed.
QUOTED = re.compile(rb'(?:\A|(?<=[,\r\n]))"[^"]*(?:""[^"]*)*"?')


class LateTypeError(InputError):
    """A value of a CSV does not convert to the type that the first rows suggest for its column."""


@contextlib.contextmanager
def open_csv(path: Path) -> Iterator[tuple[Callable[[int], bytes], Callable[[], int]]]:
    """Of a file .csv or .csv.gz: what reads at most so many bytes of text, and what tells how far into it that is."""
    with path.open("rb") as raw:
        text: Any = gzip.GzipFile(fileobj=raw) if path.suffix.lower() == ".gz" else raw
        yield text.read, raw.tell


def csv_batches(
    read: Callable[[int], bytes], wanted: Wanted, source: str, ignore: Collection[str] = ()
) -> tuple[list[str], Iterator[pa.RecordBatch]]:
    """The names of a CSV's columns, and its rows: for each read at least a batch, of no rows where none ended.

    pyarrow's own reader of streams would read from Python in threads that outlive it.

    Args:
        read: gives at most so many bytes; none at the end.
        wanted: the columns to read.
        source: for messages.
        ignore: columns that are not read.

    Raises:
        LateTypeError: while rows are read, a value is not of the type that the first rows suggest.
        InputError: there is nothing to read, or names are used twice; or while rows are read, one is no row.
    """
    blocks, schema = _headed_blocks(read, source)
    types = {name: schema.field(name).type for name in chosen(schema.names, wanted, ignore)}
    if wanted is not None:
        types = {name: _text_type(kind, wanted[name]) for name, kind in types.items()}
    guessed = [name for name in types if wanted is None or wanted[name] is None]
    no_rows = pa.RecordBatch.from_pylist([], pa.schema(list(types.items())))

    def batches() -> Iterator[pa.RecordBatch]:
        n_rows = 0
        for block, names in blocks:
            if not block:
                yield no_rows
                continue
            try:
                rows = _typed(block, types, names)
            except pa.ArrowInvalid as error:
                raise _refusal(error, block, types, names, n_rows, source, guessed) from error
            n_rows += rows.num_rows
            yield from rows.to_batches()

    return schema.names, batches()


def csv_types(path: Path, wanted: Wanted, ignore: Collection[str] = ()) -> dict[str, pa.DataType]:
    """The types of a file's columns as all of its rows suggest: those of `read_table`, in the memory of a block.

    Args:
        path: .csv or .csv.gz.
        wanted: the columns whose types to tell.
        ignore: columns that are not read.

    Raises:
        InputError: there is nothing to read, or a row is none.
    """
    types: dict[str, pa.DataType] | None = None
    while True:
        with open_csv(path) as (read, _):
            blocks, schema = _headed_blocks(read, str(path))
            if types is None:
                types = {name: schema.field(name).type for name in chosen(schema.names, wanted, ignore)}
            before, n_rows = types, 0
            for block, names in blocks:
                try:
                    n_rows += _typed(block, types, names).num_rows if block else 0
                except pa.ArrowInvalid as error:
                    as_bytes = dict.fromkeys(types, pa.binary())
                    try:
                        n_rows += _typed(block, as_bytes, names).num_rows
                    except pa.ArrowInvalid:
                        raise _refusal(error, block, as_bytes, names, n_rows, str(path)) from error
                    types = {name: _widened(block, name, kind, names) for name, kind in types.items()}
        if types == before:  # else rows before those that widened a type have to convert to it, too
            return types


def type_of_names(names: Sequence[str]) -> pa.DataType:
    """How a column of CSV is read so that its values, as text, are names like these, at least one."""
    sink = pa.BufferOutputStream()
    pa_csv.write_csv(pa.table({"names": names}), sink)
    column = _parsed(sink.getvalue().to_pybytes(), csv_values())["names"]
    return column.type if column.cast(pa.string()).to_pylist() == names else pa.string()


def _headed_blocks(
    read: Callable[[int], bytes], source: str
) -> tuple[Iterator[tuple[bytes, list[str] | None]], pa.Schema]:
    """The blocks, each with the names of its columns where its first row does not tell them; and what the first is.

    Raises:
        InputError: there is nothing to read, a row is none, or names are used twice.
    """
    blocks = _whole_rows(read)
    first, found = b"", None
    for block in blocks:
        first += block
        try:
            found = _parsed(first, csv_values()) if first else None
        except pa.ArrowInvalid as error:
            raise _refusal(error, first, {}, None, 0, source) from error
        if found is not None and found.num_rows:
            break  # names alone tell no types
    if found is None:
        raise InputError(f"{source} is empty")
    names = found.schema.names
    check_names(names, source)
    return itertools.chain([(first, None)], zip(blocks, itertools.repeat(names))), found.schema


def _typed(
    block: bytes, types: Mapping[str, pa.DataType], names: list[str] | None, use_threads: bool = True
) -> pa.Table:
    return _parsed(block, csv_values(column_types=types, include_columns=list(types)), names, use_threads)


def _widened(block: bytes, name: str, kind: pa.DataType, names: list[str] | None) -> pa.DataType:
    """The narrowest type to which a column's values in a block convert, as those before did to `kind`."""
    for wider in (kind, *TYPES[TYPES.index(kind) + 1 :]):
        with contextlib.suppress(pa.ArrowInvalid):
            _typed(block, {name: wider}, names)
            return wider
    return TYPES[-1]


def _refusal(
    error: pa.ArrowInvalid,
    block: bytes,
    types: Mapping[str, pa.DataType],
    names: list[str] | None,
    n_before: int,
    source: str,
    guessed: Collection[str] = (),
) -> InputError:
    """What to say of a block that can't be parsed, which so many rows come before."""
    says = first_line(error)
    try:
        _typed(block, types, names, use_threads=False)  # only one thread counts rows
    except pa.ArrowInvalid as counted:
        says = first_line(counted)
    refused = f"{source} is not a table that can be read"
    header = 0 if names else 1
    says = re.sub(r"Row #(\d+)", lambda row: f"row {int(row[1]) - header + n_before}", says)
    if (bad := BAD_VALUE.match(says)) is None:
        return InputError(f"{refused}: {says}")
    column = _parsed(block, csv_values()).column_names[int(bad[1])] if names is None else names[int(bad[1])]
    says = f"{refused}: column {column!r} has {bad[4]} for {bad[3]} in {bad[2]}"
    if column not in guessed:
        return InputError(f"{says}; replace it")
    return LateTypeError(f"{says}; its type is that of the first rows, as a pipe is read once: name a file instead")


def _parsed(
    block: bytes, options: pa_csv.ConvertOptions, names: list[str] | None = None, use_threads: bool = True
) -> pa.Table:
    """A block of whole rows; names are its columns', where its first row does not tell them."""
    within_quotes = pa_csv.ParseOptions(newlines_in_values=b'"' in block)  # to look for them takes longer
    headed = pa_csv.ReadOptions(column_names=names, block_size=max(1, len(block)), use_threads=use_threads)
    return pa_csv.read_csv(_native(block), headed, within_quotes, options)


def _native(data: bytes) -> pa.BufferReader:
    """A copy that Arrow owns: its threads may let go of it when Python is ending, and would crash on Python's bytes."""
    sink = pa.BufferOutputStream()
    sink.write(data)
    return pa.BufferReader(sink.getvalue())


def _whole_rows(read: Callable[[int], bytes]) -> Iterator[bytes]:
    """What is read, in blocks that end with a row: one for each read, empty where it ended none, or only blank ones."""
    rest = b""
    while data := read(CSV_BLOCK_BYTES):
        data = rest + data
        end = _end_of_rows(data)
        rows, rest = data[:end], data[end:]
        yield rows if rows.strip() else b""
    if rest.strip():
        yield rest


def _end_of_rows(data: bytes) -> int:
    """Behind the last line break that is not within quotes; if there is none for too long, behind the last."""
    last = end = data.rfind(b"\n") + 1
    quoted = [value.span() for value in QUOTED.finditer(data)] if b'"' in data else []
    for begin, stop in reversed(quoted):
        if stop < end:
            break
        if begin < end:
            end = data.rfind(b"\n", 0, begin) + 1
    return end or (last if len(data) > CSV_ROW_BYTES else 0)


def _text_type(found: pa.DataType, wanted: pa.DataType | None) -> pa.DataType:
    """The type to read a CSV column as, which looked like `found` in its first rows."""
    if wanted is None:
        return pa.string() if pa.types.is_null(found) else found
    if pa.types.is_null(found):
        return wanted
    # Whole numbers may become fractions farther down; booleans and text have to be as they were in training.
    is_narrower = pa.types.is_integer(found) or (pa.types.is_temporal(found) and pa.types.is_timestamp(wanted))
    takes_all = pa.types.is_string(wanted) or pa.types.is_binary(wanted)
    return wanted if is_narrower or takes_all else found
