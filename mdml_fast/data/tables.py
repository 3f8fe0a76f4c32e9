"""Reading and writing tables: files, arrays and data frames all become a pyarrow Table."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.feather as pa_feather
import pyarrow.parquet as pa_parquet

from mdml_fast.errors import InputError
from mdml_fast.files import replace_file

READABLE = (".parquet", ".csv", ".csv.gz", ".arrow", ".feather", ".npz")
WRITABLE = (".parquet", ".csv", ".arrow", ".feather")


def read_table(path: Path | str) -> pa.Table:
    """The table in a file, by its ending: .parquet, .csv, .csv.gz, .arrow, .feather or .npz.

    An .npz holds a matrix `X` [N, d], whose columns become x0, x1, …, and any further arrays [N], each a column.

    Raises:
        InputError: there is no such file, or it is no table.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"no such file: {path}")
    if not path.is_file():
        raise InputError(f"{path} is not a file; give a table: {', '.join(READABLE)}")
    suffix = _suffix(path, READABLE)
    try:
        table = _READERS[suffix](path)
    except InputError:
        raise
    except (pa.ArrowException, OSError, ValueError, EOFError, gzip.BadGzipFile) as error:
        raise InputError(f"{path} is not a table that can be read as {suffix}: {_first_line(error)}") from error
    return _checked(table, str(path))


def write_table(table: pa.Table, path: Path | str) -> None:
    """Write a table by the file's ending: .parquet, .csv, .arrow or .feather. The file appears whole or not at all.

    Raises:
        InputError: the ending is none of these.
        OSError: the file cannot be written.
    """
    path = Path(path)
    suffix = _suffix(path, WRITABLE)
    with replace_file(path) as temporary:
        if suffix == ".parquet":
            pa_parquet.write_table(table, temporary)
        elif suffix == ".csv":
            pa_csv.write_csv(table, temporary)
        else:
            pa_feather.write_feather(table, str(temporary))


def check_writable(path: Path | str) -> None:
    """Raise InputError now where `write_table` would later: an unknown ending, or a folder that is not there."""
    path = Path(path)
    _suffix(path, WRITABLE)
    if path.is_dir():
        raise InputError(f"{path} is a folder; give a file: {', '.join(WRITABLE)}")
    if not path.parent.is_dir():
        raise InputError(f"no such folder: {path.parent}")


def as_table(data: Any) -> pa.Table:
    """An in-memory table: pyarrow, pandas, polars (anything with the Arrow interface), or an array [N, d].

    The columns of an array are named x0, x1, ….

    Raises:
        InputError: data is none of these, or its columns cannot be represented.
    """
    try:
        if isinstance(data, pa.Table):
            table = data
        elif type(data).__module__.partition(".")[0] == "pandas":
            table = pa.Table.from_pandas(data, preserve_index=False)
        elif hasattr(data, "__arrow_c_stream__"):
            table = pa.table(data)
        else:
            table = _from_array(np.asarray(data))
    except (pa.ArrowException, TypeError) as error:
        raise InputError(f"the data is not a table: {_first_line(error)}") from error
    return _checked(table, "the data")


def _from_array(array: np.ndarray[Any, Any]) -> pa.Table:
    if array.ndim != 2:
        raise InputError(f"the data must be a matrix [rows, features], got an array of shape {list(array.shape)}")
    return pa.table({f"x{i}": pa.array(column) for i, column in enumerate(array.T)})


def _checked(table: pa.Table, source: str) -> pa.Table:
    names = table.column_names
    repeated = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if repeated:
        raise InputError(f"{source} has several columns named {', '.join(map(repr, repeated))}; rename them")
    if table.num_rows == 0:
        raise InputError(f"{source} has no rows")
    return table


def _read_parquet(path: Path) -> pa.Table:
    table = pa_parquet.ParquetFile(path).read()
    # pandas may have stored its row labels as a column; they are no feature.
    pandas = json.loads((table.schema.metadata or {}).get(b"pandas", b"{}"))
    stored = [name for name in pandas.get("index_columns", []) if isinstance(name, str)]
    return table.drop_columns([name for name in stored if name in table.column_names])


def _read_csv(path: Path) -> pa.Table:
    options = pa_csv.ConvertOptions(strings_can_be_null=True)
    return pa_csv.read_csv(path, convert_options=options)


def _read_npz(path: Path) -> pa.Table:
    with np.load(path, allow_pickle=False) as arrays:
        if "X" not in arrays:
            raise InputError(f"{path} has no matrix 'X'; it has {', '.join(map(repr, arrays.files)) or 'nothing'}")
        table = _from_array(arrays["X"])
        for name in arrays.files:
            if name != "X":
                if arrays[name].shape != (table.num_rows,):
                    shape = list(arrays[name].shape)
                    raise InputError(f"{path}: array {name!r} has shape {shape}; expected one value per row of 'X'")
                table = table.append_column(name, pa.array(arrays[name]))
        return table


_READERS = {
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".csv.gz": _read_csv,
    ".arrow": pa_feather.read_table,
    ".feather": pa_feather.read_table,
    ".npz": _read_npz,
}


def _suffix(path: Path, known: tuple[str, ...]) -> str:
    for suffix in known:
        if path.name.lower().endswith(suffix):
            return suffix
    raise InputError(f"{path} is not a table: its name must end in {', '.join(known)}")


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
