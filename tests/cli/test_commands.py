import io
import json
import logging
import resource
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from mdml_cli import app, log
from mdml_cli.app import run
from support import COMMAND, Run

SMALL = ["--label", "class", "--normal", "ok"]


def test_help_answers_in_a_second_without_torch(mdml_fast: Run) -> None:
    start = time.perf_counter()
    result = mdml_fast("--help")
    # Importing torch alone takes longer than this on a machine of two cores.
    assert time.perf_counter() - start < 1.0
    for command in ("train", "score", "evaluate", "export", "bench", "doctor"):
        assert command in result.stdout


def test_train_without_arguments_learns_the_digits(mdml_fast: Run, tmp_path: Path) -> None:
    result = mdml_fast("train")
    assert result.returncode == 0, result.stderr
    assert "unseen" in result.stdout
    assert "the model is in mdml-model" in result.stdout
    assert "training" in result.stderr
    assert "engine: fused path (an MLP in float32" in result.stderr
    assert "560 episodes in" in result.stderr
    document = json.loads((tmp_path / "mdml-model" / "model.json").read_text())
    assert document["normal_classes"] == list("01234")
    assert 0.5 < document["metrics"]["unseen"]["auroc"]["mean"] < 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mdml-model"]


def test_train_score_and_evaluate_a_table(mdml_fast: Run, in_process: Run, small_csv: Path, tmp_path: Path) -> None:
    trained = in_process("train", small_csv, *SMALL, "--out", "m", "--json")
    assert trained.returncode == 0, trained.stderr
    document = json.loads(trained.stdout)
    assert document["anomaly_classes"] == ["odd", "worse"]
    assert any("constant" in note for note in document["notes"])

    scored = in_process(
        "score", "m", small_csv, "--out", "s.parquet", "--keep", "class", "--false-alarm-rate", 0.05, "--json"
    )
    assert scored.returncode == 0, scored.stderr
    table = pq.read_table(tmp_path / "s.parquet")
    assert table.column_names == ["class", "score", "p_value", "is_anomaly"]
    assert table.num_rows == 300
    alarms = table["is_anomaly"].to_pylist()
    assert alarms == [p <= 0.05 for p in table["p_value"].to_pylist()]
    assert json.loads(scored.stdout)["alarms"] == sum(alarms)

    options = [
        "--promise",
        "certificate",
        "--confidence",
        0.9,
        "--false-alarm-rate",
        0.2,
        "--group",
        "kind",
        "--monitor",
    ]
    watched = in_process("score", "m", small_csv, "--out", "w.parquet", *options, "--json")
    assert watched.returncode == 0, watched.stderr
    assert pq.read_table(tmp_path / "w.parquet").column_names == ["score", "p_value", "is_anomaly", "drift_evidence"]
    summary = json.loads(watched.stdout)
    assert summary["promise"] == "certificate"
    # The last 60 rows of the table are anomalies.
    assert 240 < summary["drift_row"] <= 300
    assert f"from row {summary['drift_row']} on" in watched.stderr

    evaluated = mdml_fast("evaluate", small_csv, *SMALL, "--splits", 2, "--seeds", 1, "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    results = json.loads(evaluated.stdout)["results"]
    assert results.keys() == {"mdml", "knn"}


def test_score_says_why(in_process: Run, small_model: Path, small_csv: Path, tmp_path: Path) -> None:
    scored = in_process("score", small_model, small_csv, "--out", "s.parquet", "--explain", 2)
    assert scored.returncode == 0, scored.stderr
    table = pq.read_table(tmp_path / "s.parquet")
    assert table.column_names == ["score", "p_value", "is_anomaly", "why_1", "why_2", "nearest_family", "kind"]
    assert set(table["nearest_family"].to_pylist()) == {"ok"}
    for row in table.to_pylist():
        assert (row["kind"] in ("odd", "worse", "new")) is row["is_anomaly"]
    alarms = table.filter(table["is_anomaly"])
    reasons = alarms["why_1"].to_pylist()
    assert all(", nearest " in text and ", usual " in text for text in reasons)
    assert sum(text.startswith("size = ") for text in reasons) > len(reasons) / 3
    refused = in_process("score", small_model, small_csv, "--out", "s.csv", "--keep", "kind", "--explain", 1)
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)


def test_export_writes_a_program_and_says_what_to_install(mdml_fast: Run, small_model: Path, tmp_path: Path) -> None:
    written = mdml_fast(
        "export", small_model, "--format", "torch", "--out", "m.pt2", "--false-alarm-rate", 0.05, "--json"
    )
    assert written.returncode == 0, written.stderr
    assert json.loads(written.stdout) == {"out": "m.pt2", "format": "torch", "false_alarm_rate": 0.05}
    assert (tmp_path / "m.pt2").stat().st_size > 0
    missing = [name for name in ("onnx", "mlflow") if find_spec(name) is None]
    for name in missing[:1]:
        refused = mdml_fast("export", small_model, "--format", name, "--out", "m.out")
        assert refused.returncode == 2
        assert (
            refused.stderr
            == f"mdml-fast: the format {name} needs the package {name}: pip install 'mdml-fast[{name}]'\n"
        )


