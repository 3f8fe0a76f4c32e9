"""`mdml-fast score`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mdml_cli import output
from mdml_cli.options import Device, DeviceOption, JsonOption, PromiseName, ThreadsOption, set_threads

# The columns that score adds.
WRITTEN = ("score", "p_value", "is_anomaly", "drift_evidence")


def score(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The folder that train wrote.")],
    data: Annotated[Path, typer.Argument(metavar="DATA", help="A table with the columns that it was trained with.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where to write: .parquet, .csv, .arrow or .feather.")],
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
    keep: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN", help="A column of DATA to carry over; repeat for more.")
    ] = None,
    device: DeviceOption = Device.AUTO,
    threads: ThreadsOption = None,
    json: JsonOption = False,
) -> None:
    """Write a score (higher is more normal), a p-value and an alarm (true or false) for each row."""
    import pyarrow as pa

    from mdml_fast.calibration import DRIFT_CHANCE, first_drift
    from mdml_fast.data.tables import check_writable, read_table, write_table
    from mdml_fast.detector import MDMLDetector
    from mdml_fast.errors import InputError

    set_threads(threads)
    check_writable(out)
    detector = MDMLDetector.load(model, device.value)
    settings = {"false_alarm_rate": false_alarm_rate, "promise": promise, "confidence": confidence}
    detector.set_params(**{name: value for name, value in settings.items() if value is not None})
    detector.check_settings()
    table = read_table(data)
    for name in [*(keep or ()), *([group] if group else ())]:
        if name not in table.column_names:
            raise InputError(f"{data} has no column {name!r}; it has {', '.join(table.column_names)}")
    for name in keep or ():
        if name in WRITTEN:
            raise InputError(f"--keep: the output has a column {name!r} of its own; rename that of {data}")

    result = detector.alarms(table, groups=table[group] if group else None)
    columns = {name: table[name] for name in keep or ()}
    columns |= {"score": result.scores, "p_value": result.p_values, "is_anomaly": result.is_alarm}
    summary = {
        "out": str(out),
        "rows": len(result.scores),
        "alarms": int(result.is_alarm.sum()),
        "false_alarm_rate": detector.false_alarm_rate,
        "promise": detector.promise,
    }
    if monitor:
        evidence = detector.calibration_.drift_evidence(result.scores)
        columns["drift_evidence"] = evidence
        summary["drift_row"] = first_drift(evidence)
    write_table(pa.table(columns), out)

    for line in detector.attainable_notes():
        output.note(f"note: {line}")
    if summary.get("drift_row") is not None:
        output.note(
            f"note: from row {summary['drift_row']} on, rows are not like the calibration normals "
            f"(by chance so at most once in {round(1 / DRIFT_CHANCE)} streams): recalibrate, or look for many anomalies"
        )
    if json:
        output.print_json(summary)
    else:
        typer.echo(
            f"{summary['alarms']} alarms in {summary['rows']} rows at a rate of {detector.false_alarm_rate:g} "
            f"({detector.promise}); see {out}"
        )
