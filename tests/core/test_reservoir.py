"""Of a table larger than memory all anomalies are learned from, and a fair sample of its normals."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import chisquare

from mdml_fast import InputError
from mdml_fast.data import LabelledTable, csv_blocks, label_table, read_table, reservoir, write_table
from mdml_fast.data.batches import STANDARD
from mdml_fast.data.reservoir import Reservoir, sample_table

N_ROWS = 5000


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two normal classes, a tenth of the rows "rare"; every fiftieth row is an anomaly."""
    monkeypatch.setattr(reservoir, "BATCH_ROWS", 300)
    classes = ["odd" if i % 50 == 0 else "rare" if i % 10 == 1 else "usual" for i in range(N_ROWS)]
    write_table(pa.table({"row": np.arange(N_ROWS), "class": classes}), tmp_path / "t.csv")
    return tmp_path / "t.csv"


def sample(path: Path, max_normals: int, seed: int = 0) -> np.ndarray:
    data, n_normals = sample_table(path, "class", ["usual", "rare"], max_normals=max_normals, seed=seed)
    assert n_normals == 4900
    assert data.anomaly_classes() == {"odd": 100}
    assert data.is_normal.sum() == min(max_normals, n_normals)
    rows = data.features["row"].to_numpy()
    assert (np.diff(rows) > 0).all()
    return rows[data.is_normal]


def test_all_anomalies_stay_and_so_many_normals(path: Path) -> None:
    first = sample(path, 200)
    assert np.array_equal(first, sample(path, 200))
    assert not np.array_equal(first, sample(path, 200, seed=1))


def test_every_normal_has_the_same_chance_wherever_it_stands(path: Path) -> None:
    drawn = np.concatenate([sample(path, 250, seed) for seed in range(12)])
    tenths = np.bincount(drawn // 500, minlength=10)
    assert chisquare(tenths).pvalue > 0.001
    share_of_rare = (drawn % 10 == 1).mean()
    assert 0.08 < share_of_rare < 0.13  # 500 of 4900


def test_a_table_that_fits_is_taken_as_it_is(path: Path) -> None:
    data, _ = sample_table(path, "class", ["usual", "rare"], max_normals=10_000)
    whole = label_table(read_table(path), "class", ["usual", "rare"])
    assert data.features.equals(whole.features)
    assert data.labels.tolist() == whole.labels.tolist()


@pytest.fixture
def late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CSV of whose columns the last rows alone say what they are, many blocks down."""
    monkeypatch.setattr(csv_blocks, "CSV_BLOCK_BYTES", 256)
    lines = [f"{i},{i % 7},,{i % 9},{int(i % 10 == 0)},x" for i in range(200)] + ["200,2.5,3.5,ssh,odd,1.5"]
    (tmp_path / "late.csv").write_text("\n".join(["row,fraction,empty,port,class,unread", *lines]))
    return tmp_path / "late.csv"


def test_columns_of_a_csv_are_what_all_of_its_rows_say(late: Path) -> None:
    data, n_normals = sample_table(late, "class", ["0"], ["unread"], max_normals=50)
    whole = label_table(read_table(late), "class", ["0"], ["unread"])
    assert data.features.schema == whole.features.schema
    assert data.features.schema.types == [pa.int64(), pa.float64(), pa.float64(), pa.string()]
    assert data.anomaly_classes() == {"1": 20, "odd": 1}
    assert n_normals == 180
    assert data.is_normal.sum() == 50


def test_of_a_pipe_the_value_that_does_not_fit_is_named(late: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sampled(ignore: list[str]) -> LabelledTable:
        with late.open("rb") as file:
            monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=file))
            return sample_table(STANDARD, "class", ["0"], ignore, max_normals=50)[0]

    says = (
        r"^standard input .*: column 'fraction' has invalid value '2.5' for int64 in row 201; .*: name a file instead$"
    )
    with pytest.raises(InputError, match=says):
        sampled([])
    late.write_text(late.read_text().replace("odd", "1"))
    assert len(sampled(["fraction", "empty", "port", "unread"])) == 71


def test_what_is_held_is_bounded() -> None:
    holding = Reservoir("class", ["ok"], 100, seed=0)
    for _ in range(50):
        holding.add(pa.table({"class": ["ok"] * 90}))
        assert sum(table.num_rows for table in holding._tables) <= 200
    assert holding.table().num_rows == 100
    assert holding.n_normals == 4500


def test_wrong_columns_are_refused_at_the_first_batch(path: Path) -> None:
    seen: list[int] = []
    for label, normal, says in [
        ("klass", ["usual"], "no label column 'klass'"),
        ("class", [], "name the normal classes; the classes are odd, rare, usual"),
    ]:
        with pytest.raises(InputError, match=says):
            sample_table(path, label, normal, max_normals=50, progress=lambda done, _: seen.append(done))
    assert not seen
    with pytest.raises(InputError, match="no row of the normal class 'fine'"):
        sample_table(path, "class", ["fine"], max_normals=50)


@pytest.mark.parametrize(
    ("column", "value", "says"),
    [
        ("class", None, r"label column 'class' has 1 missing values \(first in row 4322\)"),
        ("class", float("nan"), r"label column 'class' has 1 missing values \(first in row 4322\)"),
        ("group", None, r"group column 'group' has 1 missing values \(first in row 4322\)"),
        ("x", float("inf"), r"column 'x' has 1 infinite values \(first in row 4322\)"),
    ],
)
def test_a_bad_row_is_named_as_it_stands_in_the_file_whether_it_would_be_drawn_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, column: str, value: float | None, says: str
) -> None:
    monkeypatch.setattr(reservoir, "BATCH_ROWS", 300)
    values = {name: [float(i % n) for i in range(N_ROWS)] for name, n in (("x", 7), ("class", 50), ("group", 3))}
    values[column][4321] = value
    write_table(pa.table(values), tmp_path / "t.parquet")
    with pytest.raises(InputError, match=rf"^in rows 4201 to 4500 of \S+t\.parquet: {says}"):
        sample_table(tmp_path / "t.parquet", "class", ["1", "2"], group="group", max_normals=20)
    with pytest.raises(InputError, match=f"^{says}"):
        label_table(read_table(tmp_path / "t.parquet"), "class", ["1", "2"], group="group")
