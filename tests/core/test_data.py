import gzip
import json
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.preprocessing import RobustScaler, StandardScaler

from mdml_fast import InputError
from mdml_fast.data import FeatureEncoder, as_table, label_table, read_table, write_table
from mdml_fast.data.batches import open_table
from mdml_fast.data.encoding import row_ids, soft_clip
from mdml_fast.data.labelled import class_names
from mdml_fast.errors import MissingValuesWarning

TABLE = pa.table({"n": [1.5, 2.5, -3.0], "s": ["a", "b", "a"]})
ALL = np.ones(3, dtype=bool)


@pytest.mark.parametrize("name", ["t.parquet", "t.csv", "t.arrow", "t.feather"])
def test_tables_survive_writing_and_reading(tmp_path: Path, name: str) -> None:
    write_table(TABLE, tmp_path / name)
    assert read_table(tmp_path / name).equals(TABLE)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_compressed_csv_and_npz_are_read(tmp_path: Path) -> None:
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(b"n,s\n1.5,a\n2.5,b\n-3.0,a\n"))
    assert read_table(tmp_path / "t.csv.gz").equals(TABLE)
    assert read_table((tmp_path / "t.csv.gz").rename(tmp_path / "T.CSV.GZ")).equals(TABLE)
    np.savez(tmp_path / "t.npz", X=np.eye(3), y=np.array(["p", "q", "q"]))
    assert read_table(tmp_path / "t.npz").column_names == ["x0", "x1", "x2", "y"]


def test_row_labels_that_pandas_stored_are_no_column(tmp_path: Path) -> None:
    pd.DataFrame({"n": [1, 2]}, index=["r1", "r2"]).to_parquet(tmp_path / "t.parquet")
    assert read_table(tmp_path / "t.parquet").column_names == ["n"]


def test_frames_and_arrays_become_the_same_table() -> None:
    assert as_table(pd.DataFrame({"n": [1.0, 2.0]}, index=[7, 3])).equals(as_table(pl.DataFrame({"n": [1.0, 2.0]})))
    assert as_table(np.ones((2, 3))).column_names == ["x0", "x1", "x2"]


@pytest.mark.parametrize("kind", [float, int, object])
def test_what_is_masked_is_missing(kind: type) -> None:
    rows = np.ma.masked_array(np.arange(6).reshape(3, 2).astype(kind), [[True, False], [False, False], [False, True]])
    assert as_table(rows).to_pydict() == {"x0": [None, 2, 4], "x1": [1, 3, None]}
    with pytest.raises(InputError, match=r"^y has 1 missing values \(first in row 3\)"):
        class_names(rows[:, 1], "y")


@pytest.mark.parametrize("column", [pd.Series([1.0, 2.0]), pl.Series([1.0, 2.0]), pd.Index([1.0, 2.0]), np.ones(2)])
def test_a_column_alone_is_no_table(column: object) -> None:
    with pytest.raises(InputError, match=r"^the data must be a matrix \[rows, features\], got shape \[2\]"):
        as_table(column)


def views() -> pl.DataFrame:
    """Text and bytes as polars has them: views, which pyarrow can do little with."""
    frame = pl.DataFrame(
        {"s": ["a", None, "b"], "b": [b"a", None, b"c"], "l": [["a"], ["b"], []], "t": [{"q": "a"}, {"q": "b"}, None]}
    )
    return frame.with_columns(c=pl.col("s").cast(pl.Categorical), e=pl.col("s").cast(pl.Enum(["a", "b"])))


def test_views_of_text_and_bytes_become_what_pyarrow_can_take(tmp_path: Path) -> None:
    frame = views()
    frame.write_ipc(tmp_path / "t.arrow", compat_level=pl.CompatLevel.newest())
    assert "_view" in str(pa.ipc.open_file(tmp_path / "t.arrow").schema)
    with open_table(tmp_path / "t.arrow", None, 2) as source:
        tables = [as_table(frame), read_table(tmp_path / "t.arrow"), pa.concat_tables(source.batches)]
    for table in tables:
        assert "_view" not in str(table.schema.remove_metadata())
        assert table.to_pylist() == frame.to_dicts()
        assert table["s"].take(pa.array([2, 0])).to_pylist() == ["b", "a"]


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("t.parquet", b"no parquet", "not a table that can be read as .parquet"),
        ("t.arrow", b"no arrow", "not a table that can be read as .arrow"),
        ("t.npz", b"no npz", "not a table that can be read as .npz"),
        ("t.csv.gz", b"no gzip", "not a table that can be read as .csv.gz"),
        ("t.txt", b"text", "its name must end in"),
        ("t.csv", b"", "not a table"),
        ("t.csv", b"a,b\n", "has no rows"),
        ("t.csv", b"a,a\n1,2\n", "several columns named 'a'"),
    ],
)
def test_what_is_no_table_is_refused_in_one_line(tmp_path: Path, name: str, content: bytes, match: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=match) as caught:
        read_table(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_numbers_are_scaled_by_the_normals_and_heavy_tails_tamed() -> None:
    rng = np.random.default_rng(0)
    normals = np.c_[rng.normal(100, 5, 1000), np.exp(rng.normal(5, 4, 1000))]
    table = as_table(np.r_[normals, [[1e6, 1e30]]])
    is_normal = np.arange(1001) < 1000
    encoder = FeatureEncoder.fit(table, is_normal)
    rows = encoder.transform(table)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows[:1000].mean(0), 0, atol=0.05)
    np.testing.assert_allclose(rows[:1000].std(0), 1, atol=0.05)
    assert [column.heavy_tailed for column in encoder.columns] == [False, True]
    assert (rows[1000] > 10).all()
    assert rows[1000].max() < 100


