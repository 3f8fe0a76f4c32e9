"""`score` as a user runs it on more than a file: pipes, a run that is cut off, logs."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pa_parquet
import pytest
from mdml_cli.app import run
from support import COMMAND

from mdml_fast import MDMLDetector
from mdml_fast.meta.default import DefaultConfig
from mdml_fast.meta.ensemble import EnsembleConfig

FAST = DefaultConfig(
    ensemble=EnsembleConfig(hidden=8, n_prototypes=32, n_queries=32, n_anomalies=24, n_synthetic=64, steps=5),
    n_trees=10,
)


def table(n_rows: int) -> pa.Table:
    values = np.random.default_rng(0).normal(size=(n_rows, 4))
    return pa.table({"id": np.arange(n_rows)} | {f"x{i}": column for i, column in enumerate(values.T)})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "model"
    MDMLDetector(FAST, random_state=0).fit(table(300).drop_columns(["id"])).save(path)
    return path


def start(folder: Path, *arguments: object, **options: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen([COMMAND, *map(str, arguments)], cwd=folder, stderr=subprocess.PIPE, **options)


def wait_for_a_part(process: subprocess.Popen[bytes], partial: Path) -> None:
    """Until a part of what is scored is written, or the process has ended."""
    while not list(partial.glob("part-*")) and process.poll() is None:
        time.sleep(0.01)


def test_arrow_and_csv_come_and_go_through_pipes(model: Path, tmp_path: Path) -> None:
    data, csv, arrow = table(20_000), io.BytesIO(), io.BytesIO()
    pa_csv.write_csv(data, csv)
    with pa.ipc.new_stream(arrow, data.schema) as writer:
        writer.write_table(data)
    found = []
    for text, sent, promise in [(True, csv, "marginal"), (False, arrow, "fdr")]:
        arguments = ["score", model, "-", "--out", "-", "--keep", "id", "--promise", promise]
        process = start(tmp_path, *arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        out, err = process.communicate(sent.getvalue(), timeout=120)
        assert process.returncode == 0, err
        assert b"alarms in 20000 rows" in err
        found.append(pa_csv.read_csv(io.BytesIO(out)) if text else pa.ipc.open_stream(out).read_all())
    for written in found:
        assert written.column_names == ["id", "score", "p_value", "is_anomaly"]
        assert written["id"].to_pylist() == list(range(20_000))
    np.testing.assert_allclose(found[0]["score"], found[1]["score"], rtol=1e-5)
    assert not list(tmp_path.iterdir())


def test_a_row_is_scored_as_it_comes_and_drift_is_told_while_it_lasts(model: Path, tmp_path: Path) -> None:
    process = start(
        tmp_path, "score", model, "-", "--out", "-", "--monitor", stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdin.write(b"x0,x1,x2,x3\n")
    for row, sent in enumerate([b"0,1,0,1\n", b"1,0.5,0,0\n", b"0,0,0,0\n" + 9 * b"90,90,90,90\n"]):
        process.stdin.write(sent)
        process.stdin.flush()
        if not row:
            assert process.stdout.readline().startswith(b'"score","p_value"')
        for _ in range(sent.count(b"\n")):
            assert process.stdout.readline().count(b",") == 3
    told = process.stderr.readline()
    while told and b"on, rows are not like the calibration normals" not in told:
        told = process.stderr.readline()
    assert told.startswith(b"note: from row ")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out == b""
    assert b"9 alarms in 12 rows" in err
    assert b"calibration normals" not in err


def test_values_missing_as_none_were_in_training_are_told_once(model: Path, tmp_path: Path) -> None:
    gaps = pa.array([None if i % 10 == 0 else float(i % 3) for i in range(20_000)])
    pa_parquet.write_table(table(20_000).set_column(1, "x0", gaps), tmp_path / "data.parquet")
    process = start(tmp_path, "score", model, "data.parquet", "--out", "out.csv", "--log-file", "log")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert err.decode().count("note: values are missing in column 'x0'") == 1
    assert (tmp_path / "log").read_text().count("values are missing in column 'x0'") == 1


def test_groups_that_the_model_does_not_know_are_said_to_change_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pa_parquet.write_table(table(50), tmp_path / "data.parquet")
    arguments = ["score", str(model), str(tmp_path / "data.parquet"), "--out", str(tmp_path / "out.csv")]
    assert run([*arguments, "--group", "id"]) == 0
    note = "note: --group id changes nothing: the model was trained without groups"
    assert capsys.readouterr().err.count(note) == 1


def test_a_reader_that_goes_away_ends_the_run_in_silence(model: Path, tmp_path: Path) -> None:
    pa_csv.write_csv(table(200_000), tmp_path / "data.csv")
    process = start(tmp_path, "score", model, "data.csv", "--out", "-", "--quiet", stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline().startswith(b'"score","p_value"')
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=60) == 1


def test_what_comes_through_a_pipe_leaves_nothing_behind_where_it_is_stopped(model: Path, tmp_path: Path) -> None:
    """Such a run can't be resumed."""
    process = start(tmp_path, "score", model, "-", "--out", "out.csv", "--threads", 1, stdin=subprocess.PIPE)
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        pa_csv.write_csv(table(100_000), process.stdin)
        process.stdin.flush()
    wait_for_a_part(process, tmp_path / "out.csv.partial")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"--resume" not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_stopped_leaves_no_half_file_and_goes_on(
    model: Path,
    tmp_path: Path,
    how: signal.Signals,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = tmp_path / "data.parquet"
    pa_parquet.write_table(table(150_000), data)
    arguments = ["score", model, "data.parquet", "--out", "out.parquet", "--keep", "id", "--threads", 1]
    process = start(tmp_path, *arguments)
    wait_for_a_part(process, tmp_path / "out.parquet.partial")
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (130 if how is signal.SIGINT else -signal.SIGKILL)
    assert (b"--resume goes on" in err) == (how is signal.SIGINT)
    assert not (tmp_path / "out.parquet").exists()

    monkeypatch.chdir(tmp_path)
    assert run([*map(str, arguments), "--resume", "--log-file", "log.jsonl"]) == 0
    assert "rows were scored by the run that was cut off" in capsys.readouterr().err
    assert pa_parquet.read_table(tmp_path / "out.parquet")["id"].to_pylist() == list(range(150_000))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.parquet", "log.jsonl", "out.parquet"]

    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events if event["event"] != "progress"] == ["start", "note", "scored", "end"]
    progress = [event for event in events if event["event"] == "progress"]
    assert progress[0]["done"] >= 65_536
    assert progress[-1] | {"time": ""} == {
        "time": "",
        "event": "progress",
        "what": "scoring",
        "done": 150_000,
        "total": 150_000,
        "detail": "",
    }
    assert events[-1]["exit_code"] == 0


