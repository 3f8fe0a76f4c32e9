"""CSV that is parsed block by block, as it is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa
import pyarrow.csv as pa_csv

from mdml_fast.data.tables import CSV_ROW_BYTES, Wanted, check_names, chosen, csv_values
from mdml_fast.errors import InputError

# So many bytes at once; the first tell the types of the columns.
CSV_BLOCK_BYTES = 2**22
# A value in quotes, which begin where a value does; to the end, where they are not closed.
QUOTED = re.compile(rb'(?:\A|(?<=[,\r\n]))"[^"]*(?:""[^"]*)*"?')


def csv_batches(
    read: Callable[[int], bytes], wanted: Wanted, source: str
) -> tuple[list[str], Iterator[pa.RecordBatch]]:
    """The names of a CSV's columns, and its rows: for each read at least a batch, of no rows where none ended.

    pyarrow's own reader of streams would read from Python in threads that outlive it.

    Args:
        read: gives at most so many bytes; none at the end.
        wanted: the columns to read.
        source: for messages.

    Raises:
        InputError: there is nothing to read, or names are used twice.
    """
    blocks = _whole_rows(read)
    first, found = b"", None
    for block in blocks:
        first += block
        found = _parsed(first, csv_values()) if first else None
        if found is not None and found.num_rows:
            break  # names alone tell no types
    if found is None:
        raise InputError(f"{source} is empty")
    schema = found.schema
    check_names(schema.names, source)
    types = {name: schema.field(name).type for name in chosen(schema.names, wanted)}
    if wanted is not None:
        types = {name: _text_type(kind, wanted[name]) for name, kind in types.items()}
    options = csv_values(column_types=types, include_columns=list(types))
    no_rows = pa.RecordBatch.from_pylist([], pa.schema(list(types.items())))

    def batches() -> Iterator[pa.RecordBatch]:
        yield from _parsed(first, options).to_batches()
        for block in blocks:
            yield from _parsed(block, options, schema.names).to_batches() if block else [no_rows]

    return schema.names, batches()


def type_of_names(names: Sequence[str]) -> pa.DataType:
    """How a column of CSV is read so that its values, as text, are names like these, at least one."""
    sink = pa.BufferOutputStream()
    pa_csv.write_csv(pa.table({"names": names}), sink)
    column = _parsed(sink.getvalue().to_pybytes(), csv_values())["names"]
    return column.type if column.cast(pa.string()).to_pylist() == names else pa.string()


def _parsed(block: bytes, options: pa_csv.ConvertOptions, names: list[str] | None = None) -> pa.Table:
    """A block of whole rows; names are its columns', where its first row does not tell them."""
    within_quotes = pa_csv.ParseOptions(newlines_in_values=b'"' in block)  # to look for them takes longer
    headed = pa_csv.ReadOptions(column_names=names, block_size=max(1, len(block)))
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
    if pa.types.is_null(found):
        return wanted or pa.string()
    # Whole numbers may become fractions farther down; booleans and text have to be as they were in training.
    is_whole = pa.types.is_integer(found)
    return wanted if wanted is not None and (is_whole or pa.types.is_string(wanted)) else found
