"""Scoring a file batch by batch gives what scoring it whole gives, and survives being cut off."""

import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pa_parquet
import pytest
import torch
from pyarrow.csv import ConvertOptions, read_csv

from mdml_fast import InputError, MDMLDetector, stream
from mdml_fast.data import csv_blocks, read_table, write_table
from mdml_fast.drift import DriftMonitor
from mdml_fast.meta.default import DefaultConfig
from mdml_fast.meta.ensemble import EnsembleConfig
from mdml_fast.stream import ScoreTask, score_file

FAST = DefaultConfig(
    ensemble=EnsembleConfig(hidden=8, n_prototypes=32, n_queries=32, n_anomalies=24, n_synthetic=64, steps=5),
    n_trees=10,
)
N_ROWS = 1000


def rows(n: int, seed: int, anomalous: float = 0.0) -> pa.Table:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(n, 3)) + 5 * (rng.random((n, 1)) < anomalous)
    kinds = pa.array(rng.choice(["a", "b"], n)).dictionary_encode()
    return pa.table({"id": np.arange(n), "x": values[:, 0], "y": values[:, 1], "z": values[:, 2], "kind": kinds})


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[MDMLDetector, ScoreTask]:
    folder = tmp_path_factory.mktemp("scoring")
    train = rows(300, 0)
    detector = MDMLDetector(FAST, random_state=0, false_alarm_rate=0.1)
    detector.fit(train.drop_columns(["id"]), groups=[f"g{i % 4}" for i in range(300)])
    detector.save(folder / "model")
    data = rows(N_ROWS, 1, 0.1).append_column("group", pa.array([f"g{i % 5}" for i in range(N_ROWS)]))
    write_table(data, folder / "data.parquet")
    return detector, ScoreTask(folder / "model", folder / "data.parquet", folder / "out.parquet")