def test_quiet_says_nothing_and_plain_lines_say_how_fast(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pa_parquet.write_table(table(20_000), tmp_path / "data.parquet")
    arguments = ["score", str(model), str(tmp_path / "data.parquet"), "--out", str(tmp_path / "out.csv")]
    assert run([*arguments, "--quiet"]) == 0
    quiet = capsys.readouterr()
    assert quiet.err == ""
    assert "alarms in 20000 rows" in quiet.out
    assert run(arguments) == 0
    first, last = capsys.readouterr().err.splitlines()
    assert first == "scoring: 16,384 of 20,000 rows"
    assert last.startswith("scoring: 20,000 of 20,000 rows, ")
    assert last.endswith(" rows/s")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--out", "-", "--json"], "both write to standard output"),
        (["--out", "-", "--resume"], "can't be resumed"),
        (["--out", "x.csv", "--log-file", "nowhere/log"], "--log-file nowhere/log cannot be written: No such file"),
    ],
)
def test_what_cannot_go_together_is_one_line(
    model: Path, tmp_path: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data.csv").write_text("x0,x1,x2,x3\n1,2,3,4\n")
    assert run(["score", str(model), str(tmp_path / "data.csv"), *arguments]) == 2
    message = capsys.readouterr().err
    assert says in message
    assert message.count("\n") == 1


def test_training_takes_a_sample_of_many_normals_says_so_and_draws_its_curve(
    tmp_path: Path, small_csv: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensorboard = pytest.importorskip("tensorboard", reason="pip install 'mdml-fast[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert tensorboard
    arguments = ["train", str(small_csv), "--label", "class", "--normal", "ok", "--out", str(tmp_path / "m")]
    assert run([*arguments, "--max-normals", "100", "--tensorboard", str(tmp_path / "curves")]) == 0
    assert "100 of the 240 normals are used, drawn at random, and all 60 anomalies" in capsys.readouterr().err
    events = EventAccumulator(str(tmp_path / "curves"))
    events.Reload()
    assert [event.step for event in events.Scalars("training/loss")] == list(range(1, 71))
    assert 0 < events.Scalars("check/unseen AUROC/mdml")[0].value <= 1


def test_without_tensorboard_one_line_says_what_to_install(
    tmp_path: Path, small_csv: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    arguments = ["train", str(small_csv), "--label", "class", "--normal", "ok", "--out", str(tmp_path / "m")]
    assert run([*arguments, "--tensorboard", str(tmp_path / "curves")]) == 2
    expected = "mdml-fast: --tensorboard needs TensorBoard: pip install 'mdml-fast[tensorboard]'\n"
    assert capsys.readouterr().err == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.csv"]


def test_a_terminal_shows_a_bar_and_notes_beside_it(model: Path, tmp_path: Path) -> None:
    strange = table(40_000)
    strange = strange.set_column(1, "x0", pa.array(np.full(40_000, 90.0)))
    pa_parquet.write_table(strange, tmp_path / "data.parquet")
    controller, terminal = os.openpty()
    command = [COMMAND, "score", model, "data.parquet", "--out", "out.csv", "--monitor"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=terminal, env=os.environ | {"COLUMNS": "120"})
    os.close(terminal)
    shown = b""
    # Reading fails once the other end is closed.
    with contextlib.suppress(OSError):
        while piece := os.read(controller, 4096):
            shown += piece
    os.close(controller)
    assert process.wait(timeout=60) == 0
    assert "━".encode() in shown
    assert b"40,000 of 40,000 rows" in shown
    assert b"rows/s" in shown
    assert re.search(rb"(\n|\r|\x1b\[2K)note: from row", shown)
