"""What comes through a pipe is handed on as it comes, and whole where it must be."""

import contextlib
import io
import os
import sys
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import BinaryIO

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow.csv import ConvertOptions, read_csv, write_csv

from mdml_fast import InputError
from mdml_fast.data import csv_blocks
from mdml_fast.data.batches import STANDARD, check_writable, open_table
from mdml_fast.data.csv_blocks import type_of_names
from mdml_fast.data.labelled import class_names
from mdml_fast.data.pipes import PATIENCE, PAUSE, Pipe

WANTED = {"x": pa.float64(), "name": pa.string()}


@contextlib.contextmanager
def ends() -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The two ends of a pipe: to read, with a buffer as standard input has, and to write, without."""
    out, into = os.pipe()
    with os.fdopen(out, "rb") as reader, os.fdopen(into, "wb", buffering=0) as writer:
        yield reader, writer


@given(pieces=st.lists(st.binary(max_size=20), max_size=20), sizes=st.lists(st.integers(1, 60), min_size=1))
def test_bytes_are_whole_and_in_order_however_they_come(pieces: list[bytes], sizes: list[int]) -> None:
    data = b"".join(pieces)

    def write(writer: BinaryIO) -> None:
        for piece in pieces:
            writer.write(piece)
        writer.close()

    with ends() as (reader, writer):
        thread = threading.Thread(target=write, args=[writer])
        thread.start()
        pipe, at = Pipe(reader), 0
        assert pipe.peek(8) == data[:8]
        for size in sizes:
            assert pipe.read(size) == data[at : at + size]
            at += size
        rest = b""
        while piece := pipe.read_ready(7):
            assert len(piece) <= 7
            rest += piece
        assert rest == data[at:]
        assert not pipe.paused()
        thread.join()


def test_what_has_come_is_there_before_the_rest_is_written() -> None:
    with ends() as (reader, writer):
        pipe = Pipe(reader)
        writer.write(b"abcdefghij")
        assert pipe.peek(4) == b"abcd"
        assert pipe.read_ready(5) == b"abcde"
        assert not pipe.paused()
        assert pipe.read_ready(100) == b"fghij"
        assert pipe.paused()
        writer.write(b"kl")
        assert pipe.read_ready(2) == b"kl"
        assert pipe.paused()  # all the same, as no more comes
        writer.close()
        assert pipe.read_ready(100) == b""
        assert not pipe.paused()


def test_bytes_in_memory_are_all_there() -> None:
    pipe = Pipe(io.BytesIO(b"abc"))
    assert not pipe.paused()
    assert pipe.read_ready(2) == b"ab"
    assert pipe.read(5) == b"c"
    assert (pipe.read_ready(2), pipe.read(2)) == (b"", b"")


def test_a_pipe_that_does_not_block_is_waited_for() -> None:
    with ends() as (reader, writer):
        os.set_blocking(reader.fileno(), False)
        threading.Timer(0.05, lambda: (writer.write(b"late"), writer.close())).start()
        assert Pipe(reader).read() == b"late"


@pytest.fixture
def standard_input(monkeypatch: pytest.MonkeyPatch) -> Iterator[BinaryIO]:
    """The end to write of a pipe into standard input."""
    with ends() as (reader, writer):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=reader))
        yield writer


def test_rows_of_csv_do_not_wait_for_others(standard_input: BinaryIO) -> None:
    standard_input.write(b'x,name\n1,a\n2,"b\n')
    with open_table(STANDARD, WANTED, 2, live=True) as table:
        assert next(table.batches).to_pydict() == {"x": [1], "name": ["a"]}
        standard_input.write(b'c"\n3')
        assert next(table.batches).to_pydict() == {"x": [2], "name": ["b\nc"]}
        standard_input.write(b".5,d\n4,e\n")
        assert next(table.batches).to_pydict() == {"x": [3.5, 4], "name": ["d", "e"]}
        assert next(table.batches).num_rows == 0  # a whole batch, and no more for now
        standard_input.write(b"5,f")
        standard_input.close()
        assert [row for batch in table.batches for row in batch.to_pylist()] == [{"x": 5, "name": "f"}]


def test_batches_of_arrow_do_not_wait_for_others(standard_input: BinaryIO) -> None:
    rows = pa.table({"x": [1.0, 2.0, 3.0], "name": ["a", "b", "c"]})
    writer = pa.ipc.new_stream(standard_input, rows.schema)
    writer.write_table(rows)
    with open_table(STANDARD, WANTED, 2, live=True) as table:
        assert next(table.batches).equals(rows.slice(0, 2))
        assert next(table.batches).equals(rows.slice(2))
        writer.write_table(rows.slice(0, 1))
        assert next(table.batches).equals(rows.slice(0, 1))
        writer.close()
        standard_input.close()
        assert not list(table.batches)


@pytest.mark.parametrize("kind", ["csv", "arrow"])
def test_no_row_waits_while_others_keep_coming(standard_input: BinaryIO, kind: str) -> None:
    """A thousand a second, and the pieces that they come in begin and end within rows."""
    stop, row = threading.Event(), pa.table({"x": [1.0], "name": ["a"]})

    def write() -> None:
        with contextlib.suppress(OSError, pa.ArrowException):  # nobody reads any more
            if kind == "csv":
                standard_input.write(b"x,name\n1,")
                while not stop.wait(0.001):
                    standard_input.write(b"a\n1,")
                return
            stream = pa.ipc.new_stream(standard_input, row.schema)
            while not stop.wait(0.001):
                stream.write_table(row)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        with open_table(STANDARD, WANTED, 100_000, live=True) as table:
            for _ in range(3):
                began = time.monotonic()
                assert 0 < next(table.batches).num_rows < 10_000
                assert time.monotonic() - began < 5 * PATIENCE
    finally:
        stop.set()
        thread.join()


def test_rows_are_handed_on_before_a_piece_of_the_next(
    standard_input: BinaryIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(csv_blocks, "CSV_BLOCK_BYTES", 16)
    block = b"x,name\n1,a\n2,b\n3"
    assert len(block) == csv_blocks.CSV_BLOCK_BYTES
    standard_input.write(block + b",")
    with open_table(STANDARD, WANTED, 100, live=True) as table:
        assert next(table.batches).to_pydict() == {"x": [1, 2], "name": ["a", "b"]}


@pytest.mark.parametrize("piece", [b"0.5,b\n", b"a4,b\n"])
def test_a_table_that_nobody_waits_for_is_read_as_a_file_is(standard_input: BinaryIO, piece: bytes) -> None:
    """Whatever pauses there are: the types of columns are not those of the first rows to come."""
    threading.Timer(5 * PAUSE, lambda: (standard_input.write(piece), standard_input.close())).start()
    standard_input.write(b"x,name\n0,a\n")
    with open_table(STANDARD, None, 100) as table:
        (rows,) = table.batches
    assert rows["x"].to_pylist() == ([0, 0.5] if piece.startswith(b"0") else ["0", "a4"])


def test_groups_are_read_so_that_their_names_are_those_of_training() -> None:
    for names in (["7", "8"], ["007"], ["true"], ["1.5"], ["2020-01-01"], ['x"y', "a,b"], ["NA"], ["7", "web"]):
        sink = io.BytesIO()
        write_csv(pa.table({"g": names}), sink)
        sink.seek(0)
        values = read_csv(sink, convert_options=ConvertOptions(column_types={"g": type_of_names(names)}))["g"]
        assert class_names(values, "group").tolist() == names


def test_closed_ends_are_refused_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match=r"^standard input is closed; pipe a table into it, or name a file$"):
        open_table(STANDARD, WANTED, 2).__enter__()
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(InputError, match=r"^standard output is closed; name a file to write to$"):
        check_writable(STANDARD)