@pytest.fixture
def task(fitted: tuple[MDMLDetector, ScoreTask], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ScoreTask:
    monkeypatch.setattr(stream, "BATCH_ROWS", 64)
    monkeypatch.setattr(stream, "PART_ROWS", 200)
    return replace(fitted[1], out=tmp_path / "out.parquet")


@pytest.mark.parametrize("promise", ["marginal", "certificate", "fdr"])
def test_the_stream_is_the_whole(fitted: tuple[MDMLDetector, ScoreTask], task: ScoreTask, promise: str) -> None:
    detector = MDMLDetector.load(task.model).set_params(promise=promise, false_alarm_rate=0.2)
    # 15 calibration normals to a group are too few for a false discovery rate.
    group = None if promise == "fdr" else "group"
    task = replace(task, keep=("id", "kind"), group=group, monitor=True)
    seen: list[tuple[int, int | None]] = []
    summary = score_file(detector, task, progress=lambda done, total: seen.append((done, total)))
    data, written = read_table(task.data), read_table(task.out)
    expected = detector.alarms(data, groups=data[group] if group else None)
    assert written.column_names == ["id", "kind", "score", "p_value", "is_anomaly", "drift_evidence"]
    assert written["id"].to_pylist() == list(range(N_ROWS))
    assert written["kind"].to_pylist() == data["kind"].to_pylist()
    np.testing.assert_allclose(written["score"].to_numpy(), expected.scores, rtol=1e-4, atol=1e-5)
    assert (written["is_anomaly"].to_numpy() == expected.is_alarm).mean() > 0.995
    monitor = DriftMonitor(detector.calibration_.scores)
    np.testing.assert_allclose(
        written["drift_evidence"].to_numpy(), monitor.evidence(written["score"].to_numpy()), rtol=1e-9
    )
    assert summary == stream.ScoreSummary(N_ROWS, int(np.sum(written["is_anomaly"].to_numpy())), 0, monitor.first_row)
    assert 20 < summary.alarms < 400
    assert seen[0] == (64, N_ROWS)
    assert seen[-1] == (N_ROWS, N_ROWS)
    assert [path.name for path in task.out.parent.iterdir()] == ["out.parquet"]


@pytest.mark.parametrize("promise", ["marginal", "fdr"])
def test_the_stream_says_why(fitted: tuple[MDMLDetector, ScoreTask], task: ScoreTask, promise: str) -> None:
    detector = MDMLDetector.load(task.model).set_params(promise=promise, false_alarm_rate=0.2)
    score_file(detector, replace(task, keep=("id",), monitor=True))
    plain = read_table(task.out)
    task = replace(task, keep=("id",), monitor=True, explain=2)
    score_file(detector, task)
    written, why = read_table(task.out), detector.explain(read_table(task.data))
    reasons = ["why_1", "why_2", "nearest_family", "kind"]
    assert written.column_names == ["id", "score", "p_value", "is_anomaly", *reasons, "drift_evidence"]
    assert written.drop_columns(reasons).equals(plain)
    assert [written[name].to_pylist() for name in reasons[:2]] == why.reasons(2)
    assert set(written["nearest_family"].to_pylist()) == {"normal"}
    kinds = [kind if alarm else None for kind, alarm in zip(why.kind, written["is_anomaly"].to_pylist(), strict=True)]
    assert written["kind"].to_pylist() == kinds
    assert 0 < written["kind"].null_count < N_ROWS
    with pytest.raises(InputError, match="the output has a column 'kind' of its own"):
        score_file(detector, replace(task, keep=("kind",)))


def test_what_is_kept_of_a_csv_stands_in_a_csv_as_it_stood(
    fitted: tuple[MDMLDetector, ScoreTask], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the first rows made of it: zeros, then a fraction; and a feature is kept as the model reads it."""
    monkeypatch.setattr(csv_blocks, "CSV_BLOCK_BYTES", 64)
    codes = ["007"] * 20 + ["1.50"]
    lines = [f"{code},{i // 20 + i % 2},0,{i / 2},a" for i, code in enumerate(codes)]
    (tmp_path / "data.csv").write_text("\n".join(["code,x,y,z,kind", *lines]))
    task = replace(fitted[1], data=tmp_path / "data.csv", out=tmp_path / "out.csv", keep=("code", "x"))
    score_file(fitted[0], task)
    text = read_csv(task.out, convert_options=ConvertOptions(column_types={"code": pa.string()}))
    assert text["code"].to_pylist() == codes
    assert text["x"].to_pylist() == [i // 20 + i % 2 for i in range(21)]
    score_file(fitted[0], replace(task, out=tmp_path / "late.parquet"))  # of numbers, a fraction last
    assert read_table(tmp_path / "late.parquet")["code"].to_pylist() == [7] * 20 + [1.5]
    (tmp_path / "data.csv").write_text("\n".join(["code,x,y,z,kind", *lines[:20]]))
    score_file(fitted[0], replace(task, out=tmp_path / "out.parquet"))
    assert read_table(tmp_path / "out.parquet")["code"].to_pylist() == [7] * 20


class CutOffError(Exception):
    """Stands for Ctrl-C, which pytest takes for itself."""


def cut_off(after: int) -> stream.Progress:
    def progress(done: int, _total: int | None) -> None:
        if done >= after:
            raise CutOffError

    return progress


def test_a_run_that_is_cut_off_goes_on_where_it_was(
    fitted: tuple[MDMLDetector, ScoreTask], task: ScoreTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector, _ = fitted
    whole = replace(task, out=task.out.with_name("whole.parquet"))
    score_file(detector, whole)
    for after in (500, 900):
        with pytest.raises(CutOffError):
            score_file(detector, task, resume=True, progress=cut_off(after))
        assert not task.out.exists()
    scored_rows = []
    score = MDMLDetector.score_samples
    monkeypatch.setattr(MDMLDetector, "score_samples", lambda self, X: scored_rows.append(X.num_rows) or score(self, X))
    summary = score_file(detector, task, resume=True)
    assert summary.resumed_rows == 768  # three parts of four batches
    assert sum(scored_rows) == N_ROWS - 768
    assert task.out.read_bytes() == whole.out.read_bytes()
    assert not task.partial.exists()


def test_without_resume_a_run_starts_anew_and_another_run_is_not_resumed(
    fitted: tuple[MDMLDetector, ScoreTask], task: ScoreTask
) -> None:
    detector, _ = fitted
    with pytest.raises(CutOffError):
        score_file(detector, task, progress=cut_off(500))
    with pytest.raises(InputError, match=r"other data or columns; leave out --resume"):
        score_file(detector, replace(task, keep=("id",)), resume=True)
    fdr = MDMLDetector.load(task.model).set_params(promise="fdr")
    with pytest.raises(InputError, match=r"is of another model, promise, other data or columns"):
        score_file(fdr, task, resume=True)
    assert task.partial.exists()
    assert score_file(detector, task).resumed_rows == 0
    task.partial.mkdir()
    (task.partial / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="is not of an earlier run"):
        score_file(detector, task)
    assert (task.partial / "thesis.txt").read_text() == "precious"


def test_bad_rows_far_down_are_named_and_nothing_is_left(
    fitted: tuple[MDMLDetector, ScoreTask], task: ScoreTask
) -> None:
    data = read_table(task.data)
    x = data["x"].to_numpy().copy()
    x[700] = np.inf
    bad = replace(task, data=task.out.with_name("bad.parquet"))
    write_table(data.set_column(1, "x", pa.array(x)), bad.data)
    says = r"in rows 641 to 704 of .*bad.parquet: column 'x' has 1 infinite values \(first in row 701\), "
    with pytest.raises(InputError, match=says):
        score_file(fitted[0], bad)
    assert [path.name for path in task.out.parent.iterdir()] == ["bad.parquet"]


def test_rows_are_read_and_written_while_others_are_scored(
    fitted: tuple[MDMLDetector, ScoreTask], task: ScoreTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, most, lock = 0, 0, threading.Lock()
    score = MDMLDetector.score_samples

    def slow(self: MDMLDetector, X: pa.Table) -> np.ndarray:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        result = score(self, X)
        with lock:
            running -= 1
        return result

    monkeypatch.setattr(MDMLDetector, "score_samples", slow)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        score_file(fitted[0], task)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert most == 2


def test_batches_ahead_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = 0

    def jobs() -> object:
        nonlocal taken
        for number in range(100):
            taken += 1
            yield lambda number=number: number

    results = stream._in_order(jobs(), 2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    assert taken <= 3 + 2 * 2
    assert list(results) == list(range(3, 100))


def test_output_is_refused_before_anything_is_scored(fitted: tuple[MDMLDetector, ScoreTask], task: ScoreTask) -> None:
    for wrong, says in [
        ({"out": task.out.with_suffix(".pdf")}, "must end in"),
        ({"keep": ("score",)}, "the output has a column 'score' of its own"),
        ({"keep": ("nope",)}, r"has no column 'nope'; it has id, x, y, z, kind, group"),
        ({"group": "nope"}, "has no column 'nope'"),
    ]:
        with pytest.raises(InputError, match=says):
            score_file(fitted[0], replace(task, **wrong))
    assert not list(task.out.parent.iterdir())


def test_what_the_format_has_no_place_for_is_refused_before_anything_is_scored(
    fitted: tuple[MDMLDetector, ScoreTask], task: ScoreTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = {
        "list": pa.array([[1]] * N_ROWS),
        "struct": pa.array([{"a": 1}] * N_ROWS),
        "bytes": pa.array([b"\xff"] * N_ROWS),
        "text": pa.array([b"a"] * N_ROWS),
    }
    data = read_table(task.data)
    for name, values in kept.items():
        data = data.append_column(name, values)
    task = replace(task, data=task.out.with_name("data.parquet"), keep=tuple(kept))
    write_table(data, task.data)
    score_file(fitted[0], task)
    assert read_table(task.out).select(list(kept)).equals(data.select(list(kept)))
    task = replace(task, out=task.out.with_suffix(".csv"))
    score_file(fitted[0], replace(task, keep=("text",)))
    assert read_table(task.out)["text"].to_pylist() == ["a"] * N_ROWS
    monkeypatch.setattr(MDMLDetector, "score_samples", None)
    for name, kind in [("list", r"list<.*>"), ("struct", r"struct<.*>"), ("bytes", "binary")]:
        says = rf"^column '{name}' holds {kind}, which \.csv has no place for .*; leave it out, or write \.parquet"
        with pytest.raises(InputError, match=says):
            score_file(fitted[0], replace(task, keep=(name, name)))
    assert not task.partial.exists()


def test_the_data_are_not_overwritten(fitted: tuple[MDMLDetector, ScoreTask], task: ScoreTask) -> None:
    before = task.data.read_bytes()
    with pytest.raises(InputError, match="is the data to score: write to another file"):
        score_file(fitted[0], replace(task, out=task.data))
    assert task.data.read_bytes() == before


def test_large_parquet_groups_do_not_grow_memory(tmp_path: Path) -> None:
    n = 800_000
    column = np.random.default_rng(0).normal(size=n)
    pa_parquet.write_table(pa.table({f"x{i}": column for i in range(10)}), tmp_path / "t.parquet", row_group_size=n)
    wanted = {f"x{i}": pa.float64() for i in range(10)}
    with stream.open_table(tmp_path / "t.parquet", wanted, 4096) as table:
        pool = pa.default_memory_pool()
        before = pool.bytes_allocated()
        most = max(pool.bytes_allocated() - before for _ in table.batches)
    assert most < 0.7 * 10 * 8 * n