@pytest.mark.parametrize(
    "values",
    [
        np.random.default_rng(0).normal(size=101),
        np.exp(np.random.default_rng(0).normal(5, 4, 102)),
        np.where(np.arange(50) % 7, np.arange(50.0), np.nan),
        np.where(np.arange(50) < 30, np.nan, np.arange(50.0)),
        np.where(np.arange(50) < 40, 0.1, np.arange(50.0)),
        0.1 + np.where(np.arange(50) < 40, np.arange(50) % 2, 5) * 1e-16,
        1e9 + np.arange(50) % 2 * 2e-7,
        np.arange(50) == 3,
    ],
    ids=["usual", "heavy", "missing", "no-normal", "equal-normals", "rounding", "far", "rare"],
)
def test_numbers_are_scaled_as_by_scikit_learn(values: np.ndarray) -> None:
    is_normal = np.arange(len(values)) < 30
    encoder = FeatureEncoder.fit(pa.table({"x": values.astype(float), "y": np.arange(len(values))}), is_normal)
    column, known = encoder.columns[0], values[is_normal & ~np.isnan(values)] + 0.0
    known = (known if len(known) else values[~np.isnan(values)])[:, None]
    robust = RobustScaler(unit_variance=True).fit(known)
    scaled = robust.transform(known)
    standard = StandardScaler().fit(np.arcsinh(scaled) if column.heavy_tailed else scaled)
    ours = [column.center, column.scale, column.mean, column.deviation]
    peer = [robust.center_[0], robust.scale_[0], standard.mean_[0], standard.scale_[0]]
    np.testing.assert_allclose(ours, peer, rtol=1e-12, atol=0)


@given(st.lists(st.floats(-1e300, 1e300), min_size=2, max_size=20))
def test_soft_clip_keeps_the_order_and_what_is_small(values: list[float]) -> None:
    array = np.sort(np.array(values))
    clipped = soft_clip(array)
    assert (np.diff(clipped) >= 0).all()
    np.testing.assert_array_equal(clipped[np.abs(array) <= 10], array[np.abs(array) <= 10])


def test_missing_values_are_filled_marked_and_said() -> None:
    table = pa.table({"n": [1.0, None, 3.0, 2.0], "s": ["a", None, "b", "a"]})
    encoder = FeatureEncoder.fit(table, np.ones(4, dtype=bool))
    assert encoder.feature_names == ["n", "n is missing", "s = a", "s = b", "s is another"]
    assert encoder.transform(table)[1].tolist() == [0, 1, 0, 0, 1]
    assert any("missing" in note and "n" in note for note in encoder.notes())


def test_constant_columns_are_dropped_and_said() -> None:
    nothing = [np.nan, -np.nan, None]
    table = TABLE.append_column("c", pa.array([1, 1, 1])).append_column("d", pa.array(nothing, from_pandas=False))
    encoder = FeatureEncoder.fit(table, ALL)
    assert encoder.constant == ("c", "d")
    assert "c, d" in encoder.notes()[0]
    with pytest.raises(InputError, match="all feature columns are constant"):
        FeatureEncoder.fit(pa.table({"c": [1, 1, 1]}), ALL)


