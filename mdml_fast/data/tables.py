"""Reading tables: files, arrays and data frames all become a pyarrow Table."""

from __future__ import annotations

import gzip
import json
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.feather as pa_feather
import pyarrow.parquet as pa_parquet

from mdml_fast.errors import InputError, first_line

# No row of a CSV may be longer; and the first so many bytes tell the types of its columns.
CSV_ROW_BYTES = 2**26

READABLE = (".parquet", ".csv", ".csv.gz", ".arrow", ".feather", ".npz")

Wanted = Mapping[str, pa.DataType | None] | None
"""The columns to read, those of them that there are; with a type, what a text format shall be read as. None is all."""


def read_table(path: Path | str) -> pa.Table:
    """The table in a file, by its ending: .parquet, .csv, .csv.gz, .arrow, .feather or .npz.

    An .npz holds a matrix `X` [N, d], whose columns become x0, x1, …, and any further arrays [N], each a column.

    Raises:
        InputError: there is no such file, or it is no table.
    """
    path = Path(path)
    suffix = check_readable(path)
    try:
        table = _READERS[suffix](path)
    except InputError:
        raise
    except (pa.ArrowException, OSError, ValueError, EOFError, gzip.BadGzipFile) as error:
        raise InputError(f"{path} is not a table that can be read as {suffix}: {first_line(error)}") from error
    return _checked(table, str(path))


def check_readable(path: Path) -> str:
    """The ending that tells how to read a file.

    Raises:
        InputError: there is no such file, or its ending is not known.
    """
    if not path.exists():
        raise InputError(f"no such file: {path}")
    if not path.is_file():
        raise InputError(f"{path} is not a file; give a table: {', '.join(READABLE)}")
    return suffix_of(path, READABLE)


def as_table(data: Any, names: Sequence[str] | None = None) -> pa.Table:
    """An in-memory table: pyarrow, pandas, polars (anything with the Arrow interface), or an array [N, d].

    Args:
        data: the rows.
        names: of the columns of an array, where that is what data is [d]; x0, x1, … where not given.

    Raises:
        InputError: data is none of these, or its columns cannot be represented.
    """
    is_column = len(getattr(data, "shape", ())) == 1  # a series, or an array of one dimension
    try:
        if isinstance(data, pa.Table):
            table = data
        elif type(data).__module__.partition(".")[0] == "pandas" and not is_column:
            check_names(list(map(str, data.columns)), "the data")
            table = pa.Table.from_pandas(data, preserve_index=False)
        elif hasattr(data, "__arrow_c_stream__") and not is_column:
            table = pa.table(data)
        else:
            table = _from_array(_dense(data), names)
    except (pa.ArrowException, TypeError) as error:
        what = f"the data is not a table: {first_line(error)}"
        raise InputError(f"{what}; give columns of numbers (in this machine's byte order) or of text") from error
    return _checked(table, "the data")


def _dense(data: Any) -> np.ndarray[Any, Any]:
    if hasattr(data, "toarray"):
        raise InputError("sparse input is not supported: give the rows as a dense array, by .toarray()")
    # Arrow takes what is masked for missing; other subclasses of arrays have rules of their own.
    array = data if isinstance(data, np.ma.MaskedArray) else np.asarray(data)
    if np.iscomplexobj(array):
        raise InputError("Complex data not supported: give its parts as columns of their own")
    return array


def _from_array(array: np.ndarray[Any, Any], names: Sequence[str] | None = None) -> pa.Table:
    if array.ndim != 2:
        # "Reshape your data" is what scikit-learn says there, and what its checks look for.
        shape = list(array.shape)
        raise InputError(f"the data must be a matrix [rows, features], got shape {shape}. Reshape your data")
    n_rows, n_features = array.shape
    if not n_features:
        raise InputError(f"Found array with 0 feature(s) (shape=({n_rows}, 0)) while a minimum of 1 is required.")
    if names is None:
        names = [f"x{i}" for i in range(n_features)]
    if n_features != len(names):
        raise InputError(f"X has {n_features} features, but MDMLDetector is expecting {len(names)} features as input")
    return pa.table({name: pa.array(column) for name, column in zip(names, array.T, strict=True)})


def _checked(table: pa.Table, source: str) -> pa.Table:
    check_names(table.column_names, source)
    if table.num_rows == 0:
        raise InputError(f"{source} has no rows")
    return without_views(table)


def without_views(table: pa.Table) -> pa.Table:
    """A table with `string` and `binary` where it has views of them, as from polars: pyarrow does little with these."""
    schema = pa.schema([field.with_type(_without_views(field.type)) for field in table.schema], table.schema.metadata)
    return table if schema.equals(table.schema) else table.cast(schema)


def _without_views(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_binary_view(kind):
        return pa.binary()
    if pa.types.is_dictionary(kind):
        return pa.dictionary(kind.index_type, _without_views(kind.value_type), kind.ordered)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        of = pa.list_ if pa.types.is_list(kind) else pa.large_list
        return of(kind.value_field.with_type(_without_views(kind.value_type)))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_without_views(field.type)) for field in kind.fields])
    return kind


def plain(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column without a dictionary, and text of any kind as `string`."""
    if pa.types.is_dictionary(values.type):
        # Not a cast of the whole: pyarrow can't do that with polars' dictionaries.
        kind = pa.string() if _is_text(values.type.value_type) else values.type.value_type
        return pa.chunked_array([chunk.dictionary.cast(kind).take(chunk.indices) for chunk in values.chunks], kind)
    return values.cast(pa.string()) if _is_text(values.type) else values


def _is_text(kind: pa.DataType) -> bool:
    return any(check(kind) for check in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))


def chosen(names: list[str], wanted: Wanted, ignore: Collection[str] = ()) -> list[str]:
    """Those of the columns that are to be read."""
    return [name for name in names if (wanted is None or name in wanted) and name not in ignore]


def check_names(names: list[str], source: str) -> None:
    """Raise InputError where two columns have one name."""
    repeated = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if repeated:
        raise InputError(f"{source} has several columns named {', '.join(map(repr, repeated))}; rename them")


def _read_parquet(path: Path) -> pa.Table:
    table = pa_parquet.ParquetFile(path).read()
    # pandas may have stored its row labels as a column; they are no feature.
    pandas = json.loads((table.schema.metadata or {}).get(b"pandas", b"{}"))
    stored = [name for name in pandas.get("index_columns", []) if isinstance(name, str)]
    return table.drop_columns([name for name in stored if name in table.column_names])


def csv_values(**options: Any) -> pa_csv.ConvertOptions:
    """How values of a CSV are read: nothing at all is missing, also in a column of text."""
    return pa_csv.ConvertOptions(strings_can_be_null=True, **options)


def _read_csv(path: Path, compression: str | None = None) -> pa.Table:
    within_quotes, large = pa_csv.ParseOptions(newlines_in_values=True), pa_csv.ReadOptions(block_size=CSV_ROW_BYTES)
    with pa.input_stream(str(path), compression) as source:
        return pa_csv.read_csv(source, large, within_quotes, csv_values())


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
    ".csv.gz": partial(_read_csv, compression="gzip"),
    ".arrow": pa_feather.read_table,
    ".feather": pa_feather.read_table,
    ".npz": _read_npz,
}


def suffix_of(path: Path, known: tuple[str, ...]) -> str:
    """Which of these endings a file has; raises InputError where it has none."""
    for suffix in known:
        if path.name.lower().endswith(suffix):
            return suffix
    raise InputError(f"{path} is not a table: its name must end in {', '.join(known)}")
