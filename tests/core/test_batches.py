"""Tables read and written batch by batch say the same as the whole."""

import contextlib
import gzip
import io
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pa_parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mdml_fast import InputError
from mdml_fast.data import csv_blocks
from mdml_fast.data.batches import STANDARD, open_table, with_types, write_tables
from mdml_fast.data.tables import Wanted, read_table

N_ROWS = 1000
TABLE = pa.table(
    {
        "id": pa.array(range(N_ROWS)),
        "x": pa.array([None if i % 7 == 0 else i / 2 for i in range(N_ROWS)]),
        "kind": pa.array([f"k{i % 3}" for i in range(N_ROWS)]),
        "other": pa.array(["unread"] * N_ROWS),
    }
)
WANTED = {"id": None, "x": pa.float64(), "kind": pa.string(), "missing": pa.float64()}


def read(path: Path, n_rows: int = 300, wanted: Wanted = WANTED) -> list[pa.Table]:
    with open_table(path, wanted, n_rows) as table:
        return list(table.batches)


class Standard:
    """Standard input or output of these bytes."""

    def __init__(self, data: bytes = b"") -> None:
        self.buffer = io.BytesIO(data)


@pytest.mark.parametrize("name", ["t.parquet", "t.csv", "t.arrow", "t.feather", "t.csv.gz"])
def test_batches_are_the_table_in_pieces_of_the_size_asked_for(tmp_path: Path, name: str) -> None:
    plain = tmp_path / name.removesuffix(".gz")
    write_tables([TABLE.slice(0, 10), TABLE.slice(10)], plain)
    if name.endswith(".gz"):
        (tmp_path / name).write_bytes(gzip.compress(plain.read_bytes()))
    pieces = read(tmp_path / name)
    assert [piece.num_rows for piece in pieces] == [300, 300, 300, 100]
    assert pa.concat_tables(pieces).equals(TABLE.select(["id", "x", "kind"]))