def test_unknown_categories_and_booleans_and_integers_score() -> None:
    table = pa.table({"s": ["a", "b", "a"], "flag": [True, False, True], "i": [1, 2, 3]})
    encoder = FeatureEncoder.fit(table, ALL)
    row = encoder.transform(pa.table({"s": ["zzz"], "flag": [False], "i": [2.0]}))
    assert row[0, :3].tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("table", "match"),
    [
        (pa.table({"s": ["a"]}), "no column 'n'"),
        (pa.table({"n": ["text"], "s": ["a"]}), "column 'n' holds text"),
        (pa.table({"n": [1.0], "s": [2.0]}), "column 's' holds numbers"),
        (pa.table({"n": [1.0, -np.inf], "s": ["a", "b"]}), r"column 'n' has 1 infinite values \(first in row 2\)"),
        (pa.table({"n": [1e300, -1.7e308], "s": ["a", "b"]}), r"column 'n' has 1 infinite values \(first in row 2\)"),
        (pa.table({"n": [[1.0]], "s": ["a"]}), "column 'n' holds list"),
    ],
)
def test_columns_that_do_not_fit_are_refused(table: pa.Table, match: str) -> None:
    with pytest.raises(InputError, match=match):
        FeatureEncoder.fit(TABLE, ALL).transform(table)


@pytest.mark.parametrize("missing", [pa.nulls(2), pa.array([None, None], pa.string()), pa.array([np.nan, np.nan])])
def test_values_that_are_all_missing_are_of_either_kind(missing: pa.Array) -> None:
    table = pa.table({"n": [1.0, None, 3.0], "s": ["a", None, "b"]})
    encoder = FeatureEncoder.fit(table, ALL)
    expected = encoder.transform(table.take([1, 1]))
    np.testing.assert_array_equal(encoder.transform(pa.table({"n": missing, "s": missing})), expected)


def test_columns_of_one_name_are_refused() -> None:
    with pytest.raises(InputError, match="several columns named 'a'; rename them"):
        as_table(pd.DataFrame(np.ones((3, 3)), columns=["a", "a", "b"]))


def test_the_encoding_survives_json() -> None:
    encoder = FeatureEncoder.fit(TABLE, ALL)
    again = FeatureEncoder.from_json(json.loads(json.dumps(encoder.to_json())))
    assert again == encoder
    np.testing.assert_array_equal(again.transform(TABLE), encoder.transform(TABLE))


def test_row_ids_tell_equal_rows() -> None:
    table = pa.table({"n": [1.0, None, 1.0, None, 1.0], "s": ["a", "a", "b", "a", "a"]})
    ids = row_ids(table)
    assert ids[0] == ids[4]
    assert ids[1] == ids[3]
    assert len(set(ids.tolist())) == 3


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"label": "klass"}, "no label column 'klass'; the columns are n, c"),
        ({"normal": ["fine"]}, "no row of the normal class 'fine'; the classes are bad, ok"),
        ({"normal": []}, "name the normal classes"),
        ({"normal": ["bad"]}, "only 3 normal rows"),
        ({"ignore": ["x"]}, "no ignored column 'x'"),
        ({"ignore": ["n"]}, "no feature column is left"),
        ({"group": "g"}, "no group column 'g'"),
        ({"ignore": ["c"]}, "the label column 'c' is ignored, too"),
        ({"group": "n", "ignore": ["n"]}, "the group column 'n' is ignored, too"),
    ],
)
def test_labels_that_do_not_fit_are_refused(arguments: dict[str, object], match: str) -> None:
    table = pa.table({"n": np.arange(33.0), "c": ["ok"] * 30 + ["bad"] * 3})
    with pytest.raises(InputError, match=match):
        label_table(table, **({"label": "c", "normal": ["ok"]} | arguments))


def test_values_that_are_missing_as_none_were_in_training_are_told() -> None:
    known = pa.table({"n": [1.0, 2.0, 3.0], "gaps": [1.0, None, 3.0], "s": ["a", "b", "a"]})
    encoder = FeatureEncoder.fit(known, np.ones(3, dtype=bool))
    gaps = pa.table({"n": [1.0, 2.0], "gaps": [None, None], "s": [None, "a"]}, schema=known.schema)
    encoder.transform(gaps)  # these are marked
    for value in (None, float("nan")):
        more = gaps.set_column(0, "n", pa.array([1.0, value]))
        with pytest.warns(MissingValuesWarning, match="missing in column 'n', and none were .* fill them") as told:
            encoder.transform(more)
        assert len(told) == 1


@pytest.mark.parametrize("labels", [["ok", None], [1.0, float("nan")], [1.0, None]])
def test_missing_labels_are_refused(labels: list[object]) -> None:
    arrow = pa.array(labels)
    for column in (arrow, arrow.dictionary_encode(), pa.array(pl.Series(labels))):
        with pytest.raises(InputError, match=r"1 missing values \(first in row 2\)") as caught:
            label_table(pa.table({"n": [1.0, 2.0], "c": column}), "c", ["ok"])
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # as from another process
