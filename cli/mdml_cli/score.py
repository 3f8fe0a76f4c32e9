"""`mdml-fast score`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mdml_cli import log, output
from mdml_cli.options import (
    Device,
    DeviceOption,
    JsonOption,
    LogFileOption,
    PromiseName,
    QuietOption,
    ThreadsOption,
    set_threads,
)


def score(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The folder that train wrote.")],
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA",
            help="A table of any size with the columns that it was trained with; - is standard input, Arrow or CSV.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="Where to write: .parquet, .csv, .arrow or .feather; - is standard output, CSV where DATA is, "
            "else an Arrow stream.",
        ),
    ],
    false_alarm_rate: Annotated[
        float | None,
        typer.Option(metavar="RATE", help="The share that the promise is about; the model's own: 0.01."),
    ] = None,
    promise: Annotated[
        PromiseName | None,
        typer.Option(
            help="'marginal': so many normals are flagged on average; 'certificate': at most so many, with confidence; "
            "'fdr': at most so many of the alarms are false. The model's own: marginal."
        ),
    ] = None,
    confidence: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Of a certificate; the model's own: 0.95.")
    ] = None,
    group: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="Hold a row against the calibration normals of its own group."),
    ] = None,
    monitor: Annotated[
        bool, typer.Option("--monitor", help="Watch for drift: rows in order of time, a column drift_evidence.")
    ] = False,
    explain: Annotated[
        int, typer.Option(min=0, metavar="K", help="Say why: the K strongest reasons of each row, and what it is like.")
    ] = 0,
    keep: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN", help="A column of DATA to carry over; repeat for more.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was cut off.")] = False,
    device: DeviceOption = Device.AUTO,
    threads: ThreadsOption = None,
    quiet: QuietOption = False,
    log_file: LogFileOption = None,
    json: JsonOption = False,
) -> None:
    """Write a score (higher is more normal), a p-value and an alarm (true or false) for each row, in their order.

    Memory does not grow with the number of rows. What is scored gathers in the folder FILE.partial and becomes FILE
    at the end.
    """
    from mdml_fast.data.batches import STANDARD
    from mdml_fast.detector import MDMLDetector
    from mdml_fast.drift import DRIFT_CHANCE
    from mdml_fast.stream import ScoreTask, score_file

    log.open_log(quiet, log_file)
    set_threads(threads)
    if json and out == STANDARD:
        raise typer.BadParameter("--json and --out - both write to standard output; name a file for one of them")
    task = ScoreTask(model, data, out, tuple(keep or ()), group, monitor, explain)
    task.check()
    detector = MDMLDetector.load(model, device.value)
    settings = {"false_alarm_rate": false_alarm_rate, "promise": promise, "confidence": confidence}
    detector.set_params(**{name: value for name, value in settings.items() if value is not None})
    detector.check_settings()
    if group is not None and detector.calibration_.groups is None:
        log.note(f"--group {group} changes nothing: the model was trained without groups")

    def on_drift(row: int) -> None:
        log.note(
            f"from row {row} on, rows are not like the calibration normals "
            f"(by chance so at most once in {round(1 / DRIFT_CHANCE)} streams): recalibrate, or look for many anomalies"
        )

    shown = log.progress("scoring", "rows", bar=out != STANDARD or not sys.stdout.isatty())
    with log.resumable("what is scored", task.partial), shown as update:
        result = score_file(
            detector,
            task,
            resume=resume,
            progress=lambda done, total: update(done, total, ""),
            on_drift=on_drift,
        )

    if result.resumed_rows:
        log.note(f"{result.resumed_rows} of the rows were scored by the run that was cut off")
    for line in detector.attainable_notes():
        log.note(line)
    summary = {
        "out": str(out),
        "rows": result.rows,
        "alarms": result.alarms,
        "false_alarm_rate": detector.false_alarm_rate,
        "promise": detector.promise,
    }
    if monitor:
        summary["drift_row"] = result.drift_row
    log.record("scored", **summary)
    if json:
        output.print_json(summary)
    elif out == STANDARD:
        log.note(f"{result.alarms} alarms in {result.rows} rows at a rate of {detector.false_alarm_rate:g}")
    else:
        typer.echo(
            f"{result.alarms} alarms in {result.rows} rows at a rate of {detector.false_alarm_rate:g} "
            f"({detector.promise}); see {out}"
        )