def test_evaluate_open_sets(in_process: Run, open_set: tuple[Path, list[str]]) -> None:
    path, options = open_set
    result = in_process("evaluate", path, *options, "--splits", 1, "--seeds", 1, "--max-rows", 8000, "--json")
    assert result.returncode == 0, result.stderr
    assert "about 8000" in result.stderr
    results = json.loads(result.stdout)["results"]
    assert results["knn"]["unseen"]["auroc"]["mean"] > 0.75
    assert 0 <= results["mdml"]["unseen"]["fpr95"]["mean"] <= 1
    assert results["mdml"]["seen"]["auroc"]["mean"] > 0.6


def test_train_on_normals_alone_says_so(in_process: Run, small_csv: Path, tmp_path: Path) -> None:
    rows = [line for line in small_csv.read_text().splitlines() if not line.endswith(("odd", "worse"))]
    (tmp_path / "normals.csv").write_text("\n".join(rows) + "\n")
    result = in_process("train", "normals.csv", *SMALL)
    assert result.returncode == 0, result.stderr
    assert "learned from normals alone" in result.stderr


def test_what_is_too_few_to_check_on_is_enough_to_train_on(in_process: Run, small_csv: Path, tmp_path: Path) -> None:
    header, *rows = small_csv.read_text().splitlines()
    few = [line for line in rows if line.endswith("ok")][:25] + [line for line in rows if not line.endswith("ok")]
    (tmp_path / "few.csv").write_text("\n".join([header, *few]) + "\n")
    result = in_process("train", "few.csv", *SMALL, "--out", "model", "--json")
    assert result.returncode == 0, result.stderr
    assert "not measured: only 15 normal rows are left to train on" in result.stderr
    assert json.loads(result.stdout)["check"] is None
    assert (tmp_path / "model").is_dir()
    assert not (tmp_path / "model.checkpoint").exists()


def test_doctor_checks_the_engine(mdml_fast: Run, in_process: Run) -> None:
    result = mdml_fast("doctor", "--json")
    assert result.returncode == 0
    document = json.loads(result.stdout)
    assert document["ok"]
    assert len(document["checks"]) >= 4
    assert document["environment"]["float32 engine"] == "fused"
    assert document["backends"]["cpu, float32"].startswith("cpu: ")
    assert "torch" in in_process("doctor").stdout