def test_an_npz_is_read_in_pieces(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", X=np.arange(20.0).reshape(10, 2))
    assert [piece.num_rows for piece in read(tmp_path / "t.npz", 6, {"x0": None})] == [6, 4]


@pytest.mark.parametrize("kind", ["stream", "file", "csv", "csv.gz"])
def test_standard_input_is_told_by_its_first_bytes(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    sink = io.BytesIO()
    if kind.startswith("csv"):
        pa_csv.write_csv(TABLE, sink)
    else:
        with {"stream": pa.ipc.new_stream, "file": pa.ipc.new_file}[kind](sink, TABLE.schema) as writer:
            writer.write_table(TABLE)
    data = sink.getvalue()
    monkeypatch.setattr(sys, "stdin", Standard(gzip.compress(data) if kind.endswith("gz") else data))
    with open_table(STANDARD, WANTED, 300) as table:
        assert table.is_text == kind.startswith("csv")
        assert table.rows_in_all(300) is None
        assert pa.concat_tables(table.batches).equals(TABLE.select(["id", "x", "kind"]))


def test_parquet_is_not_read_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    sink = io.BytesIO()
    pa_parquet.write_table(TABLE, sink)
    monkeypatch.setattr(sys, "stdin", Standard(sink.getvalue()))
    with pytest.raises(InputError, match=r"^standard input is Parquet, .*: name the file instead$"):
        open_table(STANDARD, WANTED, 300).__enter__()


@pytest.mark.parametrize("text", [True, False])
def test_standard_output_is_csv_or_an_arrow_stream(monkeypatch: pytest.MonkeyPatch, text: bool) -> None:
    stdout = Standard()
    monkeypatch.setattr(sys, "stdout", stdout)
    write_tables([TABLE.slice(0, 600), TABLE.slice(600)], STANDARD, text)
    written = io.BytesIO(stdout.buffer.getvalue())
    found = pa_csv.read_csv(written) if text else pa.ipc.open_stream(written).read_all()
    assert found["kind"].to_pylist() == TABLE["kind"].to_pylist()


@pytest.mark.parametrize("name", ["t.parquet", "t.arrow", "t.csv", "t.csv.gz"])
def test_the_number_of_rows_is_known_or_estimated(tmp_path: Path, name: str) -> None:
    write_tables([TABLE], tmp_path / name.removesuffix(".gz"))
    if name.endswith(".gz"):
        (tmp_path / name).write_bytes(gzip.compress((tmp_path / "t.csv").read_bytes()))
    with open_table(tmp_path / name, WANTED, 300) as table:
        read_rows = sum(batch.num_rows for batch in table.batches)
        assert table.rows_in_all(read_rows) == N_ROWS


def test_types_of_csv_columns_are_those_of_the_model_and_not_of_the_first_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(csv_blocks, "CSV_BLOCK_BYTES", 64)
    first = "1,,1,true,007\n" * 20
    path = tmp_path / "t.csv"
    path.write_text(f"whole,empty,code,flag,kept\n{first}1.5,2.5,b,false,8\n")
    wanted = {"whole": pa.float64(), "empty": pa.float64(), "code": pa.string(), "flag": pa.float64(), "kept": None}
    (table,) = read(path, 100, wanted)
    assert table.slice(20).to_pylist() == [{"whole": 1.5, "empty": 2.5, "code": "b", "flag": False, "kept": 8}]
    path.write_text(f"whole,empty,code,flag,kept\n{first}one,2.5,b,false,8\n")
    says = (
        r"t\.csv is not a table that can be read: column 'whole' has invalid value 'one' for double in row 21; replace"
    )
    with pytest.raises(InputError, match=says):
        read(path, 100, wanted)


@pytest.mark.parametrize("size", [64, 1 << 20])
def test_a_row_that_is_none_is_named_wherever_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Blank lines are no rows; the first block has the names."""
    monkeypatch.setattr(csv_blocks, "CSV_BLOCK_BYTES", size)
    for bad, says in [
        (b"1", "row 42: Expected 2 columns, got 1"),
        (b"1\n2,b\n", "row 42: Expected 2 columns, got 1"),
        (b"1,\xff", "column 'name' has invalid UTF8 data for string in row 42; replace it"),
    ]:
        (tmp_path / "t.csv").write_bytes(b"x,name\n" + b"1,a\n\n2,b\n" * 20 + b"3,c\n" + bad)
        with pytest.raises(InputError, match=rf"^\S+t\.csv is not a table that can be read: .*{says}"):
            read(tmp_path / "t.csv", 9, {"x": pa.float64(), "name": pa.string()})


LATE = ["", "1", "0", "007", "2.5", "true", "2020-01-01", "10:20", "2020-01-01 10:00:00.5", "2020-01-01T10:00:00Z", "a"]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(st.sampled_from(LATE), min_size=1, max_size=12), size=st.integers(4, 40))
def test_types_by_all_rows_are_those_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: list[str], size: int
) -> None:
    monkeypatch.setattr(csv_blocks, "CSV_BLOCK_BYTES", size)
    path = tmp_path / "t.csv"
    path.write_text("\n".join(["row,x,unread", *(f"{i},{value},{value}" for i, value in enumerate(values))]))
    whole = read_table(path).drop_columns(["unread"])
    wanted = with_types(path, None, ["unread"])
    assert wanted == dict(zip(whole.column_names, whole.schema.types, strict=True))
    assert pa.concat_tables(read(path, 3, wanted)).equals(whole)
    assert with_types(path, {"x": None, "row": pa.float64()}) == {"x": whole["x"].type, "row": pa.float64()}


def test_binary_formats_and_pipes_need_no_types(tmp_path: Path) -> None:
    write_tables([TABLE], tmp_path / "t.parquet")
    assert with_types(tmp_path / "t.parquet", WANTED) is WANTED
    assert with_types(STANDARD, None) is None


def test_blank_lines_and_lines_longer_than_a_block_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_blocks, "CSV_BLOCK_BYTES", 8)
    long = "y" * 50
    (tmp_path / "t.csv").write_text(f"text,x\na,1\n\n\n\n\n\n\n\n\n\n\n\n\n{long},2\nb,3")
    (table,) = read(tmp_path / "t.csv", 100, {"text": pa.string(), "x": pa.float64()})
    assert table.to_pydict() == {"text": ["a", long, "b"], "x": [1, 2, 3]}


def quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


VALUES = st.text('a,"\n', min_size=1, max_size=9).map(lambda text: (quoted(text), text)) | st.just(
    ('5" pipe', '5" pipe')
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(VALUES, min_size=1, max_size=30), size=st.integers(1, 60))
def test_line_breaks_within_quotes_end_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: list[tuple[str, str]], size: int
) -> None:
    """A quote in the middle of a value means itself."""
    monkeypatch.setattr(csv_blocks, "CSV_BLOCK_BYTES", size)
    lines = [f"{written},{i}" for i, (written, _) in enumerate(values)]
    (tmp_path / "t.csv").write_text("\n".join(["text,x", *lines]))
    expected = {"text": [text for _, text in values], "x": list(range(len(values)))}
    pieces = read(tmp_path / "t.csv", 7, None)
    assert pa.concat_tables(pieces).to_pydict() == expected
    assert read_table(tmp_path / "t.csv").to_pydict() == expected


@pytest.mark.parametrize("text", ["y" * 3_000_000, '{"key": "value",\n' * 200_000])
def test_long_rows_are_read_in_time(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.csv").write_text(f"text,x\na,1\n{quoted(text)},2\n")
    start = time.perf_counter()
    (table,) = read(tmp_path / "t.csv", 7, None)
    assert time.perf_counter() - start < 20
    assert table.to_pydict() == read_table(tmp_path / "t.csv").to_pydict() == {"text": ["a", text], "x": [1, 2]}


def test_a_quote_that_is_not_closed_fills_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_blocks, "CSV_BLOCK_BYTES", 64)
    monkeypatch.setattr(csv_blocks, "CSV_ROW_BYTES", 256)
    sizes: list[int] = []
    parsed = csv_blocks._parsed
    monkeypatch.setattr(
        csv_blocks, "_parsed", lambda block, *others: sizes.append(len(block)) or parsed(block, *others)
    )
    (tmp_path / "t.csv").write_text('text,x\na,1\n"b,2\n' + "c,3\n" * 500)
    with contextlib.suppress(InputError):
        read(tmp_path / "t.csv", 7, None)
    assert max(sizes) < 512


def test_labels_of_rows_that_pandas_stored_are_no_column(tmp_path: Path) -> None:
    pd.DataFrame({"x": [1.0, 2.0]}, index=["a", "b"]).to_parquet(tmp_path / "t.parquet")
    with open_table(tmp_path / "t.parquet", WANTED, 5) as table:
        assert table.names == ["x"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("t.parquet", b"PAR1 and nothing", "is not a table that can be read"),
        ("t.arrow", b"nothing", "is not a table that can be read"),
        ("t.csv", b"", "is empty"),
        ("t.csv", b"x\n", "has no rows"),
        ("t.csv", b"x,x\n1,2\n", "several columns named 'x'"),
        ("t.csv", b"y,z\n1,2\n", "has no column to read of x; it has y, z"),
        ("t.csv", b"x\n\xff\xfe\n", "is not a table that can be read"),
        ("t.csv.gz", gzip.compress(b"x\n1\n" * 500, mtime=0)[:30], "is not a table that can be read"),
        ("t.txt", b"x\n1\n", "must end in"),
    ],
)
def test_what_is_no_table_is_refused_in_one_line(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=says) as caught:
        read(tmp_path / name, wanted={"x": pa.string()})
    assert "\n" not in str(caught.value)


def test_a_parquet_file_cut_short_in_the_middle_is_refused(tmp_path: Path) -> None:
    pa_parquet.write_table(pa.table({"x": np.random.default_rng(0).normal(size=5000)}), tmp_path / "t.parquet")
    data = bytearray((tmp_path / "t.parquet").read_bytes())
    data[1000:3000] = bytes(2000)
    (tmp_path / "t.parquet").write_bytes(data[:4] + data[500:])
    with pytest.raises(InputError, match="is not a table that can be read"):
        read(tmp_path / "t.parquet")
