"""`mdml-fast score`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mdml_cli import output
from mdml_cli.options import Device, DeviceOption, JsonOption, ThreadsOption, set_threads


def score(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The folder that train wrote.")],
    data: Annotated[Path, typer.Argument(metavar="DATA", help="A table with the columns that it was trained with.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where to write: .parquet, .csv, .arrow or .feather.")],
    false_alarm_rate: Annotated[
        float | None,
        typer.Option(metavar="RATE", help="The share of normals that may be flagged; the model's own: 0.01."),
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN", help="A column of DATA to carry over; repeat for more.")
    ] = None,
    device: DeviceOption = Device.AUTO,
    threads: ThreadsOption = None,
    json: JsonOption = False,
) -> None:
    """Write a score (higher is more normal), a p-value and an alarm (true or false) for each row."""
    import pyarrow as pa

    from mdml_fast.data.tables import check_writable, read_table, write_table
    from mdml_fast.detector import MDMLDetector
    from mdml_fast.errors import InputError

    set_threads(threads)
    check_writable(out)
    detector = MDMLDetector.load(model, device.value)
    rate = detector.false_alarm_rate if false_alarm_rate is None else false_alarm_rate
    if not 0 < rate < 1:
        raise InputError(f"--false-alarm-rate must be between 0 and 1, got {rate:g}")
    table = read_table(data)
    kept = {}
    for name in keep or ():
        if name not in table.column_names:
            raise InputError(f"--keep: {data} has no column {name!r}; it has {', '.join(table.column_names)}")
        if name in ("score", "p_value", "is_anomaly"):
            raise InputError(f"--keep: the output has a column {name!r} of its own; rename that of {data}")
        kept[name] = table[name]

    scores = detector.score_samples(table)
    p_values = detector.calibration_.p_value(scores)
    alarms = p_values <= rate
    write_table(pa.table({**kept, "score": scores, "p_value": p_values, "is_anomaly": alarms}), out)

    lowest = detector.calibration_.lowest_rate
    if lowest > rate:
        output.note(
            f"note: no alarm can be raised at a rate of {rate:g}; the lowest this model can hold is {lowest:.2g}"
        )
    summary = {"out": str(out), "rows": len(scores), "alarms": int(alarms.sum()), "false_alarm_rate": rate}
    if json:
        output.print_json(summary)
    else:
        typer.echo(f"{summary['alarms']} alarms in {summary['rows']} rows at a false-alarm rate of {rate:g}; see {out}")