def test_bench_kernels_prints_ratios(in_process: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    result = in_process("bench", "kernels", "--case", "hinge [64, 1024", "--rounds", 1, "--json")
    assert result.returncode == 0, result.stderr
    (row,) = json.loads(result.stdout)["kernels"]["rows"]
    assert row["case"] == "hinge [64, 1024, 512]"
    assert row["ratios"].keys() == {"eager", "compile"}
    assert row["ratios"]["eager"] > 1


def test_bench_detector_measures_what_each_part_is_worth(
    in_process: Run, small_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = {"file": small_csv.name, "label": "class", "normal": ["ok"], "ignore": []}
    (tmp_path / "protocol.json").write_text(json.dumps({"small": spec}))
    monkeypatch.setenv("MDML_DATA", str(tmp_path))
    result = in_process("bench", "detector", "--ablate", "--case", "small", "--rounds", 1, "--json")
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)["detector"]
    assert document["rows"].keys() == {"small"}
    assert {"no outer steps", "no anchor"} <= document["summary"].keys()
    assert document["summary"]["no tree head"]["unseen"]["splits"] == 1


def test_bench_engine_prints_ratios_and_refuses_what_is_no_case(mdml_fast: Run, in_process: Run) -> None:
    result = mdml_fast("bench", "engine", "--case", "small", "--rounds", 1, "--json")
    assert result.returncode == 0, result.stderr
    [row] = json.loads(result.stdout)["engine"]["rows"]
    assert row["case"] == "small"
    assert {"ours", "ours, bfloat16", "plain loop", "vmap"} <= row["seconds"].keys()
    assert 0 < row["share"]["plain loop"] < row["share"]["ours"]
    assert row["share_taken"]["ours"] < 1.5
    refused = in_process("bench", "engine", "--case", "huge")
    assert refused.returncode == 2
    assert "no case has a name with huge in it" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "nothing.csv", *SMALL], "no such file: nothing.csv"),
        (["bench", "kernels", "--case", "square"], "no case has a name with square in it"),
        (["train", "text.txt", *SMALL], "not a table"),
        (["train", "small.csv"], "give --label"),
        (
            ["train", "small.csv", "--label", "klass", "--normal", "ok"],
            "the columns are size, bytes, kind, constant, class",
        ),
        (["train", "small.csv", "--label", "class"], "name the normal classes; the classes are odd, ok, worse"),
        (["train", "small.csv", "--label", "class", "--normal", "fine"], "the classes are odd, ok, worse"),
        (["train", "small.csv", *SMALL, "--ignore", "nope"], "no ignored column 'nope'"),
        (["train", "small.csv", *SMALL, "--ignore", "class"], "the label column 'class' is ignored, too"),
        (["train", "small.csv", *SMALL, "--out", "precious"], "exists and is no model"),
        (["train", "small.csv", *SMALL, "--preset", "best"], "--preset"),
        (["train", "few.csv", *SMALL], "only 5 normal rows"),
        (["train", "flat.csv", *SMALL], "all feature columns are constant"),
        (["train", "infinite.csv", *SMALL], "column 'x' has 1 infinite values (first in row 3)"),
        (["train", "--colour"], "No such option"),
        (["evaluate", "normals.csv", *SMALL], "no anomaly classes"),
        (["evaluate", "small.csv", *SMALL, "--baseline", "oracle"], "no baseline 'oracle'"),
        (["score", "nothing", "small.csv", "--out", "s.csv"], "no such model"),
        (["score", "precious", "small.csv", "--out", "s.csv"], "is no model"),
        (["score", "nothing", "small.csv", "--out", "s.pdf"], "must end in"),
    ],
)
def test_bad_input_is_one_line_and_exit_2_and_nothing_is_written(
    small_csv: Path, tmp_path: Path, arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = small_csv.read_text().splitlines()
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("precious")
    (tmp_path / "few.csv").write_text("\n".join(rows[:6]))
    (tmp_path / "flat.csv").write_text("x,class\n" + "1,ok\n" * 30)
    (tmp_path / "infinite.csv").write_text("x,class\n" + "1,ok\n2,ok\ninf,ok\n" + "3,ok\n" * 30)
    (tmp_path / "normals.csv").write_text("\n".join(rows[:200]))
    before = sorted(tmp_path.rglob("*"))
    assert run([*arguments, "--json"]) == 2
    said = capfd.readouterr()
    assert says in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_a_process_of_its_own_refuses_the_same(mdml_fast: Run) -> None:
    result = mdml_fast("train", "nothing.csv", *SMALL, "--json")
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "no such file: nothing.csv" in result.stderr


def test_a_full_disk_is_one_line_and_leaves_nothing(
    mdml_fast: Run, small_model: Path, small_csv: Path, tmp_path: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))

    def small_files_only() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))

    result = mdml_fast("score", small_model, small_csv, "--out", "s.csv", "--quiet", preexec_fn=small_files_only)
    assert result.returncode == 2
    assert "cannot write" in result.stderr
    assert result.stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_killed_run_leaves_no_model_and_resumes_to_the_same_bytes(
    in_process: Run, small_csv: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "killed.checkpoint"
    process = subprocess.Popen(
        [COMMAND, "train", small_csv, *SMALL, "--out", "killed"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    assert in_process("train", small_csv, *SMALL, "--out", "killed", "--resume").returncode == 0
    assert in_process("train", small_csv, *SMALL, "--out", "whole").returncode == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("killed", "whole")]
    assert weights[0] == weights[1]
    assert not checkpoint.exists()


def test_ctrl_c_ends_with_130(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [COMMAND, "train", "--out", "new/model"], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    while not (tmp_path / "new" / "model.checkpoint").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"note: the training so far is in new/model.checkpoint; the same command with --resume goes on" in said
    assert said.endswith(b"mdml-fast: stopped\n")
    assert not (tmp_path / "new" / "model").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_log_file_that_cannot_be_written_stops_nothing(in_process: Run, small_csv: Path, tmp_path: Path) -> None:
    result = in_process("train", small_csv, *SMALL, "--out", "m", "--log-file", "/dev/full")
    assert result.returncode == 0
    assert result.stderr.count("the log file ends here, it cannot be written: No space left on device") == 1
    assert (tmp_path / "m").exists()


def test_what_the_terminal_cannot_show_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(app, "run", lambda _: print("0.98 ± 0.01") or 0)
    with pytest.raises(SystemExit, match="0"):
        app.main()
    terminal.flush()
    assert terminal.buffer.getvalue() == b"0.98 ? 0.01\n"


@pytest.mark.parametrize("quiet", [False, True])
def test_what_the_kernels_log_is_a_note_while_a_command_runs(quiet: bool, capsys: pytest.CaptureFixture[str]) -> None:
    kernels = logging.getLogger("mdml_kernels")
    log.open_log(quiet, None)
    kernels.info("made for this processor")
    log.close_log(0)
    kernels.info("nobody asks")
    assert capsys.readouterr().err == ("" if quiet else "note: made for this processor\n")
