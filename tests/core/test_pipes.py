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

from mdml_fast import InputError
from mdml_fast.data.batches import STANDARD, check_writable, open_table
from mdml_fast.data.pipes import PATIENCE, Pipe

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
        assert not pipe.rests()  # the end is no pause
        thread.join()


def test_what_has_come_is_there_before_the_rest_is_written() -> None:
    with ends() as (reader, writer):
        pipe = Pipe(reader)
        writer.write(b"abcdefghij")
        assert pipe.peek(4) == b"abcd"
        assert not pipe.rests()  # they are still to be read
        assert pipe.read_ready(100) == b"abcdefghij"
        assert pipe.rests()
        writer.write(b"k")
        assert pipe.read_ready(100) == b"k"


def test_little_at_a_time_waits_for_no_end() -> None:
    stop = threading.Event()

    def trickle(writer: BinaryIO) -> None:
        while not stop.wait(0.01):
            writer.write(b".")

    with ends() as (reader, writer):
        thread = threading.Thread(target=trickle, args=[writer])
        thread.start()
        pipe, began, came = Pipe(reader), time.monotonic(), b""
        while not (came and pipe.rests()) and time.monotonic() < began + 10:
            came += pipe.read_ready(2**20)
        took = time.monotonic() - began
        stop.set()
        thread.join()
        assert PATIENCE <= took < 10


def test_bytes_in_memory_never_rest() -> None:
    pipe = Pipe(io.BytesIO(b"abc"))
    assert not pipe.rests()
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
    with open_table(STANDARD, WANTED, 2) as table:
        assert next(table.batches).to_pydict() == {"x": [1], "name": ["a"]}
        standard_input.write(b'c"\n3')
        assert next(table.batches).to_pydict() == {"x": [2], "name": ["b\nc"]}
        standard_input.write(b".5,d\n4,e\n")
        assert next(table.batches).to_pydict() == {"x": [3.5, 4], "name": ["d", "e"]}
        assert next(table.batches).num_rows == 0  # a whole batch, and no more for now
        standard_input.write(b"5,f")
        standard_input.close()
        assert [batch.to_pydict() for batch in table.batches] == [{"x": [5], "name": ["f"]}]


def test_batches_of_arrow_do_not_wait_for_others(standard_input: BinaryIO) -> None:
    rows = pa.table({"x": [1.0, 2.0, 3.0], "name": ["a", "b", "c"]})
    writer = pa.ipc.new_stream(standard_input, rows.schema)
    writer.write_table(rows)
    with open_table(STANDARD, WANTED, 2) as table:
        assert next(table.batches).equals(rows.slice(0, 2))
        assert next(table.batches).equals(rows.slice(2))
        writer.write_table(rows.slice(0, 1))
        assert next(table.batches).equals(rows.slice(0, 1))
        writer.close()
        standard_input.close()
        assert not list(table.batches)


def test_closed_ends_are_refused_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match=r"^standard input is closed; pipe a table into it, or name a file$"):
        open_table(STANDARD, WANTED, 2).__enter__()
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(InputError, match=r"^standard output is closed; name a file to write to$"):
        check_writable(STANDARD)
